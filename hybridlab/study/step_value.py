"""What one predicted step was worth in real ones: the paired test against plain runs, inverted."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import scipy
from numpy.typing import NDArray

from hybridlab.study.statistics import formatted

Array = NDArray[np.float64]
Scale = Callable[[Array], Array]

LEAST_FALL_NATS = 1e-6
"""Of the control curve, over all its lengths: less is the rounding of float32 losses."""

DEGREE = 3
"""Of the polynomial that smooths a seed's control losses, where there are lengths enough."""

LEAST_DISTANCE = 0.1
"""Between two control lengths, as a share of their range, for both to count towards the degree."""

SCALES: tuple[Scale, ...] = (lambda n: n**0.25, np.log, np.sqrt)
"""Of the length, in which the curve is a polynomial: the one that is used, and its neighbours to either side."""

MISFIT = 0.9
"""How far the curve may be off by its scale: this share of the difference between those in the neighbouring scales."""

MISFIT_OF_A_LINE = 2.0
"""The same of two lengths, between which no bend is seen: the line may lie in any scale from n^(-3/4) to n^(5/4)."""

CONFIDENCE = 0.95
POINTS = 513


@dataclass(frozen=True)
class SeedRuns:
    """What one seed contributes: its hybrid, and the plain runs that it is held against.

    loss: the hybrid's final loss, in nats; gradient_steps, predicted_steps: those it took. Of an arm whose cost is
        valued as a whole: 0, and that cost in full steps
    control_steps, control_losses: lengths and final losses of the plain runs, in the same order for each seed
    """

    loss: float
    gradient_steps: float
    predicted_steps: float
    control_steps: tuple[float, ...]
    control_losses: tuple[float, ...]


@dataclass(frozen=True)
class StepValue:
    """The value q of a predicted step in real ones, with its 95 % confidence interval.

    value: where plain runs of `gradient_steps + q predicted_steps` meet the hybrids in the mean; None if that lies
        outside the lengths of the control runs, or anywhere else may be meant as well
    low, high: infinite where the interval reaches the shortest or the longest control run: nothing is extrapolated
    seeds: that predicted anything
    per_seed: where the curve of each of them alone meets its hybrid; None where it does not, or at several places

    1: as good as real; 0: worth nothing; below: harmful.
    """

    value: float | None
    low: float
    high: float
    seeds: int
    per_seed: tuple[float | None, ...] = ()

    @classmethod
    def of(cls, runs: Sequence[SeedRuns]) -> Self | None:
        """From the runs of each seed. None where no seed predicted, one diverged, or controls have one length."""
        runs = [run for run in runs if run.predicted_steps]
        if not all(math.isfinite(loss) for run in runs for loss in (run.loss, *run.control_losses)):
            return None
        if not runs or any(len(set(run.control_steps)) < 2 for run in runs):
            return None
        test = PairedTest.of(runs)
        if not test.fall() >= LEAST_FALL_NATS:
            return cls(None, -math.inf, math.inf, len(runs))
        roots = test.roots()
        low, high = test.interval(roots)
        known = len(roots) == 1 and (len(runs) == 1 or math.isfinite(low) or math.isfinite(high))
        return cls(roots[0] if known else None, low, high, len(runs), test.roots_by_seed())

    @property
    def as_ratio(self) -> str:
        """As text without signs, of a value that is a ratio."""
        return str(self).replace("+", "")

    def __str__(self) -> str:
        if self.seeds < 2 and self.value is not None:
            return f"{formatted(self.value, '+.3f')} (one seed: no interval)"
        value, low, high = (_shown(number) for number in (self.value, self.low, self.high))
        return "open" if low == high == value else f"{value} [{low}, {high}]"


