"""What a run's record says of each step, written one step late."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridlab.engine.result import Statistics, StepResult
from hybridlab.study.record import RunRecorder
from hybridlab.study.run_memory import RunMemory

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
        """Write the closing figures: from here on the run counts as finished."""
        self._recorder.finish(summary)

    @contextmanager
    def open(self) -> Iterator[None]:
        """However the block ends, sampling ends too, and all that was measured reaches the disk."""
        with self._recorder:
            try:
                yield
            finally:
                self._memory.sampler.stop()
                self._recorder.extend("vram", self._memory.sampler.take())
