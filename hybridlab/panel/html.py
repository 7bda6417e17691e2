"""The gauges of the live panel, as HTML: what they show is a state, how they look is a function of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from html import escape
from importlib.resources import files

from hybridlab.engine.phases import Phase
from hybridlab.engine.result import Statistics
from hybridlab.panel.progress import clock
from hybridlab.panel.timeline import Timeline
from hybridlab.results.bounds import SAFE_PEAK_BYTES

LIMIT_BYTES = SAFE_PEAK_BYTES
"""The line that the panel draws."""

ARC = "M15 100 A85 85 0 0 1 185 100"


@dataclass(frozen=True)
class Memory:
    """Memory as the gauge shows it, in bytes.

    of_card: on a card; else the figures are the process's own, of the machine's memory
    used_bytes: by everybody on the card, or by the process; peak_bytes: the run's own, so far
    allocated_bytes, reserved_bytes: by torch; other_bytes: beyond torch's reserve; None where it is not known
    """

    of_card: bool
    total_bytes: int
    used_bytes: int
    peak_bytes: int
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    other_bytes: int | None = None


@dataclass(frozen=True)
class State:
    """Everything that the panel shows.

    title: of the run; status: "running", "paused", "stopped" or "finished"; phase: of the latest step
    step, steps: nominal, of the run; done, total: of everything that the cell trains
    losses: in nats; None where nothing was measured yet
    rate: of work done by gradient steps, in `unit` a second; step_ms: by phase, for phases that were met
    card_busy_percent: of the time the card computed, lately; None where nobody says it
    seconds_left: None while it cannot be said; note: the latest event
    """

    title: str
    status: str
    phase: str
    step: int
    steps: int
    memory: Memory
    timeline: Timeline
    statistics: Statistics
    done: int = 0
    total: int = 0
    measured_loss: float | None = None
    predicted_loss: float | None = None
    validation_loss: float | None = None
    rate: float | None = None
    unit: str = "tokens"
    step_ms: Mapping[str, float] = field(default_factory=dict)
    card_busy_percent: float | None = None
    seconds_left: float | None = None
    note: str = ""


def draw(state: State, picture: str) -> str:
    """The whole panel, its style included, for any page; one that takes styles away shows the picture instead.

    picture: the address of an image of the same state
    """
    instead = f"<img class='hl-unstyled' src='{picture}' alt='{escape(state.title, quote=True)}'>"
    return f"{style()}<div class='hl-styled' hidden='hidden'>{draw_panel(state)}</div>{instead}"


def draw_panel(state: State) -> str:
    """The panel for a page that has its style already."""
    cards = "".join((_memory(state.memory), _loss(state), _speed(state), _counts(state.statistics)))
    return (
        f"<div class='hl'>{_head(state)}{_way(state.step, state.steps)}"
        f"<div class='hl-cards'>{cards}</div>{_time_line(state)}{_note(state)}</div>"
    )


def draw_bar(label: str, done: int, total: int, status: str, seconds_left: float | None) -> str:
    """A bar alone, for runs whose gauges cannot be read; `label` names the one under way, the counts are of them all.

    For a page that has its style already.

    status: "running", "stopped" or "finished"; seconds_left: None while it cannot be said
    """
    left = _time_left(seconds_left) if status == "running" else ""
    return (
        f"<div class='hl'><div class='hl-head'><span class='hl-title'>{escape(label)}</span>"
        f"<span class='hl-status'><b>{status}</b> · step <b>{done:,}</b> of {total:,} in all{left}</span></div>"
        f"{_way(done, total)}</div>"
    )


@cache
def style() -> str:
    """How panels and bars look, which a page must be told once."""
    sheet = files("hybridlab.panel").joinpath("gauges.css").read_text(encoding="utf-8")
    return f"<style>{sheet}</style>"


def _way(done: int, total: int) -> str:
    return f"<div class='hl-way'><div style='width:{100 * done / total:.1f}%'></div></div>"


def _note(state: State) -> str:
    """The latest event; while a run goes on, its place is kept, so that the panel does not grow when one comes."""
    if state.status == "finished" and not state.note:
        return ""
    return f"<div class='hl-note'>{escape(state.note)}</div>"


# --- the head ------------------------------------------------------------------------------------------------


def _head(state: State) -> str:
    lamps = "".join(
        f"<span class='hl-lamp hl-{phase}{' on' if phase == state.phase else ''}'>{phase.capitalize()}</span>"
        for phase in Phase
    )
    return (
        f"<div class='hl-head'><span class='hl-title'>{escape(state.title)}</span>"
        f"<span class='hl-lamps'>{lamps}</span><span class='hl-status'><b>{state.status}</b> · "
        f"step <b>{state.step:,}</b> of {state.steps:,}{_of_the_cell(state)}</span></div>"
    )


def _of_the_cell(state: State) -> str:
    """What the cell trains, where that is more than the run whose step stands before it; and the time left for it."""
    counts = f" · {state.done:,} of {state.total:,} in all" if state.total > state.steps else ""
    if state.status in ("stopped", "finished"):
        return counts
    part = " in this cell" if 0 < state.total < state.steps else ""
    return counts + _time_left(state.seconds_left) + part


def _time_left(seconds: float | None) -> str:
    return " · time left unknown" if seconds is None else f" · <b>{clock(seconds)}</b> left"


# --- the cards -----------------------------------------------------------------------------------------------


def _card(name: str, *content: str) -> str:
    return f"<div class='hl-card'><div class='hl-name'>{name}</div>{''.join(content)}</div>"


def _big(value: str, unit: str) -> str:
    return f"<div class='hl-big'>{value} <small>{unit}</small></div>"


def _row(name: str, value: str, key: str = "", *, off: bool = False) -> str:
    return f"<div class='hl-row{' off' if off else ''}'>{key}<span>{name}</span><span>{value}</span></div>"


def _key(color: str, kind: str = "") -> str:
    return f"<i class='hl-key {kind}' style='--at:var(--{color})'></i>"


def _memory(memory: Memory) -> str:
    """An arc from nothing to all of it, in parts, with the line and the peak as ticks."""
    total = memory.total_bytes
    arc = [f"<path d='{ARC}' stroke='var(--well)'/>"]
    start = 0.0
    for color, size in _parts(memory):
        share = 100 * min(size / total, 1.0)
        arc.append(_stretch(start, share, f"var(--{color})"))
        start += share
    if memory.of_card and total > LIMIT_BYTES:
        arc.append(_stretch(100 * LIMIT_BYTES / total - 0.5, 1.0, "var(--limit)", width=23))
    arc.append(_stretch(100 * min(memory.peak_bytes / total, 0.995) - 0.4, 0.8, "var(--ink)"))
    used = f"<text x='100' y='82'>{memory.used_bytes / 1e9:.2f}</text>"
    of = f"<text class='of' x='100' y='100'>of {total / 1e9:.1f} GB</text>"
    name = "Card memory" if memory.of_card else "Process memory (no GPU)"
    return _card(name, f"<svg class='hl-arc' viewBox='0 0 200 106'>{''.join(arc)}{used}{of}</svg>", *_figures(memory))


def _stretch(start: float, length: float, color: str, width: int = 15) -> str:
    dashes = f"stroke-dasharray='{length:.2f} 300' stroke-dashoffset='{-start:.2f}'"
    return f"<path d='{ARC}' pathLength='100' stroke='{color}' style='stroke-width:{width}' {dashes}/>"


def _parts(memory: Memory) -> Iterable[tuple[str, int]]:
    if memory.allocated_bytes is None or memory.reserved_bytes is None:
        return [("memory", memory.used_bytes)]
    spare = memory.reserved_bytes - memory.allocated_bytes
    return [("memory", memory.allocated_bytes), ("reserved", spare), ("other", memory.other_bytes or 0)]


def _figures(memory: Memory) -> Iterable[str]:
    if memory.of_card:
        yield _row("allocated by torch", _gb(memory.allocated_bytes), _key("memory"))
        yield _row("reserved by torch", _gb(memory.reserved_bytes), _key("reserved"))
        yield _row("other", _gb(memory.other_bytes), _key("other"))
    yield _row("peak so far", _gb(memory.peak_bytes), _key("ink"))
    if memory.of_card:
        room = LIMIT_BYTES - memory.peak_bytes
        yield _row("14 GB line", f"{_gb(abs(room))} {'below' if room >= 0 else 'above'}", _key("limit"))


def _gb(size: int | None) -> str:
    return "unavailable" if size is None else f"{size / 1e9:.2f} GB"


def _loss(state: State) -> str:
    return _card(
        f"{_key('measured', 'line')} Training loss, measured",
        _big(_nats(state.measured_loss), "nats"),
        _row("predicted", _nats(state.predicted_loss), _key("predicted", "line dash"), off=not state.predicted_loss),
        _row("validation", _nats(state.validation_loss), off=state.validation_loss is None),
    )


def _nats(loss: float | None) -> str:
    return "–" if loss is None else f"{loss:.4f}"


def _speed(state: State) -> str:
    slowest = max(state.step_ms.values(), default=1.0)
    rows = []
    for phase in Phase:
        ms = state.step_ms.get(phase)
        bar = f"<span class='hl-bar'><i style='width:{100 * (ms or 0) / slowest:.0f}%'></i></span>"
        value = "–" if ms is None else f"{_figure(ms)} ms"
        rows.append(
            f"<div class='hl-row hl-{phase}{'' if ms else ' off'}'><span style='width:56px'>{phase.capitalize()}</span>"
            f"{bar}<span style='min-width:58px;text-align:right'>{value}</span></div>"
        )
    rate = "–" if state.rate is None else f"{_figure(state.rate)}"
    if state.card_busy_percent is not None:
        rows.append(_row("card busy", f"{state.card_busy_percent:.0f}%"))
    return _card("Speed, and time of a step", _big(rate, f"{state.unit} / s"), *rows)


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _counts(statistics: Statistics) -> str:
    saved, nominal = statistics.predicted_steps, statistics.nominal_steps
    return _card(
        "Gradient steps saved",
        _big(f"{saved:,}", f"of {nominal:,} ({saved / nominal:.0%})" if nominal else ""),
        _row("gradient steps taken", f"{statistics.gradient_steps:,}"),
        _row("forwards without backward", f"{statistics.forward_only_passes:,}"),
        _row("proposals accepted", f"{statistics.proposals_accepted:,}"),
        _row("proposals rejected", f"{statistics.proposals_rejected:,}"),
        _row("jumps taken back", f"{statistics.rollbacks:,}"),
    )


# --- the time line -------------------------------------------------------------------------------------------


def _time_line(state: State) -> str:
    """Loss above, memory below, the phases behind both and as a ribbon between them."""
    line = state.timeline
    bands = "".join(
        f"<div class='hl-band hl-{phase}' style='left:{100 * start:.2f}%;width:{100 * (end - start):.2f}%'></div>"
        for phase, start, end in line.bands()
    )
    measured, predicted = line.series("measured_loss"), line.series("predicted_loss")
    low, high = _range([value for _, value in measured + predicted])
    curves = _curve(measured, low, high, "measured") + _predicted(predicted, low, high, line.width)
    memory, most = line.series("memory_bytes"), _most(state)
    return (
        f"<div class='hl-time'>{_scale({high: 8, low: 92}, '{:.2f}', 'loss')}"
        f"<div class='hl-track loss'>{bands}{_svg(curves)}</div>"
        f"<div class='hl-scale'><span style='top:50%'>phase</span></div><div class='hl-track ribbon'>{bands}</div>"
        f"{_scale({most / 1e9: 14, 0: 88}, '{:.3g}', 'GB')}"
        f"<div class='hl-track memory'>{bands}{_svg(_area(memory, most) + _limit(state, most))}</div>"
        f"<div class='hl-steps'><span>0</span><span>nominal steps</span><span>{state.steps:,}</span></div></div>"
    )


def _scale(values: Mapping[float, int], style: str, unit: str) -> str:
    marks = "".join(f"<span style='top:{top}%'>{style.format(value)}</span>" for value, top in values.items())
    return f"<div class='hl-scale'>{marks}<span style='top:50%'>{unit}</span></div>"


def _range(values: list[float]) -> tuple[float, float]:
    """What the values take; half a unit to each side of a single one."""
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _curve(points: Iterable[tuple[float, float]], low: float, high: float, color: str, more: str = "") -> str:
    drawn = " ".join(f"{1000 * x:.0f},{8 + 84 * (high - y) / (high - low):.1f}" for x, y in points)
    return f"<polyline points='{drawn}' stroke='var(--{color})' {more}/>"


def _predicted(points: list[tuple[float, float]], low: float, high: float, width: int) -> str:
    """A dashed line a jump, so that none leads from one jump to the next."""
    jumps: list[list[tuple[float, float]]] = []
    for point in points:
        if jumps and point[0] - jumps[-1][-1][0] < 1.5 / width:
            jumps[-1].append(point)
        else:
            jumps.append([point])
    return "".join(
        _curve(
            [(jump[0][0] - 0.5 / width, jump[0][1]), *jump, (jump[-1][0] + 0.5 / width, jump[-1][1])],
            low,
            high,
            "predicted",
            "stroke-dasharray='5 3'",
        )
        for jump in jumps
    )


def _area(points: list[tuple[float, float]], most: float) -> str:
    if not points:
        return ""
    path = " ".join(f"{1000 * x:.0f},{100 - 86 * y / most:.1f}" for x, y in _corners(points))
    first, last = 1000 * points[0][0], 1000 * points[-1][0]
    fill = f"<polygon points='{first:.0f},100 {path} {last:.0f},100' fill='var(--memory)' fill-opacity='.25'/>"
    return f"{fill}<polyline points='{path}' stroke='var(--memory)'/>"


def _corners(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points without those amid a level stretch, of which memory has long ones."""
    heights = [None, *(y for _, y in points), None]
    around = zip(heights, heights[2:], strict=False)
    return [point for point, (before, after) in zip(points, around, strict=True) if not before == point[1] == after]


def _most(state: State) -> float:
    """The top of the memory scale: the peak, or the line where the peak comes near it."""
    peak = max(state.memory.peak_bytes, state.memory.used_bytes, 1)
    near = state.memory.of_card and peak > LIMIT_BYTES / 2
    return float(max(peak, LIMIT_BYTES)) if near else float(peak)


def _limit(state: State, most: float) -> str:
    if not state.memory.of_card or most < LIMIT_BYTES:
        return ""
    y = 100 - 86 * LIMIT_BYTES / most
    return f"<line x1='0' x2='1000' y1='{y:.1f}' y2='{y:.1f}' stroke='var(--limit)' stroke-dasharray='6 4'/>"


def _svg(content: str) -> str:
    return f"<svg viewBox='0 0 1000 100' preserveAspectRatio='none'>{content}</svg>"
