"""Snapshots and offloaded weights: copies that nothing changes, in host memory that is taken once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils._pytree import tree_leaves

from hybridlab import HybridTrainer, HybridTrainerConfig
from hybridlab.base.checkpoint import load_checkpoint, save_checkpoint
from hybridlab.base.errors import UserError
from hybridlab.base.pinned_memory import ALIGNMENT_BYTES
from hybridlab.engine.phases import Phase
from hybridlab.memory.config import MemoryConfig, MixedPrecisionConfig, PredictAwareMemoryConfig
from hybridlab.optim.low_bit import low_bit_adamw
from hybridlab.weights import bf16_resident, motion
from hybridlab.weights.motion import PIECE, chunks_of
from hybridlab.weights.residency import Residency
from hybridlab.weights.snapshot import Snapshot, Weights, plain_tensors
from tests import conftest
from tests.conftest import CountedArenas, Problem, gradient_step


class Picture(nn.Sequential):
    """Weights that lie in memory in another order, a whole number among the buffers, and a type of half the length."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(5 * 36, 7))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.register_buffer("mask", torch.ones(3, dtype=torch.bool))


class Numbers(nn.Module):
    """As many numbers in the weights as in the momentum, so that both ask for rooms of one size."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 512))


class Wide(Numbers):
    """Enough numbers for their state to leave."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 4096))


