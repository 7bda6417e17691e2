"""Intervals over seeds, the control curve, and what one predicted step was worth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEAST_FALL_NATS = 1e-6
"""Of a control curve, for e times the gradient steps: less is the rounding of float32 losses."""

MOST_STEPS = 1e15
"""More gradient steps than this nobody counts."""


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95 % confidence interval (Student's t); infinitely wide for one seed.

    values: what it was computed from, in the order of the seeds
    """

    mean: float
    low: float
    high: float
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """From one value a seed."""
        mean, count = float(np.mean(values)), len(values)
        if count < 2:
            return cls(mean, -math.inf, math.inf, tuple(values))
        half = float(stats.t.ppf(0.975, count - 1) * np.std(values, ddof=1) / math.sqrt(count))
        return cls(mean, mean - half, mean + half, tuple(values))

    @property
    def seeds(self) -> int:
        """How many values it was computed from."""
        return len(self.values)

    @property
    def ends(self) -> tuple[float, float]:
        """(low, high); of one seed, which has no interval, (mean, mean)."""
        return (self.low, self.high) if self.seeds > 1 else (self.mean, self.mean)

    @property
    def sign(self) -> int:
        """-1 or 1 where the whole interval lies below or above 0; 0 where it holds 0."""
        return int(self.low > 0) - int(self.high < 0)

    def __str__(self) -> str:
        if self.seeds < 2:
            return f"{self.mean:+.3f} (one seed: no interval)"
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def median_ends(values: Sequence[float]) -> tuple[float, float]:
    """Ends of the 95 % confidence interval of a median, whatever the distribution.

    The k-th smallest and the k-th largest value, k as large as the sign test at 5 % lets it be; infinite for fewer than
    six values, of which none are far enough out.
    """
    ordered = sorted(values)
    k = int(stats.binom.ppf(0.025, len(ordered), 0.5))
    return (ordered[k - 1], ordered[-k]) if k else (-math.inf, math.inf)


@dataclass(frozen=True)
class ControlCurve:
    """Final loss of runs that simply take n gradient steps, their schedule fitted to n.

        loss(n) = level + slope ln(n)       least squares over the control runs of one seed

    Raises ValueError with fewer than two lengths.
    """

    level: float
    slope: float

    @classmethod
    def fit(cls, final_loss: Mapping[int, float]) -> ControlCurve:
        """final_loss: from gradient steps to final validation loss, in nats."""
        if len(final_loss) < 2:
            raise ValueError("a control curve needs runs of at least two lengths")
        slope, level = np.polyfit(np.log(list(final_loss)), list(final_loss.values()), deg=1)
        return cls(float(level), float(slope))

    @property
    def falls(self) -> bool:
        """Whether more gradient steps lower the loss; only then is a loss worth a number of steps."""
        return self.slope < -LEAST_FALL_NATS

    def steps_for(self, loss: float) -> float:
        """n*: gradient steps that a plain run needs for this final loss; infinite beyond `MOST_STEPS`.

        Raises ValueError where the curve does not fall.
        """
        if not self.falls:
            raise ValueError("the control curve does not fall: no number of gradient steps is worth a loss")
        exponent = (loss - self.level) / self.slope
        return math.exp(exponent) if exponent < math.log(MOST_STEPS) else math.inf


def step_value(curve: ControlCurve, loss: float, gradient_steps: int, predicted_steps: int) -> float:
    """What one predicted step was worth in real ones.

        q = (n* - gradient_steps) / predicted_steps

    n* is where the control curve meets the hybrid's final loss. 1: as good as real; 0: worth nothing; below:
    harmful; infinite where the curve is too flat to come down to that loss.

    Raises ValueError where nothing was predicted, or the curve does not fall.
    """
    if predicted_steps < 1:
        raise ValueError("the step value needs at least one predicted step")
    return (curve.steps_for(loss) - gradient_steps) / predicted_steps
