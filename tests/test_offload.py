"""The optimizer's state leaves for Predict and returns: bit for bit, or with an error that is measured."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from hybridlab.base import pinned_memory as host_memory
from hybridlab.base.errors import UserError
from hybridlab.memory import state_offload
from hybridlab.memory.config import PredictAwareMemoryConfig
from hybridlab.memory.state_offload import StateOffload, _Storage
from hybridlab.optim import OptimizerConfig, build_optimizer, decay_groups
from hybridlab.optim.low_bit import low_bit_adamw, torchao_optim
from hybridlab.weights.residency import Residency
from hybridlab.weights.snapshot import plain_tensors
from tests.conftest import CountedArenas, gradient_step

EXACT = ("cpu", "pinned")


def model_of_two_layers() -> nn.Module:
    """Wide enough for its moments to be worth moving, and for a low-bit optimizer to quantize them."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 65))


def low_bit(model: nn.Module, state: str) -> Optimizer:
    pytest.importorskip("torchao")
    return low_bit_adamw(
        decay_groups(model.parameters(), 0.1),
        [list(model.parameters())],
        state=state,
        lr=1e-2,
        betas=(0.9, 0.99),
        eps=1e-8,
    )


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "adamw": lambda model: AdamW(model.parameters(), lr=1e-2),
    "sgd": lambda model: SGD(model.parameters(), lr=1e-2, momentum=0.9),
    "muon": lambda model: build_optimizer(model, OptimizerConfig(name="muon", lr=1e-2)),
    "int8": lambda model: low_bit(model, "int8"),
    "int4": lambda model: low_bit(model, "int4"),
}


def train(model: nn.Module, optimizer: Optimizer, steps: int = 3) -> list[float]:
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(16, 64, generator=generator) for _ in range(steps)]
    return [gradient_step(optimizer, model(batch).square().mean()) for batch in batches]


def trained(name: str) -> tuple[nn.Module, Optimizer]:
    model = model_of_two_layers()
    optimizer = OPTIMIZERS[name](model)
    train(model, optimizer)
    return model, optimizer


def pieces(optimizer: Optimizer) -> list[Tensor]:
    """The plain tensors of the state."""
    values = [value for state in optimizer.state.values() for value in state.values()]
    return [tensor for value in values for tensor in plain_tensors(value)]


def resident_bytes(optimizer: Optimizer) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in pieces(optimizer))


# --- exact -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("strategy", EXACT)
def test_an_exact_strategy_changes_no_bit_of_training(name: str, strategy: str) -> None:
    plain_model, plain = trained(name)
    model, optimizer = trained(name)
    away = StateOffload(optimizer, PredictAwareMemoryConfig(strategy))
    before, held = resident_bytes(optimizer), pieces(optimizer)
    for cycle in range(3):
        away.offload_()
        assert away.residency is Residency.OFFLOADED
        assert resident_bytes(optimizer) < 0.2 * before
        if cycle != 1:
            away.prefetch_()
            away.prefetch_()
        away.restore_()
        away.restore_()
        assert away.residency is Residency.DEVICE
        assert all(now is then for now, then in zip(pieces(optimizer), held, strict=True))
        assert train(model, optimizer) == train(plain_model, plain)


def test_host_memory_is_taken_once(arenas: CountedArenas) -> None:
    model, optimizer = trained("adamw")
    away = StateOffload(optimizer, PredictAwareMemoryConfig("pinned"))
    for _ in range(5):
        away.offload_()
        away.restore_()
        train(model, optimizer, 1)
    (taken_bytes,) = arenas.taken_bytes
    assert resident_bytes(optimizer) * 0.9 < taken_bytes < resident_bytes(optimizer) * 1.1


def test_a_state_that_was_copied_already_takes_no_host_memory(arenas: CountedArenas) -> None:
    plain_model, plain = trained("adamw")
    model, optimizer = trained("adamw")
    away = StateOffload(optimizer, PredictAwareMemoryConfig("pinned"))
    for _ in range(2):
        copies = {tensor.data_ptr(): tensor.clone() for tensor in pieces(optimizer)}
        away.offload_(lambda copies=copies: copies)  # type: ignore[misc]
        assert away.residency is Residency.OFFLOADED
        away.restore_()
        assert train(model, optimizer) == train(plain_model, plain)
    assert arenas.taken_bytes == []


def test_copies_of_a_part_of_the_state_are_not_enough(arenas: CountedArenas) -> None:
    plain_model, plain = trained("adamw")
    model, optimizer = trained("adamw")
    away = StateOffload(optimizer, PredictAwareMemoryConfig("pinned"))
    copies = {tensor.data_ptr(): torch.zeros_like(tensor) for tensor in pieces(optimizer)[:2]}
    away.offload_(lambda: copies)
    away.restore_()
    assert len(arenas.taken_bytes) == 1
    assert train(model, optimizer) == train(plain_model, plain)


