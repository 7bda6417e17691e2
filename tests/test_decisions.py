"""Gate, corrector and divergence monitor: pure decisions from numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hybridlab.engine.aftermath import Aftermath, certain_rise
from hybridlab.engine.corrector import MAX_LENGTH, MIN_LENGTH, JumpOutcome, ResidualStore, wanted_length
from hybridlab.engine.divergence import PATIENCE, Action, DivergenceMonitor
from hybridlab.engine.gate import Gate, best_length
from hybridlab.engine.jump_state import Trial
from hybridlab.predictors import Proposal

# --- gate ----------------------------------------------------------------------------------------


def test_the_gate_takes_the_length_with_the_lowest_significant_loss() -> None:
    losses = {0.0: [3.0, 3.5, 3.2], 0.5: [2.99, 3.49, 3.19], 1.0: [2.95, 3.46, 3.15], 2.0: [3.1, 3.6, 3.3]}
    decision = best_length(losses)
    assert decision.length == 1.0
    assert decision.loss_change == pytest.approx(-0.0466666, abs=1e-6)


def test_the_gate_refuses_what_lies_within_two_standard_errors() -> None:
    decision = best_length({0.0: [3.0, 3.0, 3.0, 3.0], 1.0: [2.9, 3.1, 2.95, 3.04]})
    assert not decision.accepted
    assert decision.loss_change < 0


def test_the_comparison_is_paired() -> None:
    """Batches that differ by more than the jump changes them do not hide a steady gain."""
    assert best_length({0.0: [1.0, 5.0, 9.0], 1.0: [0.99, 4.99, 8.99]}).accepted


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_length_with_a_loss_that_is_not_finite_is_no_candidate(bad: float) -> None:
    assert best_length({0.0: [3.0, 3.0], 1.0: [bad, 2.0], 2.0: [2.9, 2.91]}).length == 2.0
    assert not best_length({0.0: [3.0, 3.0], 1.0: [bad, 2.0]}).accepted


def test_refused_questions_stay_within_the_budget_and_one() -> None:
    gate, asked = Gate(budget=0.02, max_horizon=50, horizon=50.0), 0
    for step in range(1, 2001):
        if step % 20 == 0 and gate.within_budget(step):
            gate.record(best_length({0.0: [3.0, 3.0], 1.0: [3.1, 3.1]}), confidence=0.9, forward_passes=16)
            asked += 1
    assert asked >= 5
    assert gate.rejected_passes / 3 <= 0.02 * 2000 + 16 / 3
    assert gate.horizon == 1.0


def test_the_horizon_grows_with_acceptance_up_to_the_longest() -> None:
    gate = Gate(budget=0.02, max_horizon=50, horizon=20.0)
    for _ in range(3):
        gate.record(best_length({0.0: [3.0, 3.1], 1.0: [2.9, 3.0]}), confidence=0.9, forward_passes=16)
    assert gate.horizon == 50.0
    assert gate.rejected_passes == 0


def test_the_reliability_table_counts_every_proposal_in_its_bin() -> None:
    gate = Gate(budget=0.02, max_horizon=50, horizon=20.0)
    yes, no = best_length({0.0: [3.0, 3.1], 1.0: [2.9, 3.0]}), best_length({0.0: [3.0, 3.0], 1.0: [3.1, 3.1]})
    for confidence, decision in [(0.65, yes), (0.7, no), (1.0, yes)]:
        gate.record(decision, confidence, forward_passes=8)
    assert gate.reliability() == [
        {"confidence": pytest.approx(0.675), "accepted_share": 0.5, "proposals": 2},
        {"confidence": 1.0, "accepted_share": 1.0, "proposals": 1},
    ]


def test_the_acceptance_probability_follows_the_gates_own_outcomes() -> None:
    gate = Gate(budget=0.02, max_horizon=50, horizon=20.0)
    assert gate.acceptance_probability == 0.5
    yes, no = best_length({0.0: [3.0, 3.1], 1.0: [2.9, 3.0]}), best_length({0.0: [3.0, 3.0], 1.0: [3.1, 3.1]})
    gate.record(yes, 0.1, forward_passes=8)
    assert gate.acceptance_probability == pytest.approx(1.25 / 1.5)
    gate.record(no, 0.1, forward_passes=8)
    assert gate.acceptance_probability == pytest.approx((0.25 + 0.5) / (0.5 + 1.5))
    assert gate.acceptance_reliability() == [
        {"acceptance_probability": pytest.approx(1.25 / 1.5), "accepted_share": 0.0, "proposals": 1}
    ]


@pytest.mark.parametrize(("price", "length"), [(0.0, 1.0), (0.03, 0.5), (0.1, 0.0)])
def test_a_jump_has_to_be_worth_its_price(price: float, length: float) -> None:
    losses = {0.0: [3.0, 3.5], 0.5: [2.97, 3.47], 1.0: [2.96, 3.46]}
    assert best_length(losses, price).length == length


def test_what_jumps_cost_is_charged_to_later_ones_and_forgotten_by_and_by() -> None:
    gate = Gate(budget=0.02, max_horizon=50, horizon=50.0)
    gate.learn_cost(-1.0)
    assert (gate.price, gate.horizon) == (0.0, 50.0)
    gate.learn_cost(0.004)
    assert (gate.price, gate.horizon) == (0.004, 25.0)
    gate.record(best_length({0.0: [3.0, 3.0], 1.0: [3.1, 3.1]}), confidence=0.9, forward_passes=20)
    gate.learn_cost(-0.1)
    assert gate.price == 0.001


def trial(along: list[float], around_mean: list[float]) -> Trial:
    """Losses at lengths 0, 1/2 and 1, and at the path's mean and a jump beyond it; alike in four batches."""
    motion = np.ones((1, 1))
    losses = [torch.tensor(along + around_mean) + batch for batch in range(4)]
    return Trial(Proposal(motion, 0.9, 0.0), 50.0, 1.0, motion, losses)


