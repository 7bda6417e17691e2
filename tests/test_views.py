"""What notebooks claim of a study: each verdict follows from its numbers, each bound is the plan's."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from hybridlab.benchmarks.interleaved import Ratio
from hybridlab.benchmarks.step_overhead import StepOverhead
from hybridlab.notebook import (
    baseline_claims,
    comparison_chart,
    comparison_table,
    comparisons_in_sentences,
    cost_claims,
    curves,
    final_table,
    gradient_chart,
    hybrid_claims,
    loss_rows,
    overhead_table,
    phases,
    rate_claims,
    rate_table,
    reliability_table,
    time_table,
)
from hybridlab.study import Comparison, StudyResult
from hybridlab.study.record import Run
from hybridlab.study.statistics import Base, Interval
from hybridlab.study.step_value import StepValue

ENOUGH = Base(steps=200, seeds=3, tokens=100_000, fall_nats=1.0)


def compared(name: str = "bold, unguarded", **changes: Any) -> Comparison:
    """A comparison of one arm alone: no other arm's p-value corrects its own."""
    counts = {"forward_only_passes": 10.0, "accepted": 1, "rejected": 0, "rollbacks": 0, "divergences": 0}
    steps = {"gradient_steps": 80.0, "predicted_steps": 20.0}
    same = Interval.of([0.0, 0.001, -0.001])
    losses = {"validation_loss": Interval.of([3.0, 3.1, 2.9]), "to_control": same, "to_baseline": same}
    rest = {"step_value": None, "time_ratio": always(1.0), "accuracy_to_baseline": None, "base": ENOUGH}
    test = {"p_value": changes.get("to_control", same).p_value, "tested": 1}
    return Comparison(name, **counts | steps | losses | rest | test | changes)


def always(value: float) -> Interval:
    """Three seeds that agree."""
    return Interval.of([value] * 3)


def verdicts(comparison: Comparison) -> dict[str, str]:
    return {claim.id: claim.verdict for claim in hybrid_claims(comparison)}


WORSE, BETTER = Interval.of([0.1, 0.11, 0.12]), Interval.of([-0.1, -0.11, -0.12])
UNCLEAR, ONE_SEED = Interval.of([-0.1, 0.1, 0.0]), Interval.of([-0.1])


@pytest.mark.parametrize(
    ("change", "verdict"), [(BETTER, "holds"), (WORSE, "fails"), (UNCLEAR, "open"), (ONE_SEED, "open")]
)
def test_predicting_pays_where_the_whole_interval_says_so(change: Interval, verdict: str) -> None:
    assert verdicts(compared(to_control=change))["bold-unguarded-pays"] == verdict


def test_many_arms_or_too_little_training_leave_a_clear_difference_open() -> None:
    assert verdicts(compared(to_control=BETTER, p_value=0.06, tested=20))["bold-unguarded-pays"] == "open"
    left = "the best rate of bold is the highest tried, 0.006: bracket it"
    unbracketed = hybrid_claims(compared(to_control=BETTER, base=replace(ENOUGH, unbracketed=(left,))))[0]
    assert (unbracketed.verdict, left in unbracketed.text) == ("open", True)
    little = compared(to_control=BETTER, base=Base(80, 1, 10_000, 0.2), time_ratio=always(0.5))
    assert {verdicts(little)[f"bold-unguarded-{kind}"] for kind in ("pays", "quality", "speed")} == {"open"}
    assert "too little to tell: 80 of 200 steps, 1 of 3 seeds" in hybrid_claims(little)[0].text


def test_the_seeds_of_a_loss_are_not_those_of_the_step_value() -> None:
    claim = hybrid_claims(compared(step_value=StepValue(0.5, 0.1, math.inf, seeds=2)))[0]
    assert claim.value("seeds") == 3
    worth = claim.quantity("step_value")
    assert worth is not None
    assert (worth.value, worth.low, worth.high) == (0.5, 0.1, None)


