"""What a notebook shows of a study: its curves, its phases, its tables and its claims."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd

from hybridlab.benchmarks.interleaved import Ratio
from hybridlab.benchmarks.step_overhead import StepOverhead
from hybridlab.charts.builders import AXES, Against, interval_chart, loss_curves, paired, phase_chart, seed_panels
from hybridlab.charts.display import Chart, Panels
from hybridlab.charts.model import Line, Series
from hybridlab.charts.tables import Table, table
from hybridlab.engine.gate import RELIABILITY_BINS
from hybridlab.results.claims import (
    QUALITY_TOLERANCE_NATS,
    Claim,
    Quantity,
    Unit,
    Verdict,
    holds_below,
    holds_if,
    on_losses,
)
from hybridlab.study.comparison import Comparison, base_of
from hybridlab.study.rates import RateTrials
from hybridlab.study.statistics import Base, Interval
from hybridlab.study.step_value import StepValue
from hybridlab.study.study import BASELINE, StudyResult, control_name

PROMISED_SAVING = 0.4
"""Share of the time that the plan promises to save at least."""

MNIST_SPEEDUPS = {"conservative": 1.35, "aggressive": 1.88}
"""What the plan says that its presets had reached on MNIST, at a better accuracy than the baseline's."""

ACCURACY_TOLERANCE = 0.002
"""Of 1, what an accuracy may be below the baseline's where it is to be as good."""

VRAM_BOUND_BYTES = 5e9
"""The plan's bound for GPT-2 Small."""

RELIABILITIES = {"confidence": "reliability", "acceptance_probability": "acceptance_reliability"}
"""What is told before a proposal, and the closing figure that holds it against how proposals ended."""

MAX_NULL_OVER_BARE, MAX_RECORDING = 1.02, 0.03
"""What the trainer may cost: its step over the bare loop's, and the share that recording the path adds."""


def record_table(record: dict[str, Any], caption: str) -> Table:
    """A flat record, one row per fact that is known; numbers have four digits, counts all of theirs."""
    said = {key.replace("_", " "): _said(value) for key, value in record.items() if value is not None}
    return table([{"fact": fact, "value": value} for fact, value in said.items()], caption)


def _said(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)


def curves(result: StudyResult, arms: Sequence[str], against: Against) -> Chart | str:
    """Validation loss of the arms, plain runs as controls; what predicted nothing, or diverged, is named instead.

    A sentence says so where that are all.
    """
    diverged = [name for name in arms if result.has_diverged(name)]
    idle = [name for name in arms if name not in diverged and _is_idle(result, name)]
    runs = {name: result.steps(name) for name in arms if name not in [*idle, *diverged]}
    left_out = (f"; predicted nothing: {', '.join(idle)}" if idle else "") + _left_out(diverged)
    if not runs:
        return f"no arm has a curve{left_out}"
    plain = [name for name in runs if result.is_plain(name)]
    return loss_curves(
        runs,
        against=against,
        control=plain,
        control_of=_control_of(runs),
        title=f"Validation loss over {AXES[against]}{left_out}",
    )


def _at_once(arm: str, seed: int) -> str:
    return f"{arm}, seed {seed}: it diverged at its first step, and there is nothing to draw"


def _left_out(diverged: Sequence[str]) -> str:
    """What a title says of arms that cannot be drawn."""
    return f" (diverged: {', '.join(diverged)})" if diverged else ""


def _is_idle(result: StudyResult, name: str) -> bool:
    """Whether an arm was to predict, and did not with any seed."""
    runs = {seed: run for (arm, seed), run in result.runs.items() if arm == name}
    asked = any(run.config.get("hybrid", {}).get("max_predict_steps") for run in runs.values())
    return asked and not any(result.predicted(name, seed) for seed in runs)


def _control_of(names: Iterable[str]) -> dict[str, str]:
    """Each hybrid's truncated control -> the hybrid."""
    return {control_name(name): name for name in names}


def loss_rows(result: StudyResult, arms: Sequence[str]) -> list[dict[str, Any]]:
    """The table "losses" that a notebook publishes: what `curves` draws over gradient steps, a row per arm."""
    chart = curves(result, arms, "gradient_step")
    return [
        {"arm": s.name, "control": s.control, "gradient_steps": s.x, "loss": s.y, "low": s.low, "high": s.high}
        for s in (series.drawn() for series in (chart.series if isinstance(chart, Chart) else ()))
    ]