def test_the_gate_asks_both_at_the_weights_and_at_the_mean_of_the_path() -> None:
    assert trial([3.0, 2.95, 2.9], [3.0, 2.9]).result(price=0.0).length == 1.0
    ahead_of_a_lagging_mean = trial([3.0, 3.1, 3.2], [3.4, 3.1])
    assert not ahead_of_a_lagging_mean.result(price=0.0).accepted
    back_to_the_mean = trial([3.0, 2.9, 2.8], [2.8, 2.8])
    assert not back_to_the_mean.result(price=0.0).accepted


# --- aftermath -----------------------------------------------------------------------------------


def test_a_loss_that_goes_on_as_before_has_not_risen_for_certain() -> None:
    rng = np.random.default_rng(0)
    rises = []
    for _ in range(400):
        losses = 3.0 - 0.01 * np.arange(60) + 0.1 * rng.standard_normal(60)
        rises.append(certain_rise(losses[:35], losses[35:]) > 0)
    assert np.mean(rises) < 0.05


def test_a_loss_above_its_line_is_told_by_predicted_step() -> None:
    aftermath, line = Aftermath(), [3.0 - 0.01 * i + 0.001 * (-1) ** i for i in range(60)]
    for loss in line[:29]:
        aftermath.observe(loss, before_jump=False)
    aftermath.begin()
    aftermath.predicted_steps = 20
    aftermath.observe(line[29], before_jump=True)
    for loss in [*line[30:], math.inf]:
        aftermath.observe(loss + 0.4, before_jump=False)
    assert aftermath.end() == pytest.approx(0.4 / 20, rel=0.05)
    assert aftermath.after is None
    assert len(aftermath.before) == 30, "the line goes on from the jump"


def test_too_few_losses_tell_nothing() -> None:
    assert certain_rise([3.0, 2.9, 2.8], [9.0]) == -math.inf
    assert certain_rise([3.0] * 10, []) == -math.inf


# --- corrector -----------------------------------------------------------------------------------


def test_the_wanted_length_of_a_parabola_is_its_minimum() -> None:
    """Loss a/2 (x - m)^2 along the jump: slopes -a m at 0 and a (1 - m) at 1, minimum at m."""
    minimum, curvature = np.array([0.25, 0.5, 1.2]), np.array([1.0, 4.0, 0.1])
    np.testing.assert_allclose(wanted_length(-curvature * minimum, curvature * (1 - minimum)), minimum)


@pytest.mark.parametrize(
    ("before", "after", "length"),
    [(0.1, 0.5, 0.0), (-1.0, -1.0, MAX_LENGTH), (-1.0, -2.0, MAX_LENGTH), (math.nan, 1.0, 1.0), (-1.0, math.inf, 1.0)],
)
def test_wanted_length_at_the_edges(before: float, after: float, length: float) -> None:
    assert wanted_length(np.array([before]), np.array([after])) == length


