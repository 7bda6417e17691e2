"""Colors, dashes and markers: one look per series name, the same in every drawing."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import count, filterfalse

from hybridlab.charts.model import Band, ChartData, Series

# Okabe and Ito's palette, told apart by color-blind eyes, without black (too close to the control's grey)
# and yellow (too faint on white), its blue lightened for dark pages. https://jfly.uni-koeln.de/color/
PALETTE = ("#1F86C9", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
CONTROL = "#808080"
DASHES = ("solid", "dashdot", "dot")  # solid first; the next round of the palette is dash-dotted
CONTROL_DASHES = ("dash", "dot", "dashdot")
MARKERS = ("circle", "square", "triangle", "diamond", "cross")

INK, FAINT, PAPER = "#7A7A7A", "#8F8F8F", "#FFFFFF"
"""Text and axes, readable on white and on black alike: a chart has no ground of its own."""

GRID = ("#808080", 0.22)
LINE_WIDTH, THICK = 2.0, 3.4
MOST_LABELS = 20
"""So many lines are labelled at their ends; more have a legend."""

WIDTH_PX, HEIGHT_PX, PANEL_HEIGHT_PX = 900, 420, 300


@dataclass(frozen=True)
class Tint:
    """How a background band is filled: its color, how opaque it is, and a hatch that needs no color."""

    color: str
    opacity: float
    hatch: str  # as plotly names it; "" is plain


TINTS = {
    "Warmup": Tint("#8A8A70", 0.12, "."),
    "Full": Tint("#0072B2", 0.10, ""),
    "Predict": Tint("#E08A00", 0.20, "/"),
    "Correct": Tint("#8E5FA8", 0.28, "x"),
}
OTHER_TINT = Tint("#808080", 0.12, "\\")
HATCH_OPACITY = 0.45


@dataclass(frozen=True)
class Look:
    """How one series is drawn."""

    color: str
    dash: str
    marker: str
    hollow: bool
    width: float = LINE_WIDTH


def height_of(chart: ChartData) -> int:
    """Of a chart alone, in pixels: a short list of names is no taller than its rows need."""
    return min(HEIGHT_PX, 160 + 50 * len(chart.names)) if chart.names else HEIGHT_PX


def looks(series: Iterable[Series]) -> dict[str, Look]:
    """One look per series name, in order of appearance; a color asked for by index is left to its asker."""
    named: dict[str, Series] = {}
    for s in series:
        named.setdefault(s.name, s)
    taken = {s.color for s in named.values() if s.color is not None}
    free, controls = filterfalse(taken.__contains__, count()), count()
    result = {}
    for s in named.values():
        if s.control and s.color is not None:
            result[s.name] = replace(_colored(s.color, dash=True), width=THICK)
        elif s.control:
            result[s.name] = _control(next(controls))
        else:
            result[s.name] = _colored(next(free) if s.color is None else s.color, s.dash)
    return result


def _control(index: int) -> Look:
    dash = CONTROL_DASHES[index % len(CONTROL_DASHES)]
    return Look(CONTROL, dash, MARKERS[(index + 3) % len(MARKERS)], hollow=True)


def _colored(index: int, dash: bool) -> Look:
    turn, color = divmod(index, len(PALETTE))
    style = "dash" if dash else DASHES[turn % len(DASHES)]
    return Look(PALETTE[color], style, MARKERS[index % len(MARKERS)], hollow=dash)


def end_labels(chart: ChartData) -> dict[str, float]:
    """Where each line's name stands beside its end, as a share of the axis' height, no two on one another.

    Nothing for a lone series, a list of names, and more lines than there is room for.
    """
    if chart.names or not 1 < len(chart.series) <= MOST_LABELS:
        return {}
    low, high = chart.y_limits()
    ends = {s.name: (s.y[-1] - low) / (high - low) for s in chart.series if not is_point(s)}
    ordered, gap = sorted(ends, key=ends.__getitem__), 1 / MOST_LABELS
    places: dict[str, float] = {}
    least = 0.0
    for i, name in enumerate(ordered):
        room_above = gap * (len(ordered) - 1 - i)
        places[name] = max(least, min(ends[name], 1 - room_above))
        least = places[name] + gap
    return places


def is_point(series: Series) -> bool:
    """Whether a series is one point, whose name stands beside it."""
    return series.kind == "points" and len(series.x) == 1


def label_of(series: Series) -> str:
    """A name that fits beside a line."""
    return textwrap.shorten(series.name, 40, placeholder="...")


def marker_size(count: int) -> float:
    """Markers, in points, that leave a crowded line visible."""
    return 5.0 if count <= 40 else 3.5


def tint(label: str) -> Tint:
    """The fill of a band: fixed for the four phases, grey for anything else."""
    return TINTS.get(label, OTHER_TINT)


def hatch(series: Series, style: Look) -> str:
    """The hatch of a bar: predicted values, and colors that come round again, are told apart without color."""
    return "/" if series.dash else "." if style.dash == DASHES[1] and not series.control else ""


def band_text(band: Band, span: float, columns: int) -> str:
    """What fits into the band: its label, its initial, or nothing (the legend still names it)."""
    room = (band.end - band.start) / span / columns * 90  # characters across one whole picture
    return band.label if room >= len(band.label) + 1 else band.label[:1] if room >= 2 else ""


def lines_of(title: str, columns: int = 1, names: Iterable[str] = ()) -> list[str]:
    """The title broken into lines that fit above one panel, right of the names of its rows."""
    return textwrap.wrap(title, max(20, 100 // columns - max(map(len, names), default=0))) or [""]
