"""What torch's allocator counts on a GPU, and its exact peaks, each phase of a run apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch


@dataclass(frozen=True)
class Allocator:
    """Everything at one look, in bytes: asking torch for each figure apart takes as long each time.

    allocated: in live tensors; reserved: held of the GPU; peak_allocated, peak_reserved: since they were last reset
    retries: how often memory was short and everything unused was given back, since they were last reset
    """

    allocated: int
    reserved: int
    peak_allocated: int
    peak_reserved: int
    retries: int

    @classmethod
    def read(cls, device: torch.device) -> Self:
        """As it stands; all zero while the process has not touched the GPU."""
        stats = torch.cuda.memory_stats(device)
        return cls(
            allocated=stats.get("allocated_bytes.all.current", 0),
            reserved=stats.get("reserved_bytes.all.current", 0),
            peak_allocated=stats.get("allocated_bytes.all.peak", 0),
            peak_reserved=stats.get("reserved_bytes.all.peak", 0),
            retries=stats.get("num_alloc_retries", 0),
        )


class PhasePeaks:
    """Splits the allocator's one peak into one per phase, and loses nothing of the whole.

        peak of the run = max over phases of (peak since the phase was entered)

    The allocator is reset whenever a phase begins; what it had counted by then is kept here. A phase that comes back
    keeps its highest peak.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._phase = ""
        self._allocated: dict[str, int] = {}
        self._reserved = 0

    def reset(self) -> None:
        """Forget all phases, and begin again outside of any."""
        self._phase, self._allocated, self._reserved = "", {}, 0
        torch.cuda.reset_peak_memory_stats(self._device)

    def enter(self, phase: str) -> None:
        """Count for `phase` from here on; costs nothing while the phase stays."""
        if phase != self._phase:
            self._note()
            torch.cuda.reset_peak_memory_stats(self._device)
            self._phase = phase

    def reserved_bytes(self) -> int:
        """The most that torch has held of the GPU."""
        self._note()
        return self._reserved

    def allocated_bytes(self) -> int:
        """The most that live tensors have taken."""
        self._note()
        return max(self._allocated.values())

    def by_phase(self) -> dict[str, int]:
        """The most that live tensors have taken in each phase that was entered, in bytes."""
        self._note()
        return {phase: peak for phase, peak in self._allocated.items() if phase}

    def _note(self) -> None:
        now = Allocator.read(self._device)
        self._allocated[self._phase] = max(now.peak_allocated, self._allocated.get(self._phase, 0))
        self._reserved = max(self._reserved, now.peak_reserved)