@pytest.mark.parametrize(
    ("accuracy", "time", "verdict"),
    [
        ([0.01, 0.011, 0.012], always(0.7), "holds"),
        ([0.01, 0.011, 0.012], always(0.8), "fails"),
        ([-0.01, -0.011, -0.012], always(0.7), "fails"),
        ([-0.01, 0.011, 0.012], always(0.7), "open"),
    ],
)
def test_the_plan_s_speedups_on_mnist_count_at_its_accuracy(
    accuracy: list[float], time: Interval, verdict: str
) -> None:
    images = compared("conservative", accuracy_to_baseline=Interval.of(accuracy), time_ratio=time)
    found = {claim.id: claim.verdict for claim in hybrid_claims(images, perplexity=False)}
    assert found["conservative-speedup"] == verdict
    assert "conservative-quality" not in found


def test_images_whose_loss_has_no_perplexity_are_judged() -> None:
    """Its exponential would be beyond what a float holds."""
    wild = compared("conservative", to_baseline=always(1e4))
    assert "conservative-pays" in {claim.id for claim in hybrid_claims(wild, perplexity=False)}


def test_an_arm_that_predicted_nothing_tells_its_time() -> None:
    idle = compared(predicted_steps=0.0, time_ratio=Interval.of([4.3, 4.4, 4.5]))
    assert "in 4.40 times the baseline's time" in idle.sentence
    assert hybrid_claims(idle)[0].value("time_over_baseline") == pytest.approx(4.4)


def at_rate(hybrid: float, control: float, worth: float | None) -> Comparison:
    """Losses of three seeds that lie a hundredth apart."""
    losses = [hybrid - 0.01, hybrid, hybrid + 0.01]
    value = StepValue(worth, -1.0, 1.0, 3) if worth is not None else StepValue(None, -math.inf, math.inf, 3)
    change = always(hybrid - control)
    return compared(validation_loss=Interval.of(losses), to_control=change, step_value=value)


def test_a_table_of_times_shows_how_far_the_machine_drifted() -> None:
    times = {"gradient_step_ms": 20.0, "peak_memory_bytes": 10**9}
    runs = [run("baseline", 3.0, seed, seconds=10.0 + seed, **times) for seed in range(2)]
    shown = str(time_table([], study(*runs)))
    assert "the baseline's seconds, seed by seed, show how far this machine drifted meanwhile: 10.0, 11.0" in shown
    runs.append(run("baseline", 3.0, 2, seconds=12.0, hosts=["a", "b"], **times))
    assert "Mean over seeds on 2 machines, whose times may differ" in str(time_table([], study(*runs)))


def test_columns_of_the_final_figures_stand_in_one_order_in_every_process() -> None:
    figures = {"gradient_steps": 2, "averaged_validation_loss": 3.1, "accuracy": 0.5, "perplexity": math.exp(3.0)}
    columns = final_table(study(run("baseline", 3.0, 0, **figures))).columns
    assert columns[2:] == ["Validation loss", "Perplexity", "Accuracy", "Averaged validation loss"]


