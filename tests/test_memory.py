"""Memory features: exact where they must be, refused where they cannot work together."""

from __future__ import annotations

import copy
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hybridlab import HybridTrainer, HybridTrainerConfig
from hybridlab.base.errors import UserError
from hybridlab.memory.apply import optimizer_for, prepare_model_
from hybridlab.memory.checkpointing import blocks_of, buckets_of
from hybridlab.memory.config import (
    CheckpointingConfig,
    GradientAccumulationConfig,
    MemoryConfig,
    MixedPrecisionConfig,
    PredictAwareMemoryConfig,
)
from hybridlab.memory.state_offload import StateOffload, _HostStore, _Storage
from hybridlab.models import GPT2, GPT2Config
from hybridlab.optim import OptimizerConfig, build_optimizer, decay_groups, low_bit, set_lr_
from hybridlab.optim.in_backward import StepInBackward
from hybridlab.optim.low_bit import joined, low_bit_adamw, split_
from hybridlab.study import TextTaskConfig
from hybridlab.weights import bf16_resident
from hybridlab.weights.bf16_resident import Fp32Weights
from hybridlab.weights.residency import Residency
from hybridlab.weights.snapshot import Weights
from tests.conftest import gradient_step, jumping, vector
from tests.model_card import ModelCard, reserved_in_jumps

SHAPE = {"vocab_size": 128, "block_size": 16, "n_layer": 3, "n_head": 2, "n_embd": 32}


def fresh(**changes: Any) -> GPT2:
    torch.manual_seed(0)
    return GPT2(GPT2Config(**SHAPE | changes))


def tokens(step: int, windows: int = 4) -> Tensor:
    return torch.randint(0, SHAPE["vocab_size"], (windows, 16), generator=torch.Generator().manual_seed(step))


def trained(model: GPT2, optimizer: Optimizer, steps: int = 4) -> Tensor:
    """All weights after some steps."""
    for step in range(steps):
        gradient_step(optimizer, model(tokens(step), tokens(step)))
    return vector(model)


def adamw(model: nn.Module, memory: MemoryConfig | None = None) -> Optimizer:
    return optimizer_for(model, OptimizerConfig(lr=1e-2), memory or MemoryConfig())


# --- exact where they must be ----------------------------------------------------------------------------


@pytest.mark.parametrize("keep_last", [0, 2])
def test_checkpointing_changes_no_bit(keep_last: int) -> None:
    model = fresh(dropout=0.1)
    plain = trained(model, adamw(model))
    checkpointed = fresh(dropout=0.1)
    prepare_model_(checkpointed, MemoryConfig(checkpointing=CheckpointingConfig(keep_last)))
    assert torch.equal(trained(checkpointed, adamw(checkpointed)), plain)
    assert checkpointed.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("turned_on", ["residual", "attention"])
def test_dropout_that_is_turned_on_later_is_drawn_again_as_it_was(turned_on: str) -> None:
    ends = []
    for memory in (MemoryConfig(), MemoryConfig(checkpointing=CheckpointingConfig())):
        model = fresh()
        prepare_model_(model, memory)
        for block in model.h:
            block.drop.p = 0.2 if turned_on == "residual" else 0.0
            block.attn.dropout = 0.2 if turned_on == "attention" else 0.0
        ends.append(trained(model, adamw(model)))
    assert torch.equal(*ends)