def losses_chart(rows: Sequence[Mapping[str, Any]]) -> Chart:
    """Draw the table "losses"."""
    series = [
        Series(row["arm"], row["gradient_steps"], row["loss"], row["low"], row["high"], control=row["control"])
        for row in rows
    ]
    axis, shown = AXES["gradient_step"], paired(series, _control_of(row["arm"] for row in rows))
    return Chart(f"Validation loss over {axis}", axis, "validation loss (nats)", shown)


def by_seed(result: StudyResult, comparisons: Sequence[Comparison]) -> Panels | str:
    """Each hybrid that predicted anything, seed by seed, beside its truncated control."""
    names = [c.name for c in comparisons if c.predicted]
    controls = {name: control_name(name) for name in names if control_name(name) in result.controls([name])}
    diverged = [name for pair in controls.items() for name in pair if result.has_diverged(name)]
    controls = {name: control for name, control in controls.items() if not {name, control} & {*diverged}}
    if not controls:
        return f"no arm predicted anything{_left_out(diverged)}"
    runs = {name: result.steps(name) for name in {*controls, *controls.values()}}
    return seed_panels(
        runs,
        controls,
        against="gradient_step",
        title=f"Validation loss by seed, beside the control{_left_out(diverged)}",
    )


def phases(result: StudyResult, arm: str, seed: int = 0) -> Chart | str:
    """One run's losses over its phases, measured and predicted ones apart; a sentence where it diverged at once."""
    steps = result.runs[arm, seed].steps
    if not np.isfinite(steps["measured_loss"]).any():
        return _at_once(arm, seed)
    return phase_chart(steps, f"{arm}: what each nominal step did (seed {seed})")


def gradient_chart(result: StudyResult, arm: str) -> Chart | str:
    """The gradient's norm before clipping, step by step, in an arm's first run; a sentence where there is none."""
    steps = result.runs[arm, 0].steps
    if not np.isfinite(steps["gradient_norm"]).any():
        return _at_once(arm, 0)
    return loss_curves(
        {arm: steps}, against="nominal_step", smooth=10, value="gradient_norm", title="Gradient norm", y_label="norm"
    )


def final_table(result: StudyResult) -> Table:
    """The figures that every run ended with, as means over seeds."""
    known = ("validation_loss", "perplexity", "accuracy", "averaged_validation_loss")
    figures = [figure for figure in known if figure in result.summaries]
    means = result.summaries.groupby("name", sort=False)[["gradient_steps", *figures]].mean()
    rows = [
        {"arm": name, "gradient steps": row["gradient_steps"]}
        | {figure.replace("_", " ").capitalize(): row[figure] for figure in figures}
        for name, row in means.sort_values("validation_loss", kind="stable").iterrows()
    ]
    caption = "At the end of training, on held-out data; means over seeds, the lowest loss first"
    return table(rows, caption, {"gradient steps": ".1f"})


def counts_table(comparisons: Iterable[Comparison]) -> Table:
    """Every count kept apart: means over seeds, events as totals."""
    rows = [
        {
            "arm": c.name,
            "nominal": c.gradient_steps + c.predicted_steps,
            "gradient": c.gradient_steps,
            "predicted": c.predicted_steps,
            "forward-only": c.forward_only_passes,
            "accepted": c.accepted,
            "rejected": c.rejected,
            "rolled back": c.rollbacks,
            "diverged": c.divergences,
        }
        for c in comparisons
    ]
    means = dict.fromkeys(("nominal", "gradient", "predicted", "forward-only"), ".1f")
    return table(rows, "Steps by kind (mean over seeds) and decisions (total over seeds)", means)


def reliability_table(result: StudyResult, by: str = "confidence") -> Table:
    """A prediction against how often proposals were accepted, over all runs, in the gate's own bins.

    by: "confidence", the path's, or "acceptance_probability", the gate's
    """
    outcomes = [row for run in result.runs.values() for row in run.closing_figures.get(RELIABILITIES[by], [])]
    nothing: list[dict[str, Any]] = [{by.replace("_", " "): None, "accepted share": None, "proposals": 0}]
    return table(
        pooled_reliability(outcomes, by) or nothing,
        f"Trials of the gate by {by.replace('_', ' ')}; calibrated means that the two columns agree",
    )


