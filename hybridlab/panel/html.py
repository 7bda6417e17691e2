"""The live panel as HTML, a pure function of the state that it shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from html import escape
from importlib.resources import files

from matplotlib.ticker import MaxNLocator

from hybridlab.engine.phases import Phase
from hybridlab.engine.result import Statistics
from hybridlab.panel.progress import clock
from hybridlab.panel.timeline import Timeline
from hybridlab.results.bounds import SAFE_PEAK_BYTES
from hybridlab.study.study import label

HOVER_COLUMNS = 120
"""At most so many places of the loss curve tell their values under the pointer."""

Points = Sequence[tuple[float, float]]
"""(place as a share of the run, value)."""

Arms = Mapping[str, Mapping[int, float | None]]
"""Arm -> seed -> final validation loss in nats; None where the run has not finished."""


@dataclass(frozen=True)
class Memory:
    """Memory in bytes.

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
class State:
    """Everything that the panel shows; None where it is not known, or was not measured yet.

    title: of the run; status: "running", "paused", "stopped" or "finished"
    phase: of the latest step; step, steps: nominal, of the run
    note: the latest event
    done, total: nominal steps of everything that the cell trains, controls that may still be needed included
    seconds_left: of the cell
    measured, predicted, validation: the latest losses in nats
    rate: work of gradient steps, in `unit` per second; work: trained on so far, in `unit`; seconds: of training
    step_ms: mean time of a step by phase, for phases that were met
    gpu_busy_percent, power_watts, temperature_celsius: of the GPU, lately
    learning_rate, gradient_norm: of the latest gradient step, before clipping
    depth: blocks that are active, of a model whose depth grows
    threshold: the least confidence of a proposal, None for a plain run; confidence: of the path when it was last asked
    decision: what became of the latest proposal, in words
    baseline: the measured loss of the finished baseline of the same seed; arms: the cell's runs, where it has several
    """

    title: str
    status: str
    phase: str
    step: int
    steps: int
    memory: Memory
    timeline: Timeline
    statistics: Statistics
    note: str = ""
    done: int = 0
    total: int = 0
    seconds_left: float | None = None
    measured: float | None = None
    predicted: float | None = None
    validation: float | None = None
    rate: float | None = None
    unit: str = "tokens"
    work: int | None = None
    seconds: float | None = None
    step_ms: Mapping[str, float] = field(default_factory=dict)
    gpu_busy_percent: float | None = None
    power_watts: float | None = None
    temperature_celsius: float | None = None
    learning_rate: float | None = None
    gradient_norm: float | None = None
    depth: float | None = None
    threshold: float | None = None
    confidence: float | None = None
    decision: str = ""
    baseline: Points = ()
    arms: Arms = field(default_factory=dict)

    @property
    def phases(self) -> Sequence[Phase]:
        """Those that the run may be in."""
        return (Phase.WARMUP, Phase.FULL) if self.threshold is None else tuple(Phase)


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
    return (
        f"<div class='hl'>{_head(state)}{_bar(state.step, state.steps)}"
        f"{_losses(state)}{_timeline(state)}<div class='hl-cards'>{''.join(_cards(state))}</div>"
        f"<div class='hl-note'>{escape(state.note)}</div>{arms_html(state.arms, state.title)}</div>"
    )


def bar_html(
    label: str, done: int, total: int, status: str, seconds_left: float | None, arms: Arms | None = None
) -> str:
    """A bar alone, for runs whose gauges cannot be read and a page that has the style already.

    label: names the run under way; done, total: nominal steps of all runs
    status: "running", "stopped" or "finished"; seconds_left: None while it is not known
    """
    left = _time_left(seconds_left) if status == "running" else ""
    return (
        f"<div class='hl'><div class='hl-head'><span class='hl-title'>{escape(label)}</span>"
        f"<span class='hl-status'><b>{status}</b> · step <b>{done:,}</b> of {total:,} in all{left}</span></div>"
        f"{_bar(done, total)}{arms_html(arms or {}, label)}</div>"
    )