@pytest.mark.parametrize(("dropout", "is_saved"), [(0.0, False), (0.1, True)])
def test_the_random_state_is_saved_for_blocks_that_draw_from_it(
    dropout: float, is_saved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[None] = []
    get_rng_state = torch.get_rng_state
    monkeypatch.setattr(torch, "get_rng_state", lambda: (saved.append(None), get_rng_state())[1])
    model = fresh(dropout=dropout)
    prepare_model_(model, MemoryConfig(checkpointing=CheckpointingConfig()))
    model(tokens(0), tokens(0)).backward()
    assert bool(saved) == is_saved


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
def test_stepping_in_backward_changes_no_bit(name: str) -> None:
    config = OptimizerConfig(name=name, lr=1e-2)
    model, other = fresh(), fresh()
    plain = trained(model, build_optimizer(model, config))
    assert torch.equal(trained(other, optimizer_for(other, config, MemoryConfig(step_in_backward=True))), plain)


def test_stepping_in_backward_frees_each_block_before_the_next() -> None:
    model = fresh()
    optimizer = adamw(model, MemoryConfig(step_in_backward=True))
    alive = []

    def count(*_: object) -> None:
        alive.append(sum(p.grad is not None for p in model.parameters() if p.ndim > 1))

    for block in model.h:
        block.ln_1.weight.register_hook(count)
    model(tokens(0), tokens(0)).backward()
    assert max(alive) <= sum(p.ndim > 1 for p in model.h[0].parameters())
    optimizer.step()
    assert all(p.grad is None for p in model.parameters())


def clipped_step(optimizer: StepInBackward, model: GPT2, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """How far a step of SGD at rate 1 went, and the norm of all its gradients."""
    before = vector(model)
    optimizer.zero_grad()
    (scale * model(tokens(0), tokens(0))).backward()
    norm = optimizer.clip_(None)
    optimizer.step()
    return vector(model) - before, norm


def test_stepping_in_backward_clips_as_if_it_knew_all_gradients_while_their_shares_stay() -> None:
    """Even where the norm itself changes fifty-fold from one step to the next."""
    model = fresh()
    optimizer = StepInBackward(torch.optim.SGD(model.parameters(), lr=1e-9), buckets_of(model), clip_norm=0.01)
    with optimizer.no_step():
        model(tokens(0), tokens(0)).backward()
    optimizer.param_groups[0]["lr"] = 1.0
    step, norm = clipped_step(optimizer, model, scale=50.0)
    torch.testing.assert_close(step.norm(), torch.tensor(0.01), rtol=1e-3, atol=0.0)
    assert float(norm) > 1.0


def test_the_estimated_norm_is_nearer_to_the_true_one_than_the_last_norm_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as clipping goes: where training is rough, in a model of twelve blocks."""
    estimates: list[float] = []
    estimated = StepInBackward._estimated_norm

    def noting(self: StepInBackward) -> Tensor:
        norm = estimated(self)
        estimates.append(float(norm))
        return norm

    def off_by(guess: float, norm: float) -> float:
        return abs(math.log(min(1.0, 1.0 / guess) / min(1.0, 1.0 / norm)))

    monkeypatch.setattr(StepInBackward, "_estimated_norm", noting)
    task = TextTaskConfig(model="nano", data="markov", vocab_size=64, block_size=32).build(0, torch.device("cpu"))
    torch.manual_seed(0)
    model = GPT2(GPT2Config.nano(vocab_size=64, block_size=32, n_layer=12))
    optimizer = StepInBackward(torch.optim.AdamW(model.parameters(), lr=1e-2), buckets_of(model), clip_norm=1.0)
    ours, theirs, last = [], [], 0.0
    for step in range(60):
        optimizer.zero_grad()
        estimates.clear()
        task.loss(model, task.batch(step)).backward()
        norm = float(optimizer.clip_(None))
        optimizer.step()
        if step:
            ours += [off_by(estimate, norm) for estimate in estimates]
            theirs.append(off_by(last, norm))
        last = norm
    assert mean(ours) < 0.8 * mean(theirs)


def test_shares_of_a_checkpoint_on_the_host_go_to_where_the_gradients_are() -> None:
    def on(device: str) -> StepInBackward:
        model = nn.Linear(4, 4, device=device)
        return StepInBackward(torch.optim.SGD(model.parameters(), lr=0.1), [list(model.parameters())], clip_norm=1.0)

    elsewhere = on("meta")
    elsewhere.load_state_dict(on("cpu").state_dict())
    assert elsewhere.param_groups[0]["clip_shares"].device.type == "meta"


@pytest.mark.parametrize("idle_steps", [1, 3, 45])
def test_a_layer_that_was_idle_takes_its_whole_step_where_the_limit_is_far_away(idle_steps: int) -> None:
    """An expert, a branch that began at zero, a head unfrozen late: what it brings says nothing about the others."""
    torch.manual_seed(0)
    first, second = (nn.Linear(8, 8, bias=False) for _ in range(2))
    sgd = torch.optim.SGD([first.weight, second.weight], lr=1.0)
    optimizer = StepInBackward(sgd, [[first.weight], [second.weight]], clip_norm=10.0)
    x = torch.randn(4, 8)
    for _ in range(idle_steps):
        gradient_step(optimizer, (0.1 * first(x)).square().mean())
    before, hidden = second.weight.detach().clone(), first(x)
    (gradient,) = torch.autograd.grad(second(hidden).square().mean(), [second.weight])
    gradient_step(optimizer, second(hidden).square().mean())
    torch.testing.assert_close(before - second.weight.detach(), gradient)


def test_a_step_whose_norm_is_not_finite_leaves_the_estimate_as_it_was() -> None:
    model = fresh()
    optimizer = StepInBackward(torch.optim.SGD(model.parameters(), lr=0.0), buckets_of(model), clip_norm=1.0)
    clipped_step(optimizer, model)
    before = optimizer.param_groups[0]["clip_shares"].clone()
    for scale in (torch.inf, torch.nan):
        clipped_step(optimizer, model, scale=scale)
        assert torch.equal(optimizer.param_groups[0]["clip_shares"], before)


def test_stepping_in_backward_leaves_small_gradients_alone_and_reports_their_norm() -> None:
    model, other = fresh(), fresh()
    other(tokens(0), tokens(0)).backward()
    gradients = [p.grad for p in other.parameters() if p.grad is not None]
    optimizer = StepInBackward(torch.optim.SGD(model.parameters(), lr=1.0), buckets_of(model), clip_norm=1e9)
    step, norm = clipped_step(optimizer, model)
    torch.testing.assert_close(norm, nn.utils.get_total_norm(gradients))
    torch.testing.assert_close(step, -nn.utils.parameters_to_vector(gradients), rtol=1e-4, atol=1e-6)


def test_a_held_optimizer_steps_nothing() -> None:
    model = fresh()
    optimizer = StepInBackward(build_optimizer(model, OptimizerConfig.tuned()), buckets_of(model))
    before = vector(model)
    with optimizer.no_step():
        model(tokens(0), tokens(0)).backward()
    assert torch.equal(vector(model), before)
    assert all(p.grad is None for p in model.parameters())


def test_a_pass_that_is_held_lets_the_first_step_be_clipped_exactly() -> None:
    model = fresh()
    optimizer = StepInBackward(torch.optim.SGD(model.parameters(), lr=1.0), buckets_of(model), clip_norm=0.01)
    with optimizer.no_step():
        for _ in range(2):
            model(tokens(0), tokens(0)).backward()
    step, _ = clipped_step(optimizer, model)
    torch.testing.assert_close(step.norm(), torch.tensor(0.01), rtol=1e-3, atol=0.0)


def test_state_of_a_step_in_backward_survives_a_round_trip() -> None:
    memory = MemoryConfig(step_in_backward=True, clip_in_backward=0.1)
    model, other = fresh(), fresh()
    optimizer, resumed = adamw(model, memory), adamw(other, memory)
    trained(model, optimizer)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(trained(model, optimizer), trained(other, resumed))


class Line(nn.Module):
    """A linear model on numbers that float32 holds exactly, so that no order of summation changes a bit."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))

    def loss(self, inputs: Tensor) -> Tensor:
        return (inputs @ self.weight).square().mean()


def test_accumulation_equals_the_large_batch() -> None:
    """Bit for bit where numbers are exact; a GPT-2 sums in another order, and stays within rounding."""
    inputs = torch.randint(-4, 5, (8, 3), generator=torch.Generator().manual_seed(0)).float()
    whole, split = Line(), Line()
    for model, parts in ((whole, 1), (split, 4)):
        trainer = HybridTrainer(model, torch.optim.SGD(model.parameters(), lr=0.125), HybridTrainerConfig.plain())
        loss = trainer.step([lambda part=part, model=model: model.loss(part) for part in inputs.chunk(parts)])
        assert loss.measured_loss == Line().loss(inputs).item()
    assert torch.equal(whole.weight, split.weight)

    def gpt2(parts: int) -> Tensor:
        model = fresh()
        trainer = HybridTrainer(model, torch.optim.SGD(model.parameters(), lr=0.1), HybridTrainerConfig.plain())
        for step in range(4):
            batch = tokens(step).chunk(parts)
            trainer.step([lambda part=part: model(part, part) for part in batch])
        return vector(model)

    torch.testing.assert_close(gpt2(4), gpt2(1), rtol=1e-5, atol=1e-6)


# --- low-bit optimizers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["int8", "fp8", "int4"])
def test_few_calls_equal_torchao_parameter_by_parameter(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same update of matrices, whichever way they are handed over, and for vectors torch's own AdamW.

    Uncompiled, as no compiler need be here.
    """
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    ao = pytest.importorskip("torchao.optim")
    name = {"int8": "AdamW8bit", "fp8": "AdamWFp8", "int4": "AdamW4bit"}[state]
    models = [fresh(n_embd=64) for _ in range(3)]
    groups = [decay_groups(model.parameters(), 0.1) for model in models]
    settings: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8}
    ours = low_bit_adamw(groups[0], buckets_of(models[0]), state=state, **settings)
    methods = [ours, getattr(ao, name)(groups[1], **settings), torch.optim.AdamW(groups[2], **settings)]
    after = [stepped(list(model.parameters()), method) for model, method in zip(models, methods, strict=True)]
    for mine, torchaos, torchs in zip(*after, strict=True):
        assert torch.equal(mine, torchaos if mine.ndim > 1 else torchs)
    moment = ours.state[models[0].h[0].mlp.c_fc.weight]["exp_avg"]
    assert type(moment).__name__.startswith("OptimState")


def test_vectors_in_bf16_keep_float32_moments_and_are_rounded_at_random() -> None:
    """A step of a thousandth of the numbers' distance is taken by about one in a thousand, and by none otherwise."""

    def after(weights: str) -> Tensor:
        torch.manual_seed(0)
        vector, number = (nn.Parameter(torch.ones(shape, dtype=torch.bfloat16)) for shape in ((20_000,), ()))
        whole = nn.Parameter(torch.ones(8))  # beside them in one group
        params = [whole, vector, number]
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer = low_bit_adamw(
            [{"params": params}], [params], state="int8", lr=2**-18, betas=(0.9, 0.99), eps=1e-8,
            weights=weights,
        )  # fmt: skip
        optimizer.step()
        assert optimizer.state[vector]["exp_avg"].dtype is torch.float32
        torch.testing.assert_close(whole.detach(), torch.full((8,), 1.0 - 2**-18), rtol=0.0, atol=1e-7)
        return vector.detach().float()

    pytest.importorskip("torchao.optim")
    assert torch.equal(after("fp32"), torch.ones(20_000))
    moved = after("bf16")
    assert set(moved.tolist()) == {1.0, 1.0 - 2**-8}
    torch.testing.assert_close(moved.mean(), torch.tensor(1.0 - 2**-18), rtol=0.0, atol=2e-6)


def test_weights_of_24_bits_are_taken_apart_and_joined() -> None:
    """At most the last of 24 bits is off, 2^-15 of the value; a bf16 number has no rest."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(100_000, generator=generator) * 10.0 ** torch.randint(-30, 30, (100_000,), generator=generator)
    ties = (torch.arange(2**16, dtype=torch.int32) + 0x3F7F0000).view(torch.float32)
    for exact in (values, ties, -ties):
        weight, rest = torch.empty_like(exact, dtype=torch.bfloat16), torch.empty_like(exact, dtype=torch.int8)
        split_(exact, weight, rest)
        assert torch.equal(weight, exact.bfloat16()), "passes see what rounding to bf16 gives"
        torch.testing.assert_close(joined(weight, rest), exact, rtol=2**-15, atol=0.0)
        split_(weight.float(), weight, rest)
        assert not rest.any()


@pytest.mark.parametrize("state", ["int8", "int4"])
def test_a_weight_that_was_set_to_zero_keeps_training_whatever_was_left_of_it(state: str) -> None:
    """As the middle of two blocks' opposite weights is, in a growth; int4 steps matrices in pairs."""
    pytest.importorskip("torchao.optim")
    params = [nn.Parameter(torch.ones(shape, dtype=torch.bfloat16)) for shape in ((64, 128), (64,))]
    optimizer = low_bit_adamw(
        [{"params": params}], [params], state=state, lr=2**-12, betas=(0.9, 0.99), eps=1e-8, weights="24bit"
    )
    optimizer.make_state_()
    for p in params:
        p.grad = torch.ones_like(p)
        optimizer.state[p]["rest"].fill_(-100)
        p.data.view(64, -1)[:32] = 0.0
        p.data.view(64, -1)[:16] *= -1
    optimizer.step()
    for p in params:
        moved = joined(p.detach(), optimizer.state[p]["rest"]).view(64, -1)[:32]
        torch.testing.assert_close(moved, torch.full_like(moved, -(2**-12)), rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("weights", ["bf16", "24bit"])
@pytest.mark.parametrize("shape", [(10, 64), (50, 301)])
def test_a_matrix_that_no_blocks_fill_has_moments_in_float32(shape: tuple[int, int], weights: str) -> None:
    """In bf16 a second moment that shrinks by a thousandth would stay as it is: the next steps are too small then."""
    pytest.importorskip("torchao.optim")
    steps = {}
    for name in ("fp32", weights):
        matrix = nn.Parameter(torch.zeros(shape, dtype=torch.float32 if name == "fp32" else torch.bfloat16))
        optimizer = low_bit_adamw(
            [{"params": [matrix]}], [[matrix]], state="int4", lr=1.0, betas=(0.9, 0.999), eps=1e-8, weights=name
        )
        for step in range(1000):
            matrix.data.zero_()
            matrix.grad = torch.full_like(matrix, 1.0 if step < 20 else 2**-6)
            optimizer.step()
        steps[name] = matrix.detach().float()
    torch.testing.assert_close(steps[weights], steps["fp32"], rtol=0.02, atol=0.0)


@pytest.mark.parametrize("in_backward", [False, True])
def test_weights_of_24_bits_train_as_float32_ones_with_the_same_state(in_backward: bool) -> None:
    """Steps are so small that bf16 takes them by chance, if at all; gradients do not depend on the weights."""
    pytest.importorskip("torchao.optim")

    def moved(weights: str) -> Tensor:
        model = fresh(n_embd=64)
        model.to(torch.bfloat16).float()  # both begin at numbers that bf16 has
        memory = MemoryConfig(optimizer_state="int8", weights=weights, step_in_backward=in_backward)
        prepare_model_(model, memory)
        optimizer = optimizer_for(model, OptimizerConfig(lr=2**-16, betas=(0.9, 0.99)), memory)
        directions = [torch.randn(p.shape).sign() for p in model.parameters()]
        before = vector(model).float()
        for _ in range(8):
            weighted = zip(model.parameters(), directions, strict=True)
            gradient_step(optimizer, sum((p * sign).sum() for p, sign in weighted))
        state = [optimizer.state[p].get("rest") for p in model.parameters()]
        kept = [p if rest is None else joined(p, rest) for p, rest in zip(model.parameters(), state, strict=True)]
        return torch.cat([p.detach().flatten() for p in kept]) - before

    exact, ours, rounded = moved("fp32"), moved("24bit"), moved("bf16")
    assert (ours - exact).norm() < 0.1 * exact.norm() < 0.2 * (rounded - exact).norm()


@pytest.mark.parametrize("weights", ["bf16", "24bit"])
@pytest.mark.parametrize("in_backward", [False, True])
def test_a_state_keeps_its_number_formats_when_it_is_loaded(weights: str, in_backward: bool, tmp_path: Path) -> None:
    pytest.importorskip("torchao.optim")
    memory = MemoryConfig(optimizer_state="int8", weights=weights, step_in_backward=in_backward)

    def made() -> tuple[nn.Module, Optimizer]:
        model = fresh(n_embd=64)
        prepare_model_(model, memory)
        return model, optimizer_for(model, OptimizerConfig(), memory)

    def trained(model: nn.Module, optimizer: Optimizer) -> list[Tensor]:
        torch.manual_seed(1)  # of stochastic rounding
        for step in range(2):
            gradient_step(optimizer, model(tokens(step), tokens(step)))
        return [t for p in model.parameters() for t in (p.detach(), optimizer.state[p].get("rest", p).detach())]

    first, second = made(), made()
    trained(*first)
    torch.save([part.state_dict() for part in first], tmp_path / "saved.pt")
    for part, state in zip(second, torch.load(tmp_path / "saved.pt", weights_only=False), strict=True):
        part.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(trained(*first), trained(*second), strict=True))


@pytest.mark.parametrize(
    ("weights", "state"), [("24bit", "int8"), ("24bit", "int4"), ("fp32", "int8"), ("fp32", "int4")]
)
def test_steps_of_a_captured_backward_pass_are_those_of_an_ordinary_one(
    weights: str, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Played back without a GPU: the pass runs again, and writes none of the numbers that change."""
    pytest.importorskip("torchao.optim")
    memory = MemoryConfig.fit_16gb(weights=weights, optimizer_state=state)
    captured = False
    monkeypatch.setattr(low_bit, "_is_captured", lambda _: captured)

    def trained(captured_from: int) -> list[Tensor]:
        nonlocal captured
        buckets: list[int] = []
        model = fresh(n_embd=64, **memory.model_settings)
        prepare_model_(model, memory)
        optimizer = optimizer_for(model, OptimizerConfig(), memory)
        assert isinstance(optimizer, StepInBackward)
        for step in range(6):
            set_lr_(optimizer, 1e-2 / (1 + step))
            optimizer.zero_grad()
            loss, places = model(tokens(step), tokens(step)), optimizer.replays_as
            if step >= captured_from:
                optimizer.advance_(buckets)
            captured = step >= captured_from
            loss.backward()
            buckets, captured = optimizer.captured(), False
            optimizer.step()
            assert step < 2 or optimizer.replays_as == places, "what a graph would read has not moved"
        return [t for p in model.parameters() for t in (p.detach(), *map(torch.Tensor.detach, rest_of(optimizer, p)))]

    assert all(torch.equal(a, b) for a, b in zip(trained(3), trained(99), strict=True))


def rest_of(optimizer: Optimizer, param: Tensor) -> list[Tensor]:
    return [optimizer.state[param][name] for name in ("step", "rest") if name in optimizer.state[param]]


@pytest.mark.parametrize("made", [False, True])
def test_a_matrix_without_a_gradient_is_named_when_its_block_is_captured(made: bool) -> None:
    """However its state came to be."""
    pytest.importorskip("torchao.optim")
    model = nn.Sequential(*(nn.ModuleDict({"used": nn.Linear(64, 64), "unused": nn.Linear(64, 64)}) for _ in range(2)))
    optimizer = optimizer_for(model, OptimizerConfig(), MemoryConfig(optimizer_state="int8", step_in_backward=True))
    assert isinstance(optimizer, StepInBackward)
    if made:
        optimizer.make_state_()
    for _ in range(2):
        sum(block["used"](torch.ones(1, 64)).square().sum() for block in model).backward()  # type: ignore[operator, index, union-attr]
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.replays_as is not None
    sum(block["used"](torch.ones(1, 64)).square().sum() for block in model).backward()  # type: ignore[operator, index, union-attr]
    with pytest.raises(ValueError, match="parameters without a gradient"):
        optimizer.captured()


def test_what_cannot_be_captured_says_so() -> None:
    pytest.importorskip("torchao.optim")
    model = fresh(n_embd=64)
    assert StepInBackward(torch.optim.SGD(model.parameters(), lr=1.0), buckets_of(model)).replays_as is None
    model = fresh(n_embd=64)
    optimizer = optimizer_for(model, OptimizerConfig(), MemoryConfig(optimizer_state="int8", step_in_backward=True))
    assert isinstance(optimizer, StepInBackward)
    assert optimizer.replays_as is not None
    with optimizer.no_step():
        assert optimizer.replays_as is None
    model.h[0].mlp(torch.ones(1, 64)).sum().backward()
    with pytest.raises(ValueError, match="parameters without a gradient"):
        optimizer.captured()
    optimizer.zero_grad()
    for step in (0, 1):
        model(tokens(0), tokens(0)).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert (optimizer.replays_as is None) == (step == 1)
        optimizer.state[model.h[0].mlp.c_fc.weight]["step"] += 1  # as if its neighbours had missed a step
    optimizer.state[model.h[0].mlp.c_fc.weight]["step"] -= 2
    assert optimizer.replays_as is not None
    optimizer.param_groups[0]["betas"] = (0.5, 0.99)
    assert optimizer.replays_as is None, "the update has its betas as numbers"


def one_bucket(params: list[nn.Parameter], state: str) -> Optimizer:
    return low_bit_adamw([{"params": params}], [params], state=state, lr=1e-2, betas=(0.9, 0.99), eps=1e-8)


def stepped(params: list[nn.Parameter], optimizer: Optimizer, steps: int = 3) -> list[Tensor]:
    """The weights after steps along random gradients, the same every time."""
    torch.manual_seed(1)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
    return [param.detach() for param in params]


@pytest.mark.parametrize("state", ["int8", "fp8", "int4"])
def test_weights_that_do_not_lie_in_order_are_stepped_too(state: str) -> None:
    ao = pytest.importorskip("torchao.optim")
    name = {"int8": "AdamW8bit", "fp8": "AdamWFp8", "int4": "AdamW4bit"}[state]
    mixed = torch.randn(32, 16, 3, 3).to(memory_format=torch.channels_last)
    ours, theirs = ([nn.Parameter(mixed.clone())] for _ in range(2))
    plain = getattr(ao, name)(theirs, lr=1e-2, betas=(0.9, 0.99), eps=1e-8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, **_: function)
        after, expected = stepped(ours, one_bucket(ours, state)), stepped(theirs, plain)
    assert not ours[0].is_contiguous()
    assert torch.equal(*after, *expected)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="compiling for a CPU takes a compiler")
@pytest.mark.parametrize("state", ["int8", "fp8", "int4"])
def test_the_compiled_update_is_the_same_one(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao.optim")
    shapes, update = [(64, 96), (8192,), (5,)], low_bit._update
    plain, compiled = ([nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    expected = stepped(plain, one_bucket(plain, state))
    monkeypatch.setattr(low_bit, "_update", lambda compiled: update(compiled=True))
    for after, before in zip(stepped(compiled, one_bucket(compiled, state)), expected, strict=True):
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_low_bit_state_survives_snapshot_and_round_trip() -> None:
    pytest.importorskip("torchao.optim")
    memory = MemoryConfig(optimizer_state="int8", step_in_backward=True)
    model = fresh(n_embd=64)
    optimizer = adamw(model, memory)
    before = trained(model, optimizer, 2).clone()
    weights = Weights(model, optimizer)
    saved = weights.snapshot()
    after = trained(model, optimizer, 2).clone()
    weights.restore_(saved)
    assert torch.equal(vector(model), before)
    assert torch.equal(trained(model, optimizer, 2), after)


# --- offloaded weights -----------------------------------------------------------------------------------


def test_offloaded_weights_come_back_exactly_with_every_motion_added() -> None:
    model, plain = fresh(), fresh()
    row = torch.randn(sum(p.numel() for p in model.parameters()), generator=torch.Generator().manual_seed(1))
    rows = list(row.split([sum(p.numel() for p in g) for g in Weights(plain, adamw(plain)).groups]))
    for it, offloads in ((model, True), (plain, False)):
        weights = Weights(it, adamw(it))
        if offloads:
            weights.fp32.offload_()
            assert {p.dtype for p in it.parameters()} == {torch.bfloat16}
        for _ in range(3):
            weights.move_((g, rows[g], 1e-4) for g in range(len(rows)))
        weights.fp32.restore_()
    assert torch.equal(vector(model), vector(plain))


def run_hybrid(memory: MemoryConfig | None, **settings: Any) -> tuple[Tensor, list[Any]]:
    """Weights after a run that predicts, and what each step was."""
    model = fresh()
    config = jumping(2, 4, 6, correction_interval=2, correct_steps=1, path_device="host", memory=memory, **settings)
    trainer = HybridTrainer(model, adamw(model, memory), config)
    results = [trainer.step(lambda s=step: model(tokens(s), tokens(s))) for step in range(40)]
    assert trainer.statistics().predicted_steps > 0
    trainer.materialize_()
    return vector(model), results


@pytest.mark.parametrize("strategy", ["none", "cpu", "pinned"])
def test_exact_strategies_change_no_bit_of_a_run_that_predicts(strategy: str) -> None:
    plain, _ = run_hybrid(None)
    for lookahead in (0, 1):
        away, _ = run_hybrid(MemoryConfig(predict_aware=PredictAwareMemoryConfig(strategy, lookahead)))
        assert torch.equal(plain, away)


def taking_jumps_of_four(
    model: GPT2, interval: int, predict: str, predict_aware: PredictAwareMemoryConfig
) -> HybridTrainer:
    """After six gradient steps the first, of four predicted ones; the weights move every `interval` of them."""
    memory = MemoryConfig(mixed_precision=MixedPrecisionConfig("fp32", predict), predict_aware=predict_aware)
    moves = {"correction_interval": interval, "correct_steps": 1, "divergence_threshold": 1e9}
    config = jumping(2, 4, 4, path_device="host", memory=memory, **moves)
    return HybridTrainer(model, adamw(model), config)


@pytest.mark.parametrize(
    ("lookahead", "interval", "predict", "begun"),
    [
        (0, 2, "bf16_weights", ("correct", 4)),
        (1, 2, "fp32", ("predict", 4)),
        (1, 2, "bf16_weights", ("predict", 3)),  # with the weights, which the second motion brings
        (1, 4, "bf16_weights", ("predict", 4)),
        (3, 2, "fp32", ("predict", 2)),
    ],
)
def test_state_returns_beside_the_last_predicted_steps(
    lookahead: int, interval: int, predict: str, begun: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In which phase its return begins, and after how many predicted steps of a jump of four."""
    asked: list[tuple[str, int]] = []
    prefetch_ = StateOffload.prefetch_

    def noted(state: StateOffload) -> None:
        if state.residency is not Residency.DEVICE:
            phase, finished = trainer.current_phase, trainer.statistics().predicted_steps
            asked.append((str(phase), finished + (phase == "predict")))  # the one under way is counted when it ends
        prefetch_(state)

    monkeypatch.setattr(StateOffload, "prefetch_", noted)
    model = fresh()
    trainer = taking_jumps_of_four(model, interval, predict, PredictAwareMemoryConfig("pinned", lookahead))
    for step in range(11):
        trainer.step(lambda s=step: model(tokens(s), tokens(s)))  # type: ignore[misc]
    assert trainer.statistics().predicted_steps == 4
    assert asked[0] == begun


@pytest.mark.parametrize(("lookahead", "interval"), [(0, 4), (1, 2)])
def test_room_for_weights_and_then_for_the_state_is_taken_before_either_returns(
    lookahead: int, interval: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While copies are under way the driver gives none, and the host would wait for them."""
    order: list[str] = []
    asked: list[tuple[Any, str]] = [(bf16_resident, "reserve_contiguous"), (_Storage, "allocate_")]
    for owner, name in (*asked, (Fp32Weights, "_place_"), (_HostStore, "load_")):
        monkeypatch.setattr(owner, name, _noted(getattr(owner, name), order, name))
    model = fresh()
    trainer = taking_jumps_of_four(model, interval, "bf16_weights", PredictAwareMemoryConfig("pinned", lookahead))
    for step in range(11):
        trainer.step(lambda s=step: model(tokens(s), tokens(s)))  # type: ignore[misc]
    assert trainer.statistics().predicted_steps == 4
    first = [name for i, name in enumerate(order) if name not in order[:i]]
    assert first == ["reserve_contiguous", "allocate_", "_place_", "load_"]


def test_every_jump_leaves_as_little_on_the_card_as_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """What returns must not lie in one stretch with what the next jump keeps, however small that is."""
    with ModelCard(monkeypatch) as card:
        held, bf16_bytes = reserved_in_jumps("cpu", lambda: card.reserved_bytes)
    assert held == [pytest.approx(bf16_bytes, rel=0.1)] * 6


def _noted(call: Callable[..., None], order: list[str], name: str) -> Callable[..., None]:
    def noted(*args: Any, **kwargs: Any) -> None:
        order.append(name)
        call(*args, **kwargs)

    return noted


@pytest.mark.parametrize(
    ("lookahead", "interval", "seen"),
    [(1, 2, ["bfloat16", "float32"]), (1, 4, ["bfloat16"]), (0, 2, ["bfloat16", "bfloat16"])],
)
def test_weights_return_with_the_last_of_several_motions(lookahead: int, interval: int, seen: list[str]) -> None:
    """As the forward passes of a jump of four steps find them, each at the end of what one motion moved to."""
    model = fresh()
    trainer = taking_jumps_of_four(model, interval, "bf16_weights", PredictAwareMemoryConfig("none", lookahead))
    found: list[str] = []

    def loss(step: int) -> Tensor:
        if trainer.current_phase == "predict":
            found.append(str(model.wte.weight.dtype).removeprefix("torch."))
        return model(tokens(step), tokens(step))

    for step in range(11):
        trainer.step(lambda s=step: loss(s))
    assert trainer.statistics().predicted_steps == 4
    assert found == seen
    assert not trainer.is_offloaded


def test_whoever_waits_for_a_step_is_asked_before_the_first_bucket_steps() -> None:
    model = fresh()
    optimizer = adamw(model, MemoryConfig(step_in_backward=True))
    before, asked = model.wte.weight.detach().clone(), []
    optimizer.register_step_pre_hook(lambda *_: asked.append(torch.equal(model.wte.weight, before)))
    model(tokens(0), tokens(0)).backward()
    assert asked[0]
    assert not torch.equal(model.wte.weight, before)


@pytest.mark.parametrize("settings", [{"step_in_backward": True}, {"state_on_host": True}], ids=str)
def test_a_jump_is_not_corrected_by_slopes_that_are_not_known(settings: dict[str, bool]) -> None:
    """The optimizer has taken the gradients: from Correct on the weights are those of ordinary steps."""
    model, memory = nn.Linear(4, 1), MemoryConfig(**settings)
    config = jumping(2, 6, 4, memory=memory)
    trainer, inputs = HybridTrainer(model, adamw(model, memory), config), torch.randn(8, 4)
    while trainer.current_phase != "correct":
        trainer.step(lambda: model(inputs).square().mean())
    twin = nn.Linear(4, 1)
    twin.load_state_dict(model.state_dict())
    plain = adamw(twin, memory)
    plain.load_state_dict(copy.deepcopy(trainer.optimizer.state_dict()))
    alone = HybridTrainer(twin, plain, HybridTrainerConfig.plain(memory=memory))
    while trainer.current_phase == "correct":
        trainer.step(lambda: model(inputs).square().mean())
        alone.step(lambda: twin(inputs).square().mean())
    assert torch.equal(model.weight, twin.weight)
    assert trainer.state_dict()["jumps"]["residuals"]["outcomes"] == []


def test_bf16_weights_in_predict_change_measurements_alone() -> None:
    plain, _ = run_hybrid(None)
    low, _ = run_hybrid(MemoryConfig(mixed_precision=MixedPrecisionConfig("fp32", "bf16_weights")))
    assert torch.equal(plain, low)


# --- refusals --------------------------------------------------------------------------------------------

REFUSED: list[tuple[Callable[[], object], str]] = [
    (
        lambda: MemoryConfig(step_in_backward=True, gradient_accumulation=GradientAccumulationConfig(2)),
        "step_in_backward does not go with gradient_accumulation",
    ),
    (lambda: MemoryConfig(step_in_backward=True, state_on_host=True), "step_in_backward does not go with state_on"),
    (lambda: MemoryConfig(clip_in_backward=1.0), "clip_in_backward does not go with step_in_backward=False"),
    (lambda: MemoryConfig(state_on_host=True, optimizer_state="int8"), "state_on_host does not go with optimizer"),
    (
        lambda: MemoryConfig(state_on_host=True, predict_aware=PredictAwareMemoryConfig("pinned")),
        "state_on_host does not go with predict_aware",
    ),
    (
        lambda: MemoryConfig(optimizer_state="int8", predict_aware=PredictAwareMemoryConfig("compress")),
        "optimizer_state='int8' does not go with predict_aware strategy='compress'",
    ),
    (lambda: MemoryConfig(weights="bf16"), "weights='bf16' does not go with optimizer_state='fp32'"),
    (lambda: MemoryConfig(weights="24bit"), "weights='24bit' does not go with optimizer_state='fp32'"),
    (
        lambda: HybridTrainerConfig(memory=MemoryConfig.fit_16gb()),
        "weights='24bit' does not go with max_predict_steps above 0: a prediction would drown in the rounding; use "
        "float32 weights, as MemoryConfig.fit_16gb(predict_aware=PredictAwareMemoryConfig('pinned')) has them",
    ),
    (lambda: MemoryConfig(optimizer_state="int9"), "optimizer_state 'int9' is unknown: did you mean 'int8'"),
    (lambda: MemoryConfig(loss_chunk_tokens=-1), "loss_chunk_tokens is -1"),
    (
        lambda: HybridTrainerConfig(memory=MemoryConfig(step_in_backward=True), clip_norm=1.0),
        "step_in_backward does not go with clip_norm",
    ),
    (
        lambda: HybridTrainerConfig(memory=MemoryConfig(weights="bf16", optimizer_state="int8")),
        "weights='bf16' does not go with max_predict_steps",
    ),
    (lambda: HybridTrainerConfig(memory=MemoryConfig.conservative()), "set path_device='host'"),
]


@pytest.mark.parametrize(("build", "says"), REFUSED, ids=[says for _, says in REFUSED])
def test_what_cannot_work_together_is_refused_with_the_reason(build: Callable[[], object], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        build()
    assert "\n" not in str(caught.value)


def test_presets_are_accepted() -> None:
    jumps = MemoryConfig.fit_16gb(predict_aware=PredictAwareMemoryConfig("pinned"))
    for preset in (MemoryConfig.conservative(), MemoryConfig.aggressive(), jumps):
        HybridTrainerConfig(memory=preset, path_device="host")


def test_the_16gb_preset_is_for_plain_training_or_for_jumps_and_what_is_set_wins() -> None:
    plain, exact = MemoryConfig.fit_16gb(), MemoryConfig.fit_16gb(weights="fp32")
    assert (plain.weights, plain.optimizer_state, plain.checkpoints_to_host) == ("24bit", "int4", False)
    assert exact == MemoryConfig(**vars(plain) | {"weights": "fp32"})
    jumps = MemoryConfig.fit_16gb(predict_aware=PredictAwareMemoryConfig("cpu"))
    assert (jumps.weights, jumps.optimizer_state, jumps.checkpoints_to_host) == ("fp32", "int8", True)
    assert jumps.offloads_weights
    on_gpu = CheckpointingConfig(keep_last=1)
    for strategy in (None, PredictAwareMemoryConfig("none")):
        mine = MemoryConfig.fit_16gb(
            predict_aware=strategy, weights="fp32", optimizer_state="fp8", checkpointing=on_gpu
        )
        assert (mine.weights, mine.optimizer_state, mine.checkpointing) == ("fp32", "fp8", on_gpu)


def test_models_and_methods_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="repeats no block"):
        prepare_model_(nn.Linear(2, 2), MemoryConfig(checkpointing=CheckpointingConfig()))
    with pytest.raises(UserError, match="goes with AdamW"):
        optimizer_for(fresh(), OptimizerConfig(name="sgd"), MemoryConfig(optimizer_state="int8"))


def test_buckets_hold_every_trainable_parameter_once() -> None:
    model = fresh()
    model.wpe.weight.requires_grad_(False)
    flat = [id(p) for bucket in buckets_of(model) for p in bucket]
    assert sorted(flat) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert len(blocks_of(model)) == SHAPE["n_layer"]


def test_pairs_of_numbers_step_as_torchao_s_update_steps_them_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of all sizes, an infinite one too; weights, their further bits, and codes and scales of the state."""
    pytest.importorskip("torchao.optim")

    def after() -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(shape, generator=generator).bfloat16()) for shape in ((96, 256), (50, 301))]
        optimizer = low_bit_adamw(
            [{"params": params}], [params], state="int4", lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weights="24bit"
        )
        for step in range(8):
            for p in params:
                p.grad = (torch.randn(p.shape, generator=generator) * 10.0 ** (step - 6)).bfloat16()
                p.grad[3, 1] *= math.inf if step == 7 else 1
            optimizer.step()
        states = [(state[name] for name in ("rest", "exp_avg", "exp_avg_sq")) for state in optimizer.state.values()]
        kept = [part for state in states for value in state for part in low_bit._parts(value).values()]
        return [*(p.detach() for p in params), *kept]

    in_pairs = after()
    monkeypatch.setattr(low_bit.Member, "paired", lambda member, rest: member)
    one_by_one = zip(in_pairs, after(), strict=True)
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in one_by_one), "NaN is no number"


def test_a_matrix_that_lies_in_the_middle_of_a_pair_steps_like_any_other() -> None:
    """As its gradient does, where the model joins it to an odd count of other numbers."""
    pytest.importorskip("torchao.optim")

    def after(odd: bool) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        matrix = nn.Parameter(torch.randn(128, 64, generator=generator).bfloat16())
        optimizer = low_bit_adamw(
            [{"params": [matrix]}], [[matrix]], state="int4", lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weights="24bit"
        )
        for _ in range(3):
            within = torch.randn(1 + matrix.numel(), generator=generator).bfloat16()[1:].view_as(matrix)
            matrix.grad = within if odd else within.clone()
            optimizer.step()
        return matrix.detach()

    assert torch.equal(after(odd=True), after(odd=False))


@pytest.mark.parametrize("weights", ["fp32", "24bit"])
@pytest.mark.parametrize("state", low_bit.CLASSES)
def test_a_large_matrix_steps_in_pieces_as_it_would_whole(
    state: str, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An embedding, say: 4-bit codes would take 24 bytes for each number at a time. No blocks fill the last one.

    Pairs too, where nothing is compiled.
    """
    pytest.importorskip("torchao.optim")
    shapes = ((96, 256), (32, 256), (7, 512), (50, 301))

    def after() -> list[Tensor]:
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(shape).to(torch.bfloat16)) for shape in shapes]
        optimizer = low_bit_adamw(
            [{"params": params}], [params], state=state, lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weights=weights
        )
        return stepped(params, optimizer)

    whole = after()
    monkeypatch.setattr(low_bit, "MOST_AT_ONCE", 48 * 128)
    assert all(torch.equal(p, q) for p, q in zip(after(), whole, strict=True))
