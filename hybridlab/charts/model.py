"""A chart as plain data: series over bands, with reference lines. `display` shows it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, get_args

from hybridlab.base.errors import printable

MAX_POINTS = 300


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


Kind = Literal["line", "points", "bar"]
Limits = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """Named points: `y` over `x`, all of one length.

    low, high: bounds of each value, drawn as a ribbon along a line and as intervals at points
    kind: `line`, `points`, or `bar` (in a chart with names)
    dash: dashed line or hollow points: predicted, not measured
    control: a control: dashed and grey; with a color it is that series' own control, dashed and thick
    color: index into the palette; None takes the next free one
    stack: bars that begin where the stacked series before it ended: parts of one whole

    Raises ValueError for empty series, unequal lengths, nan and inf.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    kind: Kind = "line"
    dash: bool = False
    control: bool = False
    color: int | None = None
    stack: bool = False

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"series {self.name!r}: kind must be one of {get_args(Kind)}, not {self.kind!r}")
        if self.stack and (self.kind != "bar" or min(self.x, default=0) < 0):
            raise ValueError(f"series {self.name!r}: only bars of values from 0 upward can be stacked")
        if (self.low is None) != (self.high is None):
            raise ValueError(f"series {self.name!r}: give both low and high, or neither")
        for column in ("x", "y", "low", "high"):
            if (values := getattr(self, column)) is not None:
                object.__setattr__(self, column, self._checked(column, tuple(map(float, values))))

    def _checked(self, column: str, values: tuple[float, ...]) -> tuple[float, ...]:
        what = f"{column} of series {self.name!r}"
        if not values:
            raise ValueError(f"{what} is empty: give at least one point, or leave the series out")
        if not all(map(math.isfinite, values)):
            raise ValueError(f"{what} holds nan or inf: drop those points before charting them")
        if len(values) != len(self.x):
            raise ValueError(f"series {self.name!r}: {column} has {len(values)} values, x has {len(self.x)}")
        return values

    def bounds(self) -> tuple[Sequence[float], Sequence[float]] | None:
        """The lower and the upper bounds, if the series has them."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    def drawn(self) -> Series:
        """The series as drawn: thinned to at most 300 points, then rounded."""
        keep, columns = kept(self.y), (self.x, self.y, self.low, self.high)
        x, y, low, high = (None if column is None else rounded([column[i] for i in keep]) for column in columns)
        return replace(self, x=x or (), y=y or (), low=low, high=high)


@dataclass(frozen=True)
class Band:
    """A labeled stretch of the horizontal axis, drawn behind the series; bands of one label look alike."""

    start: float
    end: float
    label: str

    def __post_init__(self) -> None:
        if not self.start < self.end:
            raise ValueError(f"band {self.label!r} must end after it starts: {self.start} to {self.end}")


@dataclass(frozen=True)
class Line:
    """A reference value drawn across the chart with its label, such as a limit or zero."""

    value: float
    label: str


@dataclass(frozen=True)
class Place:
    """Where a series lies in a chart with names, and where each of its bars begins.

    offset, thickness: its shift and its size, in rows
    base: where each bar begins, 0 where nothing is stacked
    topmost: nothing is stacked on it, so that the total is written at its end
    """

    series: Series
    offset: float
    thickness: float
    base: tuple[float, ...]
    topmost: bool


@dataclass(frozen=True)
class ChartData:
    """One pair of axes, labeled with their units.

    lines: reference values on the value axis; x_lines: on the other one
    names: makes the chart a list, from top to bottom: `y` of a point is the row (0, 1, ...) of its name,
        `x` its value; bounds and reference lines then lie along x
    y_zoom: the values to show, where early points would flatten all others

    Raises ValueError for a chart without series, a series name used twice, and what cannot be drawn.
    """

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    bands: tuple[Band, ...] = ()
    lines: tuple[Line, ...] = ()
    names: tuple[str, ...] = ()
    y_zoom: Limits | None = None
    x_lines: tuple[Line, ...] = ()

    def __post_init__(self) -> None:
        for field in ("series", "bands", "lines", "names", "x_lines"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        if not self.series:
            raise ValueError(f"chart {self.title!r} has no series: give at least one")
        if doubled := [name for name, n in Counter(s.name for s in self.series).items() if n > 1]:
            raise ValueError(f"chart {self.title!r}: series name {doubled[0]!r} is used twice; rename one")
        self._check_names() if self.names else self._check_axes()

    def _check_names(self) -> None:
        if self.bands or self.y_zoom or self.x_lines:
            raise ValueError(f"chart {self.title!r}: names go without bands, y_zoom and x_lines")
        if any(row not in range(len(self.names)) for s in self.series for row in s.y):
            raise ValueError(f"chart {self.title!r}: y must be row numbers 0 to {len(self.names) - 1}")
        if any(s.kind == "line" for s in self.series):
            raise ValueError(f"chart {self.title!r}: a list of names takes bars or points, not lines")

    def _check_axes(self) -> None:
        if any(s.kind == "bar" for s in self.series):
            raise ValueError(f"chart {self.title!r}: bars need names, one per row")
        if self.y_zoom and not -math.inf < self.y_zoom[0] < self.y_zoom[1] < math.inf:
            raise ValueError(f"chart {self.title!r}: y_zoom must be (low, high), not {self.y_zoom}")

    def places(self) -> list[Place]:
        """Each series with its own part of a row; stacked ones share a part, each begins where the last one ended."""
        stacked = [s for s in self.series if s.stack]
        alone = [s for s in self.series if not s.stack]
        lanes = len(alone) + bool(stacked)
        thickness = 0.7 / lanes if self.names else 0.0
        lane = {s.name: i + bool(stacked) for i, s in enumerate(alone)}
        ends: dict[float, float] = {}
        places = []
        for s in self.series:
            base = tuple(ends.get(row, 0.0) if s.stack else 0.0 for row in s.y)
            ends |= {row: start + x for row, start, x in zip(s.y, base, s.x, strict=True) if s.stack}
            offset = round((lane.get(s.name, 0) - (lanes - 1) / 2) * thickness, 4)
            places.append(Place(s, offset, round(thickness, 4), base, not s.stack or s is stacked[-1]))
        return places

    def _values(self) -> list[float]:
        """Everything that must be visible on the value axis."""
        values = [line.value for line in self.lines]
        for place in self.places():
            s = place.series
            values += [start + x for start, x in zip(place.base, s.x, strict=True)] if self.names else s.y
            values += [v for side in s.bounds() or () for v in side]
        return values

    def x_limits(self) -> Limits:
        """What the horizontal axis shows."""
        if self.names:
            bars = any(s.kind == "bar" for s in self.series)
            return _padded(self._values() + [0.0] * bars, below=0.06, above=0.14 if bars else 0.06, stick=bars)
        xs = [x for s in self.series for x in s.x] + [x for b in self.bands for x in (b.start, b.end)]
        xs += [line.value for line in self.x_lines]
        return _padded(xs, below=0.02 * (not self.bands), above=0.02 * (not self.bands))

    def anchor(self, value: float) -> str:
        """The side of a label that stands at a value of the horizontal axis, so that the axis's end does not cut it."""
        start, end = self.x_limits()
        share = (value - start) / (end - start)
        return "left" if share < 0.25 else "right" if share > 0.75 else "center"

    def y_limits(self) -> Limits:
        """What the vertical axis shows; a list of names runs downward."""
        if self.names:
            return len(self.names) - 0.5, -0.5
        if self.y_zoom:
            return self.y_zoom
        above = 0.12 if self.bands else 0.05  # room for the bands' labels
        return _padded(self._values(), below=0.05, above=above)

    def __str__(self) -> str:
        """Title, axes, and a line for each series, band label and reference line."""
        head = [self.title, f"  x: {self.x_label}" + (f"; y: {self.y_label}" if self.y_label else "")]
        body = [self._row_text(s) if self.names else [_line_text(s)] for s in self.series]
        tail = [
            f"  line at {axis}{shown(rounded([line.value])[0])}: {line.label}"
            for axis, lines in (("", self.lines), ("x ", self.x_lines))
            for line in lines
        ]
        return "\n".join(
            map(printable, head + [line for lines in body for line in lines] + _bands_text(self.bands) + tail)
        )

    def _row_text(self, series: Series) -> list[str]:
        values = [shown(v) for v in rounded(series.x)]
        if bounds := series.bounds():
            sides = zip(*(rounded(side) for side in bounds), strict=True)
            pairs = [f" [{shown(low)}, {shown(high)}]" for low, high in sides]
            values = [value + pair for value, pair in zip(values, pairs, strict=True)]
        prefix = f"{series.name}, " if len(self.series) > 1 else ""
        return [f"  {prefix}{self.names[int(y)]}: {v}" for y, v in zip(series.y, values, strict=True)]


def _padded(values: list[float], *, below: float, above: float, stick: bool = False) -> Limits:
    """The values' range with room around it; `stick` leaves no room beyond zero."""
    low, high = min(values), max(values)
    span = high - low or abs(high) * 0.1 or 1.0
    if high == low and not (below or above):
        below = above = 0.5
    start, end = low - below * span, high + above * span
    if stick:
        start, end = (0.0 if low == 0 else start), (0.0 if high == 0 and low < 0 else end)
    return float(f"{start:.6g}"), float(f"{end:.6g}")


def _line_text(series: Series) -> str:
    y = rounded(series.y)
    count = f"{len(y)} point" + "s" * (len(y) > 1)
    return f"  {series.name}: {count}, first {shown(y[0])}, min {shown(min(y))}, last {shown(y[-1])}"


def _bands_text(bands: tuple[Band, ...]) -> list[str]:
    count = Counter(band.label for band in bands)
    width = {label: sum(b.end - b.start for b in bands if b.label == label) for label in count}
    return [f"  band {label}: {n}, together {width[label]:g} wide" for label, n in count.items()]
