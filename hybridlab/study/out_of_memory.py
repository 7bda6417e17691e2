"""What a run says, and leaves, when memory runs out."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from hybridlab.base.device import find_device
from hybridlab.base.errors import UserError
from hybridlab.base.files import remove, replaced
from hybridlab.planner import nearest_fit
from hybridlab.study.config import RunConfig
from hybridlab.study.planning import gpu_bytes_of, training_spec_of
from hybridlab.study.resume import kept_in
from hybridlab.vram import MemoryMeter

SNAPSHOT = "memory_snapshot.pickle"
"""In the folder of a run that ran out of the GPU's memory; pytorch.org/memory_viz draws it."""

SHORT_OF_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
"""In the messages of drivers, libraries and compiled kernels, whose errors are plain RuntimeErrors."""

OTHERS_MATTER_BYTES = 500_000_000
"""Of the GPU: other programs that use less are not worth a word."""


@contextmanager
def report_oom(config: RunConfig, folder: Path) -> Iterator[None]:
    """Turn "out of memory" inside the block into one line, and what the GPU held into a snapshot in `folder`.

    The line says what was asked for, what there is, who else uses it, and what to change. What the failed step held
    is let go, so that a notebook's kernel can train something smaller.

    Raises UserError.
    """
    remove(folder / SNAPSHOT)
    try:
        yield
    except RuntimeError as error:
        told = _told(error, config, folder)
        if told is None:
            raise
        traceback.clear_frames(error.__traceback__)
        raise UserError(f"{told}; {kept_in(folder)}") from error


def _told(error: RuntimeError, config: RunConfig, folder: Path) -> str | None:
    """What ran out and what to do; None for an error that is none of these."""
    if "DefaultCPUAllocator" in str(error):
        available = f"the host has {psutil.virtual_memory().available / 1e9:.1f} GB available"
        asked = f"out of host memory: {_asked(error)} asked for, {available}"
        return f"{asked}; close other programs, or take a smaller model or batch"
    if not isinstance(error, torch.OutOfMemoryError) and not any(sign in str(error) for sign in SHORT_OF_MEMORY):
        return None
    shortage = f"{_asked(error)} asked for: {_on_the_gpu(config)}{_snapshot(folder)}"
    gpu_bytes = gpu_bytes_of(config)
    advice = nearest_fit(training_spec_of(config), gpu_bytes) if gpu_bytes else "take a smaller batch"
    return f"out of memory: {shortage}; {advice}"


def _asked(error: RuntimeError) -> str:
    found = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
    return f"{found[1]} more were" if found else "more was"


def _on_the_gpu(config: RunConfig) -> str:
    device = find_device(config.device)
    meter = MemoryMeter(device)
    now, others = meter.read(), meter.other_processes_bytes() or 0
    if now.source == "process":
        return config.describe_device()
    size = f"{config.describe_device()} has {gpu_bytes_of(config) / 1e9:.1f} GB"
    text = f"{size}, torch holds {now.used_bytes / 1e9:.1f} GB"
    return text + (f", other programs use {others / 1e9:.1f} GB" if others > OTHERS_MATTER_BYTES else "")


def _snapshot(folder: Path) -> str:
    """Where the allocator's snapshot was written; nothing where there is no GPU, or no room on the disk."""
    if not torch.cuda.is_available():
        return ""
    try:
        with replaced(folder / SNAPSHOT) as beside:
            torch.cuda.memory._dump_snapshot(str(beside))  # type: ignore[no-untyped-call]
    except UserError:
        return ""
    return f"; what the GPU held is in {folder / SNAPSHOT}"
