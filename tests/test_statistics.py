"""Intervals say what they say: coverage in simulations, values by hand, nothing beyond what was measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from hybridlab.notebook import pays_claim, run_rows
from hybridlab.notebook.views.side_by_side import BESIDE
from hybridlab.report.evidence import Evidence
from hybridlab.results.claims import Claim, Quantity
from hybridlab.results.publish import plain
from hybridlab.results.words import MAY_BE_OPEN
from hybridlab.study import StudyResult, compare
from hybridlab.study.rates import RateTrials
from hybridlab.study.statistics import Interval, holm, median_ends
from hybridlab.study.step_value import Array, PairedTest, SeedRuns, StepValue
from tests.test_study import ended_run, with_hybrids

CURVES: dict[str, Callable[[Array], Array]] = {
    "linear": lambda n: 4.0 - n / 1000,
    "power law": lambda n: 2 + 30 * n**-0.45,
    "nano": lambda n: 3.6 + 2.2 * np.exp(-n / 260) + 0.9 * (n / 100) ** -0.5,
}
"""Final losses over gradient steps; the last is that of a nano GPT-2."""

STEPS, PREDICTED = 700, 300
VALUES, LENGTHS, SEEDS, NOISE = (-0.7, 0.0, 0.3, 1.0), (3, 4, 5, 6, 7), (3, 5), (0.005, 0.01, 0.02)


def studies(curve: str, q: float, lengths: Array, seeds: int, noise: float, count: int, seed: int = 0) -> PairedTest:
    """Many studies whose predicted steps are worth q; the runs of a seed share half of their noise."""
    rng, loss = np.random.default_rng(seed), CURVES[curve]
    shared = rng.normal(0, noise, (count, seeds))
    controls = loss(lengths) + shared[..., None] + rng.normal(0, noise, (count, seeds, len(lengths)))
    hybrids = loss(np.array(STEPS + q * PREDICTED)) + shared + rng.normal(0, noise, (count, seeds))
    taken, predicted = np.full(seeds, float(STEPS)), np.full(seeds, float(PREDICTED))
    return PairedTest(hybrids, controls, taken, predicted, np.tile(lengths, (seeds, 1)))


def coverage(curve: str, q: float, lengths: Array, seeds: int, noise: float, count: int = 1000) -> float:
    """In how many studies the interval holds the true value: where the test does not refuse it."""
    return float((studies(curve, q, lengths, seeds, noise, count).excess(np.array([q])) <= 0).mean())


@pytest.mark.parametrize("curve", CURVES)
def test_the_interval_of_q_holds_the_true_value_in_93_to_97_of_100_studies(curve: str) -> None:
    cells = {
        (q, lengths, seeds, noise): coverage(curve, q, np.linspace(400, 1200, lengths), seeds, noise)
        for q, lengths, seeds, noise in product(VALUES, LENGTHS, SEEDS, NOISE)
    }
    assert 0.93 <= np.mean(list(cells.values())) <= 0.97
    for q in VALUES:
        assert 0.93 <= np.mean([share for cell, share in cells.items() if cell[0] == q]) <= 0.97
    for lengths in LENGTHS:
        assert 0.93 <= np.mean([share for cell, share in cells.items() if cell[1] == lengths]) <= 0.97
    assert min(cells.values()) >= 0.93 - 3 * math.sqrt(0.05 * 0.95 / 1000)


@pytest.mark.parametrize("steps", [[500, 700, 750, 1000], [500, 750, 850, 1000], [350, 500, 750, 1000]])
@pytest.mark.parametrize("curve", CURVES)
def test_the_lengths_that_studies_have_cover_as_well(curve: str, steps: list[int]) -> None:
    shares = [coverage(curve, q, np.array(steps, float), seeds, 0.01) for q in (-0.5, 0.0, 0.3, 0.9) for seeds in SEEDS]
    assert 0.93 <= np.mean(shares) <= 0.97


@pytest.mark.parametrize("bend", [-0.5, 0.25, 1.0])
def test_between_two_lengths_the_curve_may_bend_as_those_of_models_do(
    bend: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of GPT-2 Small to Medium the losses were straight in n to powers from -0.5 to 0.4."""
    monkeypatch.setitem(CURVES, "bent", lambda n: 4 - 0.85 * ((n / 1000) ** bend - 1) / bend)
    for seeds, noise, q in product(SEEDS, NOISE, (0.0, 0.3, 0.6)):
        assert coverage("bent", q, np.array([480.0, 1000.0]), seeds, noise) >= 0.93


