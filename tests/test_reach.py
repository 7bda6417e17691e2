"""Optimizers that a jump or a rollback would not reach are refused before training; all others are left alone."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from hybridlab import HybridTrainer, HybridTrainerConfig
from hybridlab.base.errors import UserError
from hybridlab.memory import MemoryConfig, PredictAwareMemoryConfig
from tests.conftest import Problem, jumping

JUMPING = jumping(4, 8, 6, correct_steps=2)


class MyAdamW(AdamW):
    """Somebody's own, for example to log."""


class MySGD(SGD):
    """Somebody's own."""


class Lookahead(Optimizer):
    """As published packages write it: around another optimizer, without a call of the base class."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self.param_groups, self.state = optimizer, optimizer.param_groups, {}

    def step(self, closure: Any = None) -> None:
        self.optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)


class Averaged(Lookahead):
    """The same under a name that nobody knows."""


class Container(Optimizer):
    """Several optimizers as one, each with a state of its own."""

    def __init__(self, model: nn.Module) -> None:
        self.optimizers = [AdamW([p], lr=0.01) for p in model.parameters()]
        super().__init__(model.parameters(), {"lr": 0.01})

    def step(self, closure: Any = None) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


class Transparent(Optimizer):
    """A wrapper whose groups and state are those of the optimizer in it, as Accelerate's is."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    param_groups = property(lambda self: self.optimizer.param_groups)  # type: ignore[assignment]
    state = property(lambda self: self.optimizer.state)  # type: ignore[assignment]
    defaults = property(lambda self: self.optimizer.defaults)  # type: ignore[assignment]

    def step(self, closure: Any = None) -> None:
        self.optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)


class Slow(SGD):
    """Keeps slow weights in a list."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.01)
        self.slow = [p.detach().clone() for group in self.param_groups for p in group["params"]]


class Sharpness(SGD):
    """Its step needs the closure."""

    def step(self, closure: Callable[[], float]) -> float:  # type: ignore[override]
        return closure()


def run(make: Callable[[nn.Module], Optimizer], config: HybridTrainerConfig, steps: int = 40) -> HybridTrainer:
    task = Problem()
    return task.trained(config, steps, make(task.model))


@pytest.mark.parametrize(
    "make",
    [lambda m: MyAdamW(m.parameters(), lr=1e-2), lambda m: MySGD(m.parameters(), lr=1e-2, momentum=0.9)],
    ids=["AdamW", "SGD"],
)
def test_a_subclass_is_never_taken_for_one_that_keeps_weights(make: Callable[[nn.Module], Optimizer]) -> None:
    """One small moment may lie near one small weight; all of them together do not."""
    for seed in range(3):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
        x = torch.randn(64, 4)
        y = x.sum(1, keepdim=True) + 0.3 * torch.randn(64, 1)
        trainer = HybridTrainer(model, make(model), JUMPING)
        for _ in range(80):
            trainer.step(lambda model=model, x=x, y=y: nn.functional.mse_loss(model(x), y))
        assert trainer.statistics().predicted_steps > 0


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda m: Lookahead(SGD(m.parameters(), lr=0.01)), "Lookahead keeps weights of its own"),
        (lambda m: Averaged(SGD(m.parameters(), lr=0.01)), "Averaged is built around SGD"),
        (Container, "Container is built around AdamW"),
        (lambda m: Slow(m.parameters()), "Slow keeps a copy of the weights in 'slow'"),
    ],
    ids=["lookahead", "averaged", "container", "slow weights"],
)
def test_what_a_jump_would_not_reach_is_refused_before_the_first_step_and_trains_without_jumps(
    make: Callable[[nn.Module], Optimizer], reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        run(make, JUMPING, steps=0)
    assert run(make, HybridTrainerConfig.plain(), steps=3).statistics().gradient_steps == 3


def test_an_optimizer_whose_step_needs_the_closure_is_refused() -> None:
    with pytest.raises(UserError, match="Sharpness runs forward and backward by itself"):
        run(lambda m: Sharpness(m.parameters(), lr=0.1), HybridTrainerConfig.plain(), steps=0)


def test_a_transparent_wrapper_trains_as_what_is_in_it() -> None:
    bare = run(lambda m: AdamW(m.parameters(), lr=0.01), JUMPING)
    wrapped = run(lambda m: Transparent(AdamW(m.parameters(), lr=0.01)), JUMPING)
    assert wrapped.statistics().predicted_steps > 0
    for mine, theirs in zip(wrapped.model.parameters(), bare.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_where_state_leaves_the_gpu_a_wrapper_without_hooks_is_refused() -> None:
    memory = MemoryConfig(predict_aware=PredictAwareMemoryConfig("cpu"))
    config = HybridTrainerConfig(memory=memory, path_device="host")
    with pytest.raises(UserError, match="Transparent takes no hooks"):
        run(lambda m: Transparent(AdamW(m.parameters())), config, steps=0)


@pytest.mark.parametrize("strategy", ["none", "cpu"])
def test_what_a_trainer_hangs_on_an_optimizer_goes_with_it(strategy: str) -> None:
    task = Problem()
    optimizer = task.adamw()
    memory = MemoryConfig(predict_aware=PredictAwareMemoryConfig(strategy))
    config = HybridTrainerConfig(memory=memory, path_device="host")
    trainers = [weakref.ref(HybridTrainer(task.model, optimizer, config)) for _ in range(3)]
    gc.collect()
    assert [trainer() for trainer in trainers] == [None] * 3
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_load_state_dict_pre_hooks
