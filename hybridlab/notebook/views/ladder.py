"""What each rung of a ladder brings, as a table, a chart and claims."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from hybridlab.base.device import device_name, find_device
from hybridlab.benchmarks.step_profile import StepWork, step_work, time_step
from hybridlab.charts.display import Chart
from hybridlab.charts.model import Series
from hybridlab.charts.tables import Table, known_columns, table
from hybridlab.notebook.views.study_claims import known_value
from hybridlab.planner.gpu_specs import spec_of
from hybridlab.results.claims import QUALITY_TOLERANCE_NATS, Claim, Quantity, holds_below, on_losses
from hybridlab.study.comparison import base_of
from hybridlab.study.ladder import AVERAGED, Ladder, Rung, learns_as, times
from hybridlab.study.statistics import Interval
from hybridlab.study.step_value import StepValue


@dataclass(frozen=True)
class LadderProfile:
    """What steps were found to take beside the runs.

    alone_ms: rung -> a step of the vanilla run with this rung's changes only, where they do anything by themselves
    work: rung -> what a step gives the GPU to do, with the rungs before it
    """

    alone_ms: Mapping[str, float]
    work: Mapping[str, StepWork]


FORMATS = {"step (ms)": ".2f", "tokens per second": ",.0f", "GPU busy": ".0%", "launches per step": ",.0f"}
FORMATS |= {"FLOP utilisation": ".1%", "compile (s)": ".1f", "time to it (s)": ".2f"}
FORMATS |= {"alone: step (ms)": ".2f", "alone: vanilla's time over its own": ".2f"}


def profile_ladder(ladder: Ladder, steps: int) -> LadderProfile:
    """Time so many steps of each rung alone (0: of none), then profile each with those before it, and time no more."""
    alone = {name: run for name in ladder.changes if steps and (run := ladder.alone(name))}
    alone_ms = {name: time_step(run, steps) for name, run in alone.items()}
    stacked = [ladder.vanilla, *map(ladder.stacked, ladder.changes)]
    return LadderProfile(alone_ms, {run.name: step_work(run) for run in stacked})


def ladder_table(ladder: Ladder, rungs: Sequence[Rung], profile: LadderProfile) -> Table:
    """Every rung, from the vanilla run up: its step, and its time to the vanilla run's final loss."""
    rows = []
    for rung in rungs:
        cells = _step_cells(rung, profile) | _loss_cells(rung) | _alone_cells(ladder, rung, rungs, profile)
        rows.append({"rung": rung.name} | cells)
    rows = known_columns(rows)
    caption = (
        "Each rung with all before it. Steps and time to the vanilla run's final validation loss, which was fixed "
        "before; time is without compilation. That is of a rung's first run: what was compiled alike before is kept. "
        "FLOP utilisation is of the GPU's dense bf16 rate"
    )
    return table(rows, caption, {name: spec for name, spec in FORMATS.items() if name in rows[0]})


def steps_table(rungs: Sequence[Rung]) -> Table:
    """Steps of each rung to the vanilla run's final loss; no time, so that it repeats."""
    rows = [{"rung": rung.name} | _loss_cells(rung) for rung in rungs]
    timed = ("time to it (s)", "vanilla's time over it")
    shown = [{name: value for name, value in row.items() if name not in timed} for row in rows]
    caption = "A rung without lengths tried changes rounding at most: its steps are those of the rung before"
    return table(shown, caption)


def _step_cells(rung: Rung, profile: LadderProfile) -> dict[str, Any]:
    """Times are those of the runs."""
    work, task, seconds = profile.work[rung.name], rung.config.task, rung.step_seconds
    gpu = spec_of(device_name(find_device(rung.config.device)))
    return {
        "step (ms)": 1e3 * seconds,
        "tokens per second": task.batch_size * getattr(task, "block_size", 1) / seconds,
        "GPU busy": None if work.busy_ms is None else min(1.0, work.busy_ms / seconds / 1e3),
        "launches per step": work.launches,
        "FLOP utilisation": work.operations / seconds / gpu.bfloat16_flops if gpu else None,
        "compile (s)": rung.compile_seconds,
    }


def _loss_cells(rung: Rung) -> dict[str, Any]:
    return {
        "steps to the loss": _shown(rung.steps, ".0f"),
        **({"with averaged weights": _shown(rung.averaged_steps, ".0f")} if rung.averaged_steps else {}),
        "time to it (s)": rung.seconds,
        "vanilla's time over it": _shown(rung.time_ratio, ".2f"),
        "loss beside vanilla's (nats)": rung.loss_change and str(rung.loss_change),
        "lengths x seeds": f"{', '.join(map(str, rung.lengths))} x {rung.seeds}",
        "lengths tried": rung.tried or None,
    }


def _alone_cells(ladder: Ladder, rung: Rung, rungs: Sequence[Rung], profile: LadderProfile) -> dict[str, Any]:
    """The rung without the others; its steps to the loss are known where it learns as it does among them."""
    step_ms, alone, ratio = profile.alone_ms.get(rung.name), ladder.alone(rung.name), None
    if step_ms and alone and learns_as(alone, rung.config) and rung.steps and rung.steps.value:
        ratio = 1e3 * rungs[0].step_seconds * ladder.vanilla.steps / (step_ms * rung.steps.value)
    return {"alone: step (ms)": step_ms, "alone: vanilla's time over its own": ratio}


