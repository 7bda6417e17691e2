"""The path of the weights: what it records, what its Gram matrix says, how it moves and restores."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hybridlab.base.checkpoint import load_checkpoint, save_checkpoint
from hybridlab.base.errors import UserError
from hybridlab.weights.gram import PathNeeds
from hybridlab.weights.path import PathStorage, Trajectory, _products
from hybridlab.weights.residency import Residency
from hybridlab.weights.snapshot import Weights
from tests.conftest import CountedArenas, Problem, gradient_step

NEEDS = PathNeeds(rows=3, every=2, velocity=0.9, direction=True)


def recorded(needs: PathNeeds = NEEDS, storage: PathStorage = PathStorage(), steps: int = 10) -> tuple:  # type: ignore[type-arg]  # noqa: B008
    """A trajectory after some real steps, and the weights after each of them."""
    task = Problem()
    optimizer = task.adamw()
    trajectory = Trajectory(Weights(task.model, optimizer), optimizer, needs, storage)
    trajectory.anchor()
    weights = [task.weights()]
    for step in range(steps):
        gradient_step(optimizer, task.closure(step)())
        trajectory.observe()
        weights.append(task.weights())
    return task, optimizer, trajectory, weights


def row_vectors(weights: list[Tensor]) -> Tensor:
    """What the rows should be: the newest three displacements over two steps, and the velocity."""
    path = [weights[i] - weights[i - 2] for i in range(2, len(weights), 2)]
    velocity = torch.zeros_like(path[0])
    for row in path:
        velocity = 0.81 * velocity + 0.19 / 2 * row
    return torch.stack([*path[-3:], velocity]).double()


def test_the_gram_matrix_is_that_of_the_recorded_rows() -> None:
    _, _, trajectory, weights = recorded()
    gram = trajectory.gram()
    assert [row.kind for row in gram.rows] == ["displacement"] * 3 + ["velocity", "direction"]
    expected = row_vectors(weights)
    np.testing.assert_allclose(gram.products.sum(axis=0)[:4, :4], expected @ expected.T, rtol=1e-4)


def test_a_move_adds_the_combination_to_the_weights() -> None:
    task, _, trajectory, weights = recorded()
    gram = trajectory.gram()
    coefficients = gram.zeros()
    coefficients[:, :4] = [0.5, 0.0, -2.0, 3.0]
    trajectory.move_(coefficients, fraction=0.5)
    moved = 0.5 * torch.tensor([0.5, 0.0, -2.0, 3.0]).double() @ row_vectors(weights)
    torch.testing.assert_close(task.weights() - weights[-1], moved.float(), rtol=1e-4, atol=1e-6)


def test_the_mean_of_the_path() -> None:
    task, _, trajectory, weights = recorded()
    trajectory.move_(trajectory.gram().to_mean())
    torch.testing.assert_close(task.weights(), torch.stack(weights[4::2]).mean(dim=0), rtol=1e-4, atol=1e-6)


def test_the_direction_is_the_step_that_adam_would_repeat() -> None:
    task, optimizer, trajectory, _ = recorded()
    coefficients = trajectory.gram().zeros()
    coefficients[:, -1] = 1.0
    before = task.weights()
    trajectory.move_(coefficients)
    direction = task.weights() - before
    with torch.no_grad():  # a gradient equal to the running mean leaves m and v nearly as they are
        for p in task.model.parameters():
            state = optimizer.state[p]
            p.grad = state["exp_avg"] / (1 - 0.9 ** float(state["step"]))
            optimizer.param_groups[0]["weight_decay"] = 0.0
            state["exp_avg"].copy_(p.grad * (1 - 0.9 ** (float(state["step"]) + 1)))
    before = task.weights()
    optimizer.step()
    step = task.weights() - before
    assert torch.nn.functional.cosine_similarity(direction, step, dim=0) > 0.95
    assert 0.8 < direction.norm() / step.norm() < 1.25


def test_slopes_are_the_derivative_along_the_jump() -> None:
    task, _, trajectory, _ = recorded()
    coefficients = trajectory.gram().zeros()
    coefficients[:, 2] = 1.0
    task.model.zero_grad()
    task.closure(99)().backward()
    slope = float(trajectory.slopes(coefficients).sum())
    saved, size = trajectory._weights.snapshot(), 1e-2
    ends = []
    for sign in (-1, 1):
        trajectory.move_(coefficients, sign * size)
        ends.append(float(task.closure(99)().detach()))
        trajectory._weights.restore_(saved)
    assert slope == pytest.approx((ends[1] - ends[0]) / (2 * size), rel=1e-2)


def test_restore_puts_weights_and_optimizer_back_exactly() -> None:
    task, optimizer, trajectory, weights = recorded()
    saved = trajectory._weights.snapshot()
    moments = [optimizer.state[p]["exp_avg_sq"].clone() for p in task.model.parameters()]
    task.closure(3)().backward()
    optimizer.step()
    trajectory._weights.restore_(saved)
    assert torch.equal(task.weights(), weights[-1])
    assert all(map(torch.equal, moments, [optimizer.state[p]["exp_avg_sq"] for p in task.model.parameters()]))
    assert float(optimizer.state[next(task.model.parameters())]["step"]) == 10


def test_rows_survive_a_jump_but_never_contain_it() -> None:
    task, _, trajectory, _ = recorded()
    before = trajectory.gram().products.copy()
    with torch.no_grad():
        for p in task.model.parameters():
            p.add_(100.0)
    trajectory.anchor()
    np.testing.assert_array_equal(trajectory.gram().products, before)


@pytest.mark.parametrize("storage", [PathStorage(Residency.OFFLOADED), PathStorage(dtype=torch.bfloat16)])
def test_where_the_path_is_kept_changes_it_by_rounding_at_most(storage: PathStorage) -> None:
    needs = PathNeeds(rows=3, every=2)
    exact, stored = recorded(needs)[2].gram(), recorded(needs, storage)[2].gram()
    tolerance = 0.02 if storage.dtype is torch.bfloat16 else 0.0
    np.testing.assert_allclose(stored.products, exact.products, rtol=tolerance, atol=tolerance * 1e-3)


IN_BF16_ON_HOST = PathStorage(Residency.OFFLOADED, dtype=torch.bfloat16)


@pytest.mark.parametrize("velocity", [None, 0.9])
def test_the_whole_path_on_the_host_is_one_arena(arenas: CountedArenas, velocity: float | None) -> None:
    task, _, trajectory, _ = recorded(replace(NEEDS, velocity=velocity), IN_BF16_ON_HOST)
    trajectory.anchor()
    size = task.weights().numel()
    path_bytes = 2 * (NEEDS.rows + bool(velocity)) * size + 4 * size
    assert len(arenas.taken_bytes) == 1
    assert path_bytes <= arenas.taken_bytes[0] < path_bytes + 3 * 256


def test_a_path_that_finds_no_room_is_not_begun_and_may_be_later(arenas: CountedArenas) -> None:
    task = Problem()
    optimizer, before = task.adamw(), task.weights()
    trajectory = Trajectory(Weights(task.model, optimizer), optimizer, NEEDS, IN_BF16_ON_HOST)
    empty = trajectory.state_dict()
    arenas.may_take = 0
    with pytest.raises(UserError, match="host memory is short"):
        trajectory.anchor()
    assert trajectory.state_dict() == empty
    assert torch.equal(task.weights(), before)
    arenas.may_take = None
    trajectory.anchor()
    assert torch.equal(trajectory.state_dict()["last"][0][0], before)


@pytest.mark.parametrize("storage", [PathStorage(), PathStorage(Residency.OFFLOADED), IN_BF16_ON_HOST])
def test_a_path_survives_a_checkpoint(tmp_path: Path, storage: PathStorage) -> None:
    task, optimizer, trajectory, _ = recorded(storage=storage)
    expected = trajectory.gram().products
    save_checkpoint(tmp_path / "a.pt", trajectory.state_dict(), meta={})
    loaded = load_checkpoint(tmp_path / "a.pt", expect={})
    assert loaded is not None
    resumed = Trajectory(Weights(task.model, optimizer), optimizer, NEEDS, storage)
    resumed.load_state_dict(loaded)
    np.testing.assert_array_equal(resumed.gram().products, expected)


def test_products_of_long_rows_are_exact_to_float32() -> None:
    rows = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0))
    products = _products(list(rows), [slice(0, 2000), slice(2000, 5000)], torch.device("cpu"))
    torch.testing.assert_close(products, rows.double() @ rows.double().T, rtol=1e-5, atol=1e-3)
