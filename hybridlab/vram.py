"""How much memory a run takes: as the card counts it, or as the process does where there is no card."""

from __future__ import annotations

import gc
import os
import platform
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pynvml
import torch

from hybridlab.errors import UserError

LIKE_THE_CARD = 1.1
"""A card up to this much larger than the one to emulate is taken for that card: 16 GB cards differ by the gigabyte."""


@dataclass(frozen=True)
class MemoryReading:
    """Memory at one moment, in bytes.

    source: "cuda" (torch's allocator and NVML) or "process" (resident memory: there is no GPU)
    used_bytes: reserved by torch; or the resident size of the process
    allocated_bytes: in live tensors; None without a GPU
    device_used_bytes: on the whole card, by everybody; None without a GPU or where NVML is not available
    """

    source: str
    used_bytes: int
    allocated_bytes: int | None = None
    device_used_bytes: int | None = None


class MemoryMeter:
    """Reads memory now, and the peak since `reset_peak`.

        peak = max_memory_reserved + context

    context is what NVML says the process uses beyond torch's reserve, or, where containers hide processes,
    what the card has used beyond it. Without a GPU the peak is the process's own, over its whole life.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else None
        self._handle = _nvml_handle(self._device) if self._device else None

    def cap(self, card_bytes: int) -> bool:
        """Let this process take no more than a card of `card_bytes` would give it; returns whether that cut anything.

        The context counts, as it does on the card. A card that is no larger stays as it is. Raises UserError where
        there is no CUDA device.
        """
        if not self._device:
            raise UserError("a card can only be emulated on a larger CUDA card: set card_gb to 0")
        if not self.exceeds(card_bytes):
            return False
        torch.empty(1, device=self._device)  # so that there is a context to measure
        total = torch.cuda.get_device_properties(self._device).total_memory
        torch.cuda.set_per_process_memory_fraction((card_bytes - (self._context_bytes() or 0)) / total, self._device)
        return True

    def exceeds(self, card_bytes: int) -> bool:
        """Whether the card is larger than one of `card_bytes`, beyond what cards of one name differ by."""
        if not self._device:
            return False
        return torch.cuda.get_device_properties(self._device).total_memory > card_bytes * LIKE_THE_CARD

    def reset_peak(self) -> None:
        """Begin a new peak, without what earlier runs left behind. Without a GPU the process has one peak for life."""
        if self._device:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)

    def read(self) -> MemoryReading:
        """Memory at this moment; never waits for the device."""
        if not self._device:
            return MemoryReading("process", psutil.Process().memory_info().rss)
        used = torch.cuda.memory_reserved(self._device)
        return MemoryReading("cuda", used, torch.cuda.memory_allocated(self._device), self._device_used_bytes())

    def peak(self) -> dict[str, Any]:
        """The figures of a run's summary; what could not be read is None, never 0."""
        if not self._device:
            return {"memory_source": "process", "peak_memory_bytes": _process_peak_bytes()}
        reserved = torch.cuda.max_memory_reserved(self._device)
        context = self._context_bytes()
        return {
            "memory_source": "cuda",
            "peak_memory_bytes": reserved + (context or 0),
            "peak_allocated_bytes": torch.cuda.max_memory_allocated(self._device),
            "peak_reserved_bytes": reserved,
            "context_bytes": context,
            "allocator_retries": torch.cuda.memory_stats(self._device).get("num_alloc_retries", 0),
        }

    def _context_bytes(self) -> int | None:
        used = self._process_used_bytes() or self._device_used_bytes()
        return None if used is None else max(0, used - torch.cuda.memory_reserved(self._device))

    def _process_used_bytes(self) -> int | None:
        if not self._handle:
            return None
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(self._handle)
        return next((p.usedGpuMemory for p in processes if p.pid == os.getpid()), None)

    def _device_used_bytes(self) -> int | None:
        return int(pynvml.nvmlDeviceGetMemoryInfo(self._handle).used) if self._handle else None


def _nvml_handle(device: torch.device) -> Any:
    try:
        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except pynvml.NVMLError:
        return None


def _process_peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_name(device: torch.device) -> str:
    """The card's name, or the processor's as the system gives it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
