from __future__ import annotations

import copy
import math
import pickle
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from hybridlab import HybridTrainer, HybridTrainerConfig
from hybridlab.base.errors import UserError
from hybridlab.memory.apply import optimizer_for
from hybridlab.memory.config import MemoryConfig
from hybridlab.models import GPT2, GPT2Config, MnistCNN
from hybridlab.optim import low_bit
from hybridlab.optim.build import (
    MuonWithAdamW,
    OptimizerConfig,
    Schedule,
    build_optimizer,
    hidden_matrices,
    set_lr_,
)
from hybridlab.optim.muon import COEFFICIENTS, Muon, _update_all, orthogonalize, stacks
from tests.conftest import gradient_step, vector

MINI = GPT2Config(vocab_size=61, block_size=16, n_layer=2, n_head=2, n_embd=16)
TOKENS = torch.randint(61, (4, 17), generator=torch.manual_seed(1))


def mini() -> GPT2:
    torch.manual_seed(0)
    return GPT2(MINI)


def loss_of(model: nn.Module) -> Tensor:
    loss: Tensor = model(TOKENS[:, :-1], TOKENS[:, 1:])
    return loss


def train(model: nn.Module, optimizer: Optimizer, steps: int) -> list[float]:
    return [gradient_step(optimizer, loss_of(model)) for _ in range(steps)]


# --- optimizers -------------------------------------------------------------------------------------