def test_a_misfit_that_can_be_seen_widens_the_interval() -> None:
    def step_down(n: Array) -> Array:
        return 4 - 0.6 / (1 + np.exp(-(n - 700) / 60))

    CURVES["step down"] = step_down
    try:
        assert coverage("step down", 0.3, np.linspace(400, 1200, 7), 3, 0.005) > 0.97
    finally:
        del CURVES["step down"]


def runs(q: float, curve: str = "power law", *, seeds: int = 3, noise: float = 0.01, seed: int = 0) -> list[SeedRuns]:
    one = studies(curve, q, np.array([500.0, 750.0, 1000.0, 700.0]), seeds, noise, 1, seed)
    return [
        SeedRuns(float(one.losses[0, s]), STEPS, PREDICTED, (500, 750, 1000, 700), tuple(one.control_losses[0, s]))
        for s in range(seeds)
    ]


def found(q: float, **more: float) -> StepValue:
    value = StepValue.of(runs(q, **more))  # type: ignore[arg-type]
    assert value is not None
    return value


@pytest.mark.parametrize("q", [-0.5, 0.0, 0.3, 0.9])
@pytest.mark.parametrize("curve", CURVES)
def test_without_noise_q_is_what_it_is(curve: str, q: float) -> None:
    value = found(q, curve=curve, noise=1e-7)  # type: ignore[arg-type]
    assert value.value == pytest.approx(q, abs=0.02)
    assert value.low <= q <= value.high
    assert value.high - value.low < 0.2


def test_the_ends_are_where_the_test_turns() -> None:
    """However narrow the interval: its ends are roots, and no points of a grid."""
    for noise in (1e-6, 1e-3, 1e-2):
        some = runs(0.3, noise=noise)
        value, test = StepValue.of(some), PairedTest.of(some)
        assert value is not None
        assert test.excess(np.array([value.low, value.high])) == pytest.approx(0, abs=1e-9)


def test_at_q_0_the_test_is_the_paired_t_test_against_the_truncated_control() -> None:
    """Four lengths that are all far apart: the curve goes through the control's loss."""
    some = [SeedRuns(4.0 + d, 700, 300, (400, 1000, 1300, 700), (4.4, 3.8, 3.7, 4.05)) for d in (0.01, 0.02, 0.04)]
    t, mean = 4.302653, np.mean([-0.04, -0.03, -0.01])
    error = np.std([0.01, 0.02, 0.04], ddof=1) / math.sqrt(3)
    assert PairedTest.of(some).excess(np.array([0.0]))[0] == pytest.approx(abs(mean) - t * error, abs=1e-5)


def test_nothing_is_extrapolated_beyond_the_control_runs() -> None:
    better, worse = found(2.0, noise=1e-4), found(-2.0, noise=1e-4)
    assert (better.value, better.low, better.high) == (None, 1.0, math.inf)
    assert (worse.value, worse.low, worse.high) == (None, -math.inf, pytest.approx(-2 / 3))
    assert str(better) == "open [+1.000, open]"
    nearly = found(0.95, noise=0.01)
    assert nearly.low < 0.95
    assert nearly.high == math.inf


def test_q_does_not_depend_on_the_order_of_the_seeds_nor_on_seeds_that_predicted_nothing() -> None:
    some = runs(0.3)
    idle = SeedRuns(3.7, 1000, 0, (500, 750, 1000), (4.0, 3.8, 3.7))
    first, second = StepValue.of(some), StepValue.of([idle, *some[::-1]])
    assert first is not None
    assert second is not None
    assert second.seeds == 3
    assert (second.value, second.low, second.high) == pytest.approx((first.value, first.low, first.high))


def test_control_runs_that_do_not_fall_leave_q_open() -> None:
    rising = [SeedRuns(4.0 + d, 700, 300, (500, 1000, 700), (4.0, 4.2, 4.1)) for d in (0.0, 0.01, 0.02)]
    value = StepValue.of(rising)
    assert value is not None
    assert (value.value, value.low, value.high) == (None, -math.inf, math.inf)
    assert str(value) == "open"