def test_tensors_that_share_memory_return_together() -> None:
    optimizer = AdamW([weight := nn.Parameter(torch.ones(2, 2048))])
    both = torch.arange(8192.0)
    optimizer.state[weight] = {"step": torch.tensor(1.0), "exp_avg": both[:4096].view(2, -1), "other": both[4096:]}
    away = StateOffload(optimizer, PredictAwareMemoryConfig("pinned"))
    away.offload_()
    assert both.untyped_storage().nbytes() == 0
    away.restore_()
    assert torch.equal(both, torch.arange(8192.0))
    assert torch.equal(optimizer.state[weight]["other"], torch.arange(4096.0, 8192.0))


def test_channels_last_state_returns() -> None:
    weight = nn.Parameter(torch.randn(8, 16, 9, 9).to(memory_format=torch.channels_last))
    optimizer = AdamW([weight])
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    before = copy.deepcopy(optimizer.state[weight]["exp_avg"])
    away = StateOffload(optimizer, PredictAwareMemoryConfig("cpu"))
    away.offload_()
    away.restore_()
    assert torch.equal(optimizer.state[weight]["exp_avg"], before)


def test_leaving_before_the_first_step_is_nothing() -> None:
    model = model_of_two_layers()
    optimizer = AdamW(model.parameters())
    away = StateOffload(optimizer, PredictAwareMemoryConfig("pinned"))
    away.offload_()
    assert away.residency is Residency.DEVICE
    train(model, optimizer)
    away.offload_()
    assert away.residency is Residency.OFFLOADED


# --- whoever needs the state while it is away ------------------------------------------------------------


@pytest.mark.parametrize("strategy", [*EXACT, "compress"])
def test_a_checkpoint_of_a_state_that_is_away_brings_it_back(strategy: str) -> None:
    if strategy == "compress":
        pytest.importorskip("torchao")
    _, optimizer = trained("adamw")
    expected = copy.deepcopy(optimizer.state_dict())
    away = StateOffload(optimizer, PredictAwareMemoryConfig(strategy))
    away.offload_()
    saved = optimizer.state_dict()
    assert away.residency is Residency.DEVICE
    for i, state in expected["state"].items():
        for name, value in state.items():
            largest = float(value.abs().max())
            atol = 0.0 if strategy in EXACT else 0.01 * largest
            torch.testing.assert_close(saved["state"][i][name], value, rtol=0.0, atol=atol)


def test_a_state_loaded_while_one_is_away_is_the_one_that_counts() -> None:
    model, optimizer = trained("adamw")
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    expected = train(model, optimizer)
    away = StateOffload(optimizer, PredictAwareMemoryConfig("pinned"))
    away.offload_()
    model.load_state_dict(weights)
    optimizer.load_state_dict(saved)
    assert away.residency is Residency.DEVICE
    assert train(model, optimizer) == expected


def test_a_step_taken_while_the_state_is_away_brings_it_back() -> None:
    plain_model, plain = trained("muon")
    model, optimizer = trained("muon")
    StateOffload(optimizer, PredictAwareMemoryConfig("pinned")).offload_()
    assert train(model, optimizer) == train(plain_model, plain)


def test_an_interrupt_while_the_state_leaves_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    plain_model, plain = trained("adamw")
    model, optimizer = trained("adamw")
    away, freed, free_ = StateOffload(optimizer, PredictAwareMemoryConfig("pinned")), [], _Storage.free_

    def interrupted(self: _Storage) -> None:
        if len(freed) == 2:
            raise KeyboardInterrupt
        freed.append(self)
        free_(self)

    monkeypatch.setattr(_Storage, "free_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        away.offload_()
    assert train(model, optimizer) == train(plain_model, plain)


# --- inexact ---------------------------------------------------------------------------------------------


def compressed_and_back(moments: dict[str, Tensor]) -> dict[str, Tensor]:
    pytest.importorskip("torchao")
    optimizer = AdamW([weight := nn.Parameter(torch.ones(moments["exp_avg"].shape))])
    optimizer.state[weight] = {"step": torch.tensor(3.0)} | {name: value.clone() for name, value in moments.items()}
    away = StateOffload(optimizer, PredictAwareMemoryConfig("compress"))
    away.offload_()
    assert optimizer.state[weight]["exp_avg"].untyped_storage().nbytes() == 0
    away.restore_()
    return optimizer.state[weight]


def worst_of_block(error: Tensor, value: Tensor) -> float:
    """Largest error, relative to the largest number of its block."""
    whole = value.numel() // state_offload.BLOCK * state_offload.BLOCK
    errors, values = (tensor.flatten()[:whole].view(-1, state_offload.BLOCK).abs().amax(1) for tensor in (error, value))
    return float((errors / values).max())


def test_compressed_moments_err_by_a_bounded_share_of_their_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_offload, "CHUNK", 4 * state_offload.BLOCK)
    torch.manual_seed(0)
    gradient = torch.randn(300, 257) * torch.logspace(-6, 0, 300)[:, None]
    before = {"exp_avg": gradient, "exp_avg_sq": gradient.square()}
    after = compressed_and_back(before)
    assert 0.0 < worst_of_block(after["exp_avg"] - before["exp_avg"], before["exp_avg"]) < 0.008
    roots, exact_roots = after["exp_avg_sq"].sqrt(), before["exp_avg_sq"].sqrt()
    assert 0.0 < worst_of_block(roots - exact_roots, exact_roots) < 0.004
    tail = gradient.numel() % state_offload.BLOCK
    assert tail
    assert torch.equal(after["exp_avg"].flatten()[-tail:], gradient.flatten()[-tail:])
    assert float(after["step"]) == 3.0