def test_a_prediction_has_to_pay_at_the_best_rates_of_hybrid_and_control() -> None:
    """At the small rate the hybrid wins; the control's best rate is another, and there is nothing left to win."""
    by_rate = {0.002: at_rate(4.0, 4.2, 0.76), 0.008: at_rate(3.9, 3.9, None)}
    (claim,) = rate_claims(by_rate)
    assert claim.verdict == "open"
    assert (claim.value("best_rate_of_hybrid"), claim.value("best_rate_of_control")) == (0.008, 0.008)
    assert claim.value("step_value_at_0.002") == 0.76
    assert "the best rate of bold, unguarded is the highest tried, 0.008: bracket it" in claim.text
    at_both_sides = {0.001: at_rate(4.5, 4.5, 0.5), 0.002: at_rate(4.0, 4.2, 0.5), 0.004: at_rate(4.3, 4.1, -0.5)}
    (claim,) = rate_claims(at_both_sides | {0.008: at_rate(4.5, 4.5, 0.5)})
    assert (claim.verdict, claim.value("loss_to_control")) == ("holds", pytest.approx(-0.1))
    assert (claim.value("best_rate_of_hybrid"), claim.value("best_rate_of_control")) == (0.002, 0.004)
    (claim,) = rate_claims(at_both_sides)
    assert claim.verdict == "open", "the control may be better beyond"
    assert "the best rate of its control is the highest tried, 0.004: bracket it" in claim.text
    at_both_sides |= {0.0005: at_rate(math.inf, 9.0, None), 0.008: at_rate(4.5, 4.5, 0.5)}
    (claim,) = rate_claims(at_both_sides)
    assert (claim.value("best_rate_of_hybrid"), claim.value("best_rate_of_control")) == (0.002, 0.004)
    at_both_sides[0.008] = at_rate(math.inf, 4.0, None)
    (claim,) = rate_claims(at_both_sides)
    assert claim.verdict == "open", "where the hybrid diverged, no control was trained that could be the best"
    assert "the best rate of its control is the highest tried, 0.004: bracket it" in claim.text
    (claim,) = rate_claims({rate: at_rate(math.inf, 4.0, None) for rate in (0.002, 0.004)})
    assert (claim.verdict, claim.value("best_rate_of_hybrid")) == ("open", None)
    assert "bold, unguarded diverged at every rate (2 trials, from 0.002 to 0.004)" in claim.text
    assert rate_claims({0.002: at_rate(4.0, 4.2, 0.5)}) == []
    cells = rate_table(by_rate).cells()
    assert [row[0] for row in cells] == ["0.002", "0.008"]
    assert cells[1][-1] == "open"
    assert "no further rate" in rate_table({}).cells()[0][0]


def test_an_arm_that_predicted_nothing_says_so_in_every_claim_on_its_loss() -> None:
    found = verdicts(compared(to_control=BETTER, predicted_steps=0.0))
    assert {found[f"bold-unguarded-{kind}"] for kind in ("pays", "quality", "speed")} == {"predicted nothing"}


@pytest.mark.parametrize(
    ("change", "time", "speed", "quality"),
    [
        (Interval.of([0.0190, 0.0191, 0.0192]), always(0.6), "holds", "holds"),
        (Interval.of([0.0190, 0.0191, 0.0192]), always(0.61), "fails", "holds"),
        (Interval.of([0.0190, 0.0191, 0.0192]), Interval.of([0.5, 0.65, 0.58]), "open", "holds"),
        (Interval.of([0.0201, 0.0202, 0.0202]), always(0.6), "fails", "fails"),
        (UNCLEAR, always(0.6), "open", "open"),
    ],
)
def test_speed_counts_only_within_two_percent_of_the_perplexity(
    change: Interval, time: Interval, speed: str, quality: str
) -> None:
    found = verdicts(compared(to_baseline=change, time_ratio=time))
    assert (found["bold-unguarded-speed"], found["bold-unguarded-quality"]) == (speed, quality)


def test_vram_is_claimed_on_a_card_alone_and_a_divergence_is_no_stable_run() -> None:
    assert "bold-unguarded-vram" not in verdicts(compared())
    assert verdicts(compared(peak_vram_bytes=4_900_000_000))["bold-unguarded-vram"] == "holds"
    assert verdicts(compared(divergences=1, rollbacks=1))["bold-unguarded-stable"] == "fails"


def test_one_seed_is_drawn_and_told_as_the_point_that_it_is() -> None:
    chart = comparison_chart([compared(to_control=ONE_SEED)])
    assert not isinstance(chart, str)
    (series,) = chart.series
    assert series.bounds() == ((-0.1,), (-0.1,))
    loss, seeds, *_ = hybrid_claims(compared(to_control=ONE_SEED))[0].quantities
    assert (loss.low, loss.high, loss.per_seed, seeds.value) == (-0.1, -0.1, (-0.1,), 1)


