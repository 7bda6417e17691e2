"""A mean of the weights that is trained beside them: what it computes, and what goes with it."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from hybridlab import DepthSchedule, HybridTrainer, HybridTrainerConfig
from hybridlab.base.errors import UserError
from hybridlab.memory import MemoryConfig, optimizer_for
from hybridlab.models import GPT2, GPT2Config
from hybridlab.optim import OptimizerConfig, PrimalAveraging, averaged_weights, build_optimizer
from hybridlab.planner import plan
from hybridlab.study import RunConfig, TextTaskConfig, train
from tests.conftest import gradient_step, jumping, vector

SIZE = GPT2Config(vocab_size=64, block_size=16, n_layer=2, n_head=2, n_embd=16)
TOKENS = torch.randint(64, (12, 4, 17), generator=torch.manual_seed(1))
AVERAGED = OptimizerConfig(lr=5e-3, average_decay=0.8)


def fresh() -> GPT2:
    torch.manual_seed(0)
    return GPT2(SIZE)


def loss_of(model: nn.Module, step: int) -> Tensor:
    loss: Tensor = model(TOKENS[step, :, :-1], TOKENS[step, :, 1:])
    return loss


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 12) -> Tensor:
    for step in range(steps):
        gradient_step(optimizer, loss_of(model, step))
    return vector(model)


def mean_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
    with averaged_weights(optimizer):
        return vector(model)


# --- what it computes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_it_is_the_published_recurrence(name: str, share: float) -> None:
    decay, config = 0.8, OptimizerConfig(name=name, lr=5e-3)
    y, z, model = (fresh().double() for _ in range(3))
    method, x = build_optimizer(z, config), [p.detach().clone() for p in z.parameters()]
    for step in range(12):
        for at_y, at_z, mean in zip(y.parameters(), z.parameters(), x, strict=True):
            at_y.data = share * mean + (1 - share) * at_z.data
        gradients = torch.autograd.grad(loss_of(y, step), list(y.parameters()))
        for at_z, gradient in zip(z.parameters(), gradients, strict=True):
            at_z.grad = gradient
        method.step()
        x = [decay * mean + (1 - decay) * at_z.detach() for mean, at_z in zip(x, z.parameters(), strict=True)]

    optimizer = PrimalAveraging(build_optimizer(model, config), decay, share)
    trained(model, optimizer)
    torch.testing.assert_close(mean_of(model, optimizer), nn.utils.parameters_to_vector(x), atol=1e-8, rtol=0)


@pytest.mark.parametrize(("decay", "share"), [(0.0, 0.7), (0.9, 0.0)])
@pytest.mark.parametrize("method", [AdamW, SGD])
def test_without_mean_or_without_share_of_it_weights_are_the_methods_bit_for_bit(
    method: Any, decay: float, share: float
) -> None:
    model, other = fresh(), fresh()
    plain = trained(model, method(model.parameters(), lr=1e-3))
    assert torch.equal(trained(other, PrimalAveraging(method(other.parameters(), lr=1e-3), decay, share)), plain)


def test_the_mean_is_in_place_as_long_as_it_is_wanted() -> None:
    model = fresh()
    optimizer = build_optimizer(model, AVERAGED)
    assert torch.equal(mean_of(model, optimizer), vector(model))
    weights = trained(model, optimizer)
    assert not torch.equal(mean_of(model, optimizer), weights)
    assert torch.equal(vector(model), weights)
    plain = AdamW(model.parameters())
    trained(model, plain)
    assert torch.equal(mean_of(model, plain), vector(model))


# --- what goes with it ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_stepping_in_backward_changes_no_bit(name: str) -> None:
    config = OptimizerConfig(name=name, lr=5e-3, average_decay=0.8)
    model, other = fresh(), fresh()
    optimizer = build_optimizer(model, config)
    inside = optimizer_for(other, config, MemoryConfig(step_in_backward=True))
    assert torch.equal(trained(other, inside, 4), trained(model, optimizer, 4))
    assert torch.equal(mean_of(other, inside), mean_of(model, optimizer))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_with_moments_in_eight_bits_the_mean_stays_float32(name: str) -> None:
    config = OptimizerConfig(name=name, lr=5e-3, average_decay=0.8)
    model, other = fresh(), fresh()
    memory, start, optimizer = MemoryConfig(optimizer_state="int8"), vector(model), build_optimizer(model, config)
    low_bit = optimizer_for(other, config, memory)
    trained(model, optimizer)
    trained(other, low_bit)
    HybridTrainer(other, low_bit, HybridTrainerConfig.plain(memory=memory))
    moved = mean_of(model, optimizer) - start
    assert (mean_of(other, low_bit) - start - moved).norm() < 0.1 * moved.norm()
    assert all(state["lead"].dtype == torch.float32 for state in low_bit.state.values())


def test_a_jump_moves_the_mean_as_far_as_the_weights() -> None:
    model = fresh()
    optimizer = build_optimizer(model, AVERAGED)
    config = jumping(0, 8, 2, correct_steps=0)
    trainer = HybridTrainer(model, optimizer, config)
    for step in range(8):
        trainer.step(lambda step=step: loss_of(model, step))
    before = vector(model), mean_of(model, optimizer)
    assert trainer.step(lambda: loss_of(model, 8)).phase == "predict"
    moved, mean_moved = vector(model) - before[0], mean_of(model, optimizer) - before[1]
    assert moved.norm() > 0
    torch.testing.assert_close(mean_moved, moved, atol=1e-6, rtol=0)


def test_a_block_that_joins_has_the_mean_of_its_source() -> None:
    model = fresh()
    optimizer = build_optimizer(model, AVERAGED)
    trainer = HybridTrainer(model, optimizer, HybridTrainerConfig.plain(depth=DepthSchedule(((0, 1), (6, 2)))))
    for step in range(6):
        trainer.step(lambda step=step: loss_of(model, step))
    trainer._grow_(trainer_batch(model))
    with averaged_weights(optimizer):
        assert torch.equal(vector(model.h[1]), vector(model.h[0]))
    assert trainer.step(lambda: loss_of(model, 6)).depth == 2


def trainer_batch(model: nn.Module) -> Any:
    from hybridlab.engine.closures import MicroBatches

    return MicroBatches.of(lambda: loss_of(model, 6), None)


def run_config(**changes: Any) -> RunConfig:
    task = TextTaskConfig("nano", data="markov", vocab_size=64, block_size=16, batch_size=2, validation_batches=1)
    return RunConfig("averaged", task, **{"steps": 4, "optimizer": AVERAGED, "device": "cpu"} | changes)


def test_a_run_is_judged_by_the_mean(tmp_path: Path) -> None:
    """With a share of 0 the weights take a plain run's steps, and only what is judged is another."""
    optimizer = replace(AVERAGED, average_share=0.0)
    runs = [
        train(run_config(optimizer=o), tmp_path / str(o.average_decay)) for o in (optimizer, OptimizerConfig(lr=5e-3))
    ]
    averaged, plain = runs
    assert averaged.steps["measured_loss"].tolist() == plain.steps["measured_loss"].tolist()
    assert averaged.validation_loss() != plain.validation_loss()