def test_where_nothing_was_predicted_or_one_length_run_there_is_no_q() -> None:
    assert StepValue.of([SeedRuns(4.0, 1000, 0, (500, 1000), (4.2, 4.0))]) is None
    assert StepValue.of([SeedRuns(4.0, 1000, 100, (1000,), (4.0,))]) is None


def test_one_seed_has_a_value_and_no_interval() -> None:
    value = StepValue.of(runs(0.3, noise=1e-6)[:1])
    assert value is not None
    assert value.value == pytest.approx(0.3, abs=0.01)
    assert (value.low, value.high) == (-math.inf, math.inf)
    assert str(value) == f"{value.value:+.3f} (one seed: no interval)"


@pytest.mark.parametrize(
    ("values", "holds_zero"),
    [([0.1, 0.11, 0.12], False), ([-0.1, -0.11, -0.12], False), ([-0.1, 0.1, 0.05], True), ([0.5], True)],
)
def test_an_interval_holds_zero_where_the_test_does_not_refuse_it(values: list[float], holds_zero: bool) -> None:
    interval = Interval.of(values)
    assert (interval.low <= 0 <= interval.high) == holds_zero == (interval.p_value >= 0.05)


def test_interval_is_student_s() -> None:
    interval = Interval.of([1.0, 2.0, 3.0])
    assert interval.high - interval.mean == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert interval.p_value == pytest.approx(stats.ttest_1samp([1.0, 2.0, 3.0], 0).pvalue)


def test_a_ratio_of_nothing_is_zero_and_one_that_is_no_number_is_told() -> None:
    assert Interval.of_ratios([0.0, 1.0]).ends == (0.0, 0.0)
    unknown = Interval.of_ratios([math.nan, 1.0])
    assert (math.isnan(unknown.mean), unknown.low, unknown.high) == (True, 0.0, math.inf)
    with pytest.raises(ValueError, match=r"ratios have -0.5: their geometric mean takes none below 0"):
        Interval.of_ratios([1.0, -0.5])


@pytest.mark.parametrize(
    ("ratios", "holds_one"), [([0.7, 0.71, 0.72], False), ([0.8, 1.3, 1.1], True), ([1.0, 1.0], True)]
)
def test_ratios_are_tested_against_one(ratios: list[float], holds_one: bool) -> None:
    interval = Interval.of_ratios(ratios)
    assert (interval.low <= 1 <= interval.high) == holds_one == (interval.p_value >= 0.05)
    if not holds_one:
        assert interval.p_value == pytest.approx(stats.ttest_1samp([math.log(ratio) for ratio in ratios], 0).pvalue)
    assert Interval.of_ratios([0.0, 1.0]).p_value == 1.0


def test_ratios_too_far_apart_for_a_float_have_an_interval_without_end() -> None:
    interval = Interval.of_ratios([1e-300, 1e300])
    assert interval.mean == pytest.approx(1)
    assert interval.ends == (0.0, math.inf)


@pytest.mark.parametrize("ratios", [[0.706, 0.834], [0.2, 0.9, 1.4], [1.3]])
def test_a_ratio_is_never_below_zero_and_turned_over_has_the_inverse_interval(ratios: list[float]) -> None:
    ratio, inverse = Interval.of_ratios(ratios), Interval.of_ratios([1 / value for value in ratios])
    assert 0 <= ratio.low <= ratio.mean <= ratio.high
    assert ratio.mean == pytest.approx(stats.gmean(ratios))
    assert (1 / inverse.ends[1], 1 / inverse.mean, 1 / inverse.ends[0]) == pytest.approx(
        (ratio.ends[0], ratio.mean, ratio.ends[1])
    )


def test_times_of_arms_that_differ_widely_over_seeds_have_a_ratio_above_zero() -> None:
    """As a first run on a busy machine has them; what is published says how it was computed."""
    result = with_hybrids(0.03, seeds=2)
    for seed, seconds in enumerate((70.6, 83.4)):
        result.runs["0", seed].closing_figures["seconds"] = seconds
        result.runs["baseline", seed].closing_figures["seconds"] = 100.0
    time = pays_claim(compare(result, "0")).quantity("time_over_baseline")
    assert time is not None
    assert time.over == "logarithms"
    assert 0 < time.ends[0] < 0.77 < time.ends[1]