def inputs(model: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    if isinstance(model, Numbers):
        return model.weight * torch.randn(model.weight.shape, generator=generator)
    return model(torch.randn(4, 3, 8, 8, generator=generator))  # type: ignore[no-any-return]


def train_(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        gradient_step(optimizer, inputs(model, step).square().mean())


def adamw(model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), lr=1e-2)


def momentum(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=1e-2, momentum=0.9)


def int8(model: nn.Module) -> Optimizer:
    pytest.importorskip("torchao.optim")
    params = list(model.parameters())
    return low_bit_adamw([{"params": params}], [params], state="int8", lr=1e-2, betas=(0.9, 0.999), eps=1e-8)


CASES = [(Picture, adamw), (Picture, momentum), (Numbers, momentum), (Numbers, int8)]
PLACES = [Residency.DEVICE, Residency.OFFLOADED]
Case = tuple[Callable[[], nn.Module], Callable[[nn.Module], Optimizer]]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0].__name__}-{case[1].__name__}")
def trained(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, Optimizer]:
    """A model and its optimizer after some steps; uncompiled, as no compiler need be here."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    model = request.param[0]()
    optimizer = request.param[1](model)
    train_(model, optimizer, range(3))
    return model, optimizer


def plain(value: object) -> list[Tensor]:
    """The tensors inside a snapshot or a state, in order."""
    held = value.state_dict() if isinstance(value, Snapshot) else value
    return [tensor.detach() for leaf in tree_leaves(held) for tensor in plain_tensors(leaf)]


def now(model: nn.Module, optimizer: Optimizer) -> list[Tensor]:
    """Copies of all weights, buffers and state."""
    held = [[*model.parameters(), *model.buffers()], [optimizer.state[p] for p in model.parameters()]]
    return [tensor.clone() for tensor in plain(held)]


def same(these: list[Tensor], those: list[Tensor]) -> bool:
    return len(these) == len(those) and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(these, those, strict=True)
    )


# --- snapshots -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
def test_a_snapshot_is_exact_and_nothing_that_follows_changes_it(
    trained: tuple[nn.Module, Optimizer], place: Residency
) -> None:
    model, optimizer = trained
    weights = Weights(model, optimizer, snapshots=place)
    before = now(model, optimizer)
    held = weights.snapshot()
    for step in range(4):
        train_(model, optimizer, range(step, step + 1))
        weights.snapshot(optimizer=False)
        weights.snapshot()
    assert same(plain(held), before)
    assert not same(now(model, optimizer), before)
    weights.restore_(held)
    assert same(now(model, optimizer), before)
    train_(model, optimizer, range(5))
    assert same(plain(held), before), "what was restored shares nothing with it"


def test_the_host_holds_what_a_copy_beside_the_weights_would(trained: tuple[nn.Module, Optimizer]) -> None:
    here, there = (Weights(*trained, snapshots=place).snapshot() for place in PLACES)
    assert same(plain(here), plain(there))
    assert here.beside == there.beside


def test_snapshots_kept_at_once_share_nothing(trained: tuple[nn.Module, Optimizer]) -> None:
    model, optimizer = trained
    weights = Weights(model, optimizer, snapshots=Residency.OFFLOADED)
    held = [(weights.snapshot(optimizer=bool(step % 2)), now(model, optimizer)) for step in (0, 1)]
    train_(model, optimizer, range(3))
    held += [(weights.snapshot(optimizer=bool(step % 2)), now(model, optimizer)) for step in (0, 1)]
    assert all(same(plain(saved), then[: len(plain(saved))]) for saved, then in held)
    places = [tensor.data_ptr() for saved, _ in held for tensor in plain(saved)]
    assert len({*places}) == len(places)


def test_host_memory_is_taken_once_for_the_weights_and_once_for_the_state(
    trained: tuple[nn.Module, Optimizer], arenas: CountedArenas
) -> None:
    model, optimizer = trained
    weights = Weights(model, optimizer, snapshots=Residency.OFFLOADED)
    for step in range(5):
        for _ in range(3):
            probe = weights.snapshot(optimizer=False)
            weights.restore_(probe)
            del probe
        before_jump = weights.snapshot()
        train_(model, optimizer, range(step, step + 1))
        weights.restore_(before_jump)
        del before_jump
    assert len(arenas.taken_bytes) == 2
    expected = sum(tensor.nbytes for tensor in now(model, optimizer))
    assert expected <= sum(arenas.taken_bytes) < expected + 256 * len(now(model, optimizer))


def test_a_second_snapshot_has_its_own_memory_and_both_are_used_again(
    trained: tuple[nn.Module, Optimizer], arenas: CountedArenas
) -> None:
    weights = Weights(*trained, snapshots=Residency.OFFLOADED)
    for _ in range(4):
        before_jump = weights.snapshot()
        probe = weights.snapshot(optimizer=False)
        del before_jump, probe
    assert len(arenas.taken_bytes) == 3


def test_the_memory_stays_while_anybody_holds_one_tensor_of_it(trained: tuple[nn.Module, Optimizer]) -> None:
    model, optimizer = trained
    weights = Weights(model, optimizer, snapshots=Residency.OFFLOADED)
    before = now(model, optimizer)
    state = weights.snapshot().state_dict()
    last = plain(state)[-1]
    train_(model, optimizer, range(3))
    weights.snapshot()
    assert same(plain(state), before)
    del state
    weights.snapshot()
    assert torch.equal(last, before[-1])


def test_without_the_host_no_arena_is_taken(trained: tuple[nn.Module, Optimizer], arenas: CountedArenas) -> None:
    Weights(*trained).snapshot()
    assert arenas.taken_bytes == []


@pytest.mark.parametrize("place", PLACES)
def test_state_that_is_gone_comes_back_whole(trained: tuple[nn.Module, Optimizer], place: Residency) -> None:
    """As the strategy `drop` leaves it, and as an optimizer that never stepped has it."""
    model, optimizer = trained
    weights = Weights(model, optimizer, snapshots=place)
    before, saved = now(model, optimizer), weights.snapshot()
    for state in optimizer.state.values():
        state.clear()
    weights.restore_(saved)
    assert same(now(model, optimizer), before)
    optimizer.state.clear()
    weights.restore_(saved)
    assert same(now(model, optimizer), before)
    train_(model, optimizer, range(2))
    assert same(plain(saved), before)


def test_state_that_is_gone_comes_back_to_where_it_lay() -> None:
    """Moments lie beside their parameter, wherever copies of them do; a step count may lie elsewhere."""
    optimizer = AdamW([weight := nn.Parameter(torch.ones(3, device="meta"))])
    weights = Weights(nn.Module(), optimizer)
    optimizer.state[weight] = {"exp_avg": torch.ones(3, device="meta"), "step": torch.tensor(1.0), "rate": 0.5}
    saved = weights.snapshot()
    assert saved.optimizer is not None
    on_host = Snapshot(saved.tensors, {0: saved.optimizer[0] | {"exp_avg": torch.ones(3)}}, saved.beside)
    optimizer.state[weight].clear()
    weights.restore_(on_host)
    state = optimizer.state[weight]
    assert (state["exp_avg"].device.type, state["step"].device.type, state["rate"]) == ("meta", "cpu", 0.5)


@pytest.mark.parametrize("place", PLACES)
def test_a_snapshot_survives_a_checkpoint(tmp_path: Path, place: Residency) -> None:
    model = Picture()
    optimizer = adamw(model)
    train_(model, optimizer, range(3))
    weights = Weights(model, optimizer, snapshots=place)
    before, saved = now(model, optimizer), weights.snapshot()
    save_checkpoint(tmp_path / "a.pt", {"before_jump": saved.state_dict()}, meta={})
    content = sum(tensor.nbytes for tensor in before)
    assert (tmp_path / "a.pt").stat().st_size < content + 1000 * len(before)
    loaded = load_checkpoint(tmp_path / "a.pt", expect={})
    assert loaded is not None
    del saved
    train_(model, optimizer, range(3))
    weights.restore_(Snapshot(**loaded["before_jump"]))
    assert same(now(model, optimizer), before)


def test_a_snapshot_of_an_earlier_checkpoint_is_read_too() -> None:
    model = Picture()
    optimizer = adamw(model)
    train_(model, optimizer, range(3))
    weights = Weights(model, optimizer)
    before, held = now(model, optimizer), weights.snapshot().state_dict()
    del held["beside"]
    optimizer.state.clear()
    weights.restore_(Snapshot(**held))
    assert same(now(model, optimizer), before)


# --- a host that is short --------------------------------------------------------------------------------


@pytest.mark.parametrize("may_take", [0, 1])
def test_a_snapshot_without_memory_leaves_everything_as_it_was(
    trained: tuple[nn.Module, Optimizer], arenas: CountedArenas, may_take: int
) -> None:
    model, optimizer = trained
    weights = Weights(model, optimizer, snapshots=Residency.OFFLOADED)
    before = now(model, optimizer)
    arenas.may_take = may_take
    with pytest.raises(UserError, match="host memory is short"):
        weights.snapshot()
    assert same(now(model, optimizer), before)
    arenas.may_take = None
    assert same(plain(weights.snapshot()), before)
    assert len(arenas.taken_bytes) == 2, "what the first try got was used"


def test_a_snapshot_without_memory_leaves_the_one_before_as_it_was(
    trained: tuple[nn.Module, Optimizer], arenas: CountedArenas
) -> None:
    model, optimizer = trained
    weights = Weights(model, optimizer, snapshots=Residency.OFFLOADED)
    before, held = now(model, optimizer), weights.snapshot()
    train_(model, optimizer, range(3))
    arenas.may_take = 2
    with pytest.raises(UserError, match="host memory is short"):
        weights.snapshot(optimizer=False)
    weights.restore_(held)
    assert same(now(model, optimizer), before)


def test_float32_weights_that_find_no_room_stay_where_they_are(arenas: CountedArenas) -> None:
    model = Picture()
    plain_model = copy.deepcopy(model)
    groups = [[model[0].weight, model[0].bias], list(model[3].parameters())]
    optimizer = SGD([{"params": group} for group in groups], lr=0.1)
    weights = Weights(model, optimizer)
    places = [p.data_ptr() for p in model.parameters()]
    arenas.may_take = 0
    with pytest.raises(UserError, match="host memory is short"):
        weights.fp32.offload_()
    assert [p.data_ptr() for p in model.parameters()] == places
    assert same(plain(list(model.parameters())), plain(list(plain_model.parameters())))
    arenas.may_take = None
    for _ in range(3):
        weights.fp32.offload_()
        assert {p.dtype for group in groups for p in group} == {torch.bfloat16}
        weights.fp32.restore_()
    assert same(plain(list(model.parameters())), plain(list(plain_model.parameters())))
    sizes = [4 * p.numel() for group in groups for p in group]
    assert len(arenas.taken_bytes) == 1
    assert sum(sizes) <= arenas.taken_bytes[0] < sum(sizes) + ALIGNMENT_BYTES * len(sizes)


# --- in training -----------------------------------------------------------------------------------------

EAGER = replace(conftest.EAGER, max_predict_steps=6, correction_interval=3, gate=True, path_device="host")


def run(config: HybridTrainerConfig, steps: int = 120) -> tuple[Tensor, HybridTrainer]:
    task = Problem()
    trainer = task.trained(config, steps)
    trainer.materialize_()
    return task.weights(), trainer


@pytest.mark.parametrize("gate", [False, True])
def test_training_takes_one_arena_for_each_purpose_however_often_it_jumps(arenas: CountedArenas, gate: bool) -> None:
    """The path, the weights of a snapshot, and the state of it."""
    config = replace(EAGER, gate=gate, gate_budget=1.0)
    there, trainer = run(config)
    assert trainer.statistics().proposals_accepted > 1
    assert len(arenas.taken_bytes) == 3
    here, _ = run(replace(config, path_device="same"))
    assert len(arenas.taken_bytes) == 3
    assert torch.equal(here, there)


def test_what_leaves_in_predict_is_not_copied_beside_the_snapshot(arenas: CountedArenas) -> None:
    leaves = MemoryConfig(
        predict_aware=PredictAwareMemoryConfig("pinned"), mixed_precision=MixedPrecisionConfig("fp32", "bf16_weights")
    )
    config = replace(EAGER, gate=False)
    plain_run, _ = run(config)
    taken = list(arenas.taken_bytes)
    away, trainer = run(replace(config, memory=leaves))
    assert trainer.statistics().proposals_accepted > 1
    assert arenas.taken_bytes[len(taken) :] == taken
    assert torch.equal(away, plain_run)


def test_a_jump_without_memory_for_its_snapshot_is_not_begun(arenas: CountedArenas) -> None:
    task = Problem()
    trainer = HybridTrainer(task.model, task.adamw(), replace(EAGER, gate=False))
    arenas.may_take = 2  # the path and the weights of a snapshot, without the state

    def advance(first: int, steps: int) -> None:
        for step in range(first, first + steps):
            trainer.step(task.closure(step))

    with pytest.raises(UserError, match="host memory is short"):
        advance(0, 60)
    arenas.may_take = None
    state = trainer.state_dict()["jumps"]
    assert (state["jump"], state["snapshot"]) == (None, None)
    advance(60, 60)
    assert trainer.statistics().proposals_accepted > 0


# --- offloaded weights -----------------------------------------------------------------------------------


class Broken(Exception):
    """Out of memory, or a person's Ctrl-C."""


