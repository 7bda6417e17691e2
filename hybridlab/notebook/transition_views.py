"""What a notebook shows of the way to Predict and back: what it takes, beside jumps with nothing put away."""

from __future__ import annotations

from collections.abc import Mapping

from hybridlab.notebook.results import Claim, Numbers, slug, verdict
from hybridlab.notebook.tables import Table, table
from hybridlab.study.footprint import PredictPhase


def transition_table(phases: Mapping[str, PredictPhase], control: str) -> Table:
    """The time of a jump and of its parts, arm by arm; `control` puts nothing away."""
    rows = [
        {
            "arm": name,
            "proposing (ms)": phase.typical_ms("proposing"),
            "leaving (ms)": phase.typical_ms("leaving"),
            "moving again (ms)": phase.typical_ms("moving"),
            "returning (ms)": phase.typical_ms("returning"),
            "a jump (ms)": phase.typical_ms(),
            "the first (ms)": phase.jumps[0].whole,
            f"beyond {control} (ms)": _beyond_ms(phase, phases[control]),
            "in gradient steps": _beyond_ms(phase, phases[control]) / phases[control].gradient_step_ms,
            "jumps": len(phase.jumps),
        }
        for name, phase in phases.items()
    ]
    if not rows:
        return table([{"arm": "no run jumped"}])
    caption = (
        "Medians over all jumps but the first, which takes memory from the host. Parts are beyond ordinary steps; with "
        f"{control}, leaving is the first motion of the weights, and returning the last forward pass and a new path's "
        "beginning. Proposing comes before the jump"
    )
    formats = dict.fromkeys([name for name in rows[0] if name.endswith("(ms)")], ".1f")
    return table(rows, caption, formats | {"in gradient steps": ".2f"})


def transition_claims(phases: Mapping[str, PredictPhase], control: str) -> list[Claim]:
    """That clearing the card for a jump takes less time than the jump's gradient steps; nothing without a GPU."""
    return [
        _claim(name, phase, phases[control])
        for name, phase in phases.items()
        if name != control and phase.reserved_bytes is not None
    ]


def _claim(name: str, phase: PredictPhase, control: PredictPhase) -> Claim:
    beyond, step_ms = _beyond_ms(phase, control), control.gradient_step_ms
    numbers: Numbers = {
        "beyond_control_ms": beyond,
        "gradient_steps_ratio_time": beyond / step_ms,
        "replaced_ms": phase.typical_ms("steps") * step_ms,
    }
    text = f"{name}: the way to Predict and back takes less time than the gradient steps that a jump replaces"
    return Claim(f"{slug(name)}-transition", text, verdict(beyond < phase.typical_ms("steps") * step_ms), numbers)


def lookahead_claims(phases: Mapping[str, PredictPhase], ahead: str, late: str) -> list[Claim]:
    """That fetching beside the last predicted steps is quicker than after them; nothing without a GPU, or a jump."""
    if ahead not in phases or phases[ahead].reserved_bytes is None:
        return []
    numbers: Numbers = {"ahead_ms": phases[ahead].typical_ms(), "late_ms": phases[late].typical_ms()}
    holds = phases[ahead].typical_ms() < phases[late].typical_ms()
    text = f"{ahead}: a jump takes less time when the state returns beside its last predicted steps than after them"
    return [Claim("lookahead", text, verdict(holds), numbers)]


def _beyond_ms(phase: PredictPhase, control: PredictPhase) -> float:
    """How much longer a jump takes than where nothing is put away."""
    return phase.typical_ms() - control.typical_ms()
