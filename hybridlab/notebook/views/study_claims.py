"""What the runs of a study show, as claims."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean

import pandas as pd

from hybridlab.benchmarks.interleaved import Ratio
from hybridlab.benchmarks.step_overhead import StepOverhead
from hybridlab.notebook.views.memory_claims import below_claim
from hybridlab.notebook.views.study import control_loss
from hybridlab.results.claims import (
    QUALITY_TOLERANCE_NATS,
    Claim,
    Quantity,
    Unit,
    Verdict,
    holds_below,
    holds_if,
    on_losses,
    worst,
)
from hybridlab.study.comparison import Comparison, base_of
from hybridlab.study.rates import RateTrials
from hybridlab.study.statistics import Base, Interval
from hybridlab.study.step_value import StepValue
from hybridlab.study.study import BASELINE, StudyResult

PROMISED_SAVING = 0.4
"""Share of the time that the plan promises to save at least."""

MNIST_SPEEDUPS = {"conservative": 1.35, "aggressive": 1.88}
"""What the plan says that its presets had reached on MNIST, at a better accuracy than the baseline's."""

ACCURACY_TOLERANCE = 0.002
"""Of 1, what an accuracy may be below the baseline's where it is to be as good."""

VRAM_BOUND_BYTES = 5e9
"""The plan's bound for GPT-2 Small."""

TUNED = {
    "lr-is-tuned": ("lr ", "no neighbouring learning rate ends lower"),
    "beta1-is-tuned": ("beta1 ", "no neighbouring beta1 ends lower"),
    "beats-vanilla": ("vanilla", "the tuned baseline beats the plan's vanilla setting"),
}
"""What is claimed of the baseline, how the names begin of the arms that it is held against, and the sentence."""

MAX_NULL_OVER_BARE, MAX_RECORDING = 1.02, 0.03
"""What the trainer may cost: its step over the bare loop's, and the share that recording the path adds."""


def hybrid_claims(comparison: Comparison, *, perplexity: bool = True) -> list[Claim]:
    """The plan's promises for one arm, each with the numbers that decide it.

    perplexity: whether the loss is that of a language model, so that the plan's 2 % applies to its exponential; of
        images, what the plan says of MNIST counts
    """
    arm = comparison.name
    if perplexity:
        vram = _vram(arm, f"{arm}: peak VRAM stays below 5 GB", comparison.peak_vram_bytes)
        promised = [_quality(comparison), speed_claim(comparison), *vram]
    else:
        promised = _speedup(comparison)
    return [pays_claim(comparison), *promised, stable_claim([comparison], arm)]


def baseline_claims(result: StudyResult) -> list[Claim]:
    """That the baseline learns, that its learning rate and beta1 are the best of those tried, that it beats vanilla."""
    losses: dict[str, dict[int, float]] = {}
    for (name, seed), run in result.runs.items():
        losses.setdefault(name, {})[seed] = run.validation_loss()
    evaluated = result.runs[BASELINE, 0].steps.get("validation_loss", pd.Series(dtype=float)).dropna()
    first = float(evaluated.iloc[0]) if len(evaluated) else math.nan
    final = tuple(
        Quantity(f"{name.replace(' ', '_')}_loss", fmean(runs.values()), unit="nats", per_seed=tuple(runs.values()))
        for name, runs in losses.items()
    )
    falls = holds_if(max(losses[BASELINE].values()) < first)
    held = (Quantity("first_loss", first, unit="nats"), replace(final[0], bound=first), *final[1:])
    claims, mine = [Claim("converges", "the validation loss falls", falls, held)], losses[BASELINE]
    for kind, (beginning, text) in TUNED.items():
        others = {arm: of for arm, of in losses.items() if arm.startswith(beginning)}
        changes = {arm: Interval.of([mine[seed] - loss for seed, loss in of.items()]) for arm, of in others.items()}
        if changes:
            claims.append(_below(kind, text, changes, final, base_of(result)))
    return claims


