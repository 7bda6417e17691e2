"""What a notebook shows of a study in tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from hybridlab.benchmarks.step_overhead import StepOverhead
from hybridlab.charts.tables import Table, table
from hybridlab.engine.gate import RELIABILITY_BINS
from hybridlab.study.comparison import Comparison
from hybridlab.study.statistics import Interval
from hybridlab.study.study import BASELINE, StudyResult

RELIABILITIES = {"confidence": "reliability", "acceptance_probability": "acceptance_reliability"}
"""What is told before a proposal, and the closing figure that holds it against how proposals ended."""


def record_table(record: dict[str, Any], caption: str) -> Table:
    """A flat record, one row per fact that is known; numbers have four digits, counts all of theirs."""
    said = {key.replace("_", " "): _said(value) for key, value in record.items() if value is not None}
    return table([{"fact": fact, "value": value} for fact, value in said.items()], caption)


def _said(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)


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
    shown = by_difference(compared) or compared
    rows = [
        {
            "arm": c.name,
            "final loss (nats)": c.validation_loss.mean,
            **averaged_cell(c),
            "its control's": control_loss(c).mean if c.predicted else None,
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


def by_difference(comparisons: Iterable[Comparison]) -> list[Comparison]:
    """Those that predicted anything, by the difference to their control, the best first."""
    predicted = [c for c in comparisons if c.predicted]
    return sorted(predicted, key=lambda c: c.order)


def time_table(comparisons: Iterable[Comparison], result: StudyResult) -> Table:
    """Wall time from the end of each step to the end of the next, proposals and trials included; it differs by run."""
    figures = ["seconds", "gradient_step_ms", "peak_memory_bytes"]
    summaries = result.summaries.groupby("name", sort=False)[figures].mean()
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


def run_rows(result: StudyResult) -> list[dict[str, Any]]:
    """The table "runs" of a results file: what every comparison of the study can be computed from again."""
    figures = ("validation_loss", "accuracy", "seconds", "hosts", "growths", "cost_in_full_steps")
    columns = ("gradient_steps", "predicted_steps", *figures, *RELIABILITIES.values())
    return [
        {"arm": name, "seed": seed, "first_loss": float(run.steps["measured_loss"].iloc[0])}
        | {column: run.closing_figures[column] for column in columns if run.closing_figures.get(column, []) != []}
        for (name, seed), run in result.runs.items()
    ]


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


def rate_table(by_rate: Mapping[float, Comparison]) -> Table:
    """One hybrid and its truncated control at several learning rates: what a predicted step is worth at each."""
    rows: list[dict[str, Any]] = [
        {
            "learning rate": f"{rate:g}",
            "control's loss (nats)": control_loss(c).mean,
            "hybrid's loss (nats)": c.validation_loss.mean,
            "against equal gradient steps (nats)": str(c.to_control),
            "worth of a predicted step": str(c.step_value) if c.step_value else None,
        }
        for rate, c in by_rate.items()
    ]
    caption = "The same jumps at several rates; at a rate that is high enough, a predicted step is worth nothing"
    return table(rows or [{"learning rate": "no further rate was asked for"}], caption)


def control_loss(c: Comparison) -> Interval:
    """Of the truncated control, seed by seed."""
    pairs = zip(c.validation_loss.values, c.to_control.values, strict=True)
    return Interval.of([loss - change for loss, change in pairs])
