"""What a notebook shows of memory: predicted beside measured, what it cost, and the claims that follow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from hybridlab.base.errors import UserError
from hybridlab.benchmarks.footprint import Footprint, PredictPhase
from hybridlab.charts.tables import Table, table
from hybridlab.results.bounds import CARD_BYTES, SAFE_PEAK_BYTES
from hybridlab.results.publish import Claim, Numbers, interval_numbers, slug, verdict, verdict_below
from hybridlab.study.memory_log import growth_bytes
from hybridlab.study.record import Run

PREDICTED_WITHIN = 0.10
"""The plan's bound on the error of a prediction."""

QUALITY_WITHIN = 0.01
"""The plan's bound on the validation loss that a memory feature may cost, as a share of the control's."""

STEP_TIME_WITHIN = 1.5
"""How much longer XL's step may take than where memory is no object."""

PREDICT_BYTES = 3.7e9
"""What XL may occupy in Predict."""

MAY_GROW_BYTES = 50e6
"""Below this, two moments of a run take the same memory."""

STABLE_STEPS = 1000
"""Nominal steps that the plan wants without a divergence."""


def memory_table(footprints: Sequence[Footprint]) -> Table:
    """Predicted beside measured peaks, one line an arm."""
    rows = [
        {
            "arm": f.arm,
            "predicted (GB)": f.predicted.peak_allocated_bytes / 1e9,
            "measured (GB)": _gigabytes(f.measured_allocated_bytes),
            "error": None if f.error is None else f"{f.error:+.1%}",
            "on the card (GB)": None if f.measured_allocated_bytes is None else f.peak_memory_bytes / 1e9,
        }
        for f in footprints
    ]
    caption = "Peak of live tensors on a CUDA card, predicted without one, and what the card counted with its context"
    formats = {"predicted (GB)": ".3f", "measured (GB)": ".3f", "on the card (GB)": ".2f"}
    return table(rows, caption, formats)


def parts_table(footprints: Sequence[Footprint]) -> Table:
    """What the predicted peak of each arm consists of, in GB."""
    names = dict.fromkeys(part for f in footprints for part, size in f.predicted.parts.items() if size)
    rows = [{"arm": f.arm} | {part: f.predicted.parts.get(part, 0) / 1e9 for part in names} for f in footprints]
    return table(rows, "The predicted peak, part by part, in GB", dict.fromkeys(names, ".2f"))


def cost_table(footprints: Sequence[Footprint], control: str, *, fast: str | None = None) -> Table:
    """What each arm pays: its loss beside the control's, and its step over that of `fast`, by default the control.

    Where the card could hold neither of these, nothing is said of them.
    """
    fast = fast or control
    base = next((f.step_ms for f in footprints if f.arm == fast), None)
    rows = [
        {
            "arm": f.arm,
            "validation loss (nats)": f.validation_loss,
            f"against {control} (nats)": str(f.change) if f.change else None,
            "perplexity gap": f"{math.expm1(f.change.mean):+.2%}" if f.change else None,
            "step (ms)": f.step_ms,
            f"step over {fast}'s": f.step_ms / base if base and f.step_ms else None,
        }
        | ({} if f.card_busy_percent is None else {"card busy": f"{f.card_busy_percent:.0f}%"})
        for f in footprints
    ]
    formats = {"step (ms)": ".1f", f"step over {fast}'s": ".2f"}
    waits = "; a card that is not busy waits for the host" if any("card busy" in row for row in rows) else ""
    return table(rows, f"Quality and time; intervals are over seeds, paired{waits}", formats)


def predict_table(phases: Mapping[str, PredictPhase], plain: str) -> Table:
    """What Predict leaves on the card, strategy by strategy; `plain` is the one that puts nothing away."""
    rows = [
        {
            "strategy": name,
            "live tensors (GB)": _gigabytes(phase.allocated_bytes),
            "held by torch (GB)": _gigabytes(phase.reserved_bytes),
            "on the card (GB)": _gigabytes(phase.occupied_bytes),
            "a jump and Correct (ms)": phase.typical_ms(),
            f"over {plain}'s": phase.typical_ms() / phases[plain].typical_ms(),
            "jumps": len(phase.jumps),
        }
        for name, phase in phases.items()
    ]
    formats = {
        "live tensors (GB)": ".3f",
        "held by torch (GB)": ".3f",
        "on the card (GB)": ".2f",
        "a jump and Correct (ms)": ".0f",
        f"over {plain}'s": ".2f",
    }
    if not rows:
        return table([{"strategy": "no run jumped"}])
    return table(rows, "Between what leaves and what returns; times include both", formats)


# --- claims ----------------------------------------------------------------------------------------------


def predicted_claims(footprints: Sequence[Footprint], *, each: bool = True) -> list[Claim]:
    """That what was predicted is what was measured; nothing without a GPU. `each` names a claim after its arm."""
    return [
        Claim(
            f"{slug(f.arm)}-predicted-within-10-percent" if each else "predicted-within-10-percent",
            f"{f.arm}: the peak is predicted within 10 %",
            verdict(abs(f.error) <= PREDICTED_WITHIN),
            {
                "predicted_bytes": f.predicted.peak_allocated_bytes,
                "measured_bytes": f.measured_allocated_bytes or 0,
                "error_share": f.error,
            },
        )
        for f in footprints
        if f.error is not None
    ]


