"""What torch and Python keep once per process, set for a run and put back."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch

from hybridlab.base.device import find_device
from hybridlab.memory.precision import matmul_precision
from hybridlab.study.config import RunConfig
from hybridlab.vram import MemoryMeter


@dataclass(frozen=True)
class ProcessSettings:
    """The settings of torch that are not a model's but the process's, as one run wants them.

    They are in force inside `applied` alone: while a run computes, and never between two steps. What a notebook does
    there, another run among it, finds the process as it would be without this one.

    precision: of float32 matrix products, as `matmul_precision` takes it
    cpu_threads: that torch computes with on the CPU; 0 leaves them as they are
    gpu_share: of the GPU's memory that torch may take; 1 leaves it as it is
    """

    precision: str
    cpu_threads: int = 0
    gpu_share: float = 1.0

    @classmethod
    def of(cls, config: RunConfig) -> Self:
        """What a run asks for. Raises UserError for a GPU that cannot be emulated here."""
        meter = MemoryMeter(find_device(config.device))
        share = meter.share_of(config.gpu_bytes) if config.card_gb else 1.0
        return cls(config.training_precision, config.cpu_threads, share)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """In force inside; afterwards, however the block ended, all is as it was."""
        with ExitStack() as stack:
            stack.enter_context(matmul_precision(self.precision))
            if self.cpu_threads:
                stack.enter_context(_set(self.cpu_threads, torch.get_num_threads, torch.set_num_threads))
            if self.gpu_share < 1:
                cuda = torch.cuda
                shares = cuda.get_per_process_memory_fraction, cuda.set_per_process_memory_fraction
                stack.enter_context(_set(self.gpu_share, *shares))
            yield


@contextmanager
def _set(value: float, read: Callable[[], Any], write: Callable[[Any], object]) -> Iterator[None]:
    """Write a value for the length of the block."""
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


@contextmanager
def gc_frozen() -> Iterator[None]:
    """Inside, Python's garbage collector looks at what has come since, and at nothing older.

    Torch and what a notebook imports are more than half a million objects. To look at all of them takes a third of a
    second, every so many steps, in the middle of whichever step it is. What is garbage by now goes afterwards.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def refreeze_gc() -> None:
    """Inside `gc_frozen`: garbage goes, and what has come to stay, such as compiled code, counts as older."""
    gc.collect()  # or garbage that is frozen with the rest would hold memory of the GPU
    gc.freeze()