def _below(kind: str, text: str, changes: Mapping[str, Interval], final: Sequence[Quantity], base: Base) -> Claim:
    """That the baseline ends below each of some arms, by the differences to them, paired by the seeds that both have.

    final: the mean losses, to show beside the differences; base: of the baseline
    """
    decided = worst(*(holds_below(*change.ends, 0.0) for change in changes.values()))
    held = [Quantity.over_seeds(f"loss_beside_{a.replace(' ', '_')}", c, "nats", 0.0) for a, c in changes.items()]
    seeds = min(change.seeds for change in changes.values())
    return on_losses(kind, "", text, decided, (*held, *final), replace(base, seeds=seeds))


def cost_claims(overhead: StepOverhead, result: StudyResult) -> list[Claim]:
    """That the trainer costs little beside the bare loop, and, on a GPU, that the baseline fits the plan's bound."""
    thin = f"a step of the trainer, asking included, takes at most {MAX_NULL_OVER_BARE} of the bare loop's"
    cheap = f"recording the path takes at most {MAX_RECORDING:.0%} of a step"
    null, recording = overhead.null_over_bare, overhead.recording_over_bare
    claims = [
        _ratio_claim("trainer-is-thin", thin, "null_over_bare", null, MAX_NULL_OVER_BARE),
        _ratio_claim("recording-is-cheap", cheap, "recording_over_bare", recording, MAX_RECORDING),
    ]
    summary = result.runs[BASELINE, 0].closing_figures
    if summary["memory_source"] == "cuda":
        claims += _vram("", "the baseline's peak VRAM is below 5 GB", summary["peak_memory_bytes"])
    return claims


def pays_claim(comparison: Comparison) -> Claim:
    """That predicting beats a plain run of as much computation, corrected for all arms of the study."""
    c, change = comparison, comparison.to_control
    quantities = [Quantity.over_seeds("loss_to_control", change, "nats", 0.0), Quantity("seeds", change.seeds)]
    if c.predicted:
        quantities += [Quantity("p_value", c.p_value, unit="probability"), Quantity("arms_corrected_for", c.tested)]
    quantities += known_value("step_value", c.step_value)
    taken = {"gradient_steps": c.gradient_steps, "predicted_steps": c.predicted_steps}
    quantities += [*(Quantity(name, steps, unit="steps") for name, steps in taken.items()), _time_over_baseline(c)]
    words: dict[int, Verdict] = {-1: "holds", 0: "open", 1: "fails"}
    text = "predicting beats a plain run with as many gradient steps"
    if c.grown:
        text = "growing beats a plain run of as much computation"
        quantities.append(Quantity("cost_in_full_steps", c.cost, unit="steps"))
        quantities += known_value("compute_to_loss", c.compute_to_loss, "ratio")
        quantities += known_value("time_to_loss", c.time_to_loss, "time ratio")
    return _on_losses("pays", c, text, words[c.sign], quantities)


def rate_claims(by_rate: Mapping[float, Comparison]) -> list[Claim]:
    """That a hybrid beats its control when each has its best rate of as many; nothing of fewer than two.

    Open where either's best is at an edge of those tried. Where the hybrid diverged, its control was not tried.
    """
    if len(by_rate) < 2:
        return []
    hybrids = RateTrials({rate: c.validation_loss.mean for rate, c in by_rate.items()})
    ends = {rate: control_loss(c).mean for rate, c in by_rate.items()}
    controls = RateTrials({rate: loss for rate, loss in ends.items() if not math.isnan(loss)} or ends)
    hybrid, control, best = hybrids.best, controls.best, by_rate[hybrids.best]
    left = filter(None, (hybrids.unbracketed(best.name), controls.unbracketed("its control")))
    pairs = zip(best.validation_loss.values, control_loss(by_rate[control]).values, strict=True)
    change = Interval.of([mine - other for mine, other in pairs])
    quantities = (
        Quantity.over_seeds("loss_to_control", change, "nats", 0.0),
        Quantity("seeds", change.seeds),
        Quantity("best_rate_of_hybrid", hybrid if hybrids.trained else None, unit="rate"),
        Quantity("best_rate_of_control", control if controls.trained else None, unit="rate"),
        *(q for rate, c in by_rate.items() for q in known_value(f"step_value_at_{rate:g}", c.step_value)),
    )
    text = f"predicting pays when hybrid and control each have the best of {len(by_rate)} learning rates"
    decided = holds_below(*change.ends, 0.0)
    base = replace(best.base, unbracketed=tuple(left))
    return [on_losses("pays-at-best-rates", "", text, decided, quantities, base)]


