"""AdamW on the host takes the steps that torch's takes, and leaves nothing but weights on the device."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from hybridlab import HybridTrainer, HybridTrainerConfig
from hybridlab.base import pinned_memory as host_memory
from hybridlab.base.checkpoint import load_checkpoint, save_checkpoint
from hybridlab.base.errors import UserError
from hybridlab.memory.config import GradientAccumulationConfig, MemoryConfig, PredictAwareMemoryConfig
from hybridlab.memory.state_offload import StateOffload
from hybridlab.models import GPT2, GPT2Config
from hybridlab.optim import decay_groups, set_lr_
from hybridlab.optim.host_adamw import HostAdamW
from tests.conftest import Problem, gradient_step, jumping, vector

MINI = GPT2Config(vocab_size=61, block_size=16, n_layer=2, n_head=2, n_embd=16)
BETAS, EPS = (0.9, 0.99), 1e-8


def fresh(dtype: torch.dtype = torch.float32) -> GPT2:
    torch.manual_seed(0)
    return GPT2(MINI).to(dtype)


def on_host(model: nn.Module, lr: float = 1e-2) -> HostAdamW:
    return HostAdamW(decay_groups(model.parameters(), 0.1), lr=lr, betas=BETAS, eps=EPS)


def fused(model: nn.Module, lr: float = 1e-2) -> AdamW:
    return AdamW(decay_groups(model.parameters(), 0.1), lr=lr, betas=BETAS, eps=EPS, fused=True)


def loss_of(model: nn.Module, step: int) -> Tensor:
    tokens = torch.randint(61, (4, 17), generator=torch.Generator().manual_seed(step))
    return model(tokens[:, :-1], tokens[:, 1:])


def train(
    model: nn.Module, optimizer: Optimizer, steps: int = 4, parts: int = 1, clip: float | None = None, first: int = 0
) -> Tensor:
    """All weights after some steps, each of as many backward passes."""
    for step in range(first, first + steps):
        set_lr_(optimizer, 1.0 / (1 + step))
        optimizer.zero_grad()
        for part in range(parts):
            (loss_of(model, parts * step + part) / parts).backward()
        if clip is not None and isinstance(optimizer, HostAdamW):
            optimizer.clip_(clip)
        elif clip is not None:
            nn.utils.clip_grad_norm_(parameters(optimizer), clip)
        optimizer.step()
    return vector(model)


def parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    """In the order of its groups, in which norms are summed."""
    return [param for group in optimizer.param_groups for param in group["params"]]


# --- the same steps --------------------------------------------------------------------------------------


def test_a_trainer_gives_it_a_batch_in_parts() -> None:
    config = HybridTrainerConfig.plain(memory=MemoryConfig(gradient_accumulation=GradientAccumulationConfig(2)))
    ended = []
    for make in (on_host, fused):
        model = fresh()
        trainer = HybridTrainer(model, make(model), config)
        for step in range(4):
            trainer.step([partial(loss_of, model, part) for part in (2 * step, 2 * step + 1)])
        ended.append(vector(model))
    assert torch.equal(*ended)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("clip", [None, 0.5, 1e3])
def test_float32_weights_take_torchs_steps_bit_for_bit(parts: int, clip: float | None) -> None:
    model, plain = fresh(), fresh()
    here, there = on_host(model), fused(plain)
    assert torch.equal(train(model, here, parts=parts, clip=clip), train(plain, there, parts=parts, clip=clip))
    for param, twin in zip(model.parameters(), plain.parameters(), strict=True):
        assert here.state[param].keys() == there.state[twin].keys()
        for name, value in there.state[twin].items():
            assert torch.equal(here.state[param][name], value)


def test_the_norm_is_that_of_all_gradients() -> None:
    model, plain = fresh(), fresh()
    optimizer = on_host(model)
    loss_of(model, 0).backward()
    loss_of(plain, 0).backward()
    norm = nn.utils.get_total_norm([p.grad for p in parameters(fused(plain)) if p.grad is not None])
    assert torch.equal(optimizer.clip_(None), norm)
    assert torch.equal(optimizer.clip_(None), norm)
    assert torch.equal(optimizer.clip_(0.5 * float(norm)), norm)
    torch.testing.assert_close(optimizer.clip_(None), 0.5 * norm)


def test_gradients_leave_the_device_during_backward() -> None:
    model = fresh()
    optimizer = on_host(model)
    alive: list[int] = []
    for block in model.h:
        block.ln_1.weight.register_hook(lambda _: alive.append(sum(p.grad is not None for p in model.parameters())))
    loss_of(model, 0).backward()
    assert alive == [0, 0]
    assert all(p.grad is None for p in model.parameters())
    assert float(optimizer.clip_(None)) > 0.0


def test_a_parameter_without_a_gradient_stays() -> None:
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "unused": nn.Linear(4, 4)})
    optimizer = HostAdamW(model.parameters())
    before = copy.deepcopy(model.state_dict())
    model["used"](torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert not torch.equal(model["used"].weight, before["used.weight"])
    assert torch.equal(model["unused"].weight, before["unused.weight"])
    optimizer.zero_grad()
    after = copy.deepcopy(model.state_dict())
    optimizer.step()
    assert all(torch.equal(value, after[name]) for name, value in model.state_dict().items())


def test_a_held_optimizer_throws_gradients_away() -> None:
    model, plain = fresh(), fresh()
    optimizer = on_host(model)
    with optimizer.no_step():
        loss_of(model, 99).backward()
    assert all(p.grad is None for p in model.parameters())
    loss_of(model, 0).backward()
    with optimizer.no_step():
        loss_of(model, 99).backward()
    optimizer.step()
    assert torch.equal(vector(model), train(plain, fused(plain), 1))


# --- narrow weights --------------------------------------------------------------------------------------


def test_bf16_weights_are_the_rounded_masters_and_gather_small_steps() -> None:
    """A thousand steps, each far below what bf16 resolves, add up."""
    weight = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = HostAdamW([weight], lr=1e-5, weight_decay=0.0)
    for _ in range(1000):
        gradient_step(optimizer, weight.sum())
    master = optimizer.state[weight]["master"]
    assert float(master[0]) == pytest.approx(0.99, abs=1e-4)
    assert torch.equal(weight.detach(), master.bfloat16())


def test_bf16_weights_stay_near_float32_training() -> None:
    model, plain = fresh(torch.bfloat16), fresh()
    start = vector(plain)
    low, full = train(model, on_host(model, 1e-3), 8, parts=2).float(), train(plain, fused(plain, 1e-3), 8, parts=2)
    assert low.dtype is torch.float32
    assert float((low - full).norm() / (full - start).norm()) < 0.2


# --- weights that somebody else moves --------------------------------------------------------------------


@torch.no_grad()
def move_(model: nn.Module, by: float) -> None:
    for param in model.parameters():
        param.add_(by * torch.ones_like(param))


def test_masters_follow_a_prediction_exactly() -> None:
    model, plain = fresh(), fresh()
    here, there = on_host(model), fused(plain)
    train(model, here)
    train(plain, there)
    move_(model, 0.01)
    move_(plain, 0.01)
    here.weights_moved()
    assert torch.equal(train(model, here, first=4), train(plain, there, first=4))


def test_a_narrow_weight_that_was_tried_elsewhere_and_put_back_loses_no_digit() -> None:
    model = fresh(torch.bfloat16)
    optimizer = on_host(model, 1e-4)
    train(model, optimizer)
    twin, other = copy.deepcopy(model), on_host(fresh(torch.bfloat16), 1e-4)
    other = on_host(twin, 1e-4)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = copy.deepcopy(model.state_dict())
    move_(model, 0.3)
    optimizer.weights_moved()
    model.load_state_dict(before)
    optimizer.weights_moved()
    assert torch.equal(train(model, optimizer, first=4), train(twin, other, first=4))


def test_narrow_masters_move_as_far_as_the_weights_did() -> None:
    weight = nn.Parameter(torch.full((4,), 0.25, dtype=torch.bfloat16))
    optimizer = HostAdamW([weight], lr=1e-5, weight_decay=0.0)
    weight.sum().backward()
    optimizer.step()
    with torch.no_grad():
        weight.add_(1.0)
    optimizer.weights_moved()
    gradient_step(optimizer, 0.0 * weight.sum())
    assert float(optimizer.state[weight]["master"][0]) == pytest.approx(1.25 - 2e-5, abs=1e-5)
    assert float(weight.detach()[0]) == 1.25


@pytest.mark.parametrize("gate", [True, False])
def test_a_trainer_that_jumps_moves_weights_and_masters_together(gate: bool) -> None:
    """Predictions, trials and rollbacks: where nobody moves weights any more, masters and weights are one."""
    problem = Problem()
    optimizer = HostAdamW(problem.model.parameters(), lr=1e-2)
    config = jumping(5, 8, 8, gate=gate, predictor="linear")
    trainer = problem.trained(config, 120, optimizer)
    assert trainer.statistics().predicted_steps > 0
    gradient_step(optimizer, problem.closure(0)())
    for param, master in optimizer._masters.items():
        assert torch.equal(param, master)


# --- state -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_state_goes_on_bit_for_bit(dtype: torch.dtype, tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = fresh(dtype)
    optimizer = on_host(model)
    train(model, optimizer)
    save_checkpoint(tmp_path / "c.pt", {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, meta={})
    saved = load_checkpoint(tmp_path / "c.pt", expect={})
    assert saved is not None
    expected = train(model, optimizer, first=4)
    resumed = fresh(dtype)
    other = on_host(resumed)
    train(resumed, other, 2)
    other.load_state_dict(saved["optimizer"])
    resumed.load_state_dict(saved["model"])
    assert torch.equal(train(resumed, other, first=4), expected)


def test_state_goes_over_from_and_to_torchs_adamw() -> None:
    plain, model = fresh(), fresh()
    there, here = fused(plain), on_host(model)
    train(plain, there)
    model.load_state_dict(plain.state_dict())
    here.load_state_dict(there.state_dict())
    assert torch.equal(train(model, here, first=4), train(plain, there, first=4))
    back = fresh()
    back.load_state_dict(model.state_dict())
    adamw = fused(back)
    adamw.load_state_dict(copy.deepcopy(here.state_dict()))
    assert torch.equal(train(back, adamw, first=8), train(plain, there, first=8))


def test_a_state_of_another_model_is_refused() -> None:
    model = fresh()
    optimizer = on_host(model)
    with pytest.raises(ValueError, match="parameter group"):
        optimizer.load_state_dict(AdamW(nn.Linear(2, 2).parameters()).state_dict())


def test_after_a_drop_the_moments_begin_anew_in_the_same_memory() -> None:
    model = fresh()
    optimizer = on_host(model)
    train(model, optimizer)
    places = {p: state["exp_avg"].data_ptr() for p, state in optimizer.state.items()}
    twin = copy.deepcopy(model)
    for param in twin.parameters():
        param._post_accumulate_grad_hooks = None
    StateOffload(optimizer, PredictAwareMemoryConfig("drop")).offload_()
    assert torch.equal(train(model, optimizer, first=4), train(twin, fused(twin), first=4))
    assert {p: state["exp_avg"].data_ptr() for p, state in optimizer.state.items()} == places


# --- faults ----------------------------------------------------------------------------------------------


def test_a_host_short_of_memory_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = fresh(), fresh()
    with monkeypatch.context() as patch:
        patch.setattr(host_memory, "LEFT_TO_OTHERS_BYTES", 1 << 60)
        with pytest.raises(UserError, match="host memory are wanted"):
            on_host(model)
    assert torch.equal(train(model, fused(model)), train(plain, fused(plain)))


def test_a_forgotten_optimizer_gives_its_memory_and_the_gradients_back() -> None:
    model, plain = fresh(), fresh()
    optimizer = on_host(model)
    gone = weakref.ref(optimizer)
    train(model, optimizer, 1)
    del optimizer
    gc.collect()
    assert gone() is None
    model.load_state_dict(plain.state_dict())
    assert torch.equal(train(model, fused(model)), train(plain, fused(plain)))


def test_a_closure_is_called_with_gradients_enabled() -> None:
    model = fresh()
    optimizer = on_host(model)

    def closure() -> float:
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss.item()

    first: Callable[..., float | None] = optimizer.step
    assert first(closure) > optimizer.step(closure)  # type: ignore[operator]
