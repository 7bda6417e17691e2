"""What memory settings and jumps were shown to take and to cost, as claims."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median

from hybridlab.base.errors import UserError
from hybridlab.benchmarks.footprint import Footprint, PredictPhase
from hybridlab.results.claims import (
    GPU_BYTES,
    QUALITY_TOLERANCE_NATS,
    SAFE_PEAK_BYTES,
    Claim,
    Quantity,
    holds_below,
    holds_if,
    on_losses,
    worst,
)
from hybridlab.study.memory_log import growth_bytes
from hybridlab.study.record import Run
from hybridlab.study.statistics import Interval, median_ends
from hybridlab.study.study import StudyResult

PREDICTED_WITHIN = 0.10
"""The plan's bound on the error of a prediction."""

QUALITY_WITHIN = 0.01
"""The plan's bound on the validation loss that a memory feature may cost, as a share of the control's."""

STEP_TIME_WITHIN = 1.5
"""How much longer XL's step may take than without memory limits."""

FEW_BITS_BYTES, FEW_BITS_STEP, FEW_BITS_LOSS = 9.5e9, 1.15, 0.005
"""What XL may occupy with weights of 24 bits, and how much longer its step and how much higher its loss may be."""

MASTERS_BYTES = 12.5e9
"""What XL may occupy with float32 masters."""

PREDICT_BYTES = 3.7e9
"""What XL may occupy in Predict."""

MAY_GROW_BYTES = 50e6
"""Below this, two moments of a run take the same memory."""

STRICT, TF32 = "strict", "tf32"
"""How the names of losses begin in which FP32 without and with TF32 are held against each other."""

STABLE_STEPS = 1000
"""Nominal steps that the plan wants without a divergence."""


def predicted_claims(footprints: Sequence[Footprint]) -> list[Claim]:
    """That what was predicted is what was measured; nothing without a GPU."""
    return [
        Claim(
            "predicted-within-10-percent",
            f"{f.arm}: the peak is predicted within 10 %",
            holds_if(abs(f.error) <= PREDICTED_WITHIN),
            (
                Quantity("predicted", f.predicted.peak_allocated_bytes, unit="bytes"),
                Quantity("measured", f.measured_allocated_bytes, unit="bytes"),
                Quantity("error_share", f.error, unit="share", bound=PREDICTED_WITHIN),
            ),
            f.arm,
        )
        for f in footprints
        if f.error is not None
    ]


def quality_claims(
    footprints: Sequence[Footprint],
    control: float,
    kind: str = "quality",
    within: float = QUALITY_WITHIN,
    of: str = "the control's",
) -> list[Claim]:
    """That no arm's validation loss lies more than 1 % above the control's, whose mean loss is `control` in nats.

    The whole interval must lie below the bound. Where too little was trained for a verdict, it is open.

    of: the control's loss in words
    """
    claims = []
    for f in footprints:
        if f.change and f.base:
            bound, change = within * control, f.change
            gap, low, high = (math.expm1(loss) for loss in (change.mean, *change.ends))
            quantities = (
                Quantity.over_seeds("loss_change", change, "nats", bound),
                Quantity("seeds", change.seeds),
                Quantity("perplexity_gap", gap, low, high, "share", tuple(map(math.expm1, change.values))),
            )
            seeds = f"{change.seeds} seeds" if change.seeds > 1 else "one seed"
            text = f"{f.arm}: validation loss at most {100 * within:g} % above {of} ({seeds})"
            claims.append(on_losses(kind, f.arm, text, holds_below(*change.ends, bound), quantities, f.base))
    return claims


def below_claim(
    kind: str, text: str, value: float | None, bound: float, arm: str = "", of: str = "measured", **more: float | None
) -> list[Claim]:
    """That a measured number of bytes lies below a bound; nothing where it could not be measured.

    of: the number's name; more: further numbers of bytes, by name; None where one could not be measured
    """
    if value is None:
        return []
    measured = Quantity(of, int(value), unit="bytes", bound=int(bound))
    further = tuple(Quantity(name, size, unit="bytes") for name, size in more.items() if size is not None)
    return [Claim(kind, text, holds_if(value < bound), (measured, *further), arm)]


def predict_claim(phase: PredictPhase) -> list[Claim]:
    """That XL's Predict leaves most of the GPU to others; CUDA's context, which no setting changes, is apart."""
    text = "between what leaves and what returns, Predict holds less than 3.7 GB, forward passes included"
    live, whole = phase.allocated_bytes, phase.occupied_bytes
    return below_claim("predict-phase", text, phase.reserved_bytes, PREDICT_BYTES, live=live, with_context=whole)