def pooled_reliability(outcomes: Sequence[Mapping[str, float]], by: str) -> list[dict[str, Any]]:
    """Rows of several runs' reliability tables as one, in the gate's own bins; `by` as for `reliability_table`."""
    frame = pd.DataFrame([row for row in outcomes if by in row])
    if frame.empty:
        return []
    bins = (frame[by] * RELIABILITY_BINS).astype(int).clip(upper=RELIABILITY_BINS - 1)
    totals = frame[[by, "accepted_share"]].mul(frame["proposals"], axis=0).groupby(bins).sum()
    proposals = frame["proposals"].groupby(bins).sum()
    return [
        {by.replace("_", " "): mean[by], "accepted share": mean["accepted_share"], "proposals": int(count)}
        for (_, mean), count in zip(totals.div(proposals, axis=0).iterrows(), proposals, strict=True)
    ]


def comparison_table(comparisons: Iterable[Comparison]) -> Table:
    """The answer: each hybrid beside the control that took as many gradient steps, with 95 % intervals.

    The best against its control comes first; arms that predicted nothing are named above the table, where others did.
    """
    compared = list(comparisons)
    shown = _by_difference(compared) or compared
    rows = [
        {
            "arm": c.name,
            "final loss (nats)": c.validation_loss.mean,
            **averaged_cell(c),
            "its control's": _control_loss(c).mean if c.predicted else None,
            "difference (nats)": str(c.to_control) if c.predicted else None,
            "answer": c.answer,
            "the baseline's loss": c.validation_loss.mean - c.to_baseline.mean,
            "difference to it (nats)": str(c.to_baseline),
            "worth of a predicted step": str(c.step_value) if c.step_value else None,
        }
        for c in shown
    ]
    idle = ", ".join(c.name for c in compared if c not in shown)
    equal = "gradient steps, of a grown arm of as much computation" if any(c.grown for c in shown) else "gradient steps"
    caption = (
        f"The control is a plain run of as many {equal}; a difference below 0 is better. The answer takes it, "
        "its p-value corrected for all arms of the study (Holm). A predicted step is worth 1 when it replaces a real "
        "one, 0 when nothing; open is what lies outside the lengths of the control runs"
        + (f". Predicted nothing, and left out: {idle}" if idle else "")
    )
    return table(rows, caption)


def averaged_cell(c: Comparison) -> dict[str, float]:
    """The loss of the weights averaged over the runs' tails, a table's cell; none where nothing is averaged."""
    return {"of averaged weights (nats)": c.averaged_loss.mean} if c.averaged_loss else {}


def _by_difference(comparisons: Iterable[Comparison]) -> list[Comparison]:
    """Those that predicted anything, by the difference to their control, the best first."""
    predicted = [c for c in comparisons if c.predicted]
    return sorted(predicted, key=lambda c: c.order)


def comparison_chart(comparisons: Sequence[Comparison]) -> Chart | str:
    """The differences to the controls, with intervals; right of zero is worse than stopping earlier.

    Arms that predicted nothing, or diverged, are left out; a sentence says so where that are all.
    """
    drawn = _by_difference(c for c in comparisons if math.isfinite(c.to_control.mean))
    compared = {c.name: c for c in comparisons if not math.isfinite(c.to_control.mean)}
    diverged = [n if c.validation_loss.mean == math.inf else control_name(n) for n, c in compared.items()]
    rows = [(c.name, c.to_control.mean, *c.to_control.ends) for c in drawn]
    if not rows:
        return f"no arm predicted anything{_left_out(diverged)}"
    zero = (Line(0.0, "as good as stopping earlier"),)
    grown = [c.grown for c in drawn]
    equal = (
        "computation" if all(grown) else f"gradient steps{', of grown arms equal computation' if any(grown) else ''}"
    )
    title = f"Hybrid minus control, equal {equal}: right of the line is worse{_left_out(diverged)}"
    return interval_chart(title, "difference in final loss (nats)", rows, lines=zero)


