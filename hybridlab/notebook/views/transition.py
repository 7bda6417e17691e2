"""What a notebook shows of offloading for Predict and restoring: its time, against jumps that offload nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from statistics import median

from hybridlab.benchmarks.footprint import PredictPhase
from hybridlab.charts.tables import Table, table
from hybridlab.results.claims import Claim, Quantity, holds_below
from hybridlab.study.statistics import median_ends


def transition_table(phases: Mapping[str, PredictPhase], control: str) -> Table:
    """The time of a jump and of its parts, arm by arm; `control` offloads nothing."""
    rows = [
        {
            "arm": name,
            "proposing (ms)": phase.typical_ms("proposing"),
            "leaving (ms)": phase.typical_ms("leaving"),
            "moving again (ms)": phase.typical_ms("moving"),
            "returning (ms)": phase.typical_ms("returning"),
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
        "Medians over all jumps but the first, which takes memory from the host. Parts are beyond ordinary steps; with "
        f"{control}, leaving is the first motion of the weights, and returning the last forward pass and a new path's "
        "beginning. A jump counts all of its time, proposing included; beyond "
        f"{control}, jumps of the same number are compared"
    )
    formats = dict.fromkeys([name for name in rows[0] if name.endswith("(ms)")], ".1f")
    return table(rows, caption, formats | {"a jump in gradient steps": ".2f", "that in gradient steps": ".2f"})


def transition_claims(phases: Mapping[str, PredictPhase], control: str) -> list[Claim]:
    """That offloading for a jump takes less than one gradient step; nothing without a GPU, or a second jump."""
    limit_ms = phases[control].gradient_step_ms if control in phases else 0.0
    text = "leaving the GPU and returning adds less than a gradient step to a jump of"
    return [
        _claim("transition", name, f"{text} {phase.typical_ms('steps'):.0f}", beyond, limit_ms, phase)
        for name, phase in phases.items()
        if name != control and (beyond := _measured(phase, phases[control]))
    ]


def lookahead_claims(phases: Mapping[str, PredictPhase], ahead: str, late: str) -> list[Claim]:
    """That fetching beside the last predicted steps is quicker than after them; nothing without a GPU, or two jumps."""
    if ahead not in phases or not (beyond := _measured(phases[ahead], phases[late])):
        return []
    text = "a jump takes less time when the state returns beside its last predicted steps than after them"
    return [_claim("lookahead", ahead, text, beyond, 0.0, phases[ahead])]


def _measured(phase: PredictPhase, control: PredictPhase) -> list[float]:
    return [] if phase.reserved_bytes is None else phase.beyond_ms(control)


def _claim(kind: str, arm: str, text: str, beyond: list[float], limit_ms: float, phase: PredictPhase) -> Claim:
    """Jumps of the same number are compared; the median decides, with its 95 % interval. Beside it, a jump's cost."""
    low, high = median_ends(beyond)
    beyond_ms = Quantity("beyond", median(beyond), unit="ms", per_seed=tuple(beyond), bound=limit_ms)
    if math.isfinite(low):
        beyond_ms = replace(beyond_ms, low=low, high=high)
    quantities = (
        beyond_ms,
        Quantity("jumps", len(beyond)),
        Quantity("limit", limit_ms, unit="ms"),
        Quantity("whole_jump", phase.typical_ms(), unit="ms"),
        Quantity("of_that_proposing", phase.typical_ms("proposing"), unit="ms"),
        Quantity("gradient_step", phase.gradient_step_ms, unit="ms"),
    )
    return Claim(kind, f"{arm}: {text}", holds_below(low, high, limit_ms), quantities, arm)


def _beyond_ms(phase: PredictPhase, control: PredictPhase) -> float:
    """How much longer a jump takes than where nothing is offloaded."""
    return median(phase.beyond_ms(control) or [phase.typical_ms() - control.typical_ms()])