def ranks_html(memories: Mapping[int, Memory]) -> str:
    """A gauge for the memory of each of several ranks; nothing without them."""
    gauges = "".join(
        f"<div class='hl-name'>{'GPU' if memory.on_gpu else 'Process'} {rank}: {memory.used_bytes / 1e9:.2f} of "
        f"{memory.total_bytes / 1e9:.1f} GB, peak {memory.peak_bytes / 1e9:.2f}</div>"
        f"{_bar(memory.used_bytes, memory.total_bytes)}"
        for rank, memory in memories.items()
    )
    return f"<div class='hl'>{gauges}</div>" if gauges else ""


@cache
def style_html() -> str:
    """The style of panels and bars, which a page needs once."""
    sheet = files("hybridlab.panel").joinpath("gauges.css").read_text(encoding="utf-8")
    return f"<style>{sheet}</style>"


def _bar(done: int, total: int) -> str:
    return f"<div class='hl-progress'><div style='width:{100 * done / total:.1f}%'></div></div>"


# --- the head ------------------------------------------------------------------------------------------------


def _head(state: State) -> str:
    lamps = "".join(
        f"<span class='hl-lamp hl-{phase}{' on' if phase == state.phase else ''}'>{phase.capitalize()}</span>"
        for phase in state.phases
    )
    return (
        f"<div class='hl-head'><span class='hl-title'>{escape(state.title)}</span>"
        f"<span class='hl-lamps'>{lamps}</span></div><div class='hl-status'><b>{state.status}</b> · "
        f"step <b>{state.step:,}</b> of {state.steps:,}{_of_the_cell(state)}</div>"
    )


def _of_the_cell(state: State) -> str:
    """The steps of the whole cell, where it trains more than this run, and the time left for it."""
    counts = f" · {state.done:,} of {state.total:,} steps in all runs" if state.total > state.steps else ""
    if state.status in ("stopped", "finished"):
        return counts
    return counts + _time_left(state.seconds_left) + (" in this cell" if 0 < state.total < state.steps else "")


def _time_left(seconds: float | None) -> str:
    return " · time left unknown" if seconds is None else f" · <b>{clock(seconds)}</b> left"


def arms_html(arms: Arms, current: str) -> str:
    """Each arm with its final loss by seed; nothing for a single run. current: the title of the run under way"""
    if sum(map(len, arms.values())) < 2:
        return ""
    rows = "".join(_arm(name, seeds, current) for name, seeds in arms.items())
    return f"<div class='hl-name'>Final validation loss by arm and seed (nats)</div><div class='hl-arms'>{rows}</div>"


def _arm(name: str, seeds: Mapping[int, float | None], current: str) -> str:
    marks = {seed: " class='on'" if label(name, seed) == current else "" for seed in seeds}
    cells = "".join(f"<b{marks[seed]}>{'–' if loss is None else f'{loss:.3f}'}</b>" for seed, loss in seeds.items())
    on = " on" if any(marks.values()) else ""
    return f"<div class='hl-arm{on}' title='{escape(name, quote=True)}'><span>{escape(name)}</span>{cells}</div>"


# --- the loss ------------------------------------------------------------------------------------------------


def _losses(state: State) -> str:
    """The latest losses, which are the legend of the curves as well."""
    kinds = {"measured": "line", "predicted": "dash", "validation": "dot"}
    if state.threshold is None:
        del kinds["predicted"]
    values = {name: _nats(getattr(state, name)) for name in kinds}
    items = [f"<span>{_key(name, kinds[name])} {name} <b>{value}</b></span>" for name, value in values.items()]
    if state.baseline:
        here = state.step / state.steps
        beside = min(state.baseline, key=lambda point: abs(point[0] - here))[1]
        items.append(f"<span>{_key('baseline', 'line')} baseline at this step <b>{_nats(beside)}</b></span>")
    return f"<div class='hl-losses'><span class='hl-what'>Loss (nats)</span>{''.join(items)}</div>"