def fit_claims(run: Run) -> list[Claim]:
    """That a run fits a 16 GB GPU, keeps the plan's margin, and neither retries allocations nor grows.

    Of one that diverged none of it is shown.
    """
    summary = run.closing_figures
    if summary["memory_source"] != "cuda":
        return []
    peak, retries, steps = summary["peak_memory_bytes"], summary["allocator_retries"], summary["nominal_steps"]
    counts = Quantity("allocator_retries", retries), Quantity("nominal_steps", steps, unit="steps")
    used = Quantity("peak_memory", peak, unit="bytes", bound=GPU_BYTES)
    fits, safe = holds_if(peak < GPU_BYTES), holds_if(peak < SAFE_PEAK_BYTES and not retries)
    text = "peak VRAM below 14 GB, context included, without an allocator retry"
    return [
        replace(claim, verdict="open") if summary.get("diverged") and claim.verdict == "holds" else claim
        for claim in (
            Claim("fits-16gb", "trains on a 16 GB GPU", fits, (used, *counts)),
            Claim("peak-below-14gb", text, safe, (replace(used, bound=SAFE_PEAK_BYTES), *counts)),
            *_growth_claims(run, steps),
        )
    ]


def _growth_claims(run: Run, steps: int) -> list[Claim]:
    """That a run does not grow; nothing for one that was over between two samples."""
    try:
        grown = growth_bytes(run, early=min(50, steps // 4), late=steps)
    except UserError:
        return []
    text = "takes as much memory at the end as after 50 steps"
    return below_claim("does-not-grow", text, grown, MAY_GROW_BYTES, of="growth")


def stable_run_claim(run: Run) -> Claim:
    """That a run took as many steps as the plan wants, learned, and never diverged; open where it was shorter."""
    steps, divergences = (run.closing_figures[name] for name in ("nominal_steps", "divergences"))
    losses = run.steps["measured_loss"].dropna()
    first, last = float(losses.head(20).mean()), float(losses.tail(20).mean())
    stable = not divergences and last < first
    return Claim(
        f"stable-{STABLE_STEPS}-steps",
        f"trains for {STABLE_STEPS} steps without divergence",
        "open" if stable and steps < STABLE_STEPS else holds_if(stable),
        (
            Quantity("nominal_steps", steps, unit="steps"),
            Quantity("divergences", divergences, bound=0),
            Quantity("first_loss", first, unit="nats"),
            Quantity("last_loss", last, unit="nats"),
        ),
    )


def step_time_claims(
    fits: Footprint, free: Footprint, kind: str = "step-time", within: float = STEP_TIME_WITHIN
) -> list[Claim]:
    """That fitting costs little time against a run without memory limits, on the same GPU; nothing without a GPU.

    Nothing either for runs too short for a stable step time. The ratio is paired by seed, and open with one of them. A
    second ratio counts only the time in which the GPU was busy: where both steps wait for the host, it is the ratio on
    a slower GPU.
    """
    ratio = fits.step_ratio(free)
    if fits.measured_allocated_bytes is None or ratio is None:
        return []
    text = f"{fits.arm}: a step takes at most {within} times that of {free.arm}"
    measured = Quantity.over_seeds("step_ratio", ratio, "time ratio", within)
    verdict = holds_below(ratio.low, ratio.high, within)
    quantities = (measured, *_busy(ratio.values[0], fits, free))
    return [Claim(kind, text, verdict, quantities, fits.arm, id=kind)]  # by this id earlier results are matched


def _busy(ratio: float, fits: Footprint, free: Footprint) -> tuple[Quantity, ...]:
    """How busy the GPU was with each, and the ratio of its busy times; nothing where this was not measured."""
    mine, other = fits.gpu_busy_percent, free.gpu_busy_percent
    if not (mine and other):
        return ()
    return (
        Quantity("gpu_busy", mine, unit="percent"),
        Quantity("control_gpu_busy", other, unit="percent"),
        Quantity("busy_ratio", ratio * mine / other, unit="time ratio"),
    )


def format_agreement(result: StudyResult, strict: str, tf32: str, at_step: int) -> dict[str, float]:
    """Validation losses of strict FP32 and of TF32 on the same held-out batches, after as many steps, in nats.

    strict, tf32: the arms, of which the seeds that both ran with are looked at; at_step: nominal

    Returns nothing where one of them has not run. Raises UserError for a run that was not evaluated there.
    """
    both = [seed for arm, seed in result.runs if arm == tf32 and (strict, seed) in result.runs]
    losses = {
        f"{name}_seed_{seed}_loss": round(result.runs[arm, seed].validation_loss(at_step), 6)
        for seed in both
        for name, arm in ((STRICT, strict), (TF32, tf32))
    }
    return {"after_steps": at_step} | losses if both else {}


def agreement_claims(agreement: Mapping[str, float]) -> list[Claim]:
    """That TF32 gives FP32's loss, within the perplexity that a verdict allows; nothing where one of them has not run.

    Paired by seed: the whole interval must lie within the bound, above and below. One seed has none.
    """
    strict, tf32 = (
        {name.removeprefix(arm): loss for name, loss in agreement.items() if name.startswith(f"{arm}_seed")}
        for arm in (STRICT, TF32)
    )
    if not strict.keys() & tf32.keys():
        return []
    change = Interval.of([tf32[seed] - strict[seed] for seed in strict if seed in tf32])
    text = (
        f"TF32 stands for FP32: after {agreement['after_steps']:.0f} steps their validation losses differ by less than "
        "2 % of the perplexity"
    )
    quantities = (
        Quantity.over_seeds("difference_in_loss", change, "nats", QUALITY_TOLERANCE_NATS),
        Quantity("seeds", change.seeds),
        Quantity("after_steps", agreement["after_steps"], unit="steps"),
        *(Quantity(f"{STRICT}{seed}", loss, unit="nats") for seed, loss in strict.items()),
        *(Quantity(f"{TF32}{seed}", loss, unit="nats") for seed, loss in tf32.items()),
    )
    sides = (change.low, change.high), (-change.high, -change.low)
    verdict = worst(*(holds_below(*side, QUALITY_TOLERANCE_NATS) for side in sides))
    return [Claim("tf32-stands-for-fp32", text, verdict, quantities)]


def reference_claims(fits: Footprint, others: Sequence[Footprint], *, control: str, fast: str) -> list[Claim]:
    """That fitting costs neither quality nor time, as far as the GPU could hold the references.

    control: the arm whose loss counts; fast: the one whose step does
    """
    claims = []
    for other in others:
        if other.arm == control:
            claims += quality_claims([fits], other.validation_loss)
        if other.arm == fast:
            claims += step_time_claims(fits, other)
    return claims


def few_bits_claims(
    few: Footprint, others: Sequence[Footprint], ended: Footprint, *, exact: str, fast: str
) -> list[Claim]:
    """That XL with weights of 24 bits takes less memory, at a step and a loss that are hardly more; as far as measured.

    ended: the same arm after all steps, its loss beside that of `exact`, the arm with float32 masters, which is judged
    by its memory too; fast: as in `reference_claims`
    """
    claims = _peak_claims("few-bits-peak", few, FEW_BITS_BYTES)
    for other in others:
        if other.arm == exact:
            claims += predicted_claims([other]) + _peak_claims("masters-peak", other, MASTERS_BYTES)
        if other.arm == fast:
            claims += step_time_claims(few, other, "few-bits-step-time", FEW_BITS_STEP)
    if ended.change and ended.base:
        control, of = ended.validation_loss - ended.change.mean, f"that of {exact} after {ended.base.steps} steps"
        claims += quality_claims([ended], control, "few-bits-quality", FEW_BITS_LOSS, of)
    return claims


def _peak_claims(kind: str, foot: Footprint, bound: float) -> list[Claim]:
    """That an arm's peak as the GPU counts it lies below a bound; nothing without a GPU."""
    text = f"{foot.arm}: the peak stays below {bound / 1e9:g} GB, context included"
    peak = foot.peak_memory_bytes if foot.measured_allocated_bytes else None
    return below_claim(kind, text, peak, bound, foot.arm)


def transition_claims(phases: Mapping[str, PredictPhase], control: str) -> list[Claim]:
    """That offloading for a jump takes less than one gradient step; nothing without a GPU, or a second jump."""
    other, claims = phases.get(control), []
    for name, phase in phases.items():
        if other and name != control:
            steps = f"{phase.typical_ms('steps'):.0f}"
            text = f"offloading and restoring add less than a gradient step to a jump of {steps}"
            claims += _claims("transition", name, text, phase, other, other.gradient_step_ms)
    return claims


def lookahead_claims(phases: Mapping[str, PredictPhase], ahead: str, late: str) -> list[Claim]:
    """That restoring beside the last predicted steps is quicker than after them; nothing without a GPU or two jumps."""
    text = "a jump takes less time when the state is restored beside its last predicted steps than after them"
    return _claims("lookahead", ahead, text, phases[ahead], phases[late], 0.0) if ahead in phases else []


def _claims(kind: str, arm: str, text: str, phase: PredictPhase, other: PredictPhase, limit_ms: float) -> list[Claim]:
    """Jumps of the same number are compared; the median decides, with its 95 % interval. Beside it, a jump's cost.

    The two runs took no turns: what their ordinary steps differ by, over a jump, is added at both ends. Nothing without
    a GPU, or a second jump.
    """
    beyond = phase.beyond_ms(other)
    if phase.reserved_bytes is None or not beyond:
        return []
    low, high = median_ends(beyond)
    drift = abs(phase.gradient_step_ms / other.gradient_step_ms - 1) * phase.typical_ms()
    quantities = (
        Quantity("beyond", median(beyond), low, high, "ms", tuple(beyond), limit_ms),
        Quantity("jumps", len(beyond)),
        Quantity("limit", limit_ms, unit="ms"),
        Quantity("whole_jump", phase.typical_ms(), unit="ms"),
        Quantity("of_that_proposing", phase.typical_ms("proposing"), unit="ms"),
        Quantity("gradient_step", phase.gradient_step_ms, unit="ms"),
        Quantity("drift_between_runs", drift, unit="ms"),
    )
    return [Claim(kind, f"{arm}: {text}", holds_below(low - drift, high + drift, limit_ms), quantities, arm)]
