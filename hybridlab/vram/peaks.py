"""What torch's allocator counts on a GPU, and its exact peaks, each phase of a run apart."""

from __future__ import annotations

from collections import Counter

import torch


def allocator_stats(device: torch.device) -> Counter[str]:
    """Everything that torch's allocator counts, under the names of `torch.cuda.memory_stats`, at one look.

    Asking torch for each figure apart takes as long each time. All are 0 while the process has not touched the GPU.
    """
    return Counter(torch.cuda.memory_stats(device))


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
        now = allocator_stats(self._device)
        peak = now["allocated_bytes.all.peak"]
        self._allocated[self._phase] = max(peak, self._allocated.get(self._phase, 0))
        self._reserved = max(self._reserved, now["reserved_bytes.all.peak"])