def interrupted_after(call: Callable[..., Tensor], passes: int) -> Callable[..., Tensor]:
    """Lets some calls pass, then raises."""
    left = iter(range(passes))

    def broken(*args: Any, **kwargs: Any) -> Tensor:
        if next(left, None) is None:
            raise Broken
        return call(*args, **kwargs)

    return broken


@pytest.mark.parametrize("passes", range(12))
@pytest.mark.parametrize(("owner", "name"), [(Tensor, "copy_"), (torch, "empty"), (torch, "empty_like")])
@pytest.mark.parametrize("method", ["offload_", "restore_"])
def test_no_bit_is_lost_where_offloading_or_restoring_is_interrupted(
    method: str, owner: Any, name: str, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Picture()
    optimizer = AdamW([{"params": [p]} for p in model.parameters()])
    weights = Weights(model, optimizer)
    before, strides = now(model, optimizer), [p.stride() for p in model.parameters()]
    weights.fp32.offload_()
    weights.fp32.restore_()
    if method == "restore_":
        weights.fp32.offload_()
    with monkeypatch.context() as broken, suppress(Broken):
        broken.setattr(owner, name, interrupted_after(getattr(owner, name), passes))
        getattr(weights.fp32, method)()
    weights.fp32.restore_()
    assert same(now(model, optimizer), before)
    assert [p.stride() for p in model.parameters()] == strides


@pytest.mark.parametrize("passes", range(4))
@pytest.mark.parametrize(("owner", "name"), [(Tensor, "copy_"), (torch, "empty")])
def test_weights_whose_return_was_interrupted_can_leave_again(
    owner: Any, name: str, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Picture()
    exact = plain(list(model.parameters()))
    weights = Weights(model, SGD(model.parameters(), lr=0.1))
    weights.fp32.offload_()
    with monkeypatch.context() as broken, suppress(Broken):
        broken.setattr(owner, name, interrupted_after(getattr(owner, name), passes))
        weights.fp32.restore_()
    weights.fp32.offload_()
    assert same([p.clone() for p in model.parameters()], [p.bfloat16() for p in exact])


def test_all_bf16_weights_lie_in_one_piece_of_memory() -> None:
    """A small one would hold the stretch of GPU memory in which it finds room, and all of what others left there."""
    model = Picture()
    weights = Weights(model, SGD([{"params": [p]} for p in model.parameters()], lr=0.1))
    weights.fp32.offload_()
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == 1


@pytest.mark.parametrize("piece", [7, 100, PIECE])
@pytest.mark.parametrize("place", PLACES)
def test_weights_that_move_from_a_snapshot_are_offloaded_without_a_copy(
    place: Residency, piece: int, arenas: CountedArenas, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much of them is copied at a time."""
    for module in (motion, bf16_resident):
        monkeypatch.setattr(module, "PIECE", piece)
    model, plain_model = Picture(), Picture()
    rows = [torch.linspace(-1, 1, sum(p.numel() for p in model.parameters())).roll(n) for n in range(2)]
    weights, plain_weights = (Weights(m, SGD(m.parameters(), lr=0.1), snapshots=place) for m in (model, plain_model))
    snapshot = weights.snapshot()
    kept, taken = plain(snapshot), len(arenas.taken_bytes)
    weights.fp32.set_base()
    for turn in range(4):
        motions = [(0, row, 1e-3 * (turn + 1)) for row in rows]
        weights.move_(motions)
        plain_weights.move_(motions)
        weights.fp32.offload_(snapshot.tensors)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        exact = [p.bfloat16() for p in plain_model.parameters()]
        assert same([p.clone() for p in model.parameters()], exact), "rounded once, from the exact ones"
        if turn % 2:
            weights.fp32.restore_(keep_base=True)
            assert same(list(model.parameters()), list(plain_model.parameters()))
    weights.fp32.restore_()
    assert same(list(model.parameters()), list(plain_model.parameters()))
    assert same(plain(snapshot), kept)
    assert len(arenas.taken_bytes) == taken


def test_parameters_of_two_types_in_one_group_move_as_exactly_while_they_are_offloaded() -> None:
    def of_two_types() -> nn.Module:
        torch.manual_seed(0)
        return nn.ParameterList([torch.randn(5, 3).bfloat16(), torch.randn(7), torch.randn(4, 4)])

    low, plain_model = of_two_types(), of_two_types()
    weights, plain_weights = (Weights(m, SGD(m.parameters(), lr=0.1)) for m in (low, plain_model))
    weights.fp32.offload_()
    row = torch.linspace(-1, 1, 38)
    for moved in (weights, plain_weights):
        moved.move_([(0, row, 0.5)])
        moved.move_([(0, row, 0.25)])
    weights.fp32.offload_()
    assert same([p.clone() for p in low.parameters()], [p.bfloat16() for p in plain_model.parameters()])
    weights.fp32.restore_()
    assert same(list(low.parameters()), list(plain_model.parameters()))


def test_runs_are_consecutive_parameters_of_one_type_up_to_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(motion, "PIECE", 10)
    group = [torch.empty(n) for n in (4, 6, 1, 25, 0, 3)] + [torch.empty(2, dtype=torch.bfloat16)]
    assert [(members.start, members.stop, where.start, where.stop) for members, where in chunks_of(group)] == [
        (0, 2, 0, 10), (2, 3, 10, 11), (3, 4, 11, 36), (4, 6, 36, 39), (6, 7, 39, 41),
    ]  # fmt: skip


def test_a_row_that_is_used_again_is_copied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, crossed, over = Picture(), [], bf16_resident.to_device_async
    monkeypatch.setattr(bf16_resident, "to_device_async", lambda *asked: (crossed.append(asked), over(*asked))[1])
    weights = Weights(model, SGD(model.parameters(), lr=0.1))
    row = torch.ones(sum(p.numel() for p in model.parameters()))
    weights.fp32.offload_()
    for _ in range(3):
        weights.move_([(0, row, 1e-3)])
        weights.fp32.offload_()
    weights.fp32.restore_()
    assert len(crossed) == 4, "once a motion, and once at their return, all parameters together"


def test_weights_trained_after_a_jump_are_offloaded_as_they_are_then() -> None:
    model = Picture()
    optimizer = adamw(model)
    train_(model, optimizer, range(1))
    weights = Weights(model, optimizer)
    snapshot = weights.snapshot()
    weights.fp32.set_base()
    assert weights.copies_of_state(snapshot)
    weights.fp32.offload_(snapshot.tensors)
    weights.fp32.restore_()
    assert weights.copies_of_state(snapshot) == {}
    train_(model, optimizer, range(3))
    before = now(model, optimizer)
    weights.fp32.offload_()
    weights.fp32.restore_()
    assert same(now(model, optimizer), before)


def in_predict(model: nn.Module, strategy: str = "none") -> HybridTrainer:
    """A trainer in the middle of a jump, its weights offloaded."""
    memory = MemoryConfig(
        mixed_precision=MixedPrecisionConfig("fp32", "bf16_weights"), predict_aware=PredictAwareMemoryConfig(strategy)
    )
    config = replace(EAGER, gate=False, max_predict_steps=8, correction_interval=8, memory=memory)
    trainer = HybridTrainer(model, adamw(model), config)
    step = 0
    while not trainer.is_offloaded:
        trainer.step(lambda s=step: inputs(model, s).square().mean())  # type: ignore[misc]
        step += 1
    return trainer


def test_who_saves_the_model_while_it_is_offloaded_gets_the_exact_weights() -> None:
    model = Numbers()
    trainer = in_predict(model)
    assert model.weight.dtype == torch.bfloat16
    saved = model.state_dict()["weight"]
    assert saved.dtype == torch.float32
    assert not torch.equal(saved, saved.bfloat16().float())
    trainer.materialize_()
    assert torch.equal(model.weight, saved)


def test_weights_that_are_loaded_while_the_model_is_offloaded_stay() -> None:
    model = Numbers()
    trainer = in_predict(model)
    loaded = torch.linspace(3, 5, 512)
    model.load_state_dict({"weight": loaded})
    trainer.materialize_()
    assert torch.equal(model.weight, loaded)


def test_a_state_that_is_loaded_while_it_is_away_stays() -> None:
    model = Wide()
    trainer = in_predict(model, "pinned")
    loaded = copy.deepcopy(trainer.optimizer.state_dict())
    for state in loaded["state"].values():
        state["exp_avg"].fill_(0.25)
    trainer.optimizer.load_state_dict(loaded)
    trainer.materialize_()
    while trainer.current_phase is Phase.PREDICT:
        trainer.step(lambda: inputs(model, 0).square().mean())
    state = trainer.optimizer.state[model.weight]
    assert torch.equal(state["exp_avg"], torch.full_like(model.weight, 0.25))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_path_elsewhere_or_narrower_records_the_same_motion(dtype: torch.dtype) -> None:
    model = Picture()
    weights = Weights(model, SGD(model.parameters(), lr=0.1))
    size = sum(p.numel() for p in weights.params)
    last = weights.gather_(torch.empty(size), 0)
    then = last.clone()
    train_(model, SGD(model.parameters(), lr=0.1), range(1))
    row = torch.empty(size, dtype=dtype)
    weights.advance_(last, row, 0)
    assert torch.equal(last, weights.gather_(torch.empty(size), 0))
    assert torch.equal(row, (last - then).to(dtype))
    assert not torch.equal(last, then)