def _nats(loss: float | None) -> str:
    return "–" if loss is None else f"{loss:.4f}"


def _timeline(state: State) -> str:
    """Loss above, memory as a strip below it, the phases behind both and as a ribbon between them."""
    line, memory = state.timeline, state.memory
    bands = "".join(
        f"<div class='hl-band hl-{phase}' style='left:{100 * start:.2f}%;width:{100 * (end - start):.2f}%'></div>"
        for phase, start, end in line.bands()
    )
    peak = float(max(memory.peak_bytes, memory.used_bytes, 1))
    top = max(peak, SAFE_PEAK_BYTES) if near_limit(memory) else peak
    used = _area(line.series("memory_bytes"), top)
    if memory.on_gpu and top >= SAFE_PEAK_BYTES:
        y = 100 - 86 * SAFE_PEAK_BYTES / top
        used += f"<line x1='0' x2='1000' y1='{y:.1f}' y2='{y:.1f}' stroke='var(--limit)' stroke-dasharray='6 4'/>"
    ticks = [tick for tick in _ticks(0, line.steps, 8) if tick < 0.96 * line.steps]
    steps = "".join(f"<span style='left:{100 * tick / line.steps:.1f}%'>{tick:,.0f}</span>" for tick in ticks)
    return (
        f"<div class='hl-time'>{_loss_track(state, bands)}<div></div><div class='hl-track ribbon'>{bands}</div>"
        f"<div></div><div class='hl-memory'>{_memory(memory)}</div>"
        f"{_scale({14: f'{top / 1e9:.3g} GB', 92: '0'})}"
        f"<div class='hl-track memory'>{bands}{_svg(used)}</div>"
        f"<div class='hl-steps'>{steps}<span class='end'>{line.steps:,} steps</span></div></div>"
    )