REFUSED = [
    ({"hybrid": HybridTrainerConfig.plain(memory=MemoryConfig(state_on_host=True))}, "leave state_on_host off"),
    (
        {"hybrid": HybridTrainerConfig.plain(memory=MemoryConfig(weights="bf16", optimizer_state="int8"))},
        "leave weights='bf16' off",
    ),
    ({"tail_average": 0.3}, "tail_average averages weights that average_decay averages already"),
]


@pytest.mark.parametrize(("changes", "says"), REFUSED, ids=[says for _, says in REFUSED])
def test_what_a_mean_does_not_go_with_is_refused_in_one_line(changes: dict[str, Any], says: str) -> None:
    with pytest.raises((UserError, ValueError), match=re.escape(says)) as caught:
        run_config(**changes)
    assert "\n" not in str(caught.value)


def test_a_mean_without_end_and_one_of_a_mean_are_refused() -> None:
    method = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    for decay, share in ((1.0, 0.7), (-0.1, 0.7), (0.9, 2.0), (math.nan, 0.7)):
        with pytest.raises(ValueError, match="is to lie in"):
            PrimalAveraging(method, decay, share)
    with pytest.raises(ValueError, match="a mean of its own already"):
        PrimalAveraging(PrimalAveraging(method, 0.9, 0.7), 0.9, 0.7)


def test_weights_that_are_added_later_are_averaged_too() -> None:
    first, later = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = PrimalAveraging(torch.optim.SGD([first], lr=0.5), 0.9, 0.7)
    optimizer.add_param_group({"params": [later]})
    for _ in range(2):
        first.grad, later.grad = torch.ones(2), torch.ones(2)
        optimizer.step()
    assert torch.equal(first, later)


@pytest.mark.parametrize("state", ["fp32", "int8"])
def test_the_planner_counts_the_mean_beside_the_moments(state: str) -> None:
    memory = MemoryConfig(optimizer_state=state)
    without, having = (
        plan(replace(SIZE, n_embd=128), (1, 16), memory, optimizer=o) for o in (OptimizerConfig(), AVERAGED)
    )
    weights = without.phases["Full"]["weights"]
    added = having.phases["Full"]["optimizer"] - without.phases["Full"]["optimizer"]
    assert added == pytest.approx(weights, rel=0.01)
    assert having.phases["Evaluation"]["weights"] == pytest.approx(2 * weights, rel=0.05)


def test_a_copy_of_the_optimizer_goes_on_alike() -> None:
    model = fresh()
    optimizer = build_optimizer(model, AVERAGED)
    trained(model, optimizer)
    both = copy.deepcopy([model, optimizer])
    assert torch.equal(trained(*both), trained(model, optimizer))
