"""The last state of the gauges, as something that stays in a notebook: HTML, a picture, and text."""

from __future__ import annotations

import base64
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hybridlab.base.errors import UserError
from hybridlab.charts import style as look
from hybridlab.charts.png import DPI, HATCHES, STYLE, png_of
from hybridlab.engine.phases import Phase
from hybridlab.engine.result import Statistics
from hybridlab.panel.html import LIMIT_BYTES, State, draw
from hybridlab.panel.instruments import memory_of, work_of
from hybridlab.panel.timeline import timeline_of
from hybridlab.study.memory_log import card_busy_percent
from hybridlab.study.record import Run
from hybridlab.study.study import label

MEASURED, PREDICTED, MEMORY = look.PALETTE[:3]


@dataclass(frozen=True)
class Frame:
    """A state that a notebook shows as HTML, PNG and text at once; no JavaScript and no widget is in it."""

    state: State

    def png(self) -> bytes:
        """The time line under one line of figures."""
        with matplotlib.style.context(STYLE):
            figure = Figure(figsize=(look.WIDTH_PX / DPI, look.HEIGHT_PX / DPI), dpi=DPI, layout="constrained")
            loss, memory = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
            _draw_loss(loss, self.state)
            _draw_memory(memory, self.state)
            figure.suptitle(str(self), x=0.01, ha="left", fontsize=9.5)
            figure.legend(loc="outside lower left", ncols=4)
            return png_of(figure)

    def __str__(self) -> str:
        s, counts, peak = self.state, self.state.statistics, self.state.memory.peak_bytes / 1e9
        loss = "no loss measured" if s.measured_loss is None else f"measured loss {s.measured_loss:.4f} nats"
        whose = "of the card" if s.memory.of_card else "of the process (no GPU)"
        return (
            f"{s.title}, {s.status} at step {s.step:,} of {s.steps:,}: {loss}; peak memory {peak:.2f} GB {whose};\n"
            f"{counts.predicted_steps:,} gradient steps saved, {counts.proposals_accepted:,} proposals accepted, "
            f"{counts.proposals_rejected:,} rejected"
        )

    def _repr_mimebundle_(
        self, include: Collection[str] | None = None, exclude: Collection[str] | None = None
    ) -> dict[str, Any]:
        picture = base64.b64encode(self.png()).decode("ascii")
        html = draw(self.state, f"data:image/png;base64,{picture}")
        return {"text/html": html, "image/png": picture, "text/plain": str(self)}


def final_frame(run: Run) -> Frame:
    """The gauges at the end of a run, from its record alone.

    Raises UserError for a run that has not finished.
    """
    if run.summary is None:
        raise UserError(f"the run in {run.folder} has not finished: go on with it, or show its session's frame()")
    return Frame(_last_state(run, run.summary))


def _last_state(run: Run, summary: dict[str, Any]) -> State:
    steps, last = run.steps, run.steps.iloc[-1]
    counts = {name: summary[name] for name in Statistics.__dataclass_fields__ if name in summary}
    counts["seconds_by_phase"] = {str(phase): summary[f"seconds_in_{phase}"] for phase in Phase}
    taken = steps["phase"].value_counts()
    reading = {str(name): value for name, value in run.vram.iloc[-1].items()}
    work, unit = work_of(run.config["task"])
    emulated_bytes = run.config["card_gb"] * 10**9 if run.config.get("emulates_card") else 0
    return State(
        title=label(summary["name"], summary["seed"]),
        status="finished",
        phase=last["phase"],
        step=int(last["nominal_step"]),
        steps=len(steps),
        memory=memory_of(reading, summary["peak_memory_bytes"], emulated_bytes),
        timeline=timeline_of(run, len(run.steps)),
        statistics=Statistics(**counts),
        measured_loss=_latest(steps["measured_loss"]),
        predicted_loss=_latest(steps["predicted_loss"]),
        validation_loss=summary.get("validation_loss"),
        rate=work * summary["gradient_steps"] / summary["seconds"],
        unit=unit,
        card_busy_percent=card_busy_percent(run),
        step_ms={str(phase): 1e3 * summary[f"seconds_in_{phase}"] / count for phase, count in taken.items()},
    )


def _latest(column: Any) -> float | None:
    known = column.dropna()
    return float(known.iloc[-1]) if len(known) else None


def _bands(axes: Axes, state: State, *, named: bool) -> None:
    seen: set[str] = set()
    for phase, start, end in state.timeline.bands():
        tint = look.tint(phase.capitalize())
        name = phase.capitalize() if named and phase not in seen else None
        seen.add(phase)
        axes.axvspan(
            start * state.steps,
            end * state.steps,
            zorder=0.5,
            facecolor=tint.color,
            edgecolor=tint.mark,
            hatch=HATCHES[tint.hatch],
            linewidth=0,
            label=name,
        )


def _draw_loss(axes: Axes, state: State) -> None:
    _bands(axes, state, named=True)
    squares = {"linestyle": "none", "marker": "s", "markersize": 3.5, "markerfacecolor": "none"}
    styles: dict[str, dict[str, Any]] = {"measured": {"color": MEASURED}, "predicted": {"color": PREDICTED} | squares}
    for name, style in styles.items():
        if points := state.timeline.series(f"{name}_loss"):
            x, y = zip(*points, strict=True)
            axes.plot([place * state.steps for place in x], y, label=f"{name} loss", **style)
    axes.set_ylabel("loss (nats)")


def _draw_memory(axes: Axes, state: State) -> None:
    _bands(axes, state, named=False)
    points = state.timeline.series("memory_bytes")
    x, y = [place * state.steps for place, _ in points], [value / 1e9 for _, value in points]
    axes.fill_between(x, y, color=MEMORY, alpha=0.25, linewidth=0)
    axes.plot(x, y, color=MEMORY, label="memory")
    if state.memory.of_card and state.memory.peak_bytes > LIMIT_BYTES / 2:
        axes.axhline(LIMIT_BYTES / 1e9, color=look.INK, linewidth=1, linestyle=":", label="14 GB line")
    axes.set(xlim=(0, state.steps), ylim=(0, None), xlabel="nominal steps", ylabel="memory (GB)")
