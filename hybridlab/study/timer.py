"""How long training alone took."""

from __future__ import annotations

import time

import torch

from hybridlab.base.device import wait_for


class TrainingTimer:
    """Seconds of training alone: paused while a model is judged or saved; each pause waits for the device.

    seconds: that have passed before
    """

    def __init__(self, device: torch.device, seconds: float = 0.0) -> None:
        self._device = device
        self._state: tuple[float, float | None] = (seconds, None)  # replaced as one: another thread may look on

    def start(self) -> None:
        """Run, if it does not yet."""
        seconds, since = self._state
        if since is None:
            self._lap = time.perf_counter()
            self._state = (seconds, self._lap)

    def lap(self) -> float:
        """Seconds since the last lap or start."""
        now = time.perf_counter()
        elapsed, self._lap = now - self._lap, now
        return elapsed

    def pause(self) -> None:
        """Wait for the device, and stop."""
        wait_for(self._device)
        self._state = (self.seconds, None)

    @property
    def seconds(self) -> float:
        """Training time so far."""
        seconds, since = self._state
        return seconds if since is None else seconds + time.perf_counter() - since