def time_table(comparisons: Iterable[Comparison], result: StudyResult) -> Table:
    """Wall time from the end of each step to the end of the next, proposals and trials included; it differs by run."""
    summaries = result.summaries.groupby("name", sort=False)[
        ["seconds", "gradient_step_ms", "peak_memory_bytes"]
    ].mean()
    ratio = {c.name: str(c.time_ratio).replace("+", "") for c in comparisons}
    rows = [
        {
            "arm": name,
            "training (s)": row["seconds"],
            "median gradient step (ms)": row["gradient_step_ms"],
            "time over baseline's": ratio.get(str(name)),
            "peak memory (GB)": row["peak_memory_bytes"] / 1e9,
        }
        for name, row in summaries.sort_values("seconds", kind="stable").iterrows()
    ]
    source = result.summaries["memory_source"].iloc[0]
    memory = "as the GPU counts it" if source == "cuda" else "of the whole process: there is no GPU"
    formats = {"training (s)": ".1f", "median gradient step (ms)": ".1f", "peak memory (GB)": ".2f"}
    seconds = ", ".join(f"{result.value('seconds', BASELINE, seed):.1f}" for seed in result.seeds)
    drift = f"the baseline's seconds, seed by seed, show how far this machine drifted meanwhile: {seconds}"
    hosts = {host for run in result.runs.values() for host in run.closing_figures.get("hosts", [])}
    where = f"on {len(hosts)} machines, whose times may differ" if len(hosts) > 1 else "on this machine"
    return table(rows, f"Mean over seeds {where}; memory is {memory}; {drift}", formats)


def hybrid_claims(comparison: Comparison, *, perplexity: bool = True) -> list[Claim]:
    """The plan's promises for one arm, each with the numbers that decide it.

    perplexity: whether the loss is that of a language model, so that the plan's 2 % applies to its exponential; of
        images, what the plan says of MNIST counts
    """
    language = [_quality(comparison), speed_claim(comparison), *_vram(comparison)] if perplexity else []
    images = [] if perplexity else _speedup(comparison)
    return [pays_claim(comparison), *language, *images, stable_claim([comparison], comparison.name)]


def run_rows(result: StudyResult) -> list[dict[str, Any]]:
    """The table "runs" of a results file: what every comparison of the study can be computed from again."""
    figures = ("validation_loss", "accuracy", "seconds", "hosts", "growths", "cost_in_full_steps")
    columns = ("gradient_steps", "predicted_steps", *figures, *RELIABILITIES.values())
    return [
        {"arm": name, "seed": seed, "first_loss": float(run.steps["measured_loss"].iloc[0])}
        | {column: run.closing_figures[column] for column in columns if run.closing_figures.get(column, []) != []}
        for (name, seed), run in result.runs.items()
    ]


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
    claims = [Claim("converges", "the validation loss falls", falls, held)]
    below = partial(_below, losses=losses, final=final, base=base_of(result))
    for setting, text in (("lr", "learning rate"), ("beta1", "beta1")):
        if neighbours := [name for name in losses if name.startswith(f"{setting} ")]:
            claims.append(below(f"{setting}-is-tuned", f"no neighbouring {text} ends lower", neighbours))
    if "vanilla" in losses:
        text = "the tuned baseline beats the plan's vanilla setting"
        claims.append(below("beats-vanilla", text, ["vanilla"]))
    return claims


def _below(
    kind: str,
    text: str,
    others: Sequence[str],
    losses: Mapping[str, Mapping[int, float]],
    final: Sequence[Quantity],
    base: Base,
) -> Claim:
    """That the baseline ends below each of some arms, paired by the seeds that both have.

    losses: arm -> seed -> nats; final: the mean losses, to show beside the differences; base: of the baseline
    """
    mine = losses[BASELINE]
    changes = {arm: Interval.of([mine[seed] - loss for seed, loss in losses[arm].items()]) for arm in others}
    worst = _worst(*(holds_below(*change.ends, 0.0) for change in changes.values()))
    held = [Quantity.over_seeds(f"loss_beside_{a.replace(' ', '_')}", c, "nats", 0.0) for a, c in changes.items()]
    seeds = min(change.seeds for change in changes.values())
    return on_losses(kind, "", text, worst, (*held, *final), replace(base, seeds=seeds))