def test_adamw_equals_torchs() -> None:
    ours, theirs = mini(), mini()
    plain = AdamW(
        [
            {"params": [p for p in theirs.parameters() if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in theirs.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=3e-4,
        betas=(0.9, 0.999),
    )
    assert train(ours, build_optimizer(ours, OptimizerConfig(lr=3e-4)), 5) == train(theirs, plain, 5)
    assert torch.equal(vector(ours), vector(theirs))


def test_vanilla_is_the_plans_adam() -> None:
    ours, theirs = mini(), mini()
    optimizer = build_optimizer(ours, OptimizerConfig.vanilla())
    assert isinstance(optimizer, Adam)
    assert train(ours, optimizer, 5) == train(theirs, Adam(theirs.parameters(), lr=6e-4), 5)
    assert torch.equal(vector(ours), vector(theirs))


def test_sgd_equals_torchs() -> None:
    ours, theirs = mini(), mini()
    config = OptimizerConfig(name="sgd", lr=0.1, weight_decay=0.0, momentum=0.9)
    plain = SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    assert train(ours, build_optimizer(ours, config), 5) == train(theirs, plain, 5)


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd"])
def test_only_matrices_decay(name: str) -> None:
    model = MnistCNN()
    model.conv1.requires_grad_(False)
    optimizer = build_optimizer(model, OptimizerConfig(name=name, weight_decay=0.2))
    grouped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters() if p.requires_grad}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.2 if parameter.ndim >= 2 else 0.0)


def test_muon_takes_the_hidden_matrices_only() -> None:
    model = mini()
    optimizer = build_optimizer(model, OptimizerConfig(name="muon", lr=1.2e-3, embedding_multiple=0.5))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    by_method: dict[str, set[str]] = {"muon": set(), "adamw": set()}
    for group in optimizer.param_groups:
        by_method[group["method"]] |= {names[id(parameter)] for parameter in group["params"]}
        assert group["lr"] == (6e-4 if model.wte.weight is group["params"][0] else 1.2e-3)
    matrices = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert by_method["muon"] == {f"h.{i}.{matrix}.weight" for i in range(2) for matrix in matrices}
    assert by_method["adamw"] == set(names.values()) - by_method["muon"]


def test_muon_leaves_convolutions_heads_and_tied_heads_to_adamw() -> None:
    cnn = MnistCNN()
    assert [id(parameter) for parameter in hidden_matrices(cnn)] == [id(cnn.dense.weight)]
    tied = nn.ModuleDict({"embed": nn.Embedding(8, 4), "middle": nn.Linear(4, 4), "out": nn.Linear(4, 8)})
    tied["out"].weight = tied["embed"].weight
    assert [id(parameter) for parameter in hidden_matrices(tied)] == [id(tied["middle"].weight)]


def test_muon_trains() -> None:
    model = mini()
    optimizer = build_optimizer(model, OptimizerConfig(name="muon", lr=2e-2))
    losses = train(model, optimizer, 25)
    assert losses[-1] < losses[0] - 0.5
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_muon_equals_torchs_two_optimizers_within_the_rounding_of_bf16() -> None:
    ours, theirs = mini(), mini()
    optimizer = build_optimizer(ours, OptimizerConfig(name="muon", lr=5e-3))
    hidden = hidden_matrices(theirs)
    chosen = {id(parameter) for parameter in hidden}
    rest = [parameter for parameter in theirs.parameters() if id(parameter) not in chosen]
    muon = torch.optim.Muon(hidden, lr=5e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = AdamW(
        [
            {"params": [p for p in rest if p.ndim == 2], "weight_decay": 0.1},
            {"params": [p for p in rest if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=5e-3,
    )
    before = vector(ours)
    for _ in range(4):
        train(ours, optimizer, 1)
        for plain in (muon, adamw):
            plain.zero_grad()
        theirs(TOKENS[:, :-1], TOKENS[:, 1:]).backward()
        for plain in (muon, adamw):
            plain.step()
    one, other = (vector(model) for model in (ours, theirs))
    assert (one - other).norm() < 0.03 * (other - before).norm()  # each is 1 to 2 % from exact sums


@pytest.mark.parametrize(("coefficients", "least", "most"), [("torch", 0.6, 1.2), ("polar_express", 0.85, 1.13)])
def test_the_iterations_bring_singular_values_near_one(coefficients: str, least: float, most: float) -> None:
    stack = torch.randn(3, 32, 96, generator=torch.manual_seed(0))
    stack = stack / stack.norm(dim=(-2, -1), keepdim=True)
    values = torch.linalg.svdvals(orthogonalize(stack.bfloat16(), COEFFICIENTS[coefficients]).float())
    assert least < values.min() <= values.max() < most


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
def test_wide_matrices_lose_no_more_in_16_bits_than_step_by_step(coefficients: str) -> None:
    """Against the plain iteration in float64, for singular values from 0.0001 to 1, and many of zero."""
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(side, 64, dtype=torch.float64))[0] for side in (64, 256))
    values = torch.stack([torch.logspace(-4, 0, 64), torch.linspace(1, -2, 64).clamp(min=0)]).double()
    stack = left * values[:, None] @ right.T
    stack = stack / stack.norm(dim=(-2, -1), keepdim=True)

    def plainly(x: Tensor) -> Tensor:
        for a, b, c in COEFFICIENTS[coefficients]:
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x

    exact = plainly(stack)
    torch.testing.assert_close(orthogonalize(stack, COEFFICIENTS[coefficients]), exact, rtol=0, atol=1e-9)
    for number_format in (torch.float16, torch.bfloat16):
        ours = partial(orthogonalize, coefficients=COEFFICIENTS[coefficients])
        lost = [iterated(stack.to(number_format)) - exact for iterated in (ours, plainly)]
        assert lost[0].norm() < 1.2 * lost[1].norm()


def test_a_matrix_without_numbers_is_passed_by() -> None:
    params = [nn.Parameter(torch.ones(shape)) for shape in [(0, 4), (4, 0), (4, 4)]]
    for p in params:
        p.grad = torch.eye(*p.shape)
    Muon(params).step()
    assert not params[-1].equal(torch.ones(4, 4))


def test_matrices_of_one_shape_are_stepped_together_turned_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridlab.optim.muon.STACKED_NUMBERS", 3 * 8 * 32)
    shapes = [(8, 32), (32, 8), (8, 8), (8, 32), (32, 8)]
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    assert [len(stack) for stack in stacks(list(params))] == [3, 1, 1]
    alone = [nn.Parameter(p.detach().clone()) for p in params]
    optimizers = [Muon(params), *(Muon([p]) for p in alone)]
    for p, twin in zip(params, alone, strict=True):
        p.grad = torch.randn_like(p)
        twin.grad = p.grad.clone()
    for optimizer in optimizers:
        optimizer.step()
    for p, twin in zip(params, alone, strict=True):
        torch.testing.assert_close(p, twin, rtol=0, atol=1e-5)
    assert all(optimizers[0].state[p]["momentum_buffer"].shape == p.shape for p in params)


@pytest.mark.parametrize("state", ["int8", "int4"])
def test_muons_momentum_in_few_bits_trains_as_far(state: str) -> None:
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    config = replace(MINI, n_embd=64)
    start, losses = GPT2(config).state_dict(), {}
    for name in ("fp32", state):
        model = GPT2(config)
        model.load_state_dict(start)
        optimizer = optimizer_for(model, OptimizerConfig.tuned("muon"), MemoryConfig(optimizer_state=name))
        losses[name] = train(model, optimizer, 15)
    buffer = optimizer.state[model.h[0].mlp.c_fc.weight]["momentum_buffer"]
    assert type(buffer).__name__.startswith("OptimState")
    assert losses[state][-1] == pytest.approx(losses["fp32"][-1], abs=0.05 * losses["fp32"][0])
    with pytest.raises(UserError, match=r"optimizer_state='int8' with weights='fp32' goes with AdamW"):
        optimizer_for(model, OptimizerConfig("sgd"), MemoryConfig(optimizer_state="int8"))


def test_muons_update_is_one_graph_whatever_its_settings() -> None:
    """Counted with dynamo alone, which needs no compiler."""
    graphs = CompileCounter()
    torch._dynamo.reset()
    update = torch.compile(_update_all, fullgraph=True, dynamic=False, backend=graphs)
    weights, gradients, buffers = ([torch.randn(8, 16), torch.randn(16, 8)] for _ in range(3))
    for step in range(1, 4):
        settings = (torch.tensor(1.0 / step) for _ in range(3))
        update(weights, gradients, buffers, *settings, COEFFICIENTS["torch"], low_bit=False)
    assert graphs.frame_count == 1


# --- rates ------------------------------------------------------------------------------------------


def test_each_kind_of_parameter_has_its_multiple_of_the_rate() -> None:
    model = mini()
    for memory in ({}, {"optimizer_state": "int8"}):
        config = OptimizerConfig(lr=1e-3, embedding_multiple=4.0, vector_multiple=0.5)
        optimizer = optimizer_for(model, config, MemoryConfig(**memory))
        set_lr_(optimizer, 0.5)
        rates = {p: (float(g["lr"]), g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
        assert rates[model.wte.weight] == rates[model.wpe.weight] == pytest.approx((2e-3, 0.1))
        assert rates[model.h[0].attn.c_attn.weight] == pytest.approx((5e-4, 0.1))
        assert rates[model.ln_f.weight] == pytest.approx((2.5e-4, 0.0))


def test_a_rate_of_ones_own_is_that_of_all_parameters() -> None:
    assert (OptimizerConfig.tuned().lr, OptimizerConfig.tuned().embedding_multiple) == (3e-4, 4.0)
    assert OptimizerConfig.tuned(lr=1e-3).embedding_multiple == 4.0
    assert OptimizerConfig.tuned(lr=1e-3, embedding_multiple=1.0).embedding_multiple == 1.0
    assert OptimizerConfig.tuned("muon") == OptimizerConfig("muon", lr=1.2e-3)
    assert len(build_optimizer(mini(), OptimizerConfig(lr=1e-3)).param_groups) == 2


@pytest.mark.parametrize(("name", "decay"), [("adamw", 0.0), ("muon", 0.0), ("sgd", 0.0), ("muon", 0.9)])
def test_saved_state_continues_bit_for_bit(name: str, decay: float) -> None:
    config = OptimizerConfig(name=name, lr=5e-3, average_decay=decay)
    model = mini()
    optimizer = build_optimizer(model, config)
    set_lr_(optimizer, 0.5)
    train(model, optimizer, 4)
    weights = copy.deepcopy(model.state_dict())
    state = pickle.loads(pickle.dumps(optimizer.state_dict()))
    expected = train(model, optimizer, 4)

    restored = mini()
    restored.load_state_dict(weights)
    fresh = build_optimizer(restored, config)
    fresh.load_state_dict(state)
    assert [group["lr"] for group in fresh.param_groups] == [g["lr"] for g in optimizer.param_groups]
    assert train(restored, fresh, 4) == expected
    assert torch.equal(vector(model), vector(restored))


def test_muon_rolls_back_within_one_object() -> None:
    """What the trainer does after a divergence: weights and state as they were, in place."""
    model = mini()
    optimizer = build_optimizer(model, OptimizerConfig(name="muon", lr=5e-3))
    train(model, optimizer, 3)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    expected = train(model, optimizer, 3)
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    assert train(model, optimizer, 3) == expected


def test_muon_survives_a_deep_copy() -> None:
    model = mini()
    optimizer = build_optimizer(model, OptimizerConfig(name="muon", lr=5e-3))
    train(model, optimizer, 3)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    assert isinstance(twin_optimizer, MuonWithAdamW)
    assert train(twin, twin_optimizer, 3) == train(model, optimizer, 3)
    assert torch.equal(vector(model), vector(twin))


def test_muon_state_is_one_flat_mapping() -> None:
    model = mini()
    optimizer = build_optimizer(model, OptimizerConfig(name="muon"))
    train(model, optimizer, 1)
    assert set(optimizer.state) == set(model.parameters())
    assert set(optimizer.state[model.h[0].mlp.c_fc.weight]) == {"momentum_buffer"}
    assert set(optimizer.state[model.wte.weight]) == {"step", "exp_avg", "exp_avg_sq"}


def test_step_with_a_closure_returns_its_loss() -> None:
    model = mini()
    optimizer = build_optimizer(model, OptimizerConfig(name="muon"))

    def closure() -> float:
        optimizer.zero_grad()
        loss: Tensor = model(TOKENS[:, :-1], TOKENS[:, 1:])
        loss.backward()
        return loss.item()

    first = optimizer.step(closure)
    assert first is not None
    assert optimizer.step(closure) < first


def test_models_that_cannot_be_optimized_are_refused() -> None:
    with pytest.raises(ValueError, match="no trainable parameter"):
        build_optimizer(mini().requires_grad_(False), OptimizerConfig())
    with pytest.raises(ValueError, match="muon needs hidden matrices"):
        build_optimizer(nn.LayerNorm(4), OptimizerConfig(name="muon"))


def test_muon_needs_no_companion() -> None:
    layer = nn.Linear(4, 4, bias=False)
    optimizer = build_optimizer(layer, OptimizerConfig(name="muon"))
    layer(torch.ones(1, 4)).sum().backward()
    before = layer.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, layer.weight)


# --- settings ---------------------------------------------------------------------------------------


def test_a_rate_read_as_text_is_refused_with_the_fix() -> None:
    with pytest.raises(TypeError, match=r"lr is '1e-4': float is wanted .*write 1\.0e-4"):
        OptimizerConfig(lr="1e-4")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "adamwd"}, r"optimizer 'adamwd' is unknown: did you mean 'adamw'\? \(adamw, adam, muon, sgd\)"),
        ({"lr": 0.0}, r"lr is 0.0: it must be above 0"),
        ({"lr": float("nan")}, r"lr is nan: it must be finite and above 0"),
        ({"betas": (0.9, 1.0)}, r"betas is 1.0: it must be at least 0 and below 1"),
        ({"weight_decay": -0.1}, r"weight_decay is -0.1: it must be at least 0"),
        ({"name": "adam", "weight_decay": 0.1}, r"use weight_decay=0.0 or name='adamw'"),
        ({"embedding_multiple": 0.0}, r"embedding_multiple is 0.0: it must be above 0"),
        ({"coefficients": "torchs"}, r"coefficients 'torchs' is unknown: did you mean 'torch'"),
    ],
)
def test_optimizer_config_refuses_nonsense(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**changes)


