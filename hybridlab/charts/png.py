"""Draw charts as one PNG with matplotlib: no ground of its own, no global state, the same bytes every time."""

from __future__ import annotations

import io
import math
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from hybridlab.charts import style as look
from hybridlab.charts.model import ChartData, Place, Series
from hybridlab.charts.style import Look

DPI = 100
DASHES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}
MARKERS = {"circle": "o", "square": "s", "triangle": "^", "diamond": "D", "cross": "X"}
HATCHES = {"": "", ".": "..", "/": "///", "x": "xxx", "\\": "\\\\\\"}
REFERENCE: dict[str, Any] = {"color": look.INK, "linewidth": 1, "linestyle": ":"}
STYLE: list[Any] = [
    "default",
    {
        "font.family": "DejaVu Sans",
        "font.size": 9.5,
        "text.parse_math": False,
        "text.color": look.INK,
        "axes.labelcolor": look.INK,
        "axes.edgecolor": look.FAINT,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "axes.axisbelow": True,
        "axes.formatter.useoffset": False,
        "grid.color": look.GRID[0],
        "grid.alpha": look.GRID[1],
        "xtick.color": look.FAINT,
        "ytick.color": look.FAINT,
        "xtick.labelcolor": look.INK,
        "ytick.labelcolor": look.INK,
        "hatch.linewidth": 0.6,
        "legend.frameon": False,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "savefig.facecolor": "none",
    },
]
Handles = dict[tuple[str, str], Any]


def picture_of(title: str | None, charts: tuple[ChartData, ...], columns: int) -> bytes:
    """One picture of all charts, row by row, with one legend; `title` None takes the only chart's."""
    rows = math.ceil(len(charts) / columns)
    height = look.height_of(charts[0]) if title is None else 80 + look.PANEL_HEIGHT_PX * rows
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(look.WIDTH_PX / DPI, height / DPI), dpi=DPI, layout="constrained")
        styles = look.looks(s for chart in charts for s in chart.series)
        handles: Handles = {}
        for i, chart in enumerate(charts):
            axes = figure.add_subplot(rows, columns, i + 1)
            handles |= _chart(axes, chart, styles, columns)
        if title is not None:
            figure.suptitle("\n".join(look.lines_of(title)), x=0.01, ha="left", fontsize=12)
        if labelled := {} if title else look.end_labels(charts[0]):
            _label(figure.axes[0], charts[0], styles, labelled)
            handles = {key: handle for key, handle in handles.items() if key[0] == "band"}
        _legend(figure, handles, below=title is not None or bool(labelled), least=1 if labelled else 2)
        return png_of(figure)


def _chart(axes: Axes, chart: ChartData, styles: dict[str, Look], columns: int) -> Handles:
    _axes(axes, chart, columns)
    handles = _bands(axes, chart, columns)
    for line in chart.lines:
        _reference(axes, line.value, line.label, chart.anchor(line.value) if chart.names else None)
    for line in chart.x_lines:
        _x_reference(axes, line.value, line.label)
    for place in chart.places():
        drawn, style = place.series.drawn(), styles[place.series.name]
        handles["series", drawn.name] = _rows(axes, drawn, style, place) if chart.names else _curve(axes, drawn, style)
    return handles


def _label(axes: Axes, chart: ChartData, styles: dict[str, Look], places: dict[str, float]) -> None:
    """Each line's name beside its end, a lone point's beside the point, in its own color."""
    for s in chart.series:
        where, at = ((s.x[0], s.y[0]), "data") if look.is_point(s) else ((1, places[s.name]), "axes fraction")
        text: dict[str, Any] = {"color": styles[s.name].color, "va": "center", "fontsize": 8.5}
        axes.annotate(look.label_of(s), where, (7, 0), xycoords=at, textcoords="offset points", **text)


def _axes(axes: Axes, chart: ChartData, columns: int) -> None:
    named_lines = bool(chart.names and chart.lines)  # whose labels stand between title and axes
    title, size = "\n".join(look.lines_of(chart.title, columns, chart.names)), 12 if columns == 1 else 10.5
    axes.set_title(title, pad=20 if named_lines else 8, fontsize=size)
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    axes.set_xlim(*chart.x_limits())
    axes.set_ylim(*chart.y_limits())
    axes.grid(axis="x" if chart.names else "both")
    if chart.names:
        axes.set_yticks(range(len(chart.names)), chart.names)
        axes.tick_params(axis="y", length=0)


