"""The gauges of the live panel as HTML, a pure function of the state that they show."""

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

ARC = "M15 100 A85 85 0 0 1 185 100"


@dataclass(frozen=True)
class Memory:
    """Memory as the gauge shows it, in bytes.

    on_gpu: whether it is a GPU's; else the figures are the process's own, of the machine's memory
    used_bytes: by everybody on the GPU, or by the process
    peak_bytes: the run's own, so far
    allocated_bytes, reserved_bytes: by torch; other_bytes: beyond torch's reserve; None where it is not known
    """

    on_gpu: bool
    total_bytes: int
    used_bytes: int
    peak_bytes: int
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    other_bytes: int | None = None


@dataclass(frozen=True)
class Position:
    """How far a run has come, and the cell that trains it.

    phase: of the latest step; step, steps: nominal, of the run
    done, total: nominal steps of everything that the cell trains
    seconds_left: of the cell; None while it is not known
    """

    phase: str
    step: int
    steps: int
    done: int = 0
    total: int = 0
    seconds_left: float | None = None


@dataclass(frozen=True)
class Losses:
    """The latest losses in nats; None where nothing was measured yet."""

    measured: float | None = None
    predicted: float | None = None
    validation: float | None = None


@dataclass(frozen=True)
class Speed:
    """How fast a run trains.

    rate: work of gradient steps, in `unit` per second
    step_ms: mean time of a step by phase, for phases that were met
    gpu_busy_percent: share of the time in which the GPU computed, lately; None where it is not known
    """

    rate: float | None = None
    unit: str = "tokens"
    step_ms: Mapping[str, float] = field(default_factory=dict)
    gpu_busy_percent: float | None = None


@dataclass(frozen=True)
class State:
    """Everything that the panel shows.

    title: of the run; status: "running", "paused", "stopped" or "finished"; note: the latest event
    """

    title: str
    status: str
    position: Position
    memory: Memory
    timeline: Timeline
    statistics: Statistics
    losses: Losses = Losses()
    speed: Speed = Speed()
    note: str = ""


def near_limit(memory: Memory) -> bool:
    """Whether the 14 GB line belongs into a drawing of memory: on a GPU whose peak comes near it."""
    return memory.on_gpu and max(memory.peak_bytes, memory.used_bytes) > SAFE_PEAK_BYTES / 2


def frame_html(state: State, picture: str) -> str:
    """The whole panel, its style included, for any page; one that takes styles away shows the picture instead.

    picture: the address of an image of the same state
    """
    instead = f"<img class='hl-unstyled' src='{picture}' alt='{escape(state.title, quote=True)}'>"
    return f"{style_html()}<div class='hl-styled' hidden='hidden'>{panel_html(state)}</div>{instead}"


def panel_html(state: State) -> str:
    """The panel for a page that has its style already."""
    cards = (_memory(state.memory), _losses(state.losses), _speed(state.speed), _counts(state.statistics))
    return (
        f"<div class='hl'>{_head(state)}{_bar(state.position.step, state.position.steps)}"
        f"<div class='hl-cards'>{''.join(cards)}</div>{_timeline(state.timeline, state.memory)}{_note(state)}</div>"
    )


def bar_html(label: str, done: int, total: int, status: str, seconds_left: float | None) -> str:
    """A bar alone, for runs whose gauges cannot be read and a page that has the style already.

    label: names the run under way; done, total: nominal steps of all runs
    status: "running", "stopped" or "finished"; seconds_left: None while it is not known
    """
    left = _time_left(seconds_left) if status == "running" else ""
    return (
        f"<div class='hl'><div class='hl-head'><span class='hl-title'>{escape(label)}</span>"
        f"<span class='hl-status'><b>{status}</b> · step <b>{done:,}</b> of {total:,} in all{left}</span></div>"
        f"{_bar(done, total)}</div>"
    )


@cache
def style_html() -> str:
    """The style of panels and bars, which a page needs once."""
    sheet = files("hybridlab.panel").joinpath("gauges.css").read_text(encoding="utf-8")
    return f"<style>{sheet}</style>"


def _bar(done: int, total: int) -> str:
    return f"<div class='hl-progress'><div style='width:{100 * done / total:.1f}%'></div></div>"


def _note(state: State) -> str:
    """The latest event; an empty line while there is none, so that the panel does not grow when one comes."""
    if state.status == "finished" and not state.note:
        return ""
    return f"<div class='hl-note'>{escape(state.note)}</div>"