def test_the_decay_that_is_meant_goes_with_the_method() -> None:
    assert [OptimizerConfig(name).decay for name in ("adamw", "muon", "sgd", "adam")] == [0.1, 0.1, 0.1, 0.0]
    assert OptimizerConfig("adamw", weight_decay=0.0).decay == 0
    assert OptimizerConfig.tuned() == OptimizerConfig(embedding_multiple=4.0)


def test_betas_may_be_a_list_as_yaml_gives_them() -> None:
    assert OptimizerConfig(betas=[0.9, 0.95]) == OptimizerConfig(betas=(0.9, 0.95))
    with pytest.raises(TypeError, match=r"betas is 0\.9: tuple\[float, float\] is wanted"):
        OptimizerConfig(betas=0.9)


# --- schedules --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (
            Schedule("wsd", warmup_steps=100, total_steps=1000, decay_fraction=0.3),
            {0: 0.01, 49: 0.5, 98.5: 0.995, 99: 1, 500: 1, 700: 1, 850: 0.5, 999: 1 / 300, 1000: 0, 2000: 0},
        ),
        (
            Schedule("wsd", warmup_steps=0, total_steps=100, decay_fraction=1.0, final_fraction=0.1),
            {0: 1, 50: 0.55, 100: 0.1, 150: 0.1},
        ),
        (
            Schedule("cosine", warmup_steps=100, total_steps=1100, final_fraction=0.2),
            {0: 0.01, 49: 0.5, 100: 1, 350: 0.2 + 0.8 * (0.5 + 0.5 * 0.5**0.5), 600: 0.6, 1100: 0.2, 2000: 0.2},
        ),
        (
            Schedule("constant", warmup_steps=10, total_steps=100),
            {0: 0.1, 4.5: 0.55, 9: 1, 99: 1, 1000: 1},
        ),
    ],
    ids=["wsd", "wsd-whole", "cosine", "constant"],
)
def test_schedule_at_named_points(schedule: Schedule, values: dict[float, float]) -> None:
    assert {step: schedule(step) for step in values} == pytest.approx(values)


