"""What predicted depth brings, as tables and claims."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from operator import attrgetter
from typing import Any

from hybridlab.charts.builders import interval_chart
from hybridlab.charts.display import Chart
from hybridlab.charts.model import Line, Series
from hybridlab.charts.tables import Table, table
from hybridlab.depth import DepthSchedule
from hybridlab.engine.config import HybridTrainerConfig
from hybridlab.notebook.views.study import averaged_cell
from hybridlab.notebook.views.study_claims import pays_claim, speed_claim, stable_claim
from hybridlab.results.claims import Claim, Quantity, holds_below, on_losses
from hybridlab.study.comparison import Comparison, base_of, compare, difference
from hybridlab.study.rates import RateTrials
from hybridlab.study.study import StudyResult, shallow_control_name

GROWN, SHALLOW = "grown", "shallow"
"""The arms of `depth_arms`."""

UNEQUAL = "no shallow run had as much computation"
"""Why a grown model that ends below the shallow one of as many steps shows nothing."""


def depth_arms(
    plain: HybridTrainerConfig, first_blocks: int, blocks: int, grow_at: float
) -> dict[str, HybridTrainerConfig]:
    """Of these settings an arm that predicts depth, "grown", and its control "shallow", which never grows.

    first_blocks: that are trained first, of so many blocks; 0 makes no arm
    grow_at: share of the run at which all take part
    """
    if not first_blocks:
        return {}
    grown = DepthSchedule.shares(((0.0, first_blocks), (grow_at, blocks)))
    shallow = DepthSchedule.constant(first_blocks)
    return {GROWN: replace(plain, depth=grown), SHALLOW: replace(plain, depth=shallow)}


def depth_claims(result: StudyResult) -> list[Claim]:
    """What the arms of `depth_arms` show: whether growing pays, whether depth does, and the plan's promise of time.

    Nothing where they did not run.
    """
    if (GROWN, 0) not in result.runs:
        return []
    grown = compare(result, GROWN)
    return [
        pays_claim(grown),
        shallow_claim(result, GROWN, SHALLOW),
        speed_claim(grown),
        stable_claim([grown], GROWN),
    ]


def depth_table(results: Mapping[float, StudyResult], arms: Sequence[str]) -> Table:
    """Each arm's loss and cost beside the baseline's, budget by budget, the lowest loss first.

    results: tokens per parameter -> the study of that budget
    """
    by_loss = attrgetter("validation_loss.mean")
    rows = [
        {"tokens per parameter": budget} | _depth_row(result, comparison)
        for budget, result in results.items()
        for comparison in sorted((compare(result, arm) for arm in _shown(result, arms)), key=by_loss)
    ]
    caption = (
        "A difference below 0 is better. Computation and time to its loss are those of a plain run over the arm's own: "
        "above 1, growing pays. They are open where the loss lies outside those of the plain runs"
    )
    formats = {"tokens per parameter": ".3g", "cost (full steps)": ",d", "time over the baseline's": ".2f"}
    return table(rows, caption, formats) if rows else table([{"arm": "no arm predicts depth"}])


def _shown(result: StudyResult, arms: Sequence[str]) -> list[str]:
    """The arms, and the shallow models that took as much computation as those that grew."""
    equal = {shallow_control_name(arm) for arm in arms}
    return [*arms, *(control for control in result.controls(arms) if control in equal)]


def _depth_row(result: StudyResult, c: Comparison) -> dict[str, Any]:
    depths = result.runs[c.name, result.seeds[0]].steps["depth"].dropna()
    return {
        "arm": c.name,
        "blocks": " -> ".join(f"{depth:.0f}" for depth in dict.fromkeys(depths)),
        "final loss (nats)": c.validation_loss.mean,
        **averaged_cell(c),
        "against the baseline (nats)": str(c.to_baseline),
        "against as much computation (nats)": str(c.to_control) if c.grown else None,
        "answer": c.answer if c.grown else "a control",
        "cost (full steps)": round(c.cost),
        "computation to its loss": c.compute_to_loss.as_ratio if c.compute_to_loss else None,
        "time to its loss": c.time_to_loss.as_ratio if c.time_to_loss else None,
        "time over the baseline's": c.time_ratio.mean,
    }


def budget_chart(results: Mapping[float, StudyResult], arms: Sequence[str]) -> Chart | str:
    """Each arm's final loss against the plain run of as many steps, over the budget; of one budget, a row per arm.

    results: as for `depth_table`

    Where an arm or the baseline diverged, nothing is drawn; a sentence says so where that is everywhere.
    """
    changes = {arm: {at: compare(result, arm).to_baseline for at, result in results.items()} for arm in arms}
    drawn = {arm: {at: c for at, c in by.items() if math.isfinite(c.mean)} for arm, by in changes.items()}
    if not any(drawn.values()):
        return "at every budget an arm or its baseline diverged"
    words, zero = "loss above a plain run's (nats)", (Line(0.0, "the plain run of as many steps"),)
    if len(results) == 1:
        rows = [(arm, c.mean, *c.ends) for arm, by in drawn.items() for c in by.values()]
        return interval_chart("Where depth pays", words, rows, lines=zero)
    series = [
        Series(arm, list(by), [c.mean for c in over], [c.ends[0] for c in over], [c.ends[1] for c in over])
        for arm, by in drawn.items()
        if (over := list(by.values()))
    ]
    return Chart("Where depth pays", "tokens per parameter", words, tuple(series), lines=zero)


def rates_table(trials: Mapping[str, RateTrials]) -> Table:
    """The learning rates that each arm was tried at, and where the best one is."""
    rows = [
        {"arm": arm, "best rate": tried.best, "loss there (nats)": min(tried.losses.values()), "trials": str(tried)}
        for arm, tried in trials.items()
    ]
    return table(rows, "Learning rates, each arm at its own length, one seed", {"best rate": ".3g"})


def rate_rows(trials: Mapping[str, RateTrials]) -> list[dict[str, Any]]:
    """The table "rates" of a results file: each rate that an arm was tried at, with the loss there in nats."""
    return [
        {"arm": arm, "rate": rate, "loss": loss} for arm, tried in trials.items() for rate, loss in tried.losses.items()
    ]


def depth_figures(name: str, comparison: Comparison) -> dict[str, dict[str, Any]]:
    """Time of a plain run to a grown arm's loss, over the arm's own, with its interval, for results.json.

    Where rates were tried, also whether all that it rests on are bracketed, and what to do about those that are not.
    """
    ratio = comparison.time_to_loss
    if not name or ratio is None:
        return {}
    figure = asdict(ratio)
    if comparison.unbracketed is not None:
        figure |= {"bracketed": not comparison.unbracketed, "unbracketed": comparison.unbracketed}
    return {f"depth_time_ratio_{name}": figure}


def shallow_claim(result: StudyResult, grown: str, shallow: str, budget: str = "") -> Claim:
    """That the grown model ends below the shallow one that it began as: that depth pays at this budget.

    The shallow model trains for as many steps, and again for as much computation: the second decides. Where it did not
    run, the first can refute the claim, and not show it; nor does a run that diverged show it.

    budget: of the study, in words, for the claim's name, where there are several
    """
    control, arm = shallow_control_name(grown), f"{grown}, {budget}" if budget else grown
    is_equal = control in result.controls([grown])
    losses = {"loss_to_shallow": difference(result, grown, shallow)}
    if is_equal:
        losses = {"loss_to_shallow_control": difference(result, grown, control)} | losses
    deciding = next(iter(losses))
    verdict = holds_below(*losses[deciding].ends, 0.0)
    quantities = [
        Quantity.over_seeds(name, change, "nats", 0.0 if name == deciding else None) for name, change in losses.items()
    ]
    quantities.append(Quantity("seeds", losses[deciding].seeds))
    kind, _, size = shallow.partition(", ")
    name = f"{kind} model ({size})" if size else f"{kind} model"
    text = f"{arm}: depth pays at this budget, as the grown model ends below the {name} of as much computation"
    why = "a shallow run diverged" if losses[deciding].mean == -math.inf else "" if is_equal else UNEQUAL
    if why and verdict == "holds":
        verdict, text = "open", f"{text} ({why})"
    base = base_of(result, compared=(grown, control if is_equal else shallow))
    return on_losses("depth-pays", arm, text, verdict, quantities, base)