# --- the head ------------------------------------------------------------------------------------------------


def _head(state: State) -> str:
    at = state.position
    lamps = "".join(
        f"<span class='hl-lamp hl-{phase}{' on' if phase == at.phase else ''}'>{phase.capitalize()}</span>"
        for phase in Phase
    )
    return (
        f"<div class='hl-head'><span class='hl-title'>{escape(state.title)}</span>"
        f"<span class='hl-lamps'>{lamps}</span><span class='hl-status'><b>{state.status}</b> · "
        f"step <b>{at.step:,}</b> of {at.steps:,}{_of_the_cell(at, state.status)}</span></div>"
    )


def _of_the_cell(at: Position, status: str) -> str:
    """The steps of the whole cell, where it trains more than this run, and the time left for it."""
    counts = f" · {at.done:,} of {at.total:,} in all" if at.total > at.steps else ""
    if status in ("stopped", "finished"):
        return counts
    part = " in this cell" if 0 < at.total < at.steps else ""
    return counts + _time_left(at.seconds_left) + part


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
    """An arc from zero to the total, in parts, with the 14 GB line and the peak as ticks."""
    total = memory.total_bytes
    arc = [f"<path d='{ARC}' stroke='var(--well)'/>"]
    start = 0.0
    for color, size in _parts(memory):
        share = 100 * min(size / total, 1.0)
        arc.append(_stretch(start, share, f"var(--{color})"))
        start += share
    if memory.on_gpu and total > SAFE_PEAK_BYTES:
        arc.append(_stretch(100 * SAFE_PEAK_BYTES / total - 0.5, 1.0, "var(--limit)", width=23))
    arc.append(_stretch(100 * min(memory.peak_bytes / total, 0.995) - 0.4, 0.8, "var(--ink)"))
    used = f"<text x='100' y='82'>{memory.used_bytes / 1e9:.2f}</text>"
    of = f"<text class='of' x='100' y='100'>of {total / 1e9:.1f} GB</text>"
    name = "GPU memory" if memory.on_gpu else "Process memory (no GPU)"
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
    if memory.on_gpu:
        yield _row("allocated by torch", _gb(memory.allocated_bytes), _key("memory"))
        yield _row("reserved by torch", _gb(memory.reserved_bytes), _key("reserved"))
        yield _row("other", _gb(memory.other_bytes), _key("other"))
    yield _row("peak so far", _gb(memory.peak_bytes), _key("ink"))
    if memory.on_gpu:
        room = SAFE_PEAK_BYTES - memory.peak_bytes
        yield _row("14 GB line", f"{_gb(abs(room))} {'below' if room >= 0 else 'above'}", _key("limit"))


def _gb(size: int | None) -> str:
    return "unavailable" if size is None else f"{size / 1e9:.2f} GB"


def _losses(losses: Losses) -> str:
    return _card(
        f"{_key('measured', 'line')} Training loss, measured",
        _big(_nats(losses.measured), "nats"),
        _row("predicted", _nats(losses.predicted), _key("predicted", "line dash"), off=losses.predicted is None),
        _row("validation", _nats(losses.validation), off=losses.validation is None),
    )


def _nats(loss: float | None) -> str:
    return "–" if loss is None else f"{loss:.4f}"


def _speed(speed: Speed) -> str:
    slowest = max(speed.step_ms.values(), default=1.0)
    rows = []
    for phase in Phase:
        ms = speed.step_ms.get(phase)
        bar = f"<span class='hl-bar'><i style='width:{100 * (ms or 0) / slowest:.0f}%'></i></span>"
        value = "–" if ms is None else f"{_figure(ms)} ms"
        rows.append(
            f"<div class='hl-row hl-{phase}{'' if ms else ' off'}'><span style='width:56px'>{phase.capitalize()}</span>"
            f"{bar}<span style='min-width:58px;text-align:right'>{value}</span></div>"
        )
    rate = "–" if speed.rate is None else _figure(speed.rate)
    if speed.gpu_busy_percent is not None:
        rows.append(_row("GPU busy", f"{speed.gpu_busy_percent:.0f}%"))
    return _card("Speed, and time per step", _big(rate, f"{speed.unit} / s"), *rows)


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _counts(statistics: Statistics) -> str:
    saved, nominal = statistics.predicted_steps, statistics.nominal_steps
    return _card(
        "Gradient steps saved",
        _big(f"{saved:,}", f"of {nominal:,} ({saved / nominal:.0%})" if nominal else ""),
        _row("gradient steps taken", f"{statistics.gradient_steps:,}"),
        _row("forward-only passes", f"{statistics.forward_only_passes:,}"),
        _row("proposals accepted", f"{statistics.proposals_accepted:,}"),
        _row("proposals rejected", f"{statistics.proposals_rejected:,}"),
        _row("rollbacks", f"{statistics.rollbacks:,}"),
    )