def test_p_values_without_any_spread() -> None:
    assert Interval.of([0.0, 0.0]).p_value == 1.0
    assert Interval.of([0.1, 0.1]).p_value == 0.0
    assert Interval.of([0.1]).p_value == 1.0


def test_holm_s_correction_by_hand() -> None:
    corrected = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert corrected == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


# What is committed can be computed again.

ROOT = Path(__file__).parents[1]
ENTRIES = [
    pytest.param(profile, notebook, entry, id=f"{profile}/{notebook}")
    for profile, entries in Evidence.read(ROOT).entries.items()
    for notebook, entry in entries.items()
    if entry["claims"]
]


def is_older(entry: Any) -> bool:
    """Whether it ran before results carried the hashes of the code and the seeds' values (CHANGELOG, Known)."""
    return "code" not in entry


def again(quantity: Quantity) -> tuple[float, float, float]:
    """A mean over seeds with Student's interval; of a benchmark, a median over rounds or jumps with that of medians."""
    values = [value for value in quantity.per_seed if value is not None]
    if quantity.name in OVER_ROUNDS:
        return median(values), *median_ends(values)
    if quantity.name == "perplexity_gap":  # its interval is that of the loss
        of_loss = Interval.of(np.log1p(values).tolist())
        return math.expm1(of_loss.mean), *map(math.expm1, of_loss.ends)
    interval = (Interval.of_ratios if quantity.over else Interval.of)(values)
    return interval.mean, *interval.ends


OVER_ROUNDS = ("null_over_bare", "recording_over_bare", "panel_over_none", "none_over_none", "beyond", *BESIDE)


@pytest.mark.parametrize(("profile", "notebook", "entry"), ENTRIES)
def test_every_committed_interval_is_that_of_the_values_beside_it(profile: str, notebook: str, entry: Any) -> None:
    """Those that plain runs of several lengths may leave open follow from the tables of runs: see the next tests."""
    claims = [Claim.from_record(claim) for claim in entry["claims"]]
    intervals = [q for claim in claims for q in claim.quantities if q.low is not None and q.high is not None]
    figures = entry.get("figures", {}).items()  # a comparison's file kept no rounds when it was measured
    without = {name for name, figure in figures if "rounds" in figure.get("rests_on", {}) and "per_round" not in figure}
    assert is_older(entry) or all(q.per_seed for q in intervals if q.name not in without)
    for q in intervals:
        if q.per_seed and not q.name.startswith(MAY_BE_OPEN):
            rounded = 1e-4 * max(map(abs, q.per_seed))  # what six digits of two values leave of an interval
            assert again(q) == pytest.approx((q.value, q.low, q.high), rel=1e-3, abs=rounded)


@pytest.mark.parametrize(("profile", "notebook", "entry"), ENTRIES)
def test_every_committed_comparison_follows_from_the_runs_beside_it(profile: str, notebook: str, entry: Any) -> None:
    pays = [claim for claim in map(Claim.from_record, entry["claims"]) if claim.kind == "pays"]
    rows = entry.get("tables", {}).get("runs")
    assert rows or not pays or is_older(entry)
    for claim in pays if rows else []:
        arm, _, budget = (
            claim.arm.partition(" steps")[0].rpartition(", ") if "budget" in rows[0] else (claim.arm, "", "")
        )
        mine = [row for row in rows if not budget or row["budget"] == int(budget)]
        trials = [row for row in entry["tables"].get("rates", []) if row["budget"] == int(budget or 0)]
        result = replace(study_of(mine, entry["parameters"]), tried=_tried(trials))
        again = pays_claim(replace(compare(result, arm), name=claim.arm))
        assert (again.verdict, again.text) == (claim.verdict, claim.text)
        for old in claim.quantities:
            new = again.quantity(old.name)
            assert new is not None
            if new.over and not old.over:  # measured before ratios had the interval of their logarithms
                new = Quantity.over_seeds(new.name, Interval.of([value for value in new.per_seed if value]), new.unit)
            tolerance = 0.01 if old.name in ("p_value", *MAY_BE_OPEN) else 1e-4  # figures keep six digits
            pair = [np.array((q.value, q.low, q.high), dtype=float) for q in (new, old)]  # None becomes NaN
            # of logarithms, an end is off as many times as Student's t takes the standard error
            relative = 1e-5 * max(1.0, stats.t.ppf(0.975, len(new.per_seed) - 1) if new.over else 1.0)
            np.testing.assert_allclose(*pair, rtol=relative, atol=tolerance)


