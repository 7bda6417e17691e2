"""What a run records of its memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from hybridlab.vram import MemoryMeter, MemoryReading, MemorySampler

Figures = dict[str, Any]


class RunMemory:
    """What a run takes now, its peaks, and samples in between for its record.

    Make it before the run has anything on the GPU, so that it sees what others hold; call `begin` when the run's own
    figures begin.

    sampler: of the run's samples, from `begin` on
    """

    def __init__(self, device: torch.device) -> None:
        self._meter = MemoryMeter(device)
        self._others_at_start_bytes = self._meter.other_processes_bytes()
        self._meter.reset_peak()  # and without what earlier runs left behind
        self._earlier: Figures = {}
        self._in_predict: dict[str, int] = {}

    def go_on_from(self, peak: Figures) -> None:
        """Count the peaks of an interrupted run's earlier part in."""
        self._earlier = peak

    def begin(self, progress: Callable[[], Mapping[str, Any]]) -> None:
        """Count from here on. `progress` says where the run stands; it is asked in the sampler's thread."""
        self.sampler = MemorySampler(self._meter, progress)
        self._meter.reset_peak()

    def enter(self, phase: str) -> None:
        """Count the peak of `phase` from here on."""
        self._meter.enter(phase)

    def note_predict(self) -> None:
        """Keep the most that is on the GPU while it holds nothing but what Predict needs: call it then."""
        now = self._meter.in_torch()  # not the driver, which would keep the training waiting
        here = dict(zip(("predict_allocated_bytes", "predict_reserved_bytes"), now or (), strict=False))
        self._in_predict = {name: max(value, self._in_predict.get(name, 0)) for name, value in here.items()}

    def latest(self) -> tuple[MemoryReading, int]:
        """The last sample, and the peak so far in bytes: asks neither the device nor its driver, once there is one."""
        reading = self.sampler.latest or self._meter.read()
        return reading, max(self._meter.peak_beside(reading), self._earlier.get("peak_memory_bytes") or 0)

    def peak(self) -> Figures:
        """The peaks so far, an interrupted run's earlier part included."""
        now = self._meter.peak() | self._in_predict
        return self._earlier | {
            name: max(value, self._earlier.get(name) or 0) if isinstance(value, int) else value
            for name, value in now.items()
        }

    def summary(self) -> Figures:
        """The figures of a run's summary."""
        return {"other_bytes_at_start": self._others_at_start_bytes, **self.peak()}
