"""Draw charts as one plotly figure: plain lists, no template, on the page's own ground, light or dark."""

from __future__ import annotations

import html
import math
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from hybridlab.charts import style as look
from hybridlab.charts.model import ChartData, Place, Series, rounded
from hybridlab.charts.style import Look


def _faded(color: str, opacity: float) -> str:
    r, g, b = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({r},{g},{b},{opacity})"


HATCHED = {"fillmode": "overlay", "fgcolor": look.PAPER, "size": 9, "solidity": 0.15}
CLEAR = "rgba(0,0,0,0)"
HINT = "interactive: point at a line for its values, drag to zoom, double-click to zoom out"
REFERENCE = {"color": look.INK, "width": 1, "dash": "dot"}
MARKERS = {"triangle": "triangle-up", "cross": "x"}
AXIS = {
    "gridcolor": _faded(*look.GRID),
    "linecolor": look.FAINT,
    "tickcolor": look.FAINT,
    "showline": True,
    "ticks": "outside",
    "zeroline": False,
    "automargin": True,
}


def figure_of(title: str | None, charts: tuple[ChartData, ...], columns: int) -> go.Figure:
    """One figure of all charts, row by row, with one legend; `title` None takes the only chart's."""
    rows = math.ceil(len(charts) / columns)
    height = look.height_of(charts[0]) if title is None else 130 + look.PANEL_HEIGHT_PX * rows
    gaps = {"horizontal_spacing": _gap(charts, columns), "vertical_spacing": 0.3 / rows}
    figure = make_subplots(rows=rows, cols=columns, **gaps)
    styles = look.looks(s for chart in charts for s in chart.series)
    for i, chart in enumerate(charts):
        cell = {"row": i // columns + 1, "col": i % columns + 1}
        figure.add_traces(_traces(chart, styles), rows=cell["row"], cols=cell["col"])
        _axes(figure, chart, cell)
        _notes(figure, chart, cell, columns, titled=title is not None)
    labelled = {} if title else look.end_labels(charts[0])
    _one_legend(figure, hidden={f"series {s.name}" for s in charts[0].series} if labelled else set())
    below = title is not None or bool(labelled and charts[0].bands)
    figure.update_layout(_layout(charts[0].title if title is None else title, height, below, len(charts) > 1))
    if labelled:
        _label(figure, charts[0], styles, labelled)
    _hint(figure)
    return figure


def _label(figure: go.Figure, chart: ChartData, styles: dict[str, Look], places: dict[str, float]) -> None:
    """Each line's name beside its end, a lone point's beside the point, in its own color."""
    for s in chart.series:
        where: dict[str, Any] = {"x": 1, "xref": "paper", "y": places.get(s.name, 0), "yref": "paper"}
        if look.is_point(s):
            where = {"x": s.x[0], "y": s.y[0]}
        font = {"size": 11.5, "color": styles[s.name].color}
        beside = {"xanchor": "left", "yanchor": "middle", "xshift": 7, "showarrow": False}
        figure.add_annotation(text=_plain(look.label_of(s)), font=font, **beside, **where)
    longest = max((len(look.label_of(s)) for s in chart.series if not look.is_point(s)), default=0)
    figure.update_layout(margin={"r": 20 + 6.6 * longest})


def _hint(figure: go.Figure) -> None:
    """Say that the figure answers to the pointer; a picture of it does not say so."""
    where = {"x": 1, "xref": "paper", "xanchor": "right", "y": 0, "yref": "paper", "yanchor": "bottom"}
    down = 4 - figure.layout.margin.b
    figure.add_annotation(text=HINT, showarrow=False, font={"size": 10, "color": look.FAINT}, yshift=down, **where)


def _gap(charts: tuple[ChartData, ...], columns: int) -> float:
    """Room between panels, as a share of the width, for tick labels, axis titles and names of rows."""
    longest = max((len(name) for chart in charts for name in chart.names), default=8)
    return min(0.03 + 0.0075 * longest, 0.5 / columns)


def _layout(title: str, height: int, legend_below: bool, panels: bool) -> dict[str, Any]:
    below = {"orientation": "h", "x": 0, "xanchor": "left", "y": 0, "yanchor": "bottom", "yref": "container"}
    return {
        "template": "none",
        "title": {"text": _lines(title), "font": {"size": 16}, "x": 0.01, "y": 0.97, "yanchor": "top"},
        "font": {"color": look.INK, "size": 12, "family": "Helvetica, Arial, sans-serif"},
        "height": height,
        "margin": {"l": 60, "r": 20, "t": 72 if panels else 50, "b": 90 if legend_below else 72},
        "paper_bgcolor": CLEAR,
        "plot_bgcolor": CLEAR,
        "hovermode": "closest",
        "barmode": "overlay",
        "legend": {"tracegroupgap": 0} | (below if legend_below else {"x": 1.02, "y": 1}),
    }


def _traces(chart: ChartData, styles: dict[str, Look]) -> list[Any]:
    traces = _bands(chart)
    for place in chart.places():
        drawn, style = place.series.drawn(), styles[place.series.name]
        if chart.names:
            traces += _row_traces(chart, drawn, style, place)
        else:
            traces += _curve_traces(drawn, style)
    return traces


def _curve_traces(s: Series, style: Look) -> list[Any]:
    common = _common(s.name, style, len(s.x))
    traces: list[Any] = []
    if (bounds := s.bounds()) and s.kind == "line":
        traces.append(_ribbon(s.x, bounds[0], bounds[1], style, s.name))
    if bounds and s.kind == "points":
        traces.append(_segments(s.x, s.x, bounds[0], bounds[1], style, s.name))
    mode = "markers" if s.kind == "points" else "lines" if len(s.x) > 30 else "lines+markers"
    return [*traces, go.Scatter(x=list(s.x), y=list(s.y), mode=mode, **common)]


def _row_traces(chart: ChartData, s: Series, style: Look, place: Place) -> list[Any]:
    rows = [round(y + place.offset, 4) for y in s.y]
    common = _common(s.name, style, len(s.x)) | {"text": [_plain(chart.names[int(y)]) for y in s.y]}
    common["hovertemplate"] = "%{text}: %{x}<extra></extra>"
    if s.kind == "bar":
        hatch = look.hatch(s, style)
        marker: dict[str, Any] = {"color": style.color, "pattern": HATCHED | {"shape": hatch} if hatch else {}}
        if s.stack:
            marker |= {"line": {"color": look.PAPER, "width": 0.6}}
            common["base"] = rounded(place.base)
            common["customdata"], common["hovertemplate"] = list(s.x), f"%{{text}}, {_plain(s.name)}: %{{customdata}}"
        common = {k: v for k, v in common.items() if k != "line"} | {"marker": marker, "textposition": "none"}
        return [go.Bar(x=list(s.x), y=rows, width=place.thickness * 0.92, orientation="h", **common)]
    bounds = s.bounds()
    segments = [_segments(bounds[0], bounds[1], rows, rows, style, s.name)] if bounds else []
    return [*segments, go.Scatter(x=list(s.x), y=rows, mode="markers", **common)]


def _common(name: str, style: Look, count: int) -> dict[str, Any]:
    symbol = MARKERS.get(style.marker, style.marker) + ("-open" if style.hollow else "")
    marker = {"symbol": symbol, "size": look.marker_size(count) * 1.4, "color": style.color}
    return {
        "name": _plain(name),
        "legendgroup": f"series {name}",
        "line": {"color": style.color, "dash": style.dash, "width": style.width},
        "marker": marker | {"line": {"color": style.color, "width": 1.5}},
        "hovertemplate": f"{_plain(name)}<br>%{{x}}: %{{y}}<extra></extra>",
    }


def _ribbon(x: Any, low: Any, high: Any, style: Look, name: str) -> go.Scatter:
    outline = {"x": [*x, *reversed(x)], "y": [*low, *reversed(high)]}
    fill = {"fill": "toself", "fillcolor": _faded(style.color, 0.18)}
    return go.Scatter(**outline, mode="none", **fill, **_silent(f"series {name}"))


def _segments(x0: Any, x1: Any, y0: Any, y1: Any, style: Look, name: str) -> go.Scatter:
    x = [v for pair in zip(x0, x1, strict=True) for v in (*pair, None)]
    y = [v for pair in zip(y0, y1, strict=True) for v in (*pair, None)]
    line = {"color": style.color, "width": 2}
    return go.Scatter(x=x, y=y, mode="lines", line=line, **_silent(f"series {name}"))


def _silent(group: str) -> dict[str, Any]:
    return {"legendgroup": group, "showlegend": False, "hoverinfo": "skip"}


def _bands(chart: ChartData) -> list[Any]:
    """One filled trace per label, so that the legend shows it once and can hide it."""
    low, high = chart.y_limits()
    labels = dict.fromkeys(band.label for band in chart.bands)
    traces = []
    for label in labels:
        edges = [(b.start, b.end) for b in chart.bands if b.label == label]
        x = [v for a, b in edges for v in (a, a, b, b, a, None)]
        y = [v for _ in edges for v in (low, high, high, low, low, None)]
        tint = look.tint(label)
        color = _faded(tint.color, tint.opacity)
        pattern: dict[str, Any] = {
            "shape": tint.hatch,
            "fgcolor": _faded(tint.color, look.HATCH_OPACITY),
            "bgcolor": color,
        }
        pattern |= {"size": 7, "solidity": 0.15}
        fill = {"fill": "toself", "fillcolor": color, "fillpattern": pattern, "hoverinfo": "skip"}
        name = {"name": _plain(label), "legendgroup": f"band {label}", "legendrank": 2000}
        traces.append(go.Scatter(x=x, y=y, mode="lines", line={"width": 0, "color": color}, **fill, **name))
    return traces


def _axes(figure: go.Figure, chart: ChartData, cell: dict[str, int]) -> None:
    def axis(label: str) -> dict[str, Any]:
        return AXIS | {"title": {"text": _plain(label), "standoff": 8}}

    y: dict[str, Any] = {"range": list(chart.y_limits())}
    if chart.names:
        ticks = {"tickvals": list(range(len(chart.names))), "ticktext": [_plain(n) for n in chart.names]}
        y |= ticks | {"showgrid": False, "ticks": ""}
    figure.update_xaxes(axis(chart.x_label) | {"range": list(chart.x_limits())}, **cell)
    figure.update_yaxes(axis(chart.y_label) | y, **cell)


def _notes(figure: go.Figure, chart: ChartData, cell: dict[str, int], columns: int, titled: bool) -> None:
    """Everything written onto the chart: the panel's title, the bands' labels, reference lines, bar ends."""
    if titled:
        text = f"<b>{_lines(chart.title, columns)}</b>"
        _note(figure, cell, text, x=0, y=1, xref="x domain", yref="y domain", xanchor="left", yanchor="bottom")
    _band_notes(figure, chart, cell, columns)
    for line in chart.lines:
        _reference(figure, chart, cell, line.value, _plain(line.label))
    for line in chart.x_lines:
        figure.add_vline(line.value, line=REFERENCE, **cell)
        beside = {"xanchor": "right", "yanchor": "bottom", "textangle": -90}
        _note(figure, cell, _plain(line.label), x=line.value, y=0, yref="y domain", **beside)
    for place in chart.places():
        if place.series.kind == "bar" and place.topmost:
            for start, length, y in zip(place.base, place.series.x, place.series.y, strict=True):
                x = start + length
                where = {"x": x, "y": y + place.offset, "xanchor": "left" if x >= 0 else "right", "yanchor": "middle"}
                _note(figure, cell, f"{x:.4g}", borderpad=0, xshift=3 if x >= 0 else -3, **where)


def _band_notes(figure: go.Figure, chart: ChartData, cell: dict[str, int], columns: int) -> None:
    low, high = chart.x_limits()
    for band in chart.bands:
        if text := look.band_text(band, high - low, columns):
            middle = round((band.start + band.end) / 2, 4)
            _note(figure, cell, _plain(text), x=middle, y=1, yref="y domain", xanchor="center", yanchor="top")


def _reference(figure: go.Figure, chart: ChartData, cell: dict[str, int], value: float, label: str) -> None:
    if chart.names:
        where = {"x": value, "y": 1, "yref": "y domain", "xanchor": chart.anchor(value), "yanchor": "bottom"}
        figure.add_vline(value, line=REFERENCE, **cell)
    else:
        where = {"x": 1, "y": value, "xref": "x domain", "xanchor": "right", "yanchor": "bottom"}
        figure.add_hline(value, line=REFERENCE, **cell)
    _note(figure, cell, label, **where)


def _note(figure: go.Figure, cell: dict[str, int], text: str, **where: Any) -> None:
    figure.add_annotation(text=text, showarrow=False, font={"size": 11, "color": look.INK}, **where, **cell)


def _one_legend(figure: go.Figure, hidden: set[str]) -> None:
    """Name each group once; a lone series needs no legend, its chart's title names it.

    hidden: groups that are named elsewhere
    """
    seen = set(hidden)
    for trace in figure.data:
        if trace.showlegend is not False:
            trace.showlegend = trace.legendgroup not in seen
            seen.add(trace.legendgroup)
    figure.update_layout(showlegend=len(seen - hidden) > (not hidden))


def _plain(text: str) -> str:
    return html.escape(text, quote=False)


def _lines(title: str, columns: int = 1) -> str:
    return "<br>".join(_plain(line) for line in look.lines_of(title, columns))