def test_the_answer_says_why_nothing_was_predicted_and_what_to_run() -> None:
    idle = {"predicted_steps": 0.0, "rejected": 45, "time_ratio": Interval.of([1.04, 1.06])}
    (said,) = comparisons_in_sentences([compared("in time", **idle)])
    assert said.startswith("Predicted nothing, every step was a gradient step: in time. 45 proposals were tried: none ")
    assert said.endswith("Their runs took 1.05 times the baseline's time: run plain training instead.")
    unsure = compared("linear", **idle | {"rejected": 0, "time_ratio": Interval.of([1.01, 1.01])})
    (said,) = comparisons_in_sentences([compared("in time", **idle), unsure])
    assert "below its threshold, or the run ended before the first proposal: linear." in said
    assert "below its threshold, or the run ended before the first proposal)" in unsure.sentence
    assert "Their runs took 1.01 to 1.05 times" in said
    assert "trials" not in comparisons_in_sentences([unsure])[0], "none took place"


@pytest.mark.parametrize(
    ("grown", "equal"),
    [
        ((False, False), "gradient steps"),
        ((True, True), "computation"),
        ((False, True), "gradient steps, of grown arms equal computation"),
    ],
)
def test_a_chart_of_differences_says_what_each_control_is_equal_in(grown: tuple[bool, bool], equal: str) -> None:
    chart = comparison_chart([compared(f"arm {n}", to_control=BETTER, grown=it) for n, it in enumerate(grown)])
    assert not isinstance(chart, str)
    assert chart.title == f"Hybrid minus control, equal {equal}: right of the line is worse"


def test_the_best_arm_comes_first_and_idle_ones_are_named_apart() -> None:
    arms = [
        compared("worse", to_control=WORSE),
        compared("idle", predicted_steps=0.0),
        compared("better", to_control=BETTER),
    ]
    chart, shown = comparison_chart(arms), comparison_table(arms)
    assert not isinstance(chart, str)
    assert chart.names == ("better", "worse")
    assert [row[0] for row in shown.cells()] == ["better", "worse"]
    assert shown.caption is not None
    assert shown.caption.endswith("Predicted nothing, and left out: idle")
    losses = {name: shown.rows[0][name] for name in ("final loss (nats)", "its control's", "the baseline's loss")}
    assert losses == pytest.approx({"final loss (nats)": 3.0, "its control's": 3.11, "the baseline's loss": 3.0})
    assert comparison_chart(arms[1:2]) == "no arm predicted anything"
    assert comparison_table(arms[1:2]).rows[0]["answer"] == "predicted nothing"


def test_curves_leave_out_what_predicted_nothing_and_pair_controls_with_their_arms() -> None:
    asked = {"max_predict_steps": 8}
    runs = [run("baseline", 3.0), run("bold", 3.1, predicted_steps=5), run("idle", 3.0, predicted_steps=0)]
    for hybrid in runs[1:]:
        hybrid.config["hybrid"] = asked
    result = study(*runs, run("control of bold", 3.05))
    chart = curves(result, ["baseline", "bold", "idle", "control of bold"], "nominal_step")
    assert [series.name for series in chart.series] == ["baseline", "bold", "control of bold"]
    assert chart.title.endswith("predicted nothing: idle")
    colors = {series.name: series.color for series in chart.series}
    assert colors["control of bold"] == colors["bold"]
    assert colors["baseline"] is None


def test_a_study_in_which_all_diverges_at_once_is_told_and_not_drawn() -> None:
    ended: dict[str, Any] = {"diverged": "the loss is nan", "gradient_steps": 1, "predicted_steps": 0}
    runs = [run(name, math.inf, **ended) for name in ("baseline", "bold")]
    for one in runs:
        del one.steps["validation_loss"]
        one.steps[["measured_loss", "gradient_norm"]] = math.nan
        one.config["task"] = {"batch_size": 8}
    result = study(*runs)
    assert curves(result, ["baseline", "bold"], "seconds") == "no arm has a curve (diverged: baseline, bold)"
    assert loss_rows(result, ["baseline", "bold"]) == []
    assert gradient_chart(result, "baseline") == phases(result, "baseline")
    assert "diverged at its first step" in str(phases(result, "baseline"))
    assert of_baseline(runs) == ["fails"]


