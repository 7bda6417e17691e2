"""Colors, dashes and markers: one look per series name, the same in every drawing."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass

from hybridlab.charts.model import Band, Series

# Okabe and Ito's palette, told apart by color-blind eyes, without black (too close to the control's grey)
# and yellow (too faint on white). https://jfly.uni-koeln.de/color/
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
CONTROL = "#444444"
DASHES = ("solid", "dashdot", "dot")  # solid first; the next round of the palette is dash-dotted
CONTROL_DASHES = ("dash", "dot", "dashdot")
MARKERS = ("circle", "square", "triangle", "diamond", "cross")

INK, FAINT, GRID, PAPER = "#222222", "#888888", "#E4E4E4", "#FFFFFF"
WIDTH_PX, HEIGHT_PX, PANEL_HEIGHT_PX = 900, 420, 300


@dataclass(frozen=True)
class Tint:
    """How a background band is filled: its color, and a hatch (of color `mark`) that needs no color."""

    color: str
    mark: str
    hatch: str  # as plotly names it; "" is plain


TINTS = {
    "Warmup": Tint("#F1F1EC", "#D8D8CC", "."),
    "Full": Tint("#E1EEF8", "#E1EEF8", ""),
    "Predict": Tint("#FCE8D0", "#F2C48F", "/"),
    "Correct": Tint("#DCCBE6", "#A98ABF", "x"),
}
OTHER_TINT = Tint("#EFEFEF", "#D8D8D8", "\\")


@dataclass(frozen=True)
class Look:
    """How one series is drawn."""

    color: str
    dash: str
    marker: str
    hollow: bool


def looks(series: Iterable[Series]) -> dict[str, Look]:
    """One look per series name, in order of appearance; a color asked for by index is left to its asker."""
    first = {s.name: s for s in reversed(list(series))}
    named = [first[name] for name in reversed(first)]
    taken = {s.color for s in named if s.color is not None}
    free = iter(i for i in range(len(named) + len(taken)) if i not in taken)
    controls = iter(range(len(named)))
    result = {}
    for s in named:
        if s.control:
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


def lines_of(title: str, columns: int = 1) -> list[str]:
    """The title broken into lines that fit above one panel."""
    return textwrap.wrap(title, 100 // columns) or [""]