def _bands(axes: Axes, chart: ChartData, columns: int) -> Handles:
    low, high = chart.x_limits()
    handles: Handles = {}
    for band in chart.bands:
        tint = look.tint(band.label)
        fill: dict[str, Any] = {
            "facecolor": to_rgba(tint.color, tint.opacity),
            "edgecolor": to_rgba(tint.color, look.HATCH_OPACITY),
            "hatch": HATCHES[tint.hatch],
            "linewidth": 0,
        }
        axes.axvspan(band.start, band.end, zorder=0.5, **fill)
        handles["band", band.label] = Patch(**fill)
        middle, text = (band.start + band.end) / 2, look.band_text(band, high - low, columns)
        axes.text(middle, 0.985, text, transform=axes.get_xaxis_transform(), ha="center", va="top", fontsize=8.5)
    return handles


def _reference(axes: Axes, value: float, label: str, anchor: str | None) -> None:
    text: dict[str, Any] = {"va": "bottom", "fontsize": 8.5}
    if anchor:
        axes.axvline(value, zorder=2.5, **REFERENCE)
        axes.text(value, 1.01, label, transform=axes.get_xaxis_transform(), ha=anchor, **text)
    else:
        axes.axhline(value, **REFERENCE)
        axes.text(1, value, label, transform=axes.get_yaxis_transform(), ha="right", clip_on=True, **text)


def _x_reference(axes: Axes, value: float, label: str) -> None:
    axes.axvline(value, **REFERENCE)
    where: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "ha": "right", "va": "bottom", "clip_on": True}
    axes.text(value, 0.02, label, rotation=90, fontsize=8.5, **where)


def _curve(axes: Axes, s: Series, style: Look) -> Any:
    bounds = s.bounds()
    if bounds and s.kind == "line":
        axes.fill_between(s.x, *bounds, color=style.color, alpha=0.18, linewidth=0)
    if bounds and s.kind == "points":
        axes.vlines(s.x, *bounds, color=style.color)
    if s.kind == "points":
        return axes.plot(s.x, s.y, **_points(style, len(s.x)))[0]
    marks = {} if len(s.x) > 30 else _points(style, len(s.x))
    stroke = {"color": style.color, "linestyle": DASHES[style.dash], "linewidth": 0.9 * style.width}
    return axes.plot(s.x, s.y, **marks | stroke)[0]


def _rows(axes: Axes, s: Series, style: Look, place: Place) -> Any:
    rows = [y + place.offset for y in s.y]
    if s.kind == "bar":
        return _bars(axes, s, rows, style, place)
    if bounds := s.bounds():
        axes.hlines(rows, *bounds, color=style.color, linewidth=2)
    return axes.plot(s.x, rows, **_points(style, len(s.x)))[0]


def _bars(axes: Axes, s: Series, rows: list[float], style: Look, place: Place) -> Any:
    hatch = HATCHES[look.hatch(s, style)]
    fill: dict[str, Any] = {"color": style.color, "hatch": hatch, "edgecolor": look.PAPER, "linewidth": 0.6 * s.stack}
    bars = axes.barh(rows, s.x, left=place.base, height=place.thickness * 0.92, zorder=2, **fill)
    if place.topmost:
        ends = [f"{start + x:.4g}" for start, x in zip(place.base, s.x, strict=True)]
        axes.bar_label(bars, labels=ends, padding=3, fontsize=8.5, zorder=3)
    return bars


def _points(style: Look, count: int) -> dict[str, Any]:
    face = "none" if style.hollow else style.color
    shape = {"marker": MARKERS[style.marker], "markersize": look.marker_size(count), "markerfacecolor": face}
    return shape | {"markeredgecolor": style.color, "color": style.color, "linestyle": "none"}


def _legend(figure: Figure, handles: Handles, *, below: bool, least: int) -> None:
    """Series first, bands after them; fewer than `least` need no legend, as a lone series, which the title names."""
    ordered = sorted(handles, key=lambda key: key[0] == "band")
    if len(ordered) < least:
        return
    where = {"loc": "outside lower left", "ncols": 5} if below else {"loc": "outside right upper"}
    figure.legend([handles[key] for key in ordered], [name for _, name in ordered], handlelength=2.6, **where)


def png_of(figure: Figure) -> bytes:
    """The picture of a figure, with a palette of its own, a third of the size of full color."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    picture = Image.open(drawn).convert("RGBA").quantize(128, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
