"""What a person's own loop may do around a step and inside its closure: it works as in plain torch, or is refused."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW

from hybridlab import HybridTrainer, HybridTrainerConfig, Phase
from hybridlab.base.errors import UserError
from hybridlab.engine.trainer import DivergenceError
from hybridlab.memory import MemoryConfig, optimizer_for
from hybridlab.models import GPT2, GPT2Config
from hybridlab.optim import OptimizerConfig
from tests import conftest
from tests.conftest import Problem, gradient_step, vector

EAGER = replace(conftest.EAGER, warmup_steps=4, full_steps=6, max_predict_steps=6, correction_interval=3)
GATED = replace(EAGER, gate=True)
PLAIN = HybridTrainerConfig.plain()


def regression(seed: int = 0) -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    inputs = torch.randn(32, 8)
    return model, inputs, inputs.sum(1, keepdim=True)


def steps_until(trainer: HybridTrainer, phase: Phase, closure: Any) -> None:
    for _ in range(60):
        if trainer.current_phase is phase:
            return
        trainer.step(closure)
    pytest.fail(f"{phase} never came")


# --- weights and buffers that change under way -----------------------------------------------------------


@pytest.mark.parametrize("how", ["unfrozen", "added"])
def test_weights_that_come_later_are_clipped_moved_and_rolled_back(how: str) -> None:
    model, inputs, wanted = regression()
    body = list(model[0].parameters())
    for param in body:
        param.requires_grad_(False)
    optimizer = AdamW(model.parameters() if how == "unfrozen" else model[2].parameters(), lr=1e-2)
    trainer = HybridTrainer(model, optimizer, replace(EAGER, warmup_steps=30, clip_norm=0.1))
    closure = lambda: F.mse_loss(model(inputs), wanted)  # noqa: E731
    steps_until(trainer, Phase.PREDICT, closure)
    for param in body:
        param.requires_grad_(True)
    if how == "added":
        optimizer.add_param_group({"params": body})

    result = trainer.step(closure)
    assert result.phase is Phase.FULL, "the jump is over, and the path begins anew"
    assert nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]) <= 0.1001

    steps_until(trainer, Phase.PREDICT, closure)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {name: optimizer.state[p]["step"].clone() for name, p in model.named_parameters()}
    trainer.step(closure)
    assert not any(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    while not (result := trainer.step(lambda: 1e4 * F.mse_loss(model(inputs), wanted))).rolled_back:
        assert result.nominal_step < 200
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(optimizer.state[p]["step"], state[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("config", [EAGER, PLAIN], ids=["hybrid", "plain"])
def test_weights_that_are_frozen_under_way_stay_as_they_are(config: HybridTrainerConfig) -> None:
    model, inputs, wanted = regression()
    trainer = HybridTrainer(model, SGD(model.parameters(), lr=1e-2), config)
    for _ in range(8):
        trainer.step(lambda: F.mse_loss(model(inputs), wanted))
    model[0].requires_grad_(False)
    frozen = model[0].weight.clone()
    for _ in range(30):
        trainer.step(lambda: F.mse_loss(model(inputs), wanted))
    assert torch.equal(model[0].weight, frozen)


@pytest.mark.parametrize("how", ["assigned", "another module"])
def test_weights_that_were_replaced_are_refused(how: str) -> None:
    model, inputs, wanted = regression()
    trainer = HybridTrainer(model, SGD(model.parameters(), lr=1e-2), EAGER)
    trainer.step(lambda: F.mse_loss(model(inputs), wanted))
    if how == "assigned":
        model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    else:
        model[0] = nn.Linear(8, 16)
    with pytest.raises(UserError, match="not the model's"):
        trainer.step(lambda: F.mse_loss(model(inputs), wanted))


def test_an_optimizer_that_knows_its_weights_from_the_start_refuses_others() -> None:
    model, inputs, wanted = regression()
    memory = MemoryConfig(step_in_backward=True)
    trainer = HybridTrainer(model, optimizer_for(model, OptimizerConfig(), memory), replace(PLAIN, memory=memory))
    trainer.step(lambda: F.mse_loss(model(inputs), wanted))
    model[0].requires_grad_(False)
    with pytest.raises(UserError, match="build optimizer and trainer anew"):
        trainer.step(lambda: F.mse_loss(model(inputs), wanted))


class Averages(nn.Module):
    """Counts its batches and averages their inputs, in place or by putting new tensors in the buffers' places."""

    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        self.in_place, self.layer = in_place, nn.Linear(4, 1)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("latest", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.in_place:
            self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
            self.count += 1
        else:
            self.mean, self.count, self.latest = 0.9 * self.mean + 0.1 * x.mean(0), self.count + 1, x
        loss: Tensor = self.layer(x - self.mean)
        return loss


@pytest.mark.parametrize("in_place", [True, False])
def test_probes_leave_buffers_and_batch_as_they_were(in_place: bool) -> None:
    torch.manual_seed(0)
    model = Averages(in_place=in_place)
    trainer = HybridTrainer(model, SGD(model.parameters(), lr=0.01), GATED)
    for _ in range(50):
        x = torch.randn(16, 4)
        as_given = x.clone()
        trainer.step(lambda x=x: F.mse_loss(model(x), x.sum(1, keepdim=True)))
        assert torch.equal(x, as_given)
    counts = trainer.statistics()
    assert counts.proposals_accepted > 0
    measured = counts.gradient_steps + counts.predicted_steps // EAGER.correction_interval
    assert int(model.count) == measured


@pytest.mark.parametrize("in_place", [True, False])
def test_a_rollback_restores_buffers_that_forward_replaces(in_place: bool) -> None:
    torch.manual_seed(0)
    model = Averages(in_place=in_place)
    trainer = HybridTrainer(model, SGD(model.parameters(), lr=0.01), replace(EAGER, warmup_steps=25))
    x = torch.randn(16, 4)
    closure = lambda: F.mse_loss(model(x), x.sum(1, keepdim=True))  # noqa: E731
    steps_until(trainer, Phase.PREDICT, closure)
    before = (model.mean.clone(), int(model.count))
    while not trainer.step(lambda: 1e6 * closure()).rolled_back:
        assert trainer.current_phase is Phase.PREDICT
    assert torch.equal(model.mean, before[0])
    assert int(model.count) == before[1]


# --- number formats --------------------------------------------------------------------------------------


def test_autocast_around_the_step_measures_what_autocast_inside_the_closure_does() -> None:
    def trained(*, around: bool) -> list[Any]:
        model, inputs, wanted = regression()
        trainer = HybridTrainer(model, SGD(model.parameters(), lr=0.02), GATED)
        results = []
        for _ in range(40):
            with torch.autocast("cpu", torch.bfloat16, enabled=around):

                def closure() -> Tensor:
                    with torch.autocast("cpu", torch.bfloat16):
                        return F.mse_loss(model(inputs).float(), wanted)

                result = trainer.step(closure)
            results.append((result.phase, result.loss, result.event))
        return results

    assert trained(around=True) == trained(around=False)


SCALER = torch.amp.GradScaler("cpu")


def scaled(model: nn.Module, x: Tensor) -> Tensor:
    return SCALER.scale(model(x).square().mean())  # type: ignore[no-any-return]


def in_float16(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.float16):
        return model(x).float().square().mean()  # type: ignore[no-any-return]


@pytest.mark.parametrize("loss", [scaled, in_float16])
def test_float16_is_refused_with_bfloat16_as_the_remedy(loss: Any) -> None:
    model, inputs, _ = regression()
    trainer = HybridTrainer(model, SGD(model.parameters(), lr=0.1), PLAIN)
    with pytest.raises(UserError, match="bfloat16"):
        trainer.step(lambda: loss(model, inputs))


def test_a_float64_run_goes_on_bit_for_bit() -> None:
    def build() -> tuple[nn.Module, AdamW, HybridTrainer, Tensor]:
        model, inputs, _ = regression()
        model.double()
        optimizer = AdamW(model.parameters(), lr=1e-2)
        return model, optimizer, HybridTrainer(model, optimizer, GATED), inputs.double()

    def train(trainer: HybridTrainer, model: nn.Module, x: Tensor, steps: int) -> list[float]:
        return [trainer.step(lambda: F.mse_loss(model(x), x.sum(1, keepdim=True))).loss for _ in range(steps)]

    model, _, trainer, x = build()
    whole = train(trainer, model, x, 60)
    for stop in (17, 23, 31):
        first, first_optimizer, first_trainer, x = build()
        train(first_trainer, first, x, stop)
        again, again_optimizer, again_trainer, x = build()
        again.load_state_dict(first.state_dict())
        again_optimizer.load_state_dict(first_optimizer.state_dict())
        again_trainer.load_state_dict(first_trainer.state_dict())
        assert train(again_trainer, again, x, 60 - stop) == whole[stop:]
        saved, there = trainer.state_dict()["jumps"], again_trainer.state_dict()["jumps"]
        assert saved["monitor"] == there["monitor"]


def test_complex_weights_are_trained_as_in_plain_torch_and_not_predicted() -> None:
    def build() -> tuple[nn.ParameterList, SGD]:
        torch.manual_seed(0)
        model = nn.ParameterList([nn.Parameter(torch.randn(8, dtype=torch.complex64))])
        return model, SGD(model.parameters(), lr=0.01)

    plain, optimizer = build()
    for _ in range(5):
        gradient_step(optimizer, (plain[0] - (3 + 3j)).abs().square().mean())
    model, mine = build()
    trainer = HybridTrainer(model, mine, PLAIN)
    for _ in range(5):
        trainer.step(lambda: (model[0] - (3 + 3j)).abs().square().mean())
    assert torch.equal(plain[0], model[0])
    with pytest.raises(UserError, match="complex weights"):
        HybridTrainer(*build(), EAGER)


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(20, 8, sparse=True), nn.Linear(8, 20)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.embedding(tokens[:-1])), tokens[1:])