def overhead_table(overhead: StepOverhead) -> Table:
    """Step times over the bare loop's, and that one's own."""
    rows: list[dict[str, Any]] = [
        {"a step": "the bare loop's", "ms": overhead.bare_step_ms},
        {"a step": "the trainer's, which never predicts"} | overhead.plain_over_bare.record(),
        {"a step": "the same, with the null predictor"} | overhead.null_over_bare.record(),
        {"a step": "of that, recording the path"} | overhead.recording_over_bare.record(),
    ]
    caption = "Over a step of the bare loop: medians over paired rounds, with the ends of their 95 % intervals"
    return table(rows, caption, {"ms": ".3f"})


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
        claims.append(_vram_claim("", "the baseline's peak VRAM is below 5 GB", summary["peak_memory_bytes"]))
    return claims


def pays_claim(comparison: Comparison) -> Claim:
    """That predicting beats a plain run of as much computation, corrected for all arms of the study."""
    c, change, worth = comparison, comparison.to_control, comparison.step_value
    quantities = [Quantity.over_seeds("loss_to_control", change, "nats", 0.0), Quantity("seeds", change.seeds)]
    if c.predicted:
        quantities += [Quantity("p_value", c.p_value, unit="probability"), Quantity("arms_corrected_for", c.tested)]
    if worth:
        quantities.append(value_quantity("step_value", worth))
    quantities.append(Quantity("gradient_steps", c.gradient_steps, unit="steps"))
    quantities.append(Quantity("predicted_steps", c.predicted_steps, unit="steps"))
    quantities.append(_time_over_baseline(c))
    words: dict[int, Verdict] = {-1: "holds", 0: "open", 1: "fails"}
    text = "predicting beats a plain run with as many gradient steps"
    if c.grown:
        text = "growing beats a plain run of as much computation"
        quantities.append(Quantity("cost_in_full_steps", c.cost, unit="steps"))
        quantities += _to_loss(c)
    return _on_losses("pays", c, text, words[c.sign], quantities)


def _to_loss(c: Comparison) -> list[Quantity]:
    """How many times an arm's computation, and its time, a plain run takes to its loss."""
    compute = [value_quantity("compute_to_loss", c.compute_to_loss, "ratio")] if c.compute_to_loss else []
    return compute + ([value_quantity("time_to_loss", c.time_to_loss, "time ratio")] if c.time_to_loss else [])


def rate_table(by_rate: Mapping[float, Comparison]) -> Table:
    """One hybrid and its truncated control at several learning rates: what a predicted step is worth at each."""
    rows: list[dict[str, Any]] = [
        {
            "learning rate": f"{rate:g}",
            "control's loss (nats)": _control_loss(c).mean,
            "hybrid's loss (nats)": c.validation_loss.mean,
            "against equal gradient steps (nats)": str(c.to_control),
            "worth of a predicted step": str(c.step_value) if c.step_value else None,
        }
        for rate, c in by_rate.items()
    ]
    caption = "The same jumps at several rates; at a rate that is high enough, a predicted step is worth nothing"
    return table(rows or [{"learning rate": "no further rate was asked for"}], caption)


def rate_claims(by_rate: Mapping[float, Comparison]) -> list[Claim]:
    """That a hybrid beats its control when each has its best rate of as many; nothing of fewer than two.

    Open where either's best is at an edge of those tried. Where the hybrid diverged, its control was not tried.
    """
    if len(by_rate) < 2:
        return []
    hybrids = RateTrials({rate: c.validation_loss.mean for rate, c in by_rate.items()})
    ends = {rate: _control_loss(c).mean for rate, c in by_rate.items()}
    controls = RateTrials({rate: loss for rate, loss in ends.items() if not math.isnan(loss)} or ends)
    hybrid, control, best = hybrids.best, controls.best, by_rate[hybrids.best]
    left = filter(None, (hybrids.unbracketed(best.name), controls.unbracketed("its control")))
    pairs = zip(best.validation_loss.values, _control_loss(by_rate[control]).values, strict=True)
    change = Interval.of([mine - other for mine, other in pairs])
    quantities = (
        Quantity.over_seeds("loss_to_control", change, "nats", 0.0),
        Quantity("seeds", change.seeds),
        Quantity("best_rate_of_hybrid", hybrid if hybrids.trained else None, unit="rate"),
        Quantity("best_rate_of_control", control if controls.trained else None, unit="rate"),
        *(value_quantity(f"step_value_at_{rate:g}", c.step_value) for rate, c in by_rate.items() if c.step_value),
    )
    text = f"predicting pays when hybrid and control each have the best of {len(by_rate)} learning rates"
    decided = holds_below(*change.ends, 0.0)
    base = replace(best.base, unbracketed=tuple(left))
    return [on_losses("pays-at-best-rates", "", text, decided, quantities, base)]