def test_several_grown_arms_are_counted_and_the_best_of_them_is_named() -> None:
    grown = {"grown": True, "predicted_steps": 0.0}
    arms = [compared("late", to_control=WORSE, **grown), compared("early", to_control=BETTER, **grown)]
    count, best = comparisons_in_sentences(arms)
    assert count == "Growing beats a plain run of as much computation in 1 of 2 arms."
    assert best == f"The lowest loss against its control: {arms[1].sentence}"
    assert comparisons_in_sentences([*arms, compared("in time")])[0].startswith("Prediction beats stopping earlier in ")


def test_an_arm_that_diverged_before_it_predicted_is_not_said_to_have_taken_every_step() -> None:
    ended = Interval.of([math.inf] * 3)
    arm = compared("bold", validation_loss=ended, to_control=ended, predicted_steps=0.0)
    assert comparisons_in_sentences([arm]) == ["bold: diverged with 3 of 3 seeds."]
    beside = compared("worse", to_control=WORSE)
    unknown = compared("lost", to_control=always(math.nan))
    assert all(beside.sentence in comparisons_in_sentences(arms)[1] for arms in ([unknown, beside], [beside, unknown]))


def test_every_interval_over_seeds_can_be_computed_again_from_its_seeds() -> None:
    claims = hybrid_claims(compared(to_control=UNCLEAR, to_baseline=WORSE, time_ratio=BETTER))
    intervals = [quantity for claim in claims for quantity in claim.quantities if quantity.low is not None]
    names = [quantity.name for quantity in intervals]
    assert names == ["loss_to_control", "time_over_baseline", "loss_to_baseline", "time_over_baseline"]
    for quantity in intervals:
        again = Interval.of(quantity.per_seed)
        assert (again.mean, *again.ends) == (quantity.value, quantity.low, quantity.high)


def run(name: str, loss: float, seed: int = 0, **summary: Any) -> Run:
    steps = pd.DataFrame(
        {
            "nominal_step": [1, 2],
            "phase": ["full", "full"],
            "measured_loss": [4.0, 3.0 + seed],
            "predicted_loss": [float("nan")] * 2,
            "validation_loss": [4.0, loss],
        }
    )
    figures = {"name": name, "seed": seed, "validation_loss": loss, "memory_source": "process", "reliability": []}
    hybrid = {"max_predict_steps": not name.startswith(("baseline", "control"))}
    return Run(Path(name), {"name": name, "seed": seed, "hybrid": hybrid}, steps, pd.DataFrame(), figures | summary)


def study(*runs: Run) -> StudyResult:
    return StudyResult({(one.config["name"], one.config["seed"]): one for one in runs})


def long_run(name: str, loss: float, seed: int = 0, steps: int = 500) -> Run:
    """One that a verdict on losses may stand on."""
    one = run(name, loss, seed, gradient_steps=steps)
    one.config["task"] = {"batch_size": 8, "block_size": 64}
    one.steps.loc[0, ["measured_loss", "validation_loss"]] = 9.0
    return one


LOSSES = {"baseline": (3.0, 3.3, 3.1), "lr x 0.5": (3.1, 3.4, 3.21), "lr x 2": (3.2, 3.5, 3.3), "vanilla": (3.5, 4, 4)}


def tried(steps: int = 500, **more: tuple[float, ...]) -> list[Run]:
    """The baseline and its neighbours, each with as many seeds as losses."""
    losses = LOSSES | {name.replace("_", " "): of_seeds for name, of_seeds in more.items()}
    return [long_run(arm, loss, seed, steps) for arm, of_seeds in losses.items() for seed, loss in enumerate(of_seeds)]


def of_baseline(runs: list[Run]) -> list[str]:
    return [claim.verdict for claim in baseline_claims(study(*runs))]


