"""The live panel as HTML, a pure function of the state that it shows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from html import escape
from importlib.resources import files
from itertools import pairwise
from typing import Any

from jinja2 import Environment, PackageLoader
from matplotlib.ticker import MaxNLocator

from hybridlab.engine.phases import Phase
from hybridlab.engine.result import Statistics
from hybridlab.panel.progress import clock
from hybridlab.panel.timeline import Timeline
from hybridlab.results.claims import SAFE_PEAK_BYTES
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

    title: of the run; status: "running", "paused", "stopped", "failed" or "finished"
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
    return _drawn("panel", state, _loss(state), _used(state))


def bar_html(
    label: str, done: int, total: int, status: str, seconds_left: float | None, arms: Arms | None = None
) -> str:
    """A bar alone, for runs whose gauges cannot be read and a page that has the style already.

    label: names the run under way; done, total: nominal steps of all runs
    status: "running", "stopped" or "finished"; seconds_left: None while it is not known
    """
    return _drawn("bar_alone", label, done, total, status, seconds_left, arms or {})


def ranks_html(memories: Mapping[int, Memory]) -> str:
    """A gauge for the memory of each of several ranks; nothing without them."""
    return _drawn("ranks", memories)


@cache
def style_html() -> str:
    """The style of panels and bars, which a page needs once."""
    sheet = files("hybridlab.panel").joinpath("gauges.css").read_text(encoding="utf-8")
    return f"<style>{sheet}</style>"


def _drawn(macro: str, *given: object) -> str:
    """A part of the panel, by its macro in `gauges.html`."""
    return str(getattr(_macros(), macro)(*given)).strip()


@cache
def _macros() -> Any:
    environment = Environment(loader=PackageLoader("hybridlab", "panel"), trim_blocks=True)
    environment.filters |= {"esc": escape, "label_of": lambda seed, name: label(name, seed)}
    environment.filters["shown"] = lambda value, form: "–" if value is None else form.format(value)
    environment.globals |= {"clock": clock, "figure": _figure, "safe_bytes": SAFE_PEAK_BYTES}
    return environment.get_template("gauges.html").module


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


# --- what is drawn: x in thousandths of the run, y in hundredths of the height, from the top --------------------


def _loss(state: State) -> dict[str, Any]:
    """The curves with grid, loss axis and what is told under the pointer; the loss of the baseline at this step."""
    line, here = state.timeline, state.step / state.steps
    measured, predicted = line.series("measured_loss"), line.series("predicted_loss")
    validation = line.validation_series()
    low, high = _range([*measured, *state.baseline], [*predicted, *validation], hidden=len(measured) // 10)

    def at(y: float) -> float:
        return 4 + 92 * (high - y) / (high - low)

    def curve(points: Iterable[tuple[float, float]]) -> str:
        return " ".join(f"{1000 * x:.0f},{at(y):.1f}" for x, y in points)

    return {
        "ticks": {at(tick): f"{tick:.4g}" for tick in _ticks(low, high, 6)},
        "across": [1000 * x / line.steps for x in _ticks(0, line.steps, 8)],
        "curves": {"baseline": curve(p for p in state.baseline if p[0] <= 1), "measured": curve(measured)},
        "jumps": [curve(jump) for jump in _jumps(predicted, line.width)],
        "dots": [(100 * x, at(y)) for x, y in validation if low <= y <= high],
        "hover": list(_hover(line)),
        "places": min(line.width, HOVER_COLUMNS),
        "beside": min(state.baseline, key=lambda point: abs(point[0] - here))[1] if state.baseline else None,
    }


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


def _hover(line: Timeline) -> Iterator[tuple[str, bool]]:
    """What each place of the curve tells under the pointer, and whether it lies in the right half."""
    every = -(-line.width // HOVER_COLUMNS)
    for at in range(0, max(line.columns, default=-1) + 1, every):
        here = line.columns.get(at)
        if here is None:
            yield "", False
            continue
        said = [f"step {round((at + 1) * line.steps / line.width):,}", here.phase.capitalize()]
        losses = {"loss": here.measured_loss, "predicted": here.predicted_loss, "validation": line.validation.get(at)}
        said += [f"{name} {loss:.4f}" for name, loss in losses.items() if loss is not None]
        yield " · ".join(said), at > line.width / 2


def _jumps(points: Points, width: int) -> Iterator[Points]:
    """A line per jump, so that none leads from one jump to the next."""
    begins = [i for i, (x, _) in enumerate(points) if not i or x - points[i - 1][0] >= 1.5 / width]
    half = 0.5 / width
    for begin, end in pairwise([*begins, len(points)]):
        jump = points[begin:end]
        yield [(jump[0][0] - half, jump[0][1]), *jump, (jump[-1][0] + half, jump[-1][1])]


def _used(state: State) -> dict[str, Any]:
    """The strip of memory, and the steps below it."""
    line, memory = state.timeline, state.memory
    peak = float(max(memory.peak_bytes, memory.used_bytes, 1))
    top = max(peak, SAFE_PEAK_BYTES) if near_limit(memory) else peak
    points = line.series("memory_bytes")
    ends = [f"{1000 * x:.0f}" for x, _ in (points[0], points[-1])] if points else ["", ""]
    limit = f"{100 - 86 * SAFE_PEAK_BYTES / top:.1f}" if memory.on_gpu and top >= SAFE_PEAK_BYTES else ""
    return {
        "top": top,
        "path": " ".join(f"{1000 * x:.0f},{100 - 86 * y / top:.1f}" for x, y in _corners(points)),
        "first": ends[0],
        "last": ends[1],
        "limit": limit,
        "ticks": [tick for tick in _ticks(0, line.steps, 8) if tick < 0.9 * line.steps],
    }


def _corners(points: Points) -> Points:
    """The points without those inside a level stretch, of which memory has long ones."""
    heights = [None, *(y for _, y in points), None]
    around = zip(heights, heights[2:], strict=False)
    return [point for point, (before, after) in zip(points, around, strict=True) if not before == point[1] == after]