def test_a_fitted_schedule_has_the_same_shape() -> None:
    schedule = Schedule("wsd", warmup_steps=100, total_steps=1000, final_fraction=0.1)
    shorter = schedule.fitted_to(500)
    assert shorter == Schedule("wsd", warmup_steps=100, total_steps=500, final_fraction=0.1)
    assert [shorter(step) for step in (350, 425, 500)] == pytest.approx([1, 0.55, 0.1])
    assert schedule.fitted_to(1000) == schedule
    assert schedule.fitted_to(30).warmup_steps == 10
    assert schedule.fitted_to(1)(0) == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "cosin"}, r"schedule 'cosin' is unknown: did you mean 'cosine'"),
        ({"total_steps": 60}, r"warmup_steps=100 is longer than total_steps=60: use 20 or less"),
        ({"decay_fraction": 0.0}, r"decay_fraction is 0.0: it must be above 0 and at most 1"),
        ({"final_fraction": 1.5}, r"final_fraction is 1.5: it must be at least 0 and at most 1"),
        ({"total_steps": 0}, r"total_steps is 0: it must be at least 1"),
    ],
)
def test_schedule_refuses_nonsense(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(**changes)


@pytest.mark.parametrize("changes", [{"total_steps": 1e3}, {"warmup_steps": "100"}, {"decay_fraction": "3e-1"}])
def test_schedule_refuses_other_types(changes: dict[str, object]) -> None:
    with pytest.raises(TypeError, match=f"{next(iter(changes))} is "):
        Schedule(**changes)


def test_set_lr_scales_each_groups_first_rate() -> None:
    optimizer = build_optimizer(
        mini(), OptimizerConfig(name="muon", lr=1e-2, vector_multiple=0.1, embedding_multiple=0.1)
    )
    for multiplier in (0.5, 0.1, 1.0):
        set_lr_(optimizer, multiplier)
        assert {group["method"]: group["lr"] for group in optimizer.param_groups} == pytest.approx(
            {"muon": 1e-2 * multiplier, "adamw": 1e-3 * multiplier}
        )


def test_set_lr_fills_a_tensor_rate_in_place() -> None:
    rate = torch.tensor(1e-2)
    optimizer = AdamW(mini().parameters(), lr=rate)
    set_lr_(optimizer, 0.5)
    set_lr_(optimizer, 0.1)
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("name", "memory"),
    [
        *((name, memory) for name in ("adamw", "muon") for memory in ({}, {"step_in_backward": True})),
        ("adamw", {"optimizer_state": "int8"}),
    ],
)
def test_one_cycle_cycles_the_rate_and_the_momentum_of_every_group(name: str, memory: dict[str, Any]) -> None:
    model = mini()
    optimizer = optimizer_for(model, OptimizerConfig(name=name), MemoryConfig(**memory))
    scheduler = OneCycleLR(optimizer, 1e-3, total_steps=10)
    trainer = HybridTrainer(model, optimizer, HybridTrainerConfig.plain(memory=MemoryConfig(**memory)))
    for _ in range(6):
        assert math.isfinite(trainer.step(lambda: loss_of(model)).loss)
        scheduler.step()
    for group in optimizer.param_groups:
        momentum = group["momentum"] if name == "muon" else group["betas"][0]
        assert 0.85 <= momentum < 0.95
        assert 4e-5 < float(group["lr"]) < 1e-3