def test_a_baseline_must_learn_and_be_tuned_and_beat_vanilla() -> None:
    assert of_baseline(tried()) == ["holds"] * 3
    assert of_baseline(tried(baseline=(9.5, 9.4, 9.5), vanilla=(8.0, 8.0, 8.1))) == ["fails", "open", "open"]
    _, rising, _ = baseline_claims(study(*tried(baseline=(9.5, 9.4, 9.5))))
    assert "too little to tell: -0.5 of 1 nats of fall" in rising.text
    assert [claim.id for claim in baseline_claims(study(long_run("baseline", 3.0)))] == ["converges"]


def test_a_rate_is_tuned_where_every_neighbour_ends_above_it_with_the_whole_interval() -> None:
    _, tuned, _ = baseline_claims(study(*tried()))
    assert tuned.quantities[0].per_seed == pytest.approx((-0.1, -0.1, -0.11))
    assert of_baseline(tried(lr_x_4=(2.9, 3.6, 3.2))) == ["holds", "open", "holds"]
    assert of_baseline(tried(lr_x_4=(2.8, 3.1, 2.9))) == ["holds", "fails", "holds"]


def test_a_rate_is_not_shown_to_be_tuned_by_fewer_seeds_or_steps_than_a_verdict_needs() -> None:
    assert of_baseline([one for one in tried() if not one.config["seed"]]) == ["holds", "open", "open"]
    assert of_baseline(tried(vanilla=(3.5,))) == ["holds", "holds", "open"]
    assert of_baseline(tried(steps=150)) == ["holds", "open", "open"]


def costing(low: float, high: float) -> StepOverhead:
    """A trainer whose path takes between these shares of a step, and all else nothing."""
    recording = Ratio((low + high) / 2, low, high)
    null = Ratio(**{name: 1 + end for name, end in recording.record().items()})
    return StepOverhead(Ratio(1.0, 1.0, 1.0), null, recording, bare_step_ms=1.0)


def test_the_trainer_must_be_thin_and_the_baseline_small_where_there_is_a_card() -> None:
    thin, unclear, thick = (costing(*ends) for ends in ((0.0, 0.01), (0.0, 0.04), (0.04, 0.05)))
    assert [claim.verdict for claim in cost_claims(thin, study(run("baseline", 3.0)))] == ["holds", "holds"]
    assert [claim.verdict for claim in cost_claims(unclear, study(run("baseline", 3.0)))] == ["open", "open"]
    assert overhead_table(thin).cells()[2] == ["the same, with the null predictor", "–", "1.0050", "1.0000", "1.0100"]
    large = study(run("baseline", 3.0, memory_source="cuda", peak_memory_bytes=5_000_000_000))
    assert [claim.verdict for claim in cost_claims(thick, large)] == ["fails"] * 3


def test_reliability_is_pooled_over_runs_in_the_gates_bins() -> None:
    few = run("a", 3.0, reliability=[{"confidence": 0.7, "accepted_share": 0.0, "proposals": 1}])
    many = run("a", 3.0, 1, reliability=[{"confidence": 0.61, "accepted_share": 1.0, "proposals": 3}])
    sure = run("a", 3.0, 2, reliability=[{"confidence": 1.0, "accepted_share": 1.0, "proposals": 2}])
    assert reliability_table(study(few, many, sure)).cells() == [["0.6325", "0.7500", "4"], ["1.0000", "1.0000", "2"]]
    assert reliability_table(study(run("a", 3.0))).cells() == [["–", "–", "0"]]


def test_any_seed_can_be_looked_at() -> None:
    result = study(run("a", 3.0), run("a", 3.0, 1))
    assert [phases(result, "a", seed).series[0].y[-1] for seed in (0, 1)] == [3.0, 4.0]


def test_an_arm_that_ran_with_fewer_seeds_than_the_baseline_is_drawn_with_its_own() -> None:
    result = study(run("baseline", 3.0), run("baseline", 3.2, 1), run("control", 3.5))
    drawn = {
        series.name: series.drawn().y[-1] for series in curves(result, ["baseline", "control"], "nominal_step").series
    }
    assert drawn == pytest.approx({"baseline": 3.1, "control": 3.5})
