"""Reads memory again and again while something else runs."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, Self

from hybridlab.vram.meter import MemoryMeter, MemoryReading

EVERY_MS = 100
ROWS_PER_PACE = 10_000
"""After every so many samples the pace is halved: a long run's record grows more and more slowly."""


class MemorySampler:
    """Samples memory in a thread of its own, from `start` to `stop` or for a with-block; it never waits for the device.

    meter: what is read
    progress: what a sample says beside the reading: where the run stands, read in the sampler's thread
    every_ms: milliseconds between two samples, at first

    latest: the last reading; None before the first

    It may be started again. A stretch of any length has two samples at least, at its start and at its end.

    Raises ValueError for an `every_ms` that is not above 0.
    """

    def __init__(
        self, meter: MemoryMeter, progress: Callable[[], Mapping[str, Any]], every_ms: float = EVERY_MS
    ) -> None:
        if every_ms <= 0:
            raise ValueError(f"every_ms is {every_ms}: it must be above 0")
        self._meter, self._progress, self._every_ms = meter, progress, every_ms
        self.latest: MemoryReading | None = None
        self._rows: deque[dict[str, Any]] = deque()
        self._taken = 0
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self) -> list[dict[str, Any]]:
        """The samples since the last call, oldest first: `unix_seconds`, what `progress` says, and the reading."""
        return [self._rows.popleft() for _ in range(len(self._rows))]

    def start(self) -> None:
        """Sample now and from now on; does nothing where it does so already."""
        if self._thread is None:
            self._over.clear()
            self._sample()
            self._thread = threading.Thread(target=self._watch, name="memory sampler", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Sample once more, and no longer; does nothing where it has stopped."""
        if self._thread is not None:
            self._over.set()
            self._thread.join()
            self._thread = None
            self._sample()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _watch(self) -> None:
        while not self._over.wait(self._every_ms / 1e3 * 2 ** (self._taken // ROWS_PER_PACE)):
            self._sample()

    def _sample(self) -> None:
        self.latest = reading = self._meter.read()
        self._rows.append({"unix_seconds": time.time(), **self._progress(), **asdict(reading)})
        self._taken += 1
