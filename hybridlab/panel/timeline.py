"""The timeline of a run: loss, phases and memory over its nominal steps, in a fixed number of columns."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby

from hybridlab.study.record import Run

COLUMNS = 240
"""At most, however long the run."""


@dataclass
class Column:
    """What happened in a stretch of nominal steps.

    memory_bytes: the most that was seen
    measured_loss, predicted_loss: their means, in nats; None where there was none
    steps: how many of each phase; losses: how many each of the means is of
    """

    memory_bytes: int = 0
    measured_loss: float | None = None
    predicted_loss: float | None = None
    steps: Counter[str] = field(default_factory=Counter)
    losses: Counter[str] = field(default_factory=Counter)

    @property
    def phase(self) -> str:
        """Of most of its steps."""
        return self.steps.most_common(1)[0][0]


@dataclass
class Timeline:
    """Loss, phases and memory step by step.

    steps: of the whole run, which is the timeline's length
    columns: by place, from 0; none where no step was noted
    validation: the last validation loss of each place that has one
    """

    steps: int
    columns: dict[int, Column] = field(default_factory=dict)
    validation: dict[int, float] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """The number of columns."""
        return min(COLUMNS, self.steps)

    def add(
        self, nominal_step: int, phase: str, memory_bytes: int, measured: float | None, predicted: float | None
    ) -> None:
        """Note a nominal step, counted from 1."""
        column = self.columns.setdefault(self.place(nominal_step), Column())
        column.steps[phase] += 1
        column.memory_bytes = max(column.memory_bytes, memory_bytes)
        for name, loss in (("measured_loss", measured), ("predicted_loss", predicted)):
            if loss is not None and math.isfinite(loss):
                column.losses[name] += 1
                mean = getattr(column, name) or 0.0
                setattr(column, name, mean + (loss - mean) / column.losses[name])

    def place(self, nominal_step: int) -> int:
        """The column of a nominal step, counted from 1."""
        return (nominal_step - 1) * self.width // self.steps

    def validate(self, nominal_step: int, loss: float) -> None:
        """Note a validation loss; one that is not finite is left out."""
        if math.isfinite(loss):
            self.validation[self.place(nominal_step)] = loss

    def bands(self) -> Iterator[tuple[str, float, float]]:
        """Phase, start and end of each stretch of one phase, as shares of the whole."""
        for phase, stretch in groupby(sorted(self.columns.items()), key=lambda item: item[1].phase):
            places = [at for at, _ in stretch]
            yield phase, places[0] / self.width, (places[-1] + 1) / self.width

    def series(self, name: str) -> list[tuple[float, float]]:
        """(place as a share of the whole, value) of each column that has one."""
        values = ((at, getattr(column, name)) for at, column in sorted(self.columns.items()))
        return [((at + 0.5) / self.width, value) for at, value in values if value is not None]

    def validation_series(self) -> list[tuple[float, float]]:
        """(place as a share of the whole, loss) of each evaluation."""
        return [((at + 1) / self.width, loss) for at, loss in sorted(self.validation.items())]


def timeline_of(run: Run, steps: int) -> Timeline:
    """The timeline of a run's record so far.

    steps: of the whole run

    Where no sample fell into a step, its memory is that of the last step that has one.
    """
    timeline = Timeline(steps)
    if run.steps.empty or run.vram.empty:
        return timeline
    used = run.vram["used_bytes"] + (run.vram["other_bytes"].fillna(0) if "other_bytes" in run.vram else 0)
    memory = used.groupby(run.vram["nominal_step"]).max().reindex(run.steps["nominal_step"]).ffill().bfill()
    columns = [run.steps[name] for name in ("nominal_step", "phase", "measured_loss", "predicted_loss")]
    for (step, phase, measured, predicted), size in zip(zip(*columns, strict=True), memory, strict=True):
        timeline.add(int(step), phase, int(size), measured, predicted)
    if "validation_loss" in run.steps:
        for step, loss in zip(run.steps["nominal_step"], run.steps["validation_loss"], strict=True):
            timeline.validate(int(step), float(loss if loss is not None else math.nan))
    return timeline