# --- the timeline --------------------------------------------------------------------------------------------


def _timeline(line: Timeline, memory: Memory) -> str:
    """Loss above, memory below, the phases behind both and as a ribbon between them."""
    bands = "".join(
        f"<div class='hl-band hl-{phase}' style='left:{100 * start:.2f}%;width:{100 * (end - start):.2f}%'></div>"
        for phase, start, end in line.bands()
    )
    measured, predicted = line.series("measured_loss"), line.series("predicted_loss")
    low, high = _range([value for _, value in measured + predicted])
    curves = _curve(measured, low, high, "measured") + _predicted(predicted, low, high, line.width)
    top = _top_bytes(memory)
    used = _area(line.series("memory_bytes"), top) + _limit(memory, top)
    return (
        f"<div class='hl-time'>{_scale({high: 8, low: 92}, '{:.2f}', 'loss')}"
        f"<div class='hl-track loss'>{bands}{_svg(curves)}</div>"
        f"<div class='hl-scale'><span style='top:50%'>phase</span></div><div class='hl-track ribbon'>{bands}</div>"
        f"{_scale({top / 1e9: 14, 0: 88}, '{:.3g}', 'GB')}"
        f"<div class='hl-track memory'>{bands}{_svg(used)}</div>"
        f"<div class='hl-steps'><span>0</span><span>nominal steps</span><span>{line.steps:,}</span></div></div>"
    )


def _scale(values: Mapping[float, int], style: str, unit: str) -> str:
    marks = "".join(f"<span style='top:{top}%'>{style.format(value)}</span>" for value, top in values.items())
    return f"<div class='hl-scale'>{marks}<span style='top:50%'>{unit}</span></div>"


def _range(values: list[float]) -> tuple[float, float]:
    """The least and the greatest value; half a unit to each side of a single one."""
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _curve(points: Iterable[tuple[float, float]], low: float, high: float, color: str, more: str = "") -> str:
    drawn = " ".join(f"{1000 * x:.0f},{8 + 84 * (high - y) / (high - low):.1f}" for x, y in points)
    return f"<polyline points='{drawn}' stroke='var(--{color})' {more}/>"


def _predicted(points: list[tuple[float, float]], low: float, high: float, width: int) -> str:
    """A dashed line per jump, so that none leads from one jump to the next."""
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


def _area(points: list[tuple[float, float]], top: float) -> str:
    if not points:
        return ""
    path = " ".join(f"{1000 * x:.0f},{100 - 86 * y / top:.1f}" for x, y in _corners(points))
    first, last = 1000 * points[0][0], 1000 * points[-1][0]
    fill = f"<polygon points='{first:.0f},100 {path} {last:.0f},100' fill='var(--memory)' fill-opacity='.25'/>"
    return f"{fill}<polyline points='{path}' stroke='var(--memory)'/>"


def _corners(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points without those inside a level stretch, of which memory has long ones."""
    heights = [None, *(y for _, y in points), None]
    around = zip(heights, heights[2:], strict=False)
    return [point for point, (before, after) in zip(points, around, strict=True) if not before == point[1] == after]


def _top_bytes(memory: Memory) -> float:
    """The top of the memory scale: the peak, or the 14 GB line where the peak comes near it."""
    peak = float(max(memory.peak_bytes, memory.used_bytes, 1))
    return max(peak, SAFE_PEAK_BYTES) if near_limit(memory) else peak


def _limit(memory: Memory, top: float) -> str:
    if not memory.on_gpu or top < SAFE_PEAK_BYTES:
        return ""
    y = 100 - 86 * SAFE_PEAK_BYTES / top
    return f"<line x1='0' x2='1000' y1='{y:.1f}' y2='{y:.1f}' stroke='var(--limit)' stroke-dasharray='6 4'/>"


def _svg(content: str) -> str:
    return f"<svg viewBox='0 0 1000 100' preserveAspectRatio='none'>{content}</svg>"
