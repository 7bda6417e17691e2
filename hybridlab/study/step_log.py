"""What a run's record says of each step, written one step late: its losses, its memory and its training time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hybridlab.base.device import wait_for
from hybridlab.engine.result import Statistics, StepResult
from hybridlab.study.record import RunRecorder
from hybridlab.vram import MemoryMeter, MemoryReading, MemorySampler


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


RESULT_COLUMNS = (
    "nominal_step",
    "phase",
    "measured_loss",
    "predicted_loss",
    "gradient_norm",
    "confidence",
    "acceptance_probability",
    "event",
    "depth",
)
"""Of a `StepResult`, as steps.parquet has them."""


@dataclass(frozen=True)
class StepRecord:
    """One nominal step as it happened.

    result: what the trainer did; its loss stays on the device until it is read, one step later without a wait
    statistics: the counts after it
    seconds: training time so far
    evaluation: validation figures, where it was time for them; else empty
    changes: settings that a person changed just before it; else empty
    """

    result: StepResult
    statistics: Statistics
    seconds: float
    evaluation: dict[str, float]
    changes: dict[str, float]

    def row(self) -> dict[str, Any]:
        """As the record on disk has it. Reads the losses."""
        row = {name: getattr(self.result, name) for name in RESULT_COLUMNS} | {"phase": str(self.result.phase)}
        row |= {"gradient_step": self.statistics.gradient_steps, **self.evaluation}
        if self.changes:
            row["changed"] = ", ".join(f"{name}={value:g}" for name, value in self.changes.items())
        return row | {"seconds": self.seconds}


class SilentLog:
    """Of the ranks but the first: nothing is written, and samples of memory are let go.

    memory: as `StepLog` takes it
    """

    def __init__(self, memory: RunMemory) -> None:
        self._memory = memory

    def add(self, record: StepRecord) -> None:
        """Keep nothing."""
        self.catch_up()

    def catch_up(self) -> None:
        """Let the samples go."""
        self._memory.sampler.take()

    def flush(self) -> None:
        """There is nothing to bring to the disk."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Leave it to the first rank."""

    @contextmanager
    def open(self) -> Iterator[None]:
        """Sampling ends with the block."""
        try:
            yield
        finally:
            self._memory.sampler.stop()


class StepLog:
    """Writes a run's steps and its samples of memory, each step when the next one was taken: a loss is read by then.

    folder, config, keep_steps: as `RunRecorder` takes them
    memory: whose samples are written
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], memory: RunMemory, *, keep_steps: int) -> None:
        self._recorder, self._memory = RunRecorder(folder, config, keep_steps=keep_steps), memory
        self._latest: StepRecord | None = None

    def add(self, record: StepRecord) -> None:
        """Write the step before, and keep this one until the next."""
        self.catch_up()
        self._latest = record

    def catch_up(self) -> None:
        """Write the latest step, unless that is done, and how memory stood by then."""
        self._recorder.extend("vram", self._memory.sampler.take())
        record, self._latest = self._latest, None
        if record:
            self._recorder.add("steps", record.row())

    def flush(self) -> None:
        """Bring everything to the disk."""
        self.catch_up()
        self._recorder.flush()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the closing figures: from here on the run counts as finished.

        What is not finite, as a perplexity may be, becomes None: JSON holds neither NaN nor infinity.
        """
        unknown = [name for name, it in summary.items() if isinstance(it, float) and not math.isfinite(it)]
        self._recorder.finish({**summary, **dict.fromkeys(unknown)})

    @contextmanager
    def open(self) -> Iterator[None]:
        """However the block ends, sampling ends too, and all that was measured reaches the disk."""
        with self._recorder:
            try:
                yield
            finally:
                self._memory.sampler.stop()
                self._recorder.extend("vram", self._memory.sampler.take())