def quality_claims(footprints: Sequence[Footprint], control: float, *, each: bool = True) -> list[Claim]:
    """That no arm's validation loss lies more than 1 % above the control's, whose mean loss is `control` in nats.

    Over several seeds the whole interval must lie below the bound; one seed decides by its own difference.
    """
    claims = []
    for f in footprints:
        if f.change is None:
            continue
        low, high = f.change.ends
        gap: Numbers = {
            "perplexity_gap": math.expm1(f.change.mean),
            "perplexity_gap_low": math.expm1(low),
            "perplexity_gap_high": math.expm1(high),
        }
        numbers = interval_numbers("loss_change", f.change) | gap
        outcome = verdict_below(low, high, QUALITY_WITHIN * control)
        seeds = f"{f.change.seeds} seeds" if f.change.seeds > 1 else "one seed"
        text = f"{f.arm}: validation loss at most 1 % above the control's ({seeds})"
        claims.append(Claim(f"{slug(f.arm)}-quality" if each else "quality", text, outcome, numbers))
    return claims


def below_claim(id: str, text: str, value: float | None, bound: float, **more: float | int) -> list[Claim]:
    """That a measured number of bytes lies below a bound; nothing where it could not be measured."""
    if value is None:
        return []
    return [Claim(id, text, verdict(value < bound), {"measured_bytes": int(value), "bound_bytes": int(bound), **more})]


def predict_claim(phase: PredictPhase) -> list[Claim]:
    """That XL's Predict leaves most of the card to others; CUDA's context, which no setting changes, is told apart."""
    text = "between what leaves and what returns, Predict holds less than 3.7 GB, forward passes included"
    more = {"live_bytes": phase.allocated_bytes or 0, "with_context_bytes": phase.occupied_bytes or 0}
    return below_claim("predict-phase", text, phase.reserved_bytes, PREDICT_BYTES, **more)


def fit_claims(run: Run) -> list[Claim]:
    """That a run fits a 16 GB card, keeps the plan's margin, and neither retries allocations nor grows."""
    summary = run.closing_figures
    if summary["memory_source"] != "cuda":
        return []
    peak, retries, steps = summary["peak_memory_bytes"], summary["allocator_retries"], summary["nominal_steps"]
    counts: Numbers = {"peak_memory_bytes": peak, "allocator_retries": retries, "nominal_steps": steps}
    return [
        Claim("fits-16gb", "trains on a 16 GB card", verdict(peak < CARD_BYTES), counts),
        Claim(
            "peak-below-14gb",
            "peak VRAM below 14 GB, context included, without an allocator retry",
            verdict(peak < SAFE_PEAK_BYTES and not retries),
            counts,
        ),
        *_growth_claims(run, steps),
    ]


def _growth_claims(run: Run, steps: int) -> list[Claim]:
    """That a run does not grow; nothing for one that was over between two samples."""
    try:
        grown = growth_bytes(run, early=min(50, steps // 4), late=steps)
    except UserError:
        return []
    text = "takes as much memory at the end as after 50 steps"
    return [Claim("does-not-grow", text, verdict(grown < MAY_GROW_BYTES), {"growth_bytes": grown})]


def stable_run_claim(run: Run) -> Claim:
    """That a run took as many steps as the plan wants, learned, and never diverged; open where it was shorter."""
    summary = run.closing_figures
    losses = run.steps["measured_loss"].dropna()
    falls = bool(losses.tail(20).mean() < losses.head(20).mean())
    numbers: Numbers = {
        "nominal_steps": summary["nominal_steps"],
        "divergences": summary["divergences"],
        "first_loss": float(losses.head(20).mean()),
        "last_loss": float(losses.tail(20).mean()),
    }
    stable = not summary["divergences"] and falls
    outcome = "open" if stable and summary["nominal_steps"] < STABLE_STEPS else verdict(stable)
    text = f"trains for {STABLE_STEPS} steps without divergence"
    return Claim(f"stable-{STABLE_STEPS}-steps", text, outcome, numbers)


def step_time_claims(fits: Footprint, free: Footprint) -> list[Claim]:
    """That fitting costs little time beside a run to which memory is no object, on the same card; nothing without one.

    Nor is anything said of runs too short for a settled step. Beside the ratio stands that of the time in which the
    card was busy: of two steps that wait for the host, it is what a slower card would tell apart.
    """
    if fits.measured_allocated_bytes is None or not fits.step_ms or not free.step_ms:
        return []
    ratio = fits.step_ms / free.step_ms
    text = f"a step takes at most {STEP_TIME_WITHIN} times that of {free.arm}"
    numbers = {"step_ratio_time": ratio, **_busy(ratio, fits.card_busy_percent, free.card_busy_percent)}
    return [Claim("step-time", text, verdict(ratio <= STEP_TIME_WITHIN), numbers)]


def _busy(ratio: float, percent: float | None, control: float | None) -> Numbers:
    """How busy the card was with each, and what of two steps' ratio is the card's; nothing where nobody says it."""
    if not (percent and control):
        return {}
    return {
        "card_busy_percent": percent,
        "control_card_busy_percent": control,
        "busy_ratio_time": ratio * percent / control,
    }


def reference_claims(fits: Footprint, others: Sequence[Footprint], *, control: str, fast: str) -> list[Claim]:
    """That fitting costs neither quality nor time, as far as the card could hold what it is held against.

    control: the arm whose loss counts; fast: the one whose step does
    """
    claims = []
    for other in others:
        if other.arm == control:
            claims += quality_claims([fits], other.validation_loss, each=False)
        if other.arm == fast:
            claims += step_time_claims(fits, other)
    return claims


def _gigabytes(size: int | None) -> float | None:
    return None if size is None else size / 1e9
