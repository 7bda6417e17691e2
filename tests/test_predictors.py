"""One contract that every predictor keeps, and paths whose continuation is known."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch

from hybridlab.predictors import PREDICTORS, Predictor, Proposal, Signals
from hybridlab.weights.gram import Coefficients, Gram, PathNeeds, PathRow

EVERY_NAME = pytest.mark.parametrize("name", PREDICTORS)
FULL_STEPS, HORIZON, SEEDS = 20, 10.0, range(20)

WORTH_ON_A_STEADY_PATH = dict.fromkeys(PREDICTORS, 1.0) | {
    "null": 0.0,
    "ema_nesterov": 0.6 * (1 - 0.99**HORIZON) / (1 - 0.99) / HORIZON,
    "snoo": 0.7 - 1 + 0.7 * 0.4 * (1 + 0.4 + 0.4**2 + 0.4**3),
    "rre": -7 / 16,
}
"""Step value by definition. EMA-Nesterov looks ahead by 0.6 of a fading velocity; SNOO takes 0.3 of the newest stride
back before it adds its momentum; a steady path has no limit for RRE to aim at, and its uniform weights lead to the
mean of the eight newest weights, 3.5 rows back, at a full horizon of eight rows."""


@dataclass(frozen=True)
class Path:
    """What the trajectory offers, and the rows themselves: [row, dim], the dims split evenly into groups."""

    gram: Gram
    vectors: np.ndarray

    def jump(self, coefficients: Coefficients) -> np.ndarray:
        parts = np.array_split(self.vectors, len(coefficients), axis=1)
        return np.concatenate([c @ part for c, part in zip(coefficients, parts, strict=True)])


def record(theta: np.ndarray, needs: PathNeeds, groups: int = 1) -> Path:
    """Remember weights [step, dim] as the trajectory does; the latest step stands for the optimizer's direction."""
    single = np.diff(theta, axis=0)
    vectors = list(np.diff(theta[:: -needs.every][: needs.rows + 1][::-1], axis=0))
    rows = [PathRow("displacement", needs.every)] * len(vectors)
    if needs.velocity:
        average = np.zeros(theta.shape[1])
        for step in single:
            average = needs.velocity * average + (1 - needs.velocity) * step
        vectors.append(average)
        rows.append(PathRow("velocity", 1))
    if needs.direction:
        vectors.append(single[-1])
        rows.append(PathRow("direction", 1))
    stacked = np.array(vectors)
    products = np.array([part @ part.T for part in np.array_split(stacked, groups, axis=1)])
    return Path(Gram(products, tuple(rows)), stacked)


def weights_with(rows: np.ndarray, every: int) -> np.ndarray:
    """Weights [step, dim] with these displacements, each even over its steps."""
    steps = np.repeat(rows / every, every, axis=0)
    return np.concatenate([np.zeros_like(steps[:1]), np.cumsum(steps, axis=0)])


def momentum(draws: np.ndarray) -> np.ndarray:
    """Draws [step, dim] as an optimizer's momentum .9 averages them."""
    average = np.zeros_like(draws)
    for t in range(1, len(draws)):
        average[t] = 0.9 * average[t - 1] + 0.1 * draws[t]
    return average


