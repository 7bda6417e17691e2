"""What notebooks claim of a study: each verdict follows from its numbers, each bound is the plan's."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from hybridlab.benchmarks.interleaved import Ratio
from hybridlab.benchmarks.step_overhead import StepOverhead
from hybridlab.notebook import (
    baseline_claims,
    comparison_chart,
    cost_claims,
    hybrid_claims,
    overhead_table,
    phases,
    reliability_table,
)
from hybridlab.study import Comparison, StudyResult
from hybridlab.study.record import Run
from hybridlab.study.statistics import Interval


def compared(name: str = "bold, unguarded", **changes: Any) -> Comparison:
    counts = {"forward_only_passes": 10.0, "accepted": 1, "rejected": 0, "rollbacks": 0, "divergences": 0}
    steps = {"gradient_steps": 80.0, "predicted_steps": 20.0}
    same = Interval.of([0.0, 0.001, -0.001])
    losses = {"validation_loss": Interval.of([3.0, 3.1, 2.9]), "to_control": same, "to_baseline": same}
    return Comparison(name, **counts | steps | losses | {"step_value": None, "time_ratio": 1.0} | changes)


def verdicts(comparison: Comparison) -> dict[str, str]:
    return {claim.id: claim.verdict for claim in hybrid_claims(comparison)}


WORSE, BETTER = Interval.of([0.1, 0.11, 0.12]), Interval.of([-0.1, -0.11, -0.12])
UNCLEAR, ONE_SEED = Interval.of([-0.1, 0.1, 0.0]), Interval.of([-0.1])


@pytest.mark.parametrize(
    ("change", "verdict"), [(BETTER, "holds"), (WORSE, "fails"), (UNCLEAR, "open"), (ONE_SEED, "open")]
)
def test_predicting_pays_where_the_whole_interval_says_so(change: Interval, verdict: str) -> None:
    assert verdicts(compared(to_control=change))["bold-unguarded-pays"] == verdict


def test_an_arm_that_predicted_nothing_does_not_pay() -> None:
    assert verdicts(compared(to_control=BETTER, predicted_steps=0.0))["bold-unguarded-pays"] == "fails"


@pytest.mark.parametrize(
    ("change", "time", "speed", "quality"),
    [
        (Interval.of([0.0190, 0.0191, 0.0192]), 0.6, "holds", "holds"),
        (Interval.of([0.0190, 0.0191, 0.0192]), 0.61, "fails", "holds"),
        (Interval.of([0.0201, 0.0202, 0.0202]), 0.6, "fails", "fails"),
        (UNCLEAR, 0.6, "open", "open"),
    ],
)
def test_speed_counts_only_within_two_percent_of_the_perplexity(
    change: Interval, time: float, speed: str, quality: str
) -> None:
    found = verdicts(compared(to_baseline=change, time_ratio=time))
    assert (found["bold-unguarded-speed"], found["bold-unguarded-quality"]) == (speed, quality)


def test_vram_is_claimed_on_a_card_alone_and_a_divergence_is_no_stable_run() -> None:
    assert "bold-unguarded-vram" not in verdicts(compared())
    assert verdicts(compared(peak_vram_bytes=4_900_000_000))["bold-unguarded-vram"] == "holds"
    assert verdicts(compared(divergences=1, rollbacks=1))["bold-unguarded-stable"] == "fails"


def test_one_seed_is_drawn_and_told_as_the_point_that_it_is() -> None:
    (series,) = comparison_chart([compared(to_control=ONE_SEED)]).series
    assert series.bounds() == ((-0.1,), (-0.1,))
    loss, seeds, *_ = hybrid_claims(compared(to_control=ONE_SEED))[0].quantities
    assert (loss.low, loss.high, loss.per_seed, seeds.value) == (-0.1, -0.1, (-0.1,), 1)


def test_every_interval_over_seeds_can_be_computed_again_from_its_seeds() -> None:
    claims = hybrid_claims(compared(to_control=UNCLEAR, to_baseline=WORSE, step_value=BETTER))
    intervals = [quantity for claim in claims for quantity in claim.quantities if quantity.low is not None]
    assert [quantity.name for quantity in intervals] == ["loss_to_control", "step_value", "loss_to_baseline"]
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
    return Run(Path(name), {"name": name, "seed": seed}, steps, pd.DataFrame(), figures | summary)


def study(*runs: Run) -> StudyResult:
    return StudyResult({(one.config["name"], one.config["seed"]): one for one in runs})


def test_a_baseline_must_learn_and_be_tuned_and_beat_vanilla() -> None:
    good = study(run("baseline", 3.0), run("lr x 0.5", 3.1), run("lr x 2", 3.2), run("vanilla", 3.5))
    assert [claim.verdict for claim in baseline_claims(good)] == ["holds"] * 3
    poor = study(run("baseline", 4.5), run("lr x 0.5", 3.1), run("vanilla", 3.5))
    assert [claim.verdict for claim in baseline_claims(poor)] == ["fails"] * 3
    assert [claim.id for claim in baseline_claims(study(run("baseline", 3.0)))] == ["converges"]


def costing(low: float, high: float) -> StepOverhead:
    """A trainer whose path takes between these shares of a step, and all else nothing."""
    recording = Ratio((low + high) / 2, low, high)
    null = Ratio(*(1 + part for part in astuple(recording)))
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