@dataclass(frozen=True)
class PairedTest:
    """Student's t-test of the hybrids against plain runs of `gradient_steps + q predicted_steps`, for any q.

        d_s(q) = loss_s - f_s(gradient_steps_s + q predicted_steps_s)
        q is in the interval if mean d(q)^2 <= t^2 (var d(q) / S + lack of fit) + misfit(q)^2

    f_s smooths the losses of seed s alone, so that what all runs of a seed share cancels in d_s: least squares for a
    polynomial in n^(1/4). The misfit is what the scale makes out, from the curves in ln n and sqrt n: the same for all
    seeds, so that t does not multiply it. The lack of fit is the variance that the mean curve leaves beyond the seeds'
    own noise, if an F-test at 5 % finds any.

    The interval held the true q in 94 to 97 % of simulated studies of every number of lengths from three on
    (`tests/test_statistics.py`); where noise is far below the misfit, and with two lengths, it is wider.

    Shapes: S seeds, K control lengths, Q values of q. Losses may have further dimensions in front.

    losses [..., S], control_losses [..., S, K], in nats; gradient_steps, predicted_steps [S]; control_steps [S, K]
    """

    losses: Array
    control_losses: Array
    gradient_steps: Array
    predicted_steps: Array
    control_steps: Array

    @classmethod
    def of(cls, runs: Sequence[SeedRuns]) -> Self:
        """From one entry per seed."""
        columns = ("loss", "control_losses", "gradient_steps", "predicted_steps", "control_steps")
        return cls(*(np.array([getattr(run, column) for run in runs], float) for column in columns))

    @property
    def range(self) -> tuple[float, float]:
        """The least and the greatest q at which every seed has control runs on both sides."""
        ends = (self.control_steps - self.gradient_steps[:, None]) / self.predicted_steps[:, None]
        return float(ends.min(axis=1).max()), float(ends.max(axis=1).min())

    def fall(self) -> float:
        """How far the mean curve comes down over the range, in nats; one number."""
        first, last = self.difference(np.array(self.range)).mean(axis=-2)
        return float(last - first)

    def roots(self) -> list[float]:
        """Every q in the range at which the mean difference is 0."""
        return _sign_changes(lambda q: self.difference(q).mean(axis=-2), self._grid())

    def roots_by_seed(self) -> tuple[float | None, ...]:
        """For each seed the q in the range at which its own difference is 0, where that is one."""
        return tuple(self._root(seed) for seed in range(len(self.losses)))

    def _root(self, seed: int) -> float | None:
        roots = _sign_changes(lambda q: self.difference(q)[seed], self._grid())
        return roots[0] if len(roots) == 1 else None

    def interval(self, roots: Sequence[float]) -> tuple[float, float]:
        """The outermost values that the test does not refuse, infinite at the ends of the range.

        roots: of the mean difference, so that an interval between two points of the grid is not missed
        """
        grid = np.sort([*self._grid(), *roots])
        excess = self.excess(grid)
        inside = np.flatnonzero(excess <= 0)
        if not len(inside):
            better = self.difference(grid).mean() < 0
            return (float(grid[-1]), math.inf) if better else (-math.inf, float(grid[0]))
        first, last = inside[[0, -1]]
        low = -math.inf if first == 0 else self._end(grid[first - 1], grid[first])
        high = math.inf if last == len(grid) - 1 else self._end(grid[last], grid[last + 1])
        return low, high

    def excess(self, q: Array) -> Array:
        """By how many nats the mean difference is beyond the test's bound: [..., Q]; above 0, q is refused."""
        seeds = len(self.gradient_steps)
        if seeds < 2:
            return np.full((*self.losses.shape[:-1], len(q)), -math.inf)
        difference = self.difference(q)
        variance = difference.var(axis=-2, ddof=1) / seeds + self._lack_of_fit()[..., None]
        t = scipy.stats.t.ppf((1 + CONFIDENCE) / 2, seeds - 1)
        return np.abs(difference.mean(axis=-2)) - np.sqrt(t**2 * variance + self._misfit(q) ** 2)

    def difference(self, q: Array) -> Array:
        """d_s(q): [..., S, Q]."""
        return self.losses[..., None] - self._curve(q, SCALES[0])

    def _curve(self, q: Array, scale: Scale) -> Array:
        """f_s(gradient_steps_s + q predicted_steps_s): [..., S, Q]."""
        return self._smoothed(self.gradient_steps[:, None] + self.predicted_steps[:, None] * q, scale)

    def _smoothed(self, steps: Array, scale: Scale) -> Array:
        """The curves at steps [S, Q]: [..., S, Q]."""
        pairs = zip(self.control_steps, steps, strict=True)
        weights = np.stack([_weights(scale(lengths), scale(at), self._degree) for lengths, at in pairs])
        return np.einsum("sqk,...sk->...sq", weights, self.control_losses)

    def _misfit(self, q: Array) -> Array:
        """[..., Q]."""
        first, second = (self._curve(q, scale).mean(axis=-2) for scale in SCALES[1:])
        return (MISFIT if self._degree > 1 else MISFIT_OF_A_LINE) * (first - second)

    def _lack_of_fit(self) -> Array:
        """Variance of the mean losses around their curve beyond that of the seeds, 0 where it may be chance: [...]."""
        seeds, lengths = self.control_steps.shape
        freedom = lengths - self._degree - 1
        residuals = self.control_losses - self._smoothed(self.control_steps, SCALES[0])
        mean = residuals.mean(axis=-2, keepdims=True)
        if not freedom:
            return np.zeros(mean.shape[:-2])
        of_mean = (mean**2).sum(axis=(-2, -1)) / freedom
        of_seeds = ((residuals - mean) ** 2).sum(axis=(-2, -1)) / (freedom * (seeds - 1) * seeds)
        found = of_mean > of_seeds * scipy.stats.f.ppf(CONFIDENCE, freedom, freedom * (seeds - 1))
        return np.where(found, of_mean - of_seeds, 0.0)

    @property
    def _degree(self) -> int:
        return min(DEGREE, *(_far_apart(lengths) - 1 for lengths in self.control_steps))

    def _grid(self) -> Array:
        return np.linspace(*self.range, POINTS)

    def _end(self, low: float, high: float) -> float:
        return float(scipy.optimize.brentq(lambda q: self.excess(np.array([q]))[0], low, high))


def _shown(number: float | None) -> str:
    return formatted(number, "+.3f") if number is not None and math.isfinite(number) else "open"


def _weights(lengths: Array, at: Array, degree: int) -> Array:
    """The linear map from losses at the lengths [K] to their least-squares polynomial at [Q]: [Q, K]."""
    centre, spread = lengths.mean(), lengths.std()
    design, wanted = (np.vander((points - centre) / spread, degree + 1) for points in (lengths, at))
    return wanted @ np.linalg.pinv(design)


def _far_apart(lengths: Array) -> int:
    """How many lengths there are, those beside each other counted once."""
    ordered = np.sort(lengths)
    least, count, last = LEAST_DISTANCE * np.ptp(lengths), 1, ordered[0]
    for length in ordered[1:]:
        if length - last >= least:
            count, last = count + 1, length
    return count


def _sign_changes(function: Callable[[Array], Array], grid: Array) -> list[float]:
    """Where a continuous function crosses 0 between points of a grid."""
    values = function(grid)
    crossings = np.flatnonzero((values[:-1] < 0) != (values[1:] < 0))
    return [float(scipy.optimize.brentq(lambda q: function(np.array([q]))[0], grid[i], grid[i + 1])) for i in crossings]