def _shown(value: StepValue | None, spec: str) -> str | None:
    if value is None or value.value is None:
        return "open"
    ends = ("open" if math.isinf(end) else format(end, spec) for end in (value.low, value.high))
    exact = value.low == value.high or value.seeds < 2
    return format(value.value, spec) + ("" if exact else f" [{', '.join(ends)}]")


def waterfall_chart(rungs: Sequence[Rung]) -> Chart:
    """Wall time to the vanilla run's final loss, rung by rung, and what each saves of the time of the one before."""
    known = [(rung.name, rung.seconds) for rung in rungs if rung.seconds]
    seconds = [spent for _, spent in known]
    saved = [0.0, *(max(0.0, before - after) for before, after in pairwise(seconds))]
    rows = range(len(known))
    bars = (
        Series("wall time to the loss", seconds, rows, kind="bar", stack=True),
        Series("saved by this rung", saved, rows, kind="bar", stack=True),
    )
    left_out = [rung.name for rung in rungs if not rung.seconds]
    title = "Wall time to the vanilla run's final loss" + (f" (open: {', '.join(left_out)})" if left_out else "")
    return Chart(title, "seconds", "", bars, names=tuple(f"{name}: {spent:.3g} s" for name, spent in known))


def ladder_claims(ladder: Ladder, rungs: Sequence[Rung], least_ratio: float) -> list[Claim]:
    """That the stack takes less time, that rounding changes no loss, and that other rungs take fewer steps.

    least_ratio: what the vanilla run's time over the whole stack's is to be at least. Where the last rung's steps are
        taken to be those of the rung before, it must have been shown to learn as much as the vanilla run
    """
    vanilla, top = rungs[0], rungs[-1]
    base, claims = vanilla.base, []
    for rung in rungs:
        if rung.loss_change:
            claims.append(_same_loss(ladder, vanilla, rung, rung.loss_change))
        if rung.tried:
            share = times(rung.steps or StepValue(None, -math.inf, math.inf, rung.seeds), 1 / ladder.vanilla.steps)
            quantities = (*known_value("steps_over_vanilla", share, "ratio", 1.0), Quantity("seeds", rung.seeds))
            text = f"{rung.name}: the stack up to it reaches the vanilla run's final loss in fewer steps"
            decided = holds_below(share.low, share.high, 1.0)
            claims.append(on_losses("fewer-steps", rung.name, text, decided, quantities, base))
    alike = top.loss_change and holds_below(*top.loss_change.ends, QUALITY_TOLERANCE_NATS) == "holds"
    ratio = top.time_ratio or StepValue(None, -math.inf, math.inf, top.seeds)
    time = f"at most 1/{least_ratio:g} of its" if least_ratio > 1 else "less"
    text = f"the whole stack reaches the vanilla run's final loss in {time} time"
    decided = holds_below(-ratio.high, -ratio.low, -least_ratio)
    if decided == "holds" and not (top.tried or alike):
        decided, text = "open", f"{text} (that {top.name} needs no more steps than the rung before was not shown)"
    quantities = (
        *known_value("stack_time_ratio", ratio, "time ratio", least_ratio),
        Quantity("seeds", ratio.seeds),
    )
    return [on_losses("stack-is-fast", "", text, decided, quantities, base), *claims]


def _same_loss(ladder: Ladder, vanilla: Rung, rung: Rung, change: Interval) -> Claim:
    """That a rung which counts with the vanilla run's steps learns as much in them."""
    steps, bound = ladder.timed_steps, QUALITY_TOLERANCE_NATS
    text = f"{rung.name}: after {steps} steps the perplexity is at most 2 % above the vanilla run's"
    quantity = Quantity.over_seeds("loss_change", change, "nats", bound)
    base = base_of(vanilla.result, vanilla.name, steps)
    return on_losses("rounding", rung.name, text, holds_below(*change.ends, bound), (quantity,), base)


def ladder_tables(ladder: Ladder, rungs: Sequence[Rung], profile: LadderProfile) -> dict[str, list[dict[str, Any]]]:
    """What every figure of the ladder can be computed from again, for results.json: the table, and each of its runs."""
    figures = ("validation_loss", AVERAGED, "seconds", "gradient_step_ms", "warm_up_seconds")
    runs = [
        {"rung": rung.name, "seed": seed, "steps": run.config["steps"]}
        | {name: run.closing_figures.get(name) for name in figures}
        for rung in rungs
        for (_, seed), run in rung.result.runs.items()
    ]
    return {"ladder": [dict(row) for row in ladder_table(ladder, rungs, profile).rows], "ladder_runs": runs}


def ladder_figures(rungs: Sequence[Rung]) -> dict[str, dict[str, Any]]:
    """The vanilla run's time over that of the whole stack, for results.json."""
    top, ratio = rungs[-1], rungs[-1].time_ratio
    rests_on = {
        "seeds": top.seeds,
        "loss": "the vanilla run's final validation loss, seed by seed",
        "vanilla_steps": rungs[0].lengths[0],
        "rungs": [rung.name for rung in rungs],
        "lengths": list(top.lengths),
        "lengths_tried": sum(rung.tried for rung in rungs),
    }
    values = (ratio.value, ratio.low, ratio.high, ratio.per_seed) if ratio else (None, None, None, ())
    figure = dict(zip(("value", "low", "high", "per_seed"), values, strict=True))
    return {"stack_time_ratio": figure | {"rests_on": rests_on}}
