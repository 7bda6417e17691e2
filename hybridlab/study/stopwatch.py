"""How long training alone took."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """Seconds of training alone: paused while a model is judged or saved; each pause waits for the device.

    seconds: that have passed before
    """

    def __init__(self, device: torch.device, seconds: float = 0.0) -> None:
        self._device = device
        self._seconds = seconds
        self._since: float | None = None

    def start(self) -> None:
        """Run, if it does not yet."""
        if self._since is None:
            self._since = self._lap = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap or start."""
        now = time.perf_counter()
        elapsed, self._lap = now - self._lap, now
        return elapsed

    def pause(self) -> None:
        """Wait for the device, and stop."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        if self._since is not None:
            self._seconds += time.perf_counter() - self._since
            self._since = None

    @property
    def seconds(self) -> float:
        """Training time so far."""
        return self._seconds + (time.perf_counter() - self._since if self._since is not None else 0.0)