@pytest.mark.parametrize(
    "entry",
    [pytest.param(one.values[2], id=one.id) for one in ENTRIES if "ladder_runs" in one.values[2].get("tables", {})],
)
def test_every_committed_rung_follows_from_the_runs_beside_it(entry: Any) -> None:
    """Its steps to the vanilla run's final loss; the time of the whole stack at the mean time of a step."""
    runs, table = (pd.DataFrame(entry["tables"][name]) for name in ("ladder_runs", "ladder"))
    vanilla = runs[runs["rung"] == "vanilla"].set_index("seed")
    lengths = dict(zip(table["rung"], table["lengths x seeds"], strict=True))
    named = ("steps_over_vanilla", "stack_time_ratio")
    claims = [claim for claim in map(Claim.from_record, entry["claims"]) if any(map(claim.quantity, named))]
    assert claims
    for claim in claims:
        rung = claim.arm or entry["figures"]["stack_time_ratio"]["rests_on"]["rungs"][-1]
        kept = [int(length) for length in lengths[rung].partition(" x ")[0].split(",")]
        mine = runs[(runs["rung"] == rung) & runs["steps"].isin(kept)]
        by_seed = [mine[mine["seed"] == seed].sort_values("steps") for seed in vanilla.index]
        seeds = [
            SeedRuns(vanilla["validation_loss"][s], 0.0, 1.0, tuple(own["steps"]), tuple(own["validation_loss"]))
            for s, own in zip(vanilla.index, by_seed, strict=True)
        ]
        steps = StepValue.of(seeds)
        assert steps is not None
        assert steps.value is not None
        share = claim.value("steps_over_vanilla")
        assert share in (None, pytest.approx(steps.value / vanilla["steps"][0], rel=0.01))
        spent = [own["seconds"].sum() / own["steps"].sum() for own in by_seed]
        faster = float(np.mean(vanilla["seconds"] / spent)) / steps.value
        assert claim.value("stack_time_ratio") in (None, pytest.approx(faster, rel=0.01))


def _tried(rows: list[dict[str, Any]]) -> dict[str, str]:
    """What the trials in a table "rates" leave to do, by arm; a loss is missing where the trial diverged."""
    trials: dict[str, RateTrials] = {}
    for row in rows:
        loss = math.inf if row["loss"] is None else row["loss"]
        trials.setdefault(row["arm"], RateTrials()).losses[row["rate"]] = loss
    return {arm: trial.unbracketed(arm) for arm, trial in trials.items()}


def study_of(rows: list[dict[str, Any]], parameters: dict[str, Any]) -> StudyResult:
    """A study's closing figures as its table "runs" has them."""
    task = {"batch_size": parameters["batch_size"], "block_size": parameters.get("block_size", 1)}
    predicts = [not row["arm"].startswith(("baseline", "control")) for row in rows]
    runs = [ended_run(task, may, row["first_loss"], row) for may, row in zip(predicts, rows, strict=True)]
    return StudyResult({(row["arm"], row["seed"]): run for row, run in zip(rows, runs, strict=True)})


def test_a_table_of_runs_gives_the_comparison_again() -> None:
    """The whole way: claims and rows into results, and out of them the claims again."""
    result = with_hybrids(0.03, 0.02, -0.1, seeds=5)
    claims = [pays_claim(compare(result, name)).record() for name in ("0", "1", "2")]
    whole = {"claims": claims, "tables": {"runs": run_rows(result)}}
    entry = plain(whole, not_finite=[]) | {"parameters": {"batch_size": 8, "block_size": 64}}
    test_every_committed_comparison_follows_from_the_runs_beside_it("", "", entry)
    next(row for row in entry["tables"]["runs"] if row["arm"] == "1")["validation_loss"] += 0.001
    with pytest.raises(AssertionError):
        test_every_committed_comparison_follows_from_the_runs_beside_it("", "", entry)