def gaussian(seed: int, steps: int, dim: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((steps + 1, dim))


def walk(seed: int, drift: float = 0.0, noise: float = 0.0, steps: int = 400, dim: int = 500) -> np.ndarray:
    """Weights [step, dim]: `drift` a step along the first axis, in a cloud of that noise that ten steps renew."""
    theta = noise * (1.9 / 0.1) ** 0.5 * momentum(gaussian(seed, steps, dim))
    theta[:, 0] += drift * np.arange(steps + 1)
    return theta


def fresh(name: str) -> Predictor:
    return PREDICTORS[name]()


@cache
def primed(name: str) -> Predictor:
    """A predictor that has watched a loss fall steadily; proposing leaves it as it is."""
    predictor = fresh(name)
    watch(predictor, 80)
    return predictor


def watch(predictor: Predictor, steps: int) -> None:
    noise = np.random.default_rng(0)
    for step in range(steps):
        loss = 4.0 - 0.01 * step + 0.002 * noise.standard_normal()
        predictor.observe(Signals(loss, 1.0 + 0.1 * noise.standard_normal()))


def needs_of(name: str) -> PathNeeds:
    return fresh(name).needs(FULL_STEPS)


def steady_path(name: str, groups: int = 1) -> Path:
    """A velocity average of .99 needs 3000 steps to forget where it started."""
    return record(walk(0, drift=1.0, steps=3000, dim=6), needs_of(name), groups)


def assert_sound(proposal: Proposal, path: Path) -> None:
    assert proposal.coefficients.shape == path.gram.products.shape[:2]
    assert proposal.coefficients.dtype == np.float64
    assert np.isfinite(proposal.coefficients).all()
    assert np.isfinite(path.jump(proposal.coefficients)).all()
    assert 0.0 <= proposal.confidence <= 1.0
    assert np.isfinite(proposal.loss_change)


def assert_same(a: Proposal, b: Proposal) -> None:
    np.testing.assert_array_equal(a.coefficients, b.coefficients)
    assert (a.confidence, a.loss_change) == (b.confidence, b.loss_change)


# The contract


@EVERY_NAME
@pytest.mark.parametrize("full_steps", [1, 3, 20])
def test_needs_are_a_path(name: str, full_steps: int) -> None:
    predictor = fresh(name)
    assert isinstance(predictor, Predictor)
    needs = predictor.needs(full_steps)
    assert needs.rows >= 2
    assert needs.every >= 1


@EVERY_NAME
@pytest.mark.parametrize("groups", [1, 3])
def test_one_coefficient_a_group_and_row(name: str, groups: int) -> None:
    path = record(walk(0, drift=1.0, noise=0.1, dim=50), needs_of(name), groups)
    assert_sound(primed(name).propose(path.gram, HORIZON), path)
    assert_sound(fresh(name).propose(path.gram, HORIZON), path)


@EVERY_NAME
def test_no_horizon_is_no_jump(name: str) -> None:
    path = record(walk(0, drift=1.0, noise=0.1, dim=50), needs_of(name))
    none = primed(name).propose(path.gram, 0.0)
    assert none.is_empty
    assert none.loss_change == pytest.approx(0.0, abs=1e-9)
    hardly_any = primed(name).propose(path.gram, 1e-9)
    np.testing.assert_allclose(hardly_any.coefficients, 0.0, atol=1e-6)


@EVERY_NAME
def test_proposing_changes_neither_path_nor_predictor(name: str) -> None:
    path = record(walk(0, drift=1.0, noise=0.1, dim=50), needs_of(name))
    products = path.gram.products.copy()
    predictor = primed(name)
    assert_same(predictor.propose(path.gram, HORIZON), predictor.propose(path.gram, HORIZON))
    np.testing.assert_array_equal(path.gram.products, products)


def lone_row(at: int) -> np.ndarray:
    rows = np.zeros((8, 20))
    rows[at] = 1.0
    return rows


DEGENERATE_ROWS = {
    "all zero": np.zeros((8, 20)),
    "all equal": np.ones((8, 20)),
    "only the oldest moves": lone_row(0),
    "only one in the middle moves": lone_row(5),
    "only the newest moves": lone_row(-1),
    "to and fro": np.ones((8, 20)) * (-1.0) ** np.arange(8)[:, None],
    "growing": np.ones((8, 20)) * 3.0 ** np.arange(8)[:, None],
    "speeding up": np.eye(8, 20)[0] + np.arange(8)[:, None] * np.eye(8, 20)[1],
    "half the weights frozen": np.random.default_rng(0).standard_normal((8, 20)) * (np.arange(20) < 10),
    "huge": 1e30 * np.random.default_rng(1).standard_normal((8, 20)),
    "tiny": 1e-30 * np.random.default_rng(2).standard_normal((8, 20)),
    "huge after tiny": np.random.default_rng(3).standard_normal((8, 20)) * 10.0 ** np.linspace(-30, 30, 8)[:, None],
}


@EVERY_NAME
@pytest.mark.parametrize("case", DEGENERATE_ROWS)
@pytest.mark.parametrize("groups", [1, 2])
def test_degenerate_paths_give_finite_jumps(name: str, case: str, groups: int) -> None:
    needs = needs_of(name)
    path = record(weights_with(DEGENERATE_ROWS[case][-needs.rows :], needs.every), needs, groups)
    assert_sound(primed(name).propose(path.gram, HORIZON), path)


@EVERY_NAME
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_path_that_is_still_short_gives_a_finite_jump(name: str, rows: int) -> None:
    needs = needs_of(name)
    path = record(walk(0, drift=1.0, noise=0.1, steps=rows * needs.every, dim=50), needs)
    assert len(path.gram.indices("displacement")) == rows
    assert_sound(primed(name).propose(path.gram, HORIZON), path)


@EVERY_NAME
@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_broken_path_is_not_trusted(name: str, broken: float) -> None:
    needs = needs_of(name)
    rows = np.ones((needs.rows, 20))
    rows[-1, 3] = broken
    with np.errstate(invalid="ignore"):
        path = record(weights_with(rows, needs.every), needs)
        assert primed(name).propose(path.gram, HORIZON).confidence == 0.0


@EVERY_NAME
@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_signals_that_are_not_finite_leave_no_trace(name: str, broken: float) -> None:
    predictor, path = fresh(name), record(walk(0, drift=1.0, dim=50), needs_of(name))
    watch(predictor, 20)
    for signals in (Signals(broken, 1.0), Signals(1.0, broken), Signals(broken, broken)):
        predictor.observe(signals)
        assert_sound(predictor.propose(path.gram, HORIZON), path)
    watch(predictor, 20)
    assert_sound(predictor.propose(path.gram, HORIZON), path)


@EVERY_NAME
def test_a_predictor_goes_on_from_its_saved_state(name: str) -> None:
    path = record(walk(0, drift=1.0, noise=0.1, dim=50), needs_of(name), groups=2)
    file = io.BytesIO()
    torch.save(primed(name).state_dict(), file)
    file.seek(0)
    restored, unbroken = fresh(name), fresh(name)
    restored.load_state_dict(torch.load(file, weights_only=True))
    watch(unbroken, 80)
    assert_same(restored.propose(path.gram, HORIZON), unbroken.propose(path.gram, HORIZON))
    for predictor in (restored, unbroken):
        watch(predictor, 12)
    assert_same(restored.propose(path.gram, HORIZON), unbroken.propose(path.gram, HORIZON))


@EVERY_NAME
def test_the_jump_does_not_depend_on_how_the_weights_are_grouped(name: str) -> None:
    theta = walk(0, drift=1.0, noise=0.1, dim=60)
    together, apart = (record(theta, needs_of(name), groups) for groups in (1, 3))
    one, three = (primed(name).propose(path.gram, HORIZON) for path in (together, apart))
    np.testing.assert_allclose(together.jump(one.coefficients), apart.jump(three.coefficients), atol=1e-9)
    assert one.confidence == pytest.approx(three.confidence)


@EVERY_NAME
def test_a_steady_path_is_gone_on_with(name: str) -> None:
    path = steady_path(name)
    proposal = primed(name).propose(path.gram, HORIZON)
    along = path.jump(proposal.coefficients)[0]
    if name == "null":
        assert proposal.is_empty
    elif name == "rre":
        assert along < 0, "no limit ahead: towards the mean"
    else:
        assert along > 0


@EVERY_NAME
def test_confidence_is_near_one_on_a_steady_path(name: str) -> None:
    confidence = primed(name).propose(steady_path(name).gram, HORIZON).confidence
    if name in ("null", "rre"):
        assert confidence == 0.0
    else:
        assert confidence > (0.0 if name == "rssm" else 0.95), "rssm's counts for as much as its members agree"


NOISES = {
    "a random walk": lambda seed: gaussian(seed, 400, 2000).cumsum(axis=0),
    "a cloud": lambda seed: walk(seed, noise=1.0, dim=2000),
    "momentum of random gradients": lambda seed: momentum(gaussian(seed, 400, 2000)).cumsum(axis=0),
}


@EVERY_NAME
@pytest.mark.parametrize(("noise", "limit"), [*zip(NOISES, (0.1, 0.2, 0.35), strict=True)])
def test_confidence_is_near_zero_on_noise(name: str, noise: str, limit: float) -> None:
    """Momentum of .9 alone still has .9^15 = .2 of itself left across the gap in a Full block of 20 steps."""
    for seed in range(5):
        path = record(NOISES[noise](seed), needs_of(name))
        assert primed(name).propose(path.gram, HORIZON).confidence < limit


# Paths whose continuation is known


def step_value(name: str, path: Path) -> float:
    """Progress along a drift of 1, over the progress of as many real steps."""
    return path.jump(primed(name).propose(path.gram, HORIZON).coefficients)[0] / HORIZON


@pytest.mark.parametrize("name", [name for name in PREDICTORS if name != "rssm"])
def test_step_value_of_exact_drift_is_the_definition_s(name: str) -> None:
    """Not of rssm, which learns how far to go."""
    assert step_value(name, steady_path(name)) == pytest.approx(WORTH_ON_A_STEADY_PATH[name], rel=1e-3)


@pytest.mark.parametrize("name", [name for name in PREDICTORS if name not in ("null", "rre")])
def test_drift_under_noise_keeps_four_fifths_of_its_step_value(name: str) -> None:
    """Above .8 for all whose jump is meant to be as long as the steps that it replaces."""
    values = [step_value(name, record(walk(seed, drift=1.0, noise=0.2), needs_of(name))) for seed in SEEDS]
    assert np.mean(values) > 0.8 * WORTH_ON_A_STEADY_PATH[name]


def test_ema_nesterov_looks_one_step_ahead_by_beta_times_velocity_at_the_share_of_the_learning_rate() -> None:
    predictor = fresh("ema_nesterov")
    path = record(walk(0, drift=1.0, steps=3000, dim=6), predictor.needs(full_steps=1))
    velocity = path.vectors[path.gram.indices("velocity")[0]]
    for lr_share in (1.0, 0.25):
        predictor.observe(Signals(1.0, 1.0, lr_share))
        proposal = predictor.propose(path.gram, 1.0)
        np.testing.assert_allclose(path.jump(proposal.coefficients), 0.6 * lr_share * velocity)
        assert proposal.confidence > 0.95


def test_snoo_lands_where_the_outer_loop_lands() -> None:
    predictor = fresh("snoo")
    needs = predictor.needs(FULL_STEPS)
    strides = np.random.default_rng(0).standard_normal((needs.rows, 40))
    theta = weights_with(strides, needs.every)
    momentum = np.zeros(40)
    for stride in strides:
        momentum = 0.4 * momentum + stride
    outer = theta[-31] + 0.7 * (strides[-1] + 0.4 * momentum)
    path = record(theta, needs)
    for horizon, share in ((15, 0.5), (30, 1.0), (45, 1.0)):
        jump = path.jump(predictor.propose(path.gram, horizon).coefficients)
        np.testing.assert_allclose(jump, share * (outer - theta[-1]))


def test_river_sees_through_an_oscillation_and_goes_at_most_a_quarter_of_its_window() -> None:
    steps = np.arange(401)
    theta = np.stack([0.1 * steps, 5 * np.sin(2 * np.pi * steps / 50 + 1)], axis=1)
    predictor = fresh("river")
    path = record(theta, predictor.needs(FULL_STEPS))
    for horizon, taken in ((10, 10), (50, 50), (500, 50)):
        jump = path.jump(predictor.propose(path.gram, horizon).coefficients)
        np.testing.assert_allclose(jump, [0.1 * taken, 0.0], atol=1e-9)


def circle(seed: int, noise: float, steps: int, dim: int = 300) -> np.ndarray:
    """Weights [step, dim] on a circle of radius 20, once around in 125 steps, and noise at every step."""
    theta = noise * np.random.default_rng(seed).standard_normal((steps, dim))
    angle = 2 * np.pi * np.arange(steps) / 125
    theta[:, 0] += 20 * np.cos(angle)
    theta[:, 1] += 20 * np.sin(angle)
    return theta


def miss(name: str, seed: int, noise: float, horizon: int) -> float:
    """Distance, in the circle's plane, between a jump's end and where the rotation arrives."""
    now, needs = 100, needs_of(name)
    true = circle(seed, 0.0, now + horizon + 1)
    path = record(circle(seed, noise, now + 1), needs)
    jump = path.jump(fresh(name).propose(path.gram, float(horizon)).coefficients)
    return float(np.linalg.norm((jump - (true[now + horizon] - true[now]))[:2]))


def test_dmd_follows_a_rotation() -> None:
    assert needs_of("dmd").every == 5
    for horizon in (5, 10, 20):
        assert miss("dmd", 0, 0.0, horizon) < 1e-6
        assert miss("linear", 0, 0.0, horizon) > 0.5
    assert miss("dmd", 0, 0.0, 13) < 0.5, "between two rows a straight line"
    noisy = {name: np.mean([miss(name, seed, 0.05, 20) for seed in SEEDS]) for name in ("dmd", "linear")}
    assert noisy["dmd"] < 0.3 * noisy["linear"]


def test_dmd_lets_nothing_grow_and_follows_no_noise() -> None:
    needs = needs_of("dmd")
    growing = record(weights_with(DEGENERATE_ROWS["growing"], needs.every), needs)
    jump = growing.jump(fresh("dmd").propose(growing.gram, 20.0).coefficients)
    assert np.linalg.norm(jump) <= 4 * np.linalg.norm(growing.vectors[-1]) * (1 + 1e-9)
    noise = record(walk(0, noise=1.0), needs)
    assert fresh("dmd").propose(noise.gram, HORIZON).is_empty


def test_rre_arrives_where_a_shrinking_path_comes_to_rest() -> None:
    needs = needs_of("rre")
    rates = np.array([0.9, 0.6, 0.3])
    theta = np.array([5.0, -3.0, 2.0]) * rates ** (np.arange(41)[:, None] / needs.every)
    path = record(theta, needs)
    for horizon, share in ((10, 0.25), (40, 1.0), (80, 1.0)):
        proposal = fresh("rre").propose(path.gram, horizon)
        np.testing.assert_allclose(path.jump(proposal.coefficients), share * -theta[-1], atol=0.02)
    assert proposal.confidence > 0.2


def test_rre_turns_back_to_the_mean_of_a_steady_path() -> None:
    needs = needs_of("rre")
    theta = walk(0, drift=1.0, steps=40, dim=6)
    path = record(theta, needs)
    jump = path.jump(fresh("rre").propose(path.gram, 40.0).coefficients)
    np.testing.assert_allclose(jump, theta[5::5].mean(axis=0) - theta[-1])