def test_a_cycled_momentum_is_beta1_of_the_adamw_beside_muon() -> None:
    weights = {}
    for cycled in (False, True):
        model = mini()
        optimizer = build_optimizer(model, OptimizerConfig(name="muon"))
        for group in optimizer.param_groups:
            group["momentum"] = 0.8
            if group["method"] == "adamw" and not cycled:
                del group["momentum"]
                group["betas"] = (0.8, group["betas"][1])
        train(model, optimizer, 3)
        weights[cycled] = vector(model)
    assert torch.equal(weights[False], weights[True])


@pytest.mark.parametrize("change", ["fill the rate", "a float rate", "weight decay"])
def test_low_bit_adamw_compiles_once_however_its_settings_change(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted with dynamo alone, which needs no compiler; a first change from numbers to tensors costs one more."""
    graphs = CompileCounter()
    update = torch.compile(low_bit._update.__wrapped__(False), fullgraph=True, dynamic=False, backend=graphs)
    monkeypatch.setattr(low_bit, "_update", lambda compiled: update)
    model = nn.Linear(64, 64)
    optimizer = optimizer_for(model, OptimizerConfig(), MemoryConfig(optimizer_state="int8"))
    torch._dynamo.reset()
    for step in range(1, 7):
        for group in optimizer.param_groups:
            match change:
                case "fill the rate":
                    group["lr"].fill_(1e-3 / step)
                case "a float rate":
                    group["lr"] = 1e-3 / step
                case _:
                    group["weight_decay"] = 0.1 / step
        gradient_step(optimizer, model(torch.ones(2, 64)).square().mean())
    assert graphs.frame_count <= (1 if "rate" in change else 2)


def test_an_optimizer_without_a_learning_rate_trains_as_in_plain_torch_and_refuses_a_schedule() -> None:
    """As transformers' Adafactor with relative steps has it: lr=None in its group."""

    class OwnRate(SGD):
        def step(self, closure: Any = None) -> Any:
            with torch.no_grad():
                for parameter in self.param_groups[0]["params"]:
                    parameter.sub_(0.1 * parameter.grad)

    weights = []
    for hybrid in (False, True):
        model = mini()
        optimizer = OwnRate(model.parameters(), lr=0.1)
        optimizer.param_groups[0]["lr"] = None
        if hybrid:
            trainer = HybridTrainer(model, optimizer, HybridTrainerConfig.plain())
            for _ in range(3):
                trainer.step(lambda model=model: loss_of(model))  # type: ignore[misc]
        else:
            train(model, optimizer, 3)
        weights.append(vector(model))
    assert torch.equal(*weights)
    with pytest.raises(ValueError, match="OwnRate sets its own learning rate"):
        set_lr_(optimizer, 0.5)