def test_no_second_moment_is_lost_to_compression() -> None:
    """A step divides by its root: a gradient 100,000 times below its neighbours' must not meet a zero."""
    gradient = torch.logspace(-5, 0, 8192)[torch.randperm(8192, generator=torch.manual_seed(0))]
    after = compressed_and_back({"exp_avg": gradient, "exp_avg_sq": gradient.square()})
    assert float(after["exp_avg_sq"].min()) > 0.0
    assert float((after["exp_avg"] / after["exp_avg_sq"].sqrt()).max()) < 2.0


def test_training_goes_on_from_a_compressed_state() -> None:
    pytest.importorskip("torchao")
    plain_model, plain = trained("adamw")
    model, optimizer = trained("adamw")
    away = StateOffload(optimizer, PredictAwareMemoryConfig("compress"))
    for _ in range(3):
        away.offload_()
        away.restore_()
        exact, inexact = train(plain_model, plain), train(model, optimizer)
    assert inexact != exact
    assert inexact == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
def test_after_a_drop_the_optimizer_starts_anew(name: str) -> None:
    model, optimizer = trained(name)
    twin = copy.deepcopy(model)
    away = StateOffload(optimizer, PredictAwareMemoryConfig("drop"))
    away.offload_()
    assert resident_bytes(optimizer) == 0
    away.prefetch_()
    away.restore_()
    assert train(model, optimizer) == train(twin, OPTIMIZERS[name](twin))


def test_none_leaves_the_state_alone() -> None:
    _, optimizer = trained("adamw")
    before = resident_bytes(optimizer)
    away = StateOffload(optimizer, PredictAwareMemoryConfig("none"))
    away.offload_()
    assert away.residency is Residency.DEVICE
    assert resident_bytes(optimizer) == before


# --- faults ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", EXACT)
def test_a_host_short_of_memory_loses_nothing(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain_model, plain = trained("adamw")
    model, optimizer = trained("adamw")
    away = StateOffload(optimizer, PredictAwareMemoryConfig(strategy))
    with monkeypatch.context() as patch:
        patch.setattr(host_memory, "LEFT_TO_OTHERS_BYTES", 1 << 60)
        with pytest.raises(UserError, match="host memory are wanted"):
            away.offload_()
    assert away.residency is Residency.DEVICE
    assert train(model, optimizer) == train(plain_model, plain)
    away.offload_()
    assert away.residency is Residency.OFFLOADED
    assert train(model, optimizer) == train(plain_model, plain)


def test_a_card_short_of_memory_on_return_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    plain_model, plain = trained("adamw")
    model, optimizer = trained("adamw")
    away = StateOffload(optimizer, PredictAwareMemoryConfig("pinned"))
    away.offload_()
    allocate, calls = state_offload._Storage.allocate_, iter(range(10))

    def fail_the_third_time(storage: state_offload._Storage) -> None:
        if next(calls) == 2:
            raise torch.OutOfMemoryError("no room")
        allocate(storage)

    with monkeypatch.context() as patch:
        patch.setattr(state_offload._Storage, "allocate_", fail_the_third_time)
        with pytest.raises(torch.OutOfMemoryError):
            away.restore_()
    assert away.residency is Residency.OFFLOADED
    away.restore_()
    assert train(model, optimizer) == train(plain_model, plain)


def test_compress_says_that_it_needs_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    torchao_optim.cache_clear()
    _, optimizer = trained("adamw")
    with pytest.raises(UserError, match=r"strategy 'compress' needs torchao: \.venv/bin/pip install torchao"):
        StateOffload(optimizer, PredictAwareMemoryConfig("compress"))