def known_value(name: str, of: StepValue | None, unit: Unit = "steps", bound: float | None = None) -> list[Quantity]:
    """One with its interval; nothing of None."""
    return [Quantity(name, of.value, of.low, of.high, unit, of.per_seed, bound)] if of else []


def _on_losses(kind: str, c: Comparison, text: str, decided: Verdict, quantities: Iterable[Quantity]) -> Claim:
    """A claim on a hybrid's loss; where it predicted nothing, its loss is the baseline's and shows nothing."""
    if not c.predicted and math.isfinite(c.validation_loss.mean):
        return Claim(kind, f"{c.name}: {text}", "predicted nothing", tuple(quantities), c.name)
    return on_losses(kind, c.name, f"{c.name}: {text}", decided, quantities, c.base)


def _quality(comparison: Comparison) -> Claim:
    change = comparison.to_baseline
    text = "final perplexity stays within 2 % of the full baseline's"
    quantities = (
        Quantity.over_seeds("loss_to_baseline", change, "nats", QUALITY_TOLERANCE_NATS),
        Quantity("seeds", change.seeds),
        Quantity("perplexity_change", math.expm1(change.mean), unit="share"),
    )
    return _on_losses("quality", comparison, text, _keeps_quality(comparison), quantities)


def speed_claim(comparison: Comparison) -> Claim:
    """The plan's 40 to 60 % less time, at its own tolerance for quality."""
    change = Quantity("perplexity_change", math.expm1(comparison.to_baseline.mean), unit="share")
    text = "the baseline's perplexity within 2 % in 40 % less time"
    promised = 1 - PROMISED_SAVING
    decided = worst(_takes(comparison, promised), _keeps_quality(comparison))
    return _on_losses("speed", comparison, text, decided, (change, _time_over_baseline(comparison, promised)))


def _speedup(comparison: Comparison) -> list[Claim]:
    """What the plan reports of MNIST for the preset of this name."""
    times, change = MNIST_SPEEDUPS.get(comparison.name), comparison.accuracy_to_baseline
    if times is None or change is None:
        return []
    accurate = holds_below(-change.high, -change.low, ACCURACY_TOLERANCE)
    text = f"{times} times as fast as the baseline, its accuracy at most {100 * ACCURACY_TOLERANCE:.1f} % lower"
    quantities = (Quantity.over_seeds("accuracy_change", change, "share"), _time_over_baseline(comparison, 1 / times))
    return [_on_losses("speedup", comparison, text, worst(_takes(comparison, 1 / times), accurate), quantities)]


def _takes(comparison: Comparison, share: float) -> Verdict:
    """Whether an arm takes at most this share of the baseline's time."""
    low, high = comparison.time_ratio.ends
    return "open" if low <= share < high else holds_if(high <= share)


def _time_over_baseline(comparison: Comparison, bound: float | None = None) -> Quantity:
    return Quantity.over_seeds("time_over_baseline", comparison.time_ratio, "time ratio", bound)


def _keeps_quality(comparison: Comparison) -> Verdict:
    return holds_below(comparison.to_baseline.low, comparison.to_baseline.high, QUALITY_TOLERANCE_NATS)


def _vram(arm: str, text: str, peak_bytes: int | None) -> list[Claim]:
    """On a GPU, that an arm keeps the plan's bound."""
    return below_claim("vram", text, peak_bytes, VRAM_BOUND_BYTES, arm, of="peak_memory")


def _ratio_claim(kind: str, text: str, name: str, ratio: Ratio, bound: float) -> Claim:
    quantity = Quantity(name, ratio.median, ratio.low, ratio.high, "time ratio", ratio.rounds, bound)
    return Claim(kind, text, holds_below(ratio.low, ratio.high, bound), (quantity,))


def stable_claim(comparisons: Sequence[Comparison], arm: str) -> Claim:
    """That no run of these comparisons diverges; rollbacks are counted apart. arm: what the claim calls them."""
    divergences = sum(comparison.divergences for comparison in comparisons)
    rollbacks = Quantity("rollbacks", sum(comparison.rollbacks for comparison in comparisons))
    counts = (Quantity("divergences", divergences, bound=0), rollbacks)
    return Claim("stable", f"{arm}: no run diverges", holds_if(not divergences), counts, arm)