def _loss_track(state: State, bands: str) -> str:
    line = state.timeline
    measured, predicted = line.series("measured_loss"), line.series("predicted_loss")
    validation = line.validation_series()
    low, high = _range([*measured, *state.baseline], [*predicted, *validation], hidden=len(measured) // 10)

    def at(y: float) -> float:
        return 4 + 92 * (high - y) / (high - low)

    ticks = {at(tick): f"{tick:.4g}" for tick in _ticks(low, high, 6)}
    grid = "".join(f"<path class='grid' d='M0,{y:.1f}H1000'/>" for y in ticks)
    grid += "".join(f"<path class='grid' d='M{1000 * x / line.steps:.0f},0V100'/>" for x in _ticks(0, line.steps, 8))
    curves = [
        _curve([(x, at(y)) for x, y in state.baseline if x <= 1], "baseline"),
        _curve([(x, at(y)) for x, y in measured], "measured"),
        *_predicted([(x, at(y)) for x, y in predicted], line.width),
    ]
    dots = "".join(f"<u style='left:{100 * x:.1f}%;top:{at(y):.1f}%'></u>" for x, y in validation if low <= y <= high)
    over = f"<div class='hl-hover' style='--n:{min(line.width, HOVER_COLUMNS)}'>{''.join(_hover(line))}</div>"
    return f"{_scale(ticks)}<div class='hl-track loss'>{bands}{_svg(grid + ''.join(curves))}{dots}{over}</div>"


def _range(curve: Points, others: Points, hidden: int) -> tuple[float, float]:
    """What the loss axis shows: the first `hidden` points of the curve may leave it at the top."""
    later = [y for _, y in [*curve[hidden:], *others]]
    if not later:
        return 0.0, 1.0
    low, high = min(later), max(later)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round values between two."""
    ticks = MaxNLocator(count, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return [float(tick) for tick in ticks if low <= tick <= high]


def _hover(line: Timeline) -> Iterator[str]:
    """A column for each place of the curve, which tells its values under the pointer."""
    every = -(-line.width // HOVER_COLUMNS)
    for at in range(0, max(line.columns, default=-1) + 1, every):
        here = line.columns.get(at)
        if here is None:
            yield "<i></i>"
            continue
        said = [f"step {round((at + 1) * line.steps / line.width):,}", here.phase.capitalize()]
        losses = {"loss": here.measured_loss, "predicted": here.predicted_loss, "validation": line.validation.get(at)}
        said += [f"{name} {loss:.4f}" for name, loss in losses.items() if loss is not None]
        yield f"<i{' class=r' if at > line.width / 2 else ''} data-t='{' · '.join(said)}'></i>"


def _scale(marks: Mapping[float, str]) -> str:
    spans = "".join(f"<span style='top:{top:.1f}%'>{text}</span>" for top, text in marks.items())
    return f"<div class='hl-scale'>{spans}</div>"


def _curve(points: Points, color: str, more: str = "") -> str:
    drawn = " ".join(f"{1000 * x:.0f},{y:.1f}" for x, y in points)
    return f"<polyline points='{drawn}' stroke='var(--{color})' {more}/>" if points else ""


def _predicted(points: Points, width: int) -> Iterator[str]:
    """A dashed line per jump, so that none leads from one jump to the next."""
    jumps: list[list[tuple[float, float]]] = []
    for point in points:
        if jumps and point[0] - jumps[-1][-1][0] < 1.5 / width:
            jumps[-1].append(point)
        else:
            jumps.append([point])
    half = 0.5 / width
    for jump in jumps:
        ends = [(jump[0][0] - half, jump[0][1]), *jump, (jump[-1][0] + half, jump[-1][1])]
        yield _curve(ends, "predicted", "stroke-dasharray='5 3'")


# --- memory --------------------------------------------------------------------------------------------------


def _memory(memory: Memory) -> str:
    """The figures of the strip in one line."""
    if not memory.on_gpu:
        used = f"<b>{memory.used_bytes / 1e9:.2f}</b> GB of the machine's {memory.total_bytes / 1e9:.1f}"
        return f"<span>Process memory (no GPU) {used}</span><span>peak {_gb(memory.peak_bytes)}</span>"
    room = SAFE_PEAK_BYTES - memory.peak_bytes
    parts = {"allocated": memory.allocated_bytes, "reserved": memory.reserved_bytes}
    parts |= {"other": memory.other_bytes, "peak": memory.peak_bytes}
    figures = "".join(f"<span>{name} {_gb(size)}</span>" for name, size in parts.items())
    used = f"<b>{memory.used_bytes / 1e9:.2f}</b> of {memory.total_bytes / 1e9:.1f} GB"
    line = f"{_key('limit', 'dash')} {_gb(abs(room))} {'below' if room >= 0 else 'above'} 14 GB"
    return f"<span>GPU memory {used}</span>{figures}<span>{line}</span>"


def _gb(size: int | None) -> str:
    return "unavailable" if size is None else f"{size / 1e9:.2f} GB"


def _area(points: Points, top: float) -> str:
    if not points:
        return ""
    path = " ".join(f"{1000 * x:.0f},{100 - 86 * y / top:.1f}" for x, y in _corners(points))
    first, last = 1000 * points[0][0], 1000 * points[-1][0]
    fill = f"<polygon points='{first:.0f},100 {path} {last:.0f},100' fill='var(--memory)' fill-opacity='.25'/>"
    return f"{fill}<polyline points='{path}' stroke='var(--memory)'/>"


def _corners(points: Points) -> Points:
    """The points without those inside a level stretch, of which memory has long ones."""
    heights = [None, *(y for _, y in points), None]
    around = zip(heights, heights[2:], strict=False)
    return [point for point, (before, after) in zip(points, around, strict=True) if not before == point[1] == after]


def _svg(content: str) -> str:
    return f"<svg viewBox='0 0 1000 100' preserveAspectRatio='none'>{content}</svg>"


# --- the cards -----------------------------------------------------------------------------------------------


def _cards(state: State) -> Iterator[str]:
    if state.threshold is not None:
        yield _prediction(state.statistics)
        yield _confidence(state, state.threshold)
    yield _training(state)
    yield _speed(state)


def _prediction(counts: Statistics) -> str:
    predicted, nominal = counts.predicted_steps, counts.nominal_steps
    return _card(
        "Steps predicted",
        _big(f"{predicted:,}", f"of {nominal:,} ({predicted / nominal:.0%})" if nominal else ""),
        _row("gradient steps", f"{counts.gradient_steps:,}"),
        _row("forward-only passes", f"{counts.forward_only_passes:,}"),
        _row("proposals accepted", f"{counts.proposals_accepted:,}"),
        _row("rejected, rolled back", f"{counts.proposals_rejected:,}, {counts.rollbacks:,}"),
    )


def _confidence(state: State, threshold: float) -> str:
    """Confidence against its threshold, and what the gate decided."""
    filled = 100 * min(max(state.confidence or 0.0, 0.0), 1.0)
    mark = f"<i class='hl-mark' style='left:{100 * threshold:.0f}%'></i>"
    return _card(
        "Confidence",
        _big("–" if state.confidence is None else f"{state.confidence:.2f}", f"threshold {threshold:.2f}"),
        f"<div class='hl-meter'><i style='width:{filled:.0f}%'></i>{mark}</div>",
        f"<div class='hl-reason'>{escape(state.decision or 'no proposal yet')}</div>",
    )


def _training(state: State) -> str:
    figures = {
        "learning rate": state.learning_rate is not None and f"{state.learning_rate:.2e}",
        "gradient norm": state.gradient_norm is not None and f"{state.gradient_norm:.3g}",
        state.unit: state.work is not None and f"{state.work:,}",
        "elapsed": state.seconds is not None and clock(state.seconds),
    }
    rows = [_row(name, value or "–") for name, value in figures.items()]
    return _card("Training", *rows, *([] if state.depth is None else [_row("depth", f"{state.depth:.0f} blocks")]))


def _speed(state: State) -> str:
    slowest = max(state.step_ms.values(), default=1.0)
    rows = []
    for phase in state.phases:
        ms = state.step_ms.get(phase)
        bar = f"<span class='hl-bar'><i style='width:{100 * (ms or 0) / slowest:.0f}%'></i></span>"
        value = "–" if ms is None else f"{_figure(ms)} ms"
        name = f"<span class='hl-phase'>{phase.capitalize()}</span>"
        rows.append(f"<div class='hl-row hl-{phase}{'' if ms else ' off'}'>{name}{bar}<span>{value}</span></div>")
    rate = "–" if state.rate is None else _figure(state.rate)
    gpu = {"% busy": state.gpu_busy_percent, " W": state.power_watts, " °C": state.temperature_celsius}
    if known := [f"{value:.0f}{unit}" for unit, value in gpu.items() if value is not None]:
        rows.append(_row("GPU", " · ".join(known)))
    return _card("Speed, and time per step", _big(rate, f"{state.unit} / s"), *rows)


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _card(name: str, *content: str) -> str:
    return f"<div class='hl-card'><div class='hl-name'>{name}</div>{''.join(content)}</div>"


def _big(value: str, unit: str) -> str:
    return f"<div class='hl-big'>{value} <small>{unit}</small></div>"


def _row(name: str, value: str) -> str:
    return f"<div class='hl-row'><span>{name}</span><span>{value}</span></div>"


def _key(color: str, kind: str) -> str:
    return f"<i class='hl-key {kind}' style='--at:var(--{color})'></i>"
