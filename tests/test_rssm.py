"""The dynamics model learns what can be learnt, says how sure it is, and touches nothing that is not its own."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch

from hybridlab.predictors.base import Proposal, Signals
from hybridlab.predictors.rssm import SCORED_AHEAD_STEPS, Forecast, Rssm
from hybridlab.predictors.rssm_model import Dynamics
from hybridlab.weights.gram import Gram, PathRow

JUMP_AT = 400


def wave(steps: int, seed: int = 0) -> list[Signals]:
    """A decaying loss that swings with a period of 24 steps, the gradient norm a quarter period ahead, under noise."""
    random, phases = np.random.default_rng(seed), 2 * math.pi * np.arange(steps) / 24
    losses = 1 + 3 * np.exp(-np.arange(steps) / 200)
    losses *= np.exp(0.1 * np.sin(phases) + 0.02 * random.standard_normal(steps))
    norms = np.exp(0.3 * np.cos(phases) + 0.1 * random.standard_normal(steps))
    return [Signals(float(loss), float(norm)) for loss, norm in zip(losses, norms, strict=True)]


def white(steps: int, seed: int = 0, noise: float = 0.05) -> list[Signals]:
    """A loss of 3 under noise, going nowhere."""
    numbers = np.exp(np.random.default_rng(seed).standard_normal((steps, 2)) * [noise, 0.1])
    return [Signals(3 * float(loss), float(norm)) for loss, norm in numbers]


def told(signals: Iterable[Signals], seed: int = 0) -> Rssm:
    predictor = Rssm(seed)
    for one in signals:
        predictor.observe(one)
    return predictor


@pytest.fixture
def straight() -> Gram:
    """Two groups whose four displacements of five steps are all the same."""
    return Gram(np.ones((2, 4, 4)), (PathRow("displacement", 5),) * 4)


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def identical(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(identical, a, b))
    return bool(a == b)


def test_forecasts_beat_persistence_where_the_loss_has_a_rhythm() -> None:
    skill = told(wave(400)).skill()
    assert skill is not None
    assert skill > 0.4


def test_skill_on_white_noise_is_none_beyond_chance_and_no_fall_is_promised(straight: Gram) -> None:
    predictor = told(white(400))
    skill, proposal = predictor.skill(), predictor.propose(straight, 16)
    assert skill is not None
    assert skill < 0.1
    assert abs(proposal.loss_change) < 3 * 0.05


def test_skill_is_unknown_until_a_forecast_came_due() -> None:
    signals = wave(32 + SCORED_AHEAD_STEPS)
    assert told(signals[:-1]).skill() is None
    assert told(signals).skill() is not None


def test_a_steady_fall_is_forecast(straight: Gram) -> None:
    random = np.random.default_rng(0)
    falling = [Signals(4 * math.exp(-t / 100 + 0.02 * random.standard_normal()), 1.0) for t in range(200)]
    predictor = told(falling)
    level, proposal = falling[-1].loss, predictor.propose(straight, 20)
    assert proposal.loss_change == pytest.approx(level * math.expm1(-0.2), abs=0.15 * level)
    assert (proposal.coefficients[:, -1] > 0.9 * 20 / 5).all()


def test_spread_rises_and_confidence_falls_when_the_loss_jumps(straight: Gram) -> None:
    """Over the 32 steps after the jump, beside the same steps without it; the mean of four seeds."""
    spread, confidence = np.zeros(2), np.zeros(2)
    for seed in range(4):
        signals = wave(JUMP_AT + 32, seed)
        before = told(signals[:JUMP_AT], seed).state_dict()
        for case, factor in enumerate((1.0, 3.0)):
            predictor = Rssm()
            predictor.load_state_dict(before)
            for step, one in enumerate(signals[JUMP_AT:]):
                predictor.observe(Signals(factor * one.loss, one.gradient_norm))
                forecast = predictor.forecast(16) if step % 4 == 0 else None
                if forecast is None:
                    continue
                spread[case] += forecast.spread
                confidence[case] += predictor.propose(straight, 16).confidence
    assert spread[1] > 1.4 * spread[0] > 0
    assert confidence[1] < 0.95 * confidence[0]


def test_the_global_random_state_is_left_alone(straight: Gram) -> None:
    before = torch.get_rng_state()
    told(wave(64)).propose(straight, 10)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_it_learns_the_same_in_whatever_mode_the_caller_is(mode: Any) -> None:
    predictor = Rssm()
    with mode():
        for one in wave(48):
            predictor.observe(one)
    assert identical(predictor.state_dict(), told(wave(48)).state_dict())


def test_training_changes_every_weight_tensor_and_lowers_the_loss() -> None:
    waves = np.array([[math.log(one.loss), math.log(one.gradient_norm)] for one in wave(256)])
    dynamics = Dynamics(signals=2)
    before = dynamics.state_dict()["model"]
    losses = [dynamics.fit((waves - waves.mean(0)) / waves.std(0)) for _ in range(60)]
    after = dynamics.state_dict()["model"]
    assert not any(torch.equal(before[name], after[name]) for name in before)
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.5


def test_observing_trains() -> None:
    fresh, trained = (told(wave(steps)).state_dict()["dynamics"]["model"] for steps in (0, 40))
    assert not any(torch.equal(fresh[name], trained[name]) for name in fresh)


def test_a_saved_predictor_goes_on_bit_for_bit(straight: Gram) -> None:
    signals = wave(150)
    unbroken = told(signals[:100])
    resumed = Rssm(seed=5)
    resumed.load_state_dict(saved_and_loaded(unbroken.state_dict()))
    for one in signals[100:]:
        unbroken.observe(one)
        resumed.observe(one)
    assert identical(unbroken.state_dict(), resumed.state_dict())
    assert unbroken.skill() == resumed.skill()
    a, b = unbroken.propose(straight, 12), resumed.propose(straight, 12)
    assert (a.coefficients == b.coefficients).all()
    assert (a.confidence, a.loss_change) == (b.confidence, b.loss_change)


def test_a_state_taken_is_a_copy() -> None:
    predictor = told(wave(64))
    taken, kept = predictor.state_dict(), saved_and_loaded(predictor.state_dict())
    for one in wave(32, seed=1):
        predictor.observe(one)
    assert identical(taken, kept)


@pytest.mark.parametrize("loss", [math.nan, math.inf, 0.0, -1.0])
def test_signals_without_meaning_are_skipped(loss: float) -> None:
    clean, dirty = wave(64), []
    for one in clean:
        dirty += [one, Signals(loss, 1.0), Signals(1.0, abs(loss) * 0.0), Signals(1.0, 1.0, math.nan)]
    assert identical(told(clean).state_dict(), told(dirty).state_dict())


@pytest.mark.parametrize("losses", [[1.0], [1e-30, 1e30], [1e-300, 1e300]])
def test_proposals_stay_finite_on_extreme_signals(losses: list[float], straight: Gram) -> None:
    predictor = told(Signals(losses[t % len(losses)], losses[-1]) for t in range(80))
    assert_sound(predictor.propose(straight, 1000), full_length=1000 / 5)


def assert_sound(proposal: Proposal, full_length: float) -> None:
    assert np.isfinite(proposal.coefficients).all()
    assert not proposal.coefficients[:, :-1].any()
    assert (proposal.coefficients[:, -1] >= 0).all()
    assert (proposal.coefficients[:, -1] <= full_length).all()
    assert 0 <= proposal.confidence <= 1
    assert math.isfinite(proposal.loss_change)


@pytest.mark.parametrize("steps", [0, 1, 31, 32, 100])
@pytest.mark.parametrize("horizon", [0.5, 1, 50, 200])
def test_the_direction_is_the_newest_displacement_and_never_lengthened(
    steps: int, horizon: float, straight: Gram
) -> None:
    assert_sound(told(wave(steps)).propose(straight, horizon), full_length=horizon / 5)


def test_no_horizon_no_motion(straight: Gram) -> None:
    proposal = told(wave(64)).propose(straight, 0)
    assert proposal.is_empty
    assert proposal.loss_change == 0


def test_asking_changes_nothing(straight: Gram) -> None:
    predictor = told(wave(64))
    before = predictor.state_dict()
    first, second = predictor.propose(straight, 10), predictor.propose(straight, 10)
    assert first.loss_change == second.loss_change
    assert identical(before, predictor.state_dict())


def test_before_it_has_learnt_it_claims_nothing(straight: Gram) -> None:
    proposal = told(wave(31)).propose(straight, 10)
    assert (proposal.confidence, proposal.loss_change) == (0, 0)


def test_members_that_disagree_and_a_loss_that_rises_count_against_a_jump() -> None:
    def forecast(change: float, spread: float) -> Forecast:
        return Forecast(log_loss=1 + change, spread=spread, level=1.0, noise=0.1)

    assert forecast(0, 0).agreement == 1
    assert forecast(0, 0.1).agreement == pytest.approx(0.5)
    assert forecast(0, 0.2).agreement < 0.5 < forecast(-0.2, 0.2).agreement < 1
    assert forecast(0, 0.1).fall_probability == pytest.approx(0.5)
    assert forecast(-0.1, 0).fall_probability > 0.99 > 0.01 > forecast(0.1, 0).fall_probability
    assert forecast(-0.1, 0).fall_probability > forecast(-0.1, 0.1).fall_probability
    assert forecast(-0.1, 0).loss_change == pytest.approx(math.exp(0.9) - math.exp(1.0))
