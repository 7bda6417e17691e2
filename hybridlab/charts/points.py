"""What happens to numbers before they are drawn: checked, rounded, thinned."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

MAX_POINTS = 300


def finite(values: Iterable[float], what: str) -> tuple[float, ...]:
    """The values as plain floats. Raises ValueError where there are none, or one is infinite or not a number."""
    result = tuple(float(value) for value in values)
    if not result:
        raise ValueError(f"{what} is empty: give at least one point, or leave the series out")
    if not all(map(math.isfinite, result)):
        raise ValueError(f"{what} holds nan or inf: drop those points before charting them")
    return result


def rounded(values: Sequence[float]) -> list[float]:
    """Round for display, so that runs that agree to four decimals give the same chart.

    Four decimals; three significant digits of the largest value where that is below 0.01 (learning rates).
    """
    largest = max(abs(value) for value in values)
    decimals = 4 if largest >= 0.01 or largest == 0 else 2 - math.floor(math.log10(largest))
    return [round(value, decimals) + 0.0 for value in values]  # + 0.0: no negative zero


def kept(y: Sequence[float]) -> list[int]:
    """Indices of the points of a long line that are drawn, at most `MAX_POINTS` of them.

    The first and the last point stay; what lies between is cut into stretches of equal count, and of each stretch its
    lowest and its highest point stay. So the line's minimum, maximum and envelope are those of the whole.
    """
    last = len(y) - 1
    if len(y) <= MAX_POINTS:
        return list(range(len(y)))
    stretches = (MAX_POINTS - 2) // 2
    edges = [1 + round(i * (last - 1) / stretches) for i in range(stretches + 1)]
    chosen = {0, last}
    for start, stop in pairwise(edges):
        chosen |= {min(range(start, stop), key=y.__getitem__), max(range(start, stop), key=y.__getitem__)}
    return sorted(chosen)


def shown(value: float) -> str:
    """A rounded value as text: four decimals, more only where the value has more."""
    text = f"{value:.4f}"
    return text if float(text) == value else f"{value:g}"