def _control_loss(c: Comparison) -> Interval:
    """Of the truncated control, seed by seed."""
    pairs = zip(c.validation_loss.values, c.to_control.values, strict=True)
    return Interval.of([loss - change for loss, change in pairs])


def value_quantity(name: str, value: StepValue, unit: Unit = "steps", bound: float | None = None) -> Quantity:
    """With its interval."""
    return Quantity(name, value.value, value.low, value.high, unit, value.per_seed, bound)


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
    decided = _worst(_takes(comparison, 1 - PROMISED_SAVING), _keeps_quality(comparison))
    return _on_losses(
        "speed", comparison, text, decided, (change, _time_over_baseline(comparison, 1 - PROMISED_SAVING))
    )


def _speedup(comparison: Comparison) -> list[Claim]:
    """What the plan reports of MNIST for the preset of this name."""
    times, change = MNIST_SPEEDUPS.get(comparison.name), comparison.accuracy_to_baseline
    if times is None or change is None:
        return []
    accurate = holds_below(-change.high, -change.low, ACCURACY_TOLERANCE)
    text = f"{times} times as fast as the baseline, its accuracy at most {100 * ACCURACY_TOLERANCE:.1f} % lower"
    quantities = (Quantity.over_seeds("accuracy_change", change, "share"), _time_over_baseline(comparison, 1 / times))
    return [_on_losses("speedup", comparison, text, _worst(_takes(comparison, 1 / times), accurate), quantities)]


def _takes(comparison: Comparison, share: float) -> Verdict:
    """Whether an arm takes at most this share of the baseline's time."""
    low, high = comparison.time_ratio.ends
    return "open" if low <= share < high else holds_if(high <= share)


def _worst(*verdicts: Verdict) -> Verdict:
    """That all of them hold."""
    return next((verdict for verdict in ("fails", "open") if verdict in verdicts), "holds")


def _time_over_baseline(comparison: Comparison, bound: float | None = None) -> Quantity:
    return Quantity.over_seeds("time_over_baseline", comparison.time_ratio, "time ratio", bound)


def _keeps_quality(comparison: Comparison) -> Verdict:
    return holds_below(comparison.to_baseline.low, comparison.to_baseline.high, QUALITY_TOLERANCE_NATS)


def _vram(comparison: Comparison) -> list[Claim]:
    """On a GPU, that prediction keeps the plan's bound."""
    peak, text = comparison.peak_vram_bytes, f"{comparison.name}: peak VRAM stays below 5 GB"
    return [] if peak is None else [_vram_claim(comparison.name, text, peak)]


def _vram_claim(arm: str, text: str, peak_bytes: int) -> Claim:
    fits = holds_if(peak_bytes < VRAM_BOUND_BYTES)
    return Claim("vram", text, fits, (Quantity("peak_memory", peak_bytes, unit="bytes", bound=VRAM_BOUND_BYTES),), arm)


def _ratio_claim(kind: str, text: str, name: str, ratio: Ratio, bound: float) -> Claim:
    quantity = Quantity(name, ratio.median, ratio.low, ratio.high, "time ratio", ratio.rounds, bound)
    return Claim(kind, text, holds_below(ratio.low, ratio.high, bound), (quantity,))


def stable_claim(comparisons: Sequence[Comparison], arm: str) -> Claim:
    """That no run of these comparisons diverges; rollbacks are counted apart. arm: what the claim calls them."""
    divergences = sum(comparison.divergences for comparison in comparisons)
    rollbacks = Quantity("rollbacks", sum(comparison.rollbacks for comparison in comparisons))
    counts = (Quantity("divergences", divergences, bound=0), rollbacks)
    return Claim("stable", f"{arm}: no run diverges", holds_if(not divergences), counts, arm)
