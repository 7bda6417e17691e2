"""The time line of a run: loss, phases and memory over its nominal steps, in a fixed number of columns."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby

COLUMNS = 240
"""However long the run, it is drawn in no more."""


@dataclass
class Column:
    """What happened in a stretch of nominal steps.

    memory_bytes: the most that was seen; steps_in: phase -> steps taken in it
    losses: their mean, in nats; None where there was none
    """

    memory_bytes: int
    steps_in: Counter[str] = field(default_factory=Counter)
    measured_loss: float | None = None
    predicted_loss: float | None = None
    measured: int = 0
    predicted: int = 0

    @property
    def phase(self) -> str:
        """The phase of most of its steps."""
        return max(self.steps_in, key=self.steps_in.__getitem__)

    def add(self, measured: float | None, predicted: float | None) -> None:
        """Take a step's losses into the means."""
        self.measured, self.measured_loss = _mean(self.measured, self.measured_loss, measured)
        self.predicted, self.predicted_loss = _mean(self.predicted, self.predicted_loss, predicted)


@dataclass
class Timeline:
    """Grows by one step at a time.

    steps: of the whole run, which the time line is as long as
    """

    steps: int
    columns: dict[int, Column] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """Columns in all."""
        return min(COLUMNS, self.steps)

    def add(
        self, nominal_step: int, phase: str, memory_bytes: int, measured: float | None, predicted: float | None
    ) -> None:
        """Note a nominal step, counted from 1."""
        at = (nominal_step - 1) * self.width // self.steps
        column = self.columns.setdefault(at, Column(memory_bytes))
        column.memory_bytes = max(column.memory_bytes, memory_bytes)
        column.steps_in[phase] += 1
        column.add(measured, predicted)

    def bands(self) -> Iterator[tuple[str, float, float]]:
        """Phase, start and end of each stretch of one phase, as shares of the whole."""
        start = 0.0
        for phase, stretch in groupby(sorted(self.columns.items()), key=lambda item: item[1].phase):
            end = (list(stretch)[-1][0] + 1) / self.width
            yield phase, start, end
            start = end

    def series(self, name: str) -> list[tuple[float, float]]:
        """(place as a share of the whole, value) of each column that has one."""
        values = ((at, getattr(column, name)) for at, column in sorted(self.columns.items()))
        return [((at + 0.5) / self.width, value) for at, value in values if value is not None]


def _mean(count: int, mean: float | None, value: float | None) -> tuple[int, float | None]:
    if value is None or not math.isfinite(value):
        return count, mean
    return count + 1, value if mean is None else mean + (value - mean) / (count + 1)
