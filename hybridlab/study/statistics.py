"""Intervals over seeds, what several of them in one study are corrected by, and the least that a verdict stands on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np


def formatted(value: float, spec: str) -> str:
    """A number as `format` writes it; one that is rounded to 0 has no sign."""
    text = format(value, spec)
    return text if any(sign.isalnum() and sign != "0" for sign in text) else text.lstrip("+-")


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95 % confidence interval (Student's t); infinitely wide for one seed.

    Where a run diverged, its loss is infinite, and so are the mean and both ends; with its control, the mean is NaN.

    values: what it was computed from, in the order of the seeds
    over: what of them has the mean and Student's interval; None is the values themselves
    """

    mean: float
    low: float
    high: float
    values: tuple[float, ...]
    over: Literal["logarithms"] | None = None

    @classmethod
    def of_ratios(cls, ratios: Sequence[float]) -> Interval:
        """From one positive ratio per seed: the geometric mean, and the interval of the mean logarithm, exponentiated.

        So no end is below 0, and the ratios' inverses have the inverse interval. With a ratio of 0 all of it is 0, with
        one that is no number the mean is NaN; an end that is beyond any float is 0 or infinite. Raises ValueError for
        one below 0.
        """
        if below := [ratio for ratio in ratios if ratio < 0]:
            raise ValueError(f"ratios have {below[0]}: their geometric mean takes none below 0")
        logs = cls.of([math.log(ratio) if ratio else -math.inf for ratio in ratios])
        with np.errstate(over="ignore"):
            mean, low, high = map(float, np.exp([logs.mean, logs.low, logs.high]))
        return cls(mean, low, high, tuple(ratios), "logarithms")

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """From one value per seed."""
        import scipy  # which tables of runs, that only write numbers, need not wait for

        finite, count = all(map(math.isfinite, values)), len(values)
        mean = float(np.mean(values)) if finite else float(sum(values))
        if math.isinf(mean):
            return cls(mean, mean, mean, tuple(values))
        if count < 2 or math.isnan(mean):
            return cls(mean, -math.inf, math.inf, tuple(values))
        half = float(scipy.stats.t.ppf(0.975, count - 1) * np.std(values, ddof=1) / math.sqrt(count))
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
    def p_value(self) -> float:
        """Of Student's two-sided test that the mean is 0, of ratios that it is 1.

        1 for one seed, and where a value, or the logarithm of a ratio, is not finite.
        """
        import scipy

        with np.errstate(divide="ignore"):
            values = np.log(self.values) if self.over else np.asarray(self.values)
        if self.seeds < 2 or not np.isfinite(values).all():
            return 1.0
        error, mean = float(np.std(values, ddof=1)) / math.sqrt(self.seeds), float(np.mean(values))
        return float(2 * scipy.stats.t.sf(abs(mean) / error, self.seeds - 1)) if error else float(not mean)

    def __str__(self) -> str:
        if not math.isfinite(self.mean):
            return "diverged"
        if self.seeds < 2:
            return f"{formatted(self.mean, '+.3f')} (one seed: no interval)"
        mean, low, high = (formatted(value, "+.3f") for value in (self.mean, self.low, self.high))
        return f"{mean} [{low}, {high}]"


def median_ends(values: Sequence[float]) -> tuple[float, float]:
    """Ends of the 95 % confidence interval of a median, whatever the distribution.

    The k-th smallest and the k-th largest value, k as large as the sign test at 5 % lets it be; infinite for fewer than
    six values, of which none are far enough out.
    """
    import scipy

    ordered = sorted(values)
    k = int(scipy.stats.binom.ppf(0.025, len(ordered), 0.5))
    return (ordered[k - 1], ordered[-k]) if k else (-math.inf, math.inf)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's correction of several tests that are looked at together: by name, what each p-value counts as.

        p'_(i) = max over j <= i of min(1, (m - j + 1) p_(j))        p_(1) <= ... <= p_(m)

    Refusing where p' < 0.05 keeps the chance of any wrong refusal below 5 %.
    """
    corrected, greatest = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        greatest = max(greatest, min(1.0, (len(p_values) - rank) * p_values[name]))
        corrected[name] = greatest
    return {name: corrected[name] for name in p_values}


@dataclass(frozen=True)
class Base:
    """How much was trained and how often, to compare with the least that a verdict needs.

    steps: gradient steps of the baseline; seeds: runs per arm
    tokens: that the baseline has seen; of image tasks, the number of images
    fall_nats: from the baseline's first training loss to its final validation loss
    unbracketed: of each arm that is compared and whose best learning rate is at an edge of those tried: what to do
    """

    steps: int
    seeds: int
    tokens: int
    fall_nats: float
    unbracketed: tuple[str, ...] = ()

    @property
    def lacks(self) -> list[str]:
        """What is missing, in words, as "2 of 3 seeds"; nothing where a verdict can be given."""
        least, here = asdict(LEAST), asdict(self)
        words = {name: name.removesuffix("_nats") for name in least if name != "unbracketed"}
        short = [
            f"{round(here[name], 2):.6g} of {least[name]:.6g} {'nats of ' if name != word else ''}{word}"
            for name, word in words.items()
            if not here[name] >= least[name]
        ]
        return [*short, *filter(None, ["; ".join(self.unbracketed)])]


LEAST = Base(steps=200, seeds=3, tokens=100_000, fall_nats=1.0)
"""Below it, a claim on losses is open whatever its numbers: what barely trained shows nothing about training.

Of two seeds, Student's t is 12.7. A fall of one nat leaves 37 % of the first perplexity. Tokens count images alike.
"""