def test_similar_cases_weigh_the_next_correction() -> None:
    store = ResidualStore()
    assert store.expected_length(0.7) == 1.0
    np.testing.assert_allclose(store.blend(np.array([0.4]), 0.7, taken=1.0), 0.4)
    for _ in range(8):
        store.add(JumpOutcome(confidence=0.7, loss_error=0.0, wanted=0.2))
        store.add(JumpOutcome(confidence=0.1, loss_error=0.0, wanted=1.4))
    store.add(JumpOutcome(confidence=0.7, loss_error=math.nan, wanted=0.2))
    assert store.expected_length(0.7) == pytest.approx(0.2)
    np.testing.assert_allclose(store.blend(np.array([0.4]), 0.7, taken=1.0), 0.3)
    np.testing.assert_allclose(store.blend(np.array([0.4]), 0.7, taken=0.5), 0.4)
    for _ in range(8):
        store.add(JumpOutcome(confidence=0.7, loss_error=0.0, wanted=1.0))
    assert store.expected_length(0.7) == 1.0, "of equally near ones the latest count"


def test_jumps_that_went_uphill_leave_a_length_that_can_grow_again() -> None:
    store = ResidualStore()
    for _ in range(8):
        store.add(JumpOutcome(confidence=0.0, loss_error=0.0, wanted=0.0))
    assert store.expected_length(0.0) == MIN_LENGTH > 0


# --- divergence ----------------------------------------------------------------------------------


def settled(threshold: float = 6.0) -> DivergenceMonitor:
    monitor = DivergenceMonitor(band=threshold)
    rng = np.random.default_rng(0)
    for _ in range(200):
        assert monitor.check(3.0 + 0.1 * float(rng.standard_normal()), gradient_norm=1.0) is None
    return monitor


@pytest.mark.parametrize(
    ("measured", "kind", "action"),
    [
        ({"loss": math.nan}, "not finite", Action.ROLL_BACK),
        ({"loss": 3.0, "gradient_norm": math.inf}, "not finite", Action.ROLL_BACK),
        ({"loss": 4.0, "gradient_norm": 1.0}, "loss band", Action.ROLL_BACK),
        ({"loss": 3.0, "gradient_norm": 25.0}, "gradient explosion", Action.ROLL_BACK),
        ({"loss": 3.0, "gradient_norm": 1e-4}, "gradient vanishing", Action.END),
        ({"loss": 3.15, "predicted_loss": 3.0}, "prediction error", Action.SHORTEN),
        ({"loss": 3.3, "predicted_loss": 3.0}, "prediction error", Action.END),
    ],
)
def test_each_kind_of_divergence_is_named_and_answered(measured: dict[str, float], kind: str, action: Action) -> None:
    monitor = settled()
    found = [monitor.check(**measured) for _ in range(PATIENCE)]
    divergence = found[-1]
    assert divergence is not None
    at_once = kind == "not finite" or "predicted_loss" in measured
    assert (found[0] is not None) == at_once
    assert (divergence.kind, divergence.action) == (kind, action)


def test_an_oscillation_is_named() -> None:
    monitor = DivergenceMonitor(band=6.0)
    found = [monitor.check(3.0 + 0.5 * (-1) ** step) for step in range(60)]
    assert {divergence.kind for divergence in found if divergence} == {"oscillation"}


def test_what_diverged_does_not_teach_the_band() -> None:
    monitor = settled()
    before = monitor.state_dict()
    for _ in range(PATIENCE):
        monitor.check(50.0, gradient_norm=1.0)
    assert monitor.state_dict() == before | {"alarms": PATIENCE}


def test_a_level_that_stays_is_called_divergence_once_and_is_then_the_usual_one() -> None:
    monitor = settled()
    found = []
    for _ in range(100):
        found.append(monitor.check(50.0, gradient_norm=1.0))
        if found[-1]:
            monitor.restart_warmup()
    assert sum(divergence is not None for divergence in found) == 1
    assert monitor.mean == pytest.approx(50.0)


def test_a_single_odd_batch_is_no_divergence() -> None:
    monitor = settled()
    assert [monitor.check(loss, gradient_norm=1.0) for loss in (4.0, 3.0, 4.0, 4.0, 3.0)] == [None] * 5


@pytest.mark.parametrize("at", [0, 19])
def test_a_batch_of_padding_does_not_teach_the_gradient_norm(at: int) -> None:
    """Its loss and gradient are 0; late in the warm-up, three usual norms after it counted as an explosion."""
    monitor = DivergenceMonitor(band=6.0)
    for step in range(40):
        assert monitor.check(*(0.0, 0.0) if step == at else (3.0, 0.5)) is None
    assert monitor.log_norm == pytest.approx(math.log(0.5), abs=0.1)


def test_the_pace_of_the_loss_prices_a_change() -> None:
    monitor = DivergenceMonitor(band=6.0)
    for step in range(400):
        monitor.check(3.0 - 0.001 * step)
    assert monitor.equivalent_gradient_steps(-0.01, most=50) == pytest.approx(10, rel=0.05)
    assert monitor.equivalent_gradient_steps(-1.0, most=50) == 50
    assert monitor.equivalent_gradient_steps(0.01, most=50) == 0
