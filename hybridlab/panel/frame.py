"""The last state of the gauges as HTML, a picture and text, which stay in a notebook."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hybridlab.charts.display import Panels
from hybridlab.charts.model import Band, ChartData, Kind, Line, Series
from hybridlab.engine.phases import Phase
from hybridlab.engine.result import Statistics
from hybridlab.panel.html import State, frame_html, near_limit
from hybridlab.panel.instruments import decision_of, memory_of, work_of
from hybridlab.panel.timeline import timeline_of
from hybridlab.results.claims import SAFE_PEAK_BYTES
from hybridlab.study.memory_log import gpu_busy_percent
from hybridlab.study.record import Run
from hybridlab.study.study import label


@dataclass(frozen=True)
class Frame:
    """A state that a notebook shows as HTML, PNG and text at once; no JavaScript and no widget is in it."""

    state: State

    def png(self) -> bytes:
        """Loss and memory over the run, under a line of figures."""
        return Panels(str(self), tuple(_charts(self.state)), columns=1).png()

    def __str__(self) -> str:
        s, counts, peak = self.state, self.state.statistics, self.state.memory.peak_bytes / 1e9
        loss = "no loss measured" if s.measured is None else f"measured loss {s.measured:.4f} nats"
        whose = "of the GPU" if s.memory.on_gpu else "of the process (no GPU)"
        head = f"{s.title}, {s.status} at step {s.step:,} of {s.steps:,}: {loss}; peak memory {peak:.2f} GB {whose}"
        if s.threshold is None:
            return head
        return (
            f"{head};\n{counts.predicted_steps:,} steps predicted, {counts.proposals_accepted:,} proposals accepted, "
            f"{counts.proposals_rejected:,} rejected"
        )

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        picture = base64.b64encode(self.png()).decode("ascii")
        html = frame_html(self.state, f"data:image/png;base64,{picture}")
        return {"text/html": html, "image/png": picture, "text/plain": str(self)}


def final_frame(run: Run) -> Frame:
    """The gauges at the end of a run, from its record alone.

    Raises UserError for a run that has not finished.
    """
    return Frame(_last_state(run, run.closing_figures))


def _last_state(run: Run, summary: dict[str, Any]) -> State:
    steps, last = run.steps, run.steps.iloc[-1]
    counts = {name: summary[name] for name in Statistics.__dataclass_fields__ if name in summary}
    counts["seconds_by_phase"] = {str(phase): summary[f"seconds_in_{phase}"] for phase in Phase}
    taken = steps["phase"].value_counts().items()
    step_ms = {str(phase): 1e3 * summary[f"seconds_in_{phase}"] / count for phase, count in taken}
    reading = {str(name): value for name, value in run.vram.iloc[-1].items()}
    work, unit = work_of(run.config["task"])
    emulated_bytes = run.config["card_gb"] * 10**9 if run.config.get("emulates_card") else 0
    latest: dict[str, Any] = {
        name: _latest(steps[name]) for name in ("depth", "confidence", "gradient_norm") if name in steps
    }
    return State(
        title=label(summary["name"], summary["seed"]),
        status="finished",
        phase=last["phase"],
        step=int(last["nominal_step"]),
        steps=len(steps),
        memory=memory_of(reading, summary["peak_memory_bytes"], emulated_bytes),
        timeline=timeline_of(run, len(steps)),
        statistics=Statistics(**counts),
        measured=_latest(steps["measured_loss"]),
        predicted=_latest(steps["predicted_loss"]),
        validation=summary.get("validation_loss"),
        rate=work * summary["gradient_steps"] / summary["seconds"],
        unit=unit,
        work=work * summary["gradient_steps"],
        seconds=summary["seconds"],
        step_ms=step_ms,
        gpu_busy_percent=gpu_busy_percent(run),
        **latest,
        **_asked(run),
    )


def _asked(run: Run) -> dict[str, Any]:
    """Threshold and last decision of a run that may predict; nothing of a plain run."""
    hybrid = run.config["hybrid"]
    if not hybrid["max_predict_steps"]:
        return {}
    threshold = hybrid["confidence_threshold"]
    rows: list[Any] = run.steps[["nominal_step", "confidence", "event"]].to_dict("records")
    said = [decision for row in rows if (decision := decision_of(row, threshold))]
    return {"threshold": threshold, "decision": said[-1] if said else ""}


def _latest(column: Any) -> float | None:
    known = column.dropna()
    return float(known.iloc[-1]) if len(known) else None


def _charts(state: State) -> Iterator[ChartData]:
    """Loss above memory, each over nominal steps with the phases behind it."""
    timeline, memory, steps = state.timeline, state.memory, state.timeline.steps
    bands = tuple(Band(start * steps, end * steps, phase.capitalize()) for phase, start, end in timeline.bands())

    def points(name: str) -> tuple[list[float], list[float]]:
        known = timeline.series(name)
        return [place * steps for place, _ in known], [value for _, value in known]

    kinds: dict[str, Kind] = {"measured": "line", "predicted": "points"}
    losses = [
        Series(f"{name} loss", *xy, kind=kind, dash=kind == "points", color=color)
        for color, (name, kind) in enumerate(kinds.items())
        if (xy := points(f"{name}_loss"))[0]
    ]
    if losses:
        yield ChartData("Loss", "nominal steps", "loss (nats)", tuple(losses), bands)
    x, used = points("memory_bytes")
    if x:
        gigabytes = [size / 1e9 for size in used]
        area = Series("memory", x, gigabytes, [0.0] * len(x), gigabytes, color=len(kinds))
        top = 1.15 * max(*gigabytes, SAFE_PEAK_BYTES / 1e9 * near_limit(memory))
        lines = (Line(SAFE_PEAK_BYTES / 1e9, "14 GB line"),) if near_limit(memory) else ()
        yield ChartData("Memory", "nominal steps", "memory (GB)", (area,), bands, lines=lines, y_zoom=(0.0, top))