def test_sparse_gradients_are_trained_as_in_plain_torch() -> None:
    tokens = torch.randint(20, (33,), generator=torch.Generator().manual_seed(0))
    plain, model = Sparse(), Sparse()
    optimizer = SGD(plain.parameters(), lr=0.1)
    trainer = HybridTrainer(model, SGD(model.parameters(), lr=0.1), PLAIN)
    for _ in range(10):
        gradient_step(optimizer, plain(tokens))
        trainer.step(lambda: model(tokens))
    assert torch.equal(vector(plain), vector(model))


def test_sparse_gradients_are_clipped_and_predicted_as_dense_ones() -> None:
    tokens = torch.randint(20, (33,), generator=torch.Generator().manual_seed(0))
    norms = []
    for sparse in (True, False):
        model = Sparse()
        model.embedding.sparse = sparse
        trainer = HybridTrainer(model, SGD(model.parameters(), lr=0.1), replace(EAGER, clip_norm=0.05))
        norms.append([trainer.step(lambda model=model: model(tokens)).gradient_norm or 0.0 for _ in range(30)])
        assert trainer.statistics().predicted_steps > 0
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@pytest.mark.parametrize("lr", [None, torch.tensor([0.01])])
def test_learning_rates_that_are_no_plain_number(lr: Tensor | None) -> None:
    class OwnRate(SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for param in group["params"]:
                    param.data.add_(param.grad, alpha=-0.01)

    model, inputs, wanted = regression()
    optimizer = OwnRate(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["lr"] = lr
    trainer = HybridTrainer(model, optimizer, EAGER)
    losses = [trainer.step(lambda: F.mse_loss(model(inputs), wanted)).loss for _ in range(40)]
    assert losses[-1] < losses[0]


# --- batches in parts ------------------------------------------------------------------------------------


def test_parts_are_refused_where_the_optimizer_steps_inside_backward() -> None:
    model, inputs, wanted = regression()
    memory = MemoryConfig(step_in_backward=True)
    trainer = HybridTrainer(model, optimizer_for(model, OptimizerConfig(), memory), replace(PLAIN, memory=memory))
    with pytest.raises(UserError, match="steps inside backward"):
        trainer.step([lambda: F.mse_loss(model(inputs), wanted)] * 2)


def padded() -> tuple[GPT2, SGD, Tensor, Tensor]:
    torch.manual_seed(0)
    model = GPT2(GPT2Config.nano())
    tokens, targets = torch.randint(512, (4, 16)), torch.randint(512, (4, 16))
    targets[1, 3:] = targets[3, 10:] = -100
    return model, SGD(model.parameters(), lr=0.1), tokens, targets


def test_parts_of_unequal_counts_weigh_by_them() -> None:
    model, optimizer, tokens, targets = padded()
    whole = HybridTrainer(model, optimizer, PLAIN).step(lambda: model(tokens, targets))
    other, optimizer, tokens, targets = padded()
    parts = [lambda i=i: other(tokens[i : i + 1], targets[i : i + 1]) for i in range(4)]
    counts = (targets != -100).sum(1).tolist()
    in_parts = HybridTrainer(other, optimizer, PLAIN).step(parts, weights=counts)
    assert in_parts.loss == pytest.approx(whole.loss, rel=1e-5)
    assert in_parts.gradient_norm == pytest.approx(whole.gradient_norm, rel=1e-4)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_parts_of_unequal_counts_without_weights_are_refused_before_anything_steps() -> None:
    model, optimizer, tokens, targets = padded()
    before = [p.clone() for p in model.parameters()]
    trainer = HybridTrainer(model, optimizer, PLAIN)
    with pytest.raises(UserError, match="weights="):
        trainer.step([lambda i=i: model(tokens[i : i + 1], targets[i : i + 1]) for i in range(4)])
    assert trainer.statistics().nominal_steps == 0
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("weights", [[1.0], [1, 0], [1, float("nan")], [1, -1]])
def test_weights_that_mean_nothing_are_refused(weights: list[float]) -> None:
    model, inputs, wanted = regression()
    trainer = HybridTrainer(model, SGD(model.parameters(), lr=0.1), PLAIN)
    with pytest.raises(UserError, match="one number above 0 for each part"):
        trainer.step([lambda: F.mse_loss(model(inputs), wanted)] * 2, weights=weights)


# --- what goes wrong inside a closure --------------------------------------------------------------------


@pytest.mark.parametrize("steps_before", [0, 1])
@pytest.mark.parametrize("config", [EAGER, GATED], ids=["ungated", "gated"])
def test_nan_at_an_acceptance_or_before_it_is_never_restored(config: HybridTrainerConfig, steps_before: int) -> None:
    def run(spoilt: int | None) -> tuple[list[str | None], HybridTrainer]:
        model, inputs, wanted = regression()
        trainer = HybridTrainer(model, SGD(model.parameters(), lr=0.01), config)
        events: list[str | None] = []
        while "accepted" not in events:
            factor = float("nan") if len(events) == spoilt else 1.0
            events.append(trainer.step(lambda: F.mse_loss(model(inputs), wanted) * factor).event)  # noqa: B023
        return events, trainer

    accepted_at = len(run(None)[0]) - 1
    with pytest.raises(DivergenceError):
        run(accepted_at - steps_before)


def test_nan_in_the_very_last_step_is_seen_when_asked() -> None:
    model, inputs, wanted = regression()
    trainer = HybridTrainer(model, SGD(model.parameters(), lr=0.01), PLAIN)
    trainer.step(lambda: F.mse_loss(model(inputs), wanted))
    trainer.check_finite()
    trainer.step(lambda: F.mse_loss(model(inputs), wanted) * float("nan"))
    with pytest.raises(DivergenceError, match="after step 2, the last one"):
        trainer.check_finite()


def test_what_is_no_model_no_clock_or_no_state_is_named() -> None:
    model, _, _ = regression()
    trainer = HybridTrainer(model, SGD(model.parameters(), lr=0.01), PLAIN)
    with pytest.raises(TypeError, match="model and optimizer are Sequential and str: give"):
        HybridTrainer(model, "sgd")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="clock 'nominl' is unknown: did you mean 'nominal'"):
        trainer.steps_by("nominl")
    with pytest.raises(UserError, match="no whole state of a HybridTrainer, it lacks jumps"):
        trainer.load_state_dict({name: value for name, value in trainer.state_dict().items() if name != "jumps"})


@pytest.mark.parametrize("steps", [1, 2])
def test_a_gradient_norm_that_overflows_is_named(steps: int) -> None:
    """Clipping by it makes the step one of zero gradients, which nobody would notice."""
    model, inputs, wanted = regression()
    trainer = HybridTrainer(model, SGD(model.parameters(), lr=0.01), PLAIN)
    closure = lambda: F.mse_loss(model(inputs), wanted) * 1e25  # noqa: E731
    trainer.step(closure)
    ended = trainer.check_finite if steps == 1 else lambda: trainer.step(closure)
    with pytest.raises(DivergenceError, match=r"the gradient norm is inf, as gradients or their squares are too large"):
        ended()


def test_nan_in_the_last_step_of_a_full_block_still_rolls_back_the_jump_before() -> None:
    model, inputs, wanted = regression()
    trainer = HybridTrainer(model, SGD(model.parameters(), lr=0.01), EAGER)
    closure = lambda: F.mse_loss(model(inputs), wanted)  # noqa: E731
    steps_until(trainer, Phase.PREDICT, closure)
    before = [p.clone() for p in model.parameters()]
    steps_until(trainer, Phase.CORRECT, closure)
    steps_until(trainer, Phase.FULL, closure)
    for _ in range(EAGER.full_steps - 1):
        trainer.step(closure)
    trainer.step(lambda: closure() * float("nan"))
    assert trainer.step(closure).rolled_back
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.filterwarnings("ignore:the closure draws")
@pytest.mark.parametrize("config", [EAGER, GATED], ids=["ungated", "gated"])
def test_a_step_whose_closure_raised_can_be_tried_again(config: HybridTrainerConfig) -> None:
    def trained(*, failing: bool) -> tuple[Tensor, list[Any]]:
        model, inputs, wanted = regression()
        trainer = HybridTrainer(model, AdamW(model.parameters(), lr=0.01), config)
        seen = []
        for _ in range(40):
            result = None
            for good in (0, 2, 4, 99) if failing else (99,):
                calls = iter(range(good))
                with suppress(StopIteration):
                    result = result or trainer.step(lambda: F.mse_loss(model(inputs), wanted + 0 * next(calls)))  # noqa: B023
            assert result is not None
            seen.append((result.nominal_step, result.phase, result.loss, result.event))
        return vector(model), seen

    (failed, after_failures), (weights, seen) = trained(failing=True), trained(failing=False)
    assert after_failures == seen
    assert torch.equal(failed, weights)


# --- closures that draw ----------------------------------------------------------------------------------


def own_batches() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randn(16, 8, generator=generator)


def gated_run(draw: Any) -> None:
    model, _, _ = regression()
    trainer = HybridTrainer(model, SGD(model.parameters(), lr=0.05), GATED)

    def closure() -> Tensor:
        x = draw()
        return F.mse_loss(model(x), x[:, :1])

    for _ in range(60):
        trainer.step(closure)
    assert trainer.statistics().forward_only_passes > 0


def test_a_closure_that_takes_the_next_batch_is_told_once_and_how_to_do_it() -> None:
    batches, (model, _, _) = own_batches(), regression()
    trainer = HybridTrainer(model, SGD(model.parameters(), lr=0.05), GATED)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        for _ in range(60):
            trainer.step(lambda: model(next(batches)).square().mean())
    assert ["batch = next(batches)" in str(warning.message) for warning in told] == [True]


def test_a_closure_that_draws_by_its_own_stream_is_noticed() -> None:
    batches = own_batches()
    with pytest.warns(UserWarning, match="draws a batch of its own"):
        gated_run(batches.__next__)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: torch.randn(16, 8),
        lambda: torch.from_numpy(np.random.randn(16, 8)).float(),  # noqa: NPY002
        lambda: torch.tensor([[random.gauss(0, 1) for _ in range(8)] for _ in range(16)]),
    ],
    ids=["torch", "numpy", "python"],
)
def test_global_random_streams_give_every_call_of_a_step_the_same_numbers(draw: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gated_run(draw)


def test_a_trial_leaves_every_random_stream_as_a_plain_step_does(problem: Problem) -> None:
    def drawn(config: HybridTrainerConfig) -> tuple[Any, ...]:
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        torch.manual_seed(1)
        task = Problem()
        trainer = HybridTrainer(task.model, task.adamw(), config)
        for step in range(13):
            trainer.step(lambda step=step: task.closure(step)() * (1 + 0 * random.random() * np.random.rand()))  # noqa: NPY002
        return random.random(), np.random.rand(), float(torch.rand(()))  # noqa: NPY002

    assert drawn(GATED) == drawn(PLAIN)
