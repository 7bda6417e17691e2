"""What a notebook shows of memory in tables: predicted beside measured, what it cost, and what a jump takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from hybridlab.benchmarks.footprint import Footprint, PredictPhase
from hybridlab.charts.tables import Table, table
from hybridlab.study.statistics import formatted


def memory_table(footprints: Sequence[Footprint]) -> Table:
    """Predicted beside measured peaks, one row per arm."""
    rows = [
        {
            "arm": f.arm,
            "predicted (GB)": f.predicted.peak_allocated_bytes / 1e9,
            "measured (GB)": _gigabytes(f.measured_allocated_bytes),
            "error": None if f.error is None else formatted(f.error, "+.1%"),
            "on the GPU (GB)": None if f.measured_allocated_bytes is None else f.peak_memory_bytes / 1e9,
        }
        for f in footprints
    ]
    caption = "Peak of live tensors on a CUDA GPU, predicted without one, and what the GPU counted with its context"
    formats = {"predicted (GB)": ".3f", "measured (GB)": ".3f", "on the GPU (GB)": ".2f"}
    return table(rows, caption, formats)


def parts_table(footprints: Sequence[Footprint]) -> Table:
    """What the predicted peak of each arm consists of, in GB."""
    names = dict.fromkeys(part for f in footprints for part, size in f.predicted.parts.items() if size)
    rows = [{"arm": f.arm} | {part: f.predicted.parts.get(part, 0) / 1e9 for part in names} for f in footprints]
    return table(rows, "The predicted peak, part by part, in GB", dict.fromkeys(names, ".2f"))


def cost_table(footprints: Sequence[Footprint], control: str, *, fast: str | None = None) -> Table:
    """What each arm pays: its loss beside the control's, and its step over that of `fast`, by default the control.

    Where the GPU could hold neither of these, nothing is said of them.
    """
    fast = fast or control
    base = next((f.step_ms for f in footprints if f.arm == fast), None)  # further seeds may have another number format
    rows = [
        {
            "arm": f.arm,
            "validation loss (nats)": f.validation_loss,
            f"against {control} (nats)": str(f.change) if f.change else None,
            "perplexity gap": formatted(math.expm1(f.change.mean), "+.2%") if f.change else None,
            "step (ms)": f.step_ms,
            f"step over {fast}'s": f.step_ms / base if base and f.step_ms else None,
        }
        | ({} if f.gpu_busy_percent is None else {"GPU busy": f"{f.gpu_busy_percent:.0f}%"})
        for f in footprints
    ]
    formats = {"step (ms)": ".1f", f"step over {fast}'s": ".2f"}
    waits = "; a GPU that is not busy waits for the host" if any("GPU busy" in row for row in rows) else ""
    return table(rows, f"Quality and time; intervals are over seeds, paired{waits}", formats)


def predict_table(phases: Mapping[str, PredictPhase], plain: str) -> Table:
    """What Predict leaves on the GPU, strategy by strategy; `plain` is the one that offloads nothing."""
    rows = [
        {
            "strategy": name,
            "live tensors (GB)": _gigabytes(phase.allocated_bytes),
            "reserved by torch (GB)": _gigabytes(phase.reserved_bytes),
            "on the GPU (GB)": _gigabytes(phase.occupied_bytes),
            "a jump and Correct (ms)": phase.typical_ms(),
            f"over {plain}'s": phase.typical_ms() / phases[plain].typical_ms(),
            "jumps": len(phase.jumps),
        }
        for name, phase in phases.items()
    ]
    formats = dict.fromkeys(("live tensors (GB)", "reserved by torch (GB)"), ".3f")
    formats |= {"on the GPU (GB)": ".2f", "a jump and Correct (ms)": ".0f", f"over {plain}'s": ".2f"}
    if not rows:
        return table([{"strategy": "no run jumped"}])
    return table(rows, "Between what leaves and what returns; times include both", formats)


def predict_rows(phases: Mapping[str, PredictPhase], model: str) -> list[dict[str, Any]]:
    """The table "predict" of a results file: live tensors in Predict, strategy by strategy."""
    return [
        {"arm": name, "model": model, "measured_allocated_bytes": phase.allocated_bytes}
        for name, phase in phases.items()
    ]


def _gigabytes(size: int | None) -> float | None:
    return None if size is None else size / 1e9


def transition_table(phases: Mapping[str, PredictPhase], control: str) -> Table:
    """The time of a jump and of its parts, arm by arm; `control` offloads nothing."""
    rows = [
        {
            "arm": name,
            "proposing (ms)": phase.typical_ms("proposing"),
            "offloading (ms)": phase.typical_ms("offloading"),
            "moving again (ms)": phase.typical_ms("moving"),
            "restoring (ms)": phase.typical_ms("restoring"),
            "a jump (ms)": phase.typical_ms(),
            "the first (ms)": phase.jumps[0].whole,
            "a jump in gradient steps": phase.typical_ms() / phase.gradient_step_ms,
            f"beyond {control} (ms)": _beyond_ms(phase, phases[control]),
            "that in gradient steps": _beyond_ms(phase, phases[control]) / phases[control].gradient_step_ms,
            "jumps": len(phase.jumps),
        }
        for name, phase in phases.items()
    ]
    if not rows:
        return table([{"arm": "no run jumped"}])
    caption = (
        "Medians over all jumps but the first, which takes memory from the host. Parts are beyond ordinary steps. With "
        f"{control}, offloading is the first motion of the weights, and restoring the last pass and a new path; "
        "a jump counts all of its time, proposing included; beyond "
        f"{control}, jumps of the same number are compared"
    )
    formats = dict.fromkeys([name for name in rows[0] if name.endswith("(ms)")], ".1f")
    return table(rows, caption, formats | {"a jump in gradient steps": ".2f", "that in gradient steps": ".2f"})


def _beyond_ms(phase: PredictPhase, control: PredictPhase) -> float:
    """How much longer a jump takes than where nothing is offloaded."""
    return median(phase.beyond_ms(control) or [phase.typical_ms() - control.typical_ms()])
