"""What only a GPU can show; skipped where there is none."""

from __future__ import annotations

import gc
import pickle
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from hybridlab import DepthSchedule, HybridTrainer, HybridTrainerConfig
from hybridlab.base import pinned_memory as host_memory
from hybridlab.base.errors import UserError
from hybridlab.base.pinned_memory import HostArena, arena_bytes
from hybridlab.benchmarks.step_profile import step_work
from hybridlab.memory.apply import optimizer_for, prepare_model_
from hybridlab.memory.config import (
    INPUTS,
    CheckpointingConfig,
    MemoryConfig,
    MixedPrecisionConfig,
    PredictAwareMemoryConfig,
)
from hybridlab.memory.precision import autocast
from hybridlab.memory.state_offload import StateOffload
from hybridlab.models import GPT2, GPT2Config
from hybridlab.optim import OptimizerConfig, Schedule, build_optimizer, decay_groups, set_lr_
from hybridlab.optim import host_adamw as host_optimizer
from hybridlab.optim.host_adamw import HostAdamW
from hybridlab.optim.low_bit import joined, low_bit_adamw
from hybridlab.speed import CudaGraphs
from hybridlab.study import RunConfig, TextTaskConfig, train
from hybridlab.study.memory_log import growth_bytes
from hybridlab.study.process_settings import ProcessSettings
from hybridlab.study.step_log import StepRecord
from hybridlab.study.study import run_arms
from hybridlab.study.tasks import Batch, Task
from hybridlab.study.training import Training
from hybridlab.weights.gram import PathNeeds
from hybridlab.weights.path import PathStorage, Trajectory
from hybridlab.weights.residency import Residency
from hybridlab.weights.snapshot import Snapshot, Weights, plain_tensors
from tests.conftest import CountedArenas, TaskWithin, jumping, vector
from tests.model_card import reserved_in_jumps

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA = torch.device("cuda")


def batch(step: int) -> torch.Tensor:
    return torch.randint(0, 512, (4, 64), generator=torch.Generator().manual_seed(step)).to(CUDA)


def trained(config: HybridTrainerConfig | None, steps: int = 60) -> torch.Tensor:
    """Final weights of a nano GPT-2 under a trainer, or under the plain loop where there is none."""
    torch.manual_seed(0)
    model = GPT2(GPT2Config.nano()).to(CUDA)
    optimizer = build_optimizer(model, OptimizerConfig())
    trainer = HybridTrainer(model, optimizer, config) if config else None
    for step in range(steps):
        if trainer:
            trainer.step(lambda step=step: model(batch(step), batch(step)))  # type: ignore[misc]
        else:
            optimizer.zero_grad()
            model(batch(step), batch(step)).backward()
            optimizer.step()
    return vector(model)


def test_plain_training_is_the_bare_loop_bit_for_bit_on_a_gpu() -> None:
    assert torch.equal(trained(None), trained(HybridTrainerConfig.plain()))


@pytest.mark.parametrize("predictor", ["linear", "adam_coast"])
@pytest.mark.parametrize("path_device", ["same", "host"])
def test_jumps_and_rollback_snapshots_work_wherever_the_path_is_kept(predictor: str, path_device: str) -> None:
    config = jumping(10, 8, 8, gate=True, predictor=predictor)
    kept_here = trained(config)
    kept_there = trained(replace(config, path_device=path_device))
    torch.testing.assert_close(kept_here, kept_there, rtol=1e-3, atol=1e-4)


def test_weights_moved_in_place_reach_a_compiled_bf16_forward() -> None:
    model = GPT2(GPT2Config.nano()).to(CUDA)
    compiled = torch.compile(model)
    tokens = batch(0)

    def losses() -> tuple[float, float]:
        with torch.no_grad(), autocast("bf16", CUDA):
            return float(compiled(tokens, tokens)), float(model(tokens, tokens))

    before, _ = losses()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    after, eager = losses()
    assert after == pytest.approx(eager, rel=1e-3)
    assert abs(after - before) > 1e-3


def test_a_run_on_a_gpu_counts_memory_as_the_card_does(tmp_path: Path) -> None:
    config = RunConfig(
        name="baseline",
        task=TextTaskConfig(model="nano", data="markov", vocab_size=64, block_size=32),
        steps=20,
        schedule=Schedule(warmup_steps=5, total_steps=20),
        precision="bf16",
        device="cuda",
    )
    summary = train(config, tmp_path).summary
    assert summary is not None
    assert summary["memory_source"] == "cuda"
    assert summary["peak_memory_bytes"] >= summary["peak_reserved_bytes"] >= summary["peak_allocated_bytes"] > 0
    by_phase = {name: peak for name, peak in summary.items() if name.startswith("peak_allocated_bytes_in_")}
    assert {*by_phase} == {f"peak_allocated_bytes_in_{phase}" for phase in ("warmup", "evaluation")}
    assert max(by_phase.values()) == summary["peak_allocated_bytes"]


# --- memory: what only a card can show ---------------------------------------------------------------------


def gpu_run(**changes: Any) -> RunConfig:
    settings = {
        "name": "baseline",
        "task": TextTaskConfig(model="nano", data="markov", vocab_size=64, block_size=32),
        "steps": 20,
        "device": "cuda",
    }
    return RunConfig(**settings | changes)


def test_predict_takes_less_than_full_and_both_peaks_are_kept(tmp_path: Path) -> None:
    jumpy = jumping(10, 8, 8, correct_steps=2)
    summary = train(gpu_run(steps=60, hybrid=jumpy), tmp_path).summary
    assert summary is not None
    assert summary["predicted_steps"] > 0
    peaks = [summary[f"peak_allocated_bytes_in_{phase}"] for phase in ("predict", "full")]
    assert 0 < peaks[0] < peaks[1] <= summary["peak_allocated_bytes"]


def test_samples_say_what_the_card_says(tmp_path: Path) -> None:
    vram = train(gpu_run(steps=200), tmp_path).vram
    assert (vram["used_bytes"] >= vram["allocated_bytes"]).all()
    assert {*vram["source"]} <= {"nvml", "torch"}
    if "nvml" in {*vram["source"]}:
        assert (vram["device_used_bytes"] >= vram["used_bytes"]).all()
        assert (vram["device_total_bytes"] > vram["device_used_bytes"]).all()


def test_memory_does_not_grow_over_a_run(tmp_path: Path) -> None:
    assert growth_bytes(train(gpu_run(steps=600, evaluate_every=25), tmp_path), early=100, late=600) == 0


@dataclass(frozen=True)
class GreedyTaskConfig(TextTaskConfig):
    """A nano GPT-2 whose thirteenth step wants a terabyte."""

    def build(self, *given: Any, **named: Any) -> Task:
        return Greedy(super().build(*given, **named))


class Greedy(TaskWithin):
    def batch(self, step: int) -> Batch:
        self._step = step
        return self.task.batch(step)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        held = torch.empty(10**8 if self._step == 12 else 1, dtype=torch.uint8, device=CUDA)
        if self._step == 12:
            torch.empty(2**40, dtype=torch.uint8, device=CUDA)
        return self.task.loss(model, batch) + 0 * held[0]


def test_a_full_card_leaves_a_snapshot_and_lets_go_of_what_the_step_held(tmp_path: Path) -> None:
    task = GreedyTaskConfig(model="nano", data="markov", vocab_size=64, block_size=32)
    before = torch.cuda.memory_allocated()
    with pytest.raises(UserError, match=r"^out of memory: 1024\.00 GiB more were asked for: .* torch holds") as caught:
        train(gpu_run(task=task, checkpoint_every=5), tmp_path)
    assert "\n" not in str(caught.value)
    with (tmp_path / "memory_snapshot.pickle").open("rb") as file:
        blocks = [block for segment in pickle.load(file)["segments"] for block in segment["blocks"]]
    assert max(block["size"] for block in blocks if block["state"] == "active_allocated") >= 10**8
    assert (tmp_path / "checkpoint.pt").exists()
    gc.collect()
    assert torch.cuda.memory_allocated() - before < 10**8


def test_a_smaller_card_binds_the_run_alone(tmp_path: Path) -> None:
    """What comes after it, and what is done between its steps, has the whole card."""
    if torch.cuda.get_device_properties(0).total_memory < 20e9:
        pytest.skip("needs a card that is larger than the one to emulate")
    config, more = gpu_run(card_gb=16), 17 * 10**9
    with ProcessSettings.of(config).applied(), pytest.raises(torch.OutOfMemoryError):
        torch.empty(more, dtype=torch.uint8, device=CUDA)
    between: list[float] = []
    train(config, tmp_path, lambda: between.append(torch.cuda.get_per_process_memory_fraction()))
    assert between == [1.0] * config.steps
    assert torch.empty(more, dtype=torch.uint8, device=CUDA).nbytes == more


HOLDER = """
import torch
held = torch.ones(10**9, dtype=torch.uint8, device="cuda")
print("ready", flush=True)
input()
"""
LOOK = """
import torch
from hybridlab.vram import MemoryMeter
print(MemoryMeter(torch.device("cuda")).other_processes_bytes())
"""


def others_bytes() -> int:
    """Of the card, as a fresh process counts it, whether or not processes are hidden from it."""
    seen = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, check=True).stdout.strip()
    if seen == "None":
        pytest.skip("NVML is not available")
    return int(seen)


def test_a_second_process_on_the_card_is_seen() -> None:
    alone = others_bytes()
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "ready\n"
        beside = others_bytes()
        holder.communicate("\n")
    assert 10**9 <= beside - alone < 3 * 10**9


def test_an_arena_is_pinned_and_its_views_reach_the_card_and_come_back() -> None:
    like = torch.randn(1000, 33, device=CUDA)
    arena = HostArena(arena_bytes([like, like]), pinned=True)
    there, back = arena.take(like), arena.take(like)
    assert there.is_pinned()
    there.copy_(like, non_blocking=True)
    again = torch.empty_like(like)
    again.copy_(there, non_blocking=True)
    back.copy_(again, non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(back, like.cpu())


def plain_tensors_of(snapshot: Snapshot) -> list[Tensor]:
    return [plain for leaf in tree_leaves(snapshot.state_dict()) for plain in plain_tensors(leaf)]


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", ["adamw", "int8"])
def test_snapshots_lie_in_page_locked_memory_that_is_locked_once(name: str, arenas: CountedArenas) -> None:
    model = wide()
    optimizer = optimizer_of(model, name)
    there, here = Weights(model, optimizer, snapshots=Residency.OFFLOADED), Weights(model, optimizer)
    for _ in range(3):
        train_(model, optimizer)
        before, saved = vector(model), there.snapshot()
        held, expected = plain_tensors_of(saved), plain_tensors_of(here.snapshot())
        assert all(tensor.is_pinned() for tensor in held)
        assert all(torch.equal(a, b.cpu()) for a, b in zip(held, expected, strict=True))
        train_(model, optimizer)
        there.restore_(saved)
        assert torch.equal(vector(model), before)
        del saved, held
    assert len(arenas.taken_bytes) == 2


def test_a_state_that_was_dropped_returns_to_the_card_with_the_snapshot() -> None:
    model = wide()
    optimizer = optimizer_of(model, "adamw")
    train_(model, optimizer)
    weights = Weights(model, optimizer, snapshots=Residency.OFFLOADED)
    saved = weights.snapshot()
    train_(model, optimizer)
    expected = vector(model)
    StateOffload(optimizer, PredictAwareMemoryConfig("drop")).offload_()
    weights.restore_(saved)
    train_(model, optimizer)
    assert torch.equal(vector(model), expected)


@pytest.mark.parametrize("has_base", [True, False])
def test_the_path_and_the_weights_that_leave_lie_in_page_locked_memory(has_base: bool, arenas: CountedArenas) -> None:
    model = wide()
    optimizer = optimizer_of(model, "adamw")
    weights = Weights(model, optimizer, snapshots=Residency.OFFLOADED)
    trajectory = Trajectory(weights, optimizer, PathNeeds(rows=2, every=1), PathStorage(Residency.OFFLOADED))
    trajectory.anchor()
    before = vector(model)
    snapshot = weights.snapshot() if has_base else None
    if has_base:
        weights.fp32.set_base()
    weights.fp32.offload_(snapshot.tensors if snapshot else None)
    assert all(base.is_pinned() for base in weights.fp32._base)
    assert all(tensor.is_pinned() for tensor in tree_leaves(trajectory.state_dict()) if isinstance(tensor, Tensor))
    weights.fp32.restore_()
    assert torch.equal(vector(model), before)
    assert len(arenas.taken_bytes) == 2


def test_a_driver_that_refuses_to_pin_is_told_and_the_next_kernel_runs() -> None:
    memory = host_memory._empty(2**20)
    host_memory._pin_(memory)
    with pytest.raises(UserError, match="the driver refuses to pin"):
        host_memory._pin_(memory)
    assert float(torch.ones(3, device=CUDA).sum()) == 3


def test_inputs_of_blocks_leave_the_card_and_every_bit_comes_back() -> None:
    shape = GPT2Config.nano(n_layer=12, n_embd=256, dropout=0.1)
    gradients, peaks = [], []
    for inputs in INPUTS:
        torch.manual_seed(0)
        model = GPT2(shape).to(CUDA)
        prepare_model_(model, MemoryConfig(checkpointing=CheckpointingConfig(inputs=inputs)))
        for step in range(20):
            tokens = batch(step).repeat(8, 1)
            torch.cuda.reset_peak_memory_stats()
            model(tokens, tokens).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        peaks.append(torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated())
        del model
    assert torch.equal(*gradients)
    one = 32 * 64 * 256 * 4
    assert peaks[0] - peaks[1] > 8 * one


def test_a_run_in_its_own_process_leaves_this_one_s_card_alone(tmp_path: Path) -> None:
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    (run,) = run_arms([gpu_run()], tmp_path, isolated=True).runs.values()
    assert run.summary is not None
    assert run.summary["peak_allocated_bytes"] > 0
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


# --- the optimizer's state away for Predict --------------------------------------------------------------


def wide(layers: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(layers)]).to(CUDA)


def optimizer_of(model: nn.Module, name: str) -> Optimizer:
    if name != "int8":
        return build_optimizer(model, OptimizerConfig(name=name, lr=1e-3))
    pytest.importorskip("torchao")
    groups = decay_groups(model.parameters(), 0.1)
    return low_bit_adamw(groups, [list(model.parameters())], state="int8", lr=1e-3, betas=(0.9, 0.99), eps=1e-8)


@pytest.mark.parametrize("state", ["int8", "int4"])
def test_weights_of_24_bits_take_the_same_steps_compiled(state: str) -> None:
    pytest.importorskip("torchao")

    def after(stance: str) -> list[Tensor]:
        model = wide(2).bfloat16()
        params, settings = list(model.parameters()), {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8}
        optimizer = low_bit_adamw([{"params": params}], [params], state=state, weights="24bit", **settings)
        with torch.compiler.set_stance(stance):
            for step in range(3):
                for i, p in enumerate(params):
                    p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(9 * step + i)).to(p)
                optimizer.step()
        return [joined(p.detach(), optimizer.state[p]["rest"]) for p in params]

    pairs = zip(after("default"), after("force_eager"), strict=True)
    apart = torch.cat([(compiled - eager).abs().flatten() for compiled, eager in pairs])
    assert apart.max() < 3e-3  # three steps at this rate: a code of the state may round the other way
    assert (apart > 1e-5).float().mean() < 1e-3  # but seldom does: 3e-4 of the weights on an H200


def train_(model: nn.Module, optimizer: Optimizer, steps: int = 2) -> None:
    """The last step's writes come late: whoever copies too early copies something else."""
    for step in range(steps):
        inputs = torch.randn(8, 1024, generator=torch.Generator().manual_seed(step)).to(CUDA)
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        torch.cuda._sleep(20_000_000)
        optimizer.step()


@pytest.fixture
def uncompiled() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", ["adamw", "muon", "sgd", "int8"])
@pytest.mark.parametrize("strategy", ["cpu", "pinned"])
def test_state_leaves_the_card_and_returns_bit_for_bit(name: str, strategy: str) -> None:
    plain_model, model = wide(), wide()
    plain, optimizer = optimizer_of(plain_model, name), optimizer_of(model, name)
    away = StateOffload(optimizer, PredictAwareMemoryConfig(strategy))
    freed = []
    for cycle in range(3):
        train_(plain_model, plain)
        train_(model, optimizer)
        optimizer.zero_grad()
        gc.collect()  # what earlier tests left behind must not go in between
        full = torch.cuda.memory_allocated()
        away.offload_()
        freed.append(full - torch.cuda.memory_allocated())
        junk = [torch.full((freed[-1] // 64,), torch.nan, device=CUDA) for _ in range(16)]
        torch.cuda._sleep(20_000_000)
        if cycle != 1:
            away.prefetch_()
        junk += [torch.full((freed[-1] // 64,), torch.nan, device=CUDA) for _ in range(16)]
        away.restore_()
        del junk
        assert torch.cuda.memory_allocated() <= 1.05 * full
    parameter_bytes = sum(p.nbytes for p in model.parameters())
    share = {"adamw": 2.0, "muon": 1.0, "sgd": 1.0, "int8": 0.5}[name]
    assert freed == pytest.approx([share * parameter_bytes] * 3, rel=0.1)
    train_(plain_model, plain)
    train_(model, optimizer)
    assert torch.equal(vector(model), vector(plain_model))


def test_a_pinned_state_lies_in_page_locked_memory() -> None:
    model = wide(1)
    optimizer = optimizer_of(model, "adamw")
    train_(model, optimizer)
    away = StateOffload(optimizer, PredictAwareMemoryConfig("pinned"))
    away.offload_()
    assert all(place.is_pinned() for place in away._store._places)  # type: ignore[attr-defined]
    away.restore_()


def test_compressed_state_takes_a_quarter_of_the_memory() -> None:
    pytest.importorskip("torchao")
    model = wide()
    optimizer = optimizer_of(model, "adamw")
    train_(model, optimizer)
    optimizer.zero_grad()
    before = {p: state["exp_avg"].clone() for p, state in optimizer.state.items()}
    state_bytes = 2 * sum(p.nbytes for p in model.parameters())
    gc.collect()  # what earlier tests left behind
    full = torch.cuda.memory_allocated()
    away = StateOffload(optimizer, PredictAwareMemoryConfig("compress"))
    away.offload_()
    freed = full - torch.cuda.memory_allocated()
    assert 0.7 * state_bytes < freed < 0.8 * state_bytes
    away.restore_()
    for p, state in optimizer.state.items():
        torch.testing.assert_close(state["exp_avg"], before[p], rtol=0.0, atol=0.008 * float(before[p].abs().max()))
    train_(model, optimizer)
    assert bool(vector(model).isfinite().all())


@pytest.mark.parametrize("lookahead", [0, 3])
def test_a_trainer_whose_state_leaves_the_card_takes_the_same_steps(lookahead: int) -> None:
    config = jumping(10, 8, 8, path_device="host")
    memory = MemoryConfig(predict_aware=PredictAwareMemoryConfig("pinned", lookahead))
    assert torch.equal(trained(config), trained(replace(config, memory=memory)))


# --- gradients and state on the host ---------------------------------------------------------------------


def host_trained(device: torch.device, dtype: torch.dtype, parts: int) -> Tensor:
    """Weights after some steps with gradients that are the same numbers on every device, and one move by hand."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(300, 257), (257,), (512, 512), (3,), (64, 64, 3)]
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in shapes]
    optimizer = HostAdamW(params, lr=1e-2, betas=(0.9, 0.99))
    for step in range(4):
        optimizer.zero_grad()
        for _ in range(parts):
            slopes = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
            if device.type == "cuda":
                torch.cuda._sleep(20_000_000)
            loss: Tensor = sum((p * slope).sum() for p, slope in zip(params, slopes, strict=True))  # type: ignore[assignment]
            loss.backward()  # type: ignore[no-untyped-call]
            assert all(p.grad is None for p in params)
        optimizer.clip_(1.0)
        optimizer.step()
        if step == 1:
            with torch.no_grad():
                for p in params:
                    p.mul_(0.5)
            optimizer.weights_moved()
    return nn.utils.parameters_to_vector(params).detach().cpu()


@pytest.mark.parametrize("leaving_bytes", [0, 1 << 40])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_host_optimizer_steps_as_on_the_cpu_bit_for_bit(
    dtype: torch.dtype, parts: int, leaving_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_optimizer, "LEAVING_BYTES", leaving_bytes)
    there, here = (host_trained(device, dtype, parts) for device in (CUDA, torch.device("cpu")))
    assert torch.equal(there, here)


def test_gradients_on_their_way_to_the_host_never_all_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_optimizer, "LEAVING_BYTES", 16_000_000)
    model = wide(64)
    optimizer = HostAdamW(model.parameters())
    inputs = torch.randn(8, 1024, device=CUDA)

    def step() -> None:
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()

    step()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    reserved = torch.cuda.memory_reserved()
    for _ in range(3):
        step()
    gradient_bytes = sum(p.nbytes for p in model.parameters())
    assert torch.cuda.max_memory_reserved() - reserved < 0.5 * gradient_bytes


# --- weights put away, and blocks that step in backward ---------------------------------------------------


def jumped(memory: MemoryConfig | None) -> tuple[torch.Tensor, HybridTrainer]:
    """Final weights of a run that jumps on every occasion."""
    torch.manual_seed(0)
    model = GPT2(GPT2Config.nano()).to(CUDA)
    config = jumping(
        2, 4, 8, correction_interval=3, correct_steps=2, path_device="host", path_dtype="bf16", memory=memory
    )
    trainer = HybridTrainer(model, optimizer_for(model, OptimizerConfig(), memory or MemoryConfig()), config)
    for step in range(40):
        trainer.step(lambda step=step: model(batch(step), batch(step)))  # type: ignore[misc]
    trainer.materialize_()
    return vector(model), trainer


def test_bf16_weights_on_the_card_and_masters_on_the_host_end_where_plain_weights_do() -> None:
    plain, _ = jumped(None)
    memory = MemoryConfig(
        mixed_precision=MixedPrecisionConfig("fp32", "bf16_weights"),
        predict_aware=PredictAwareMemoryConfig("pinned", lookahead=2),
    )
    low, trainer = jumped(memory)
    assert trainer.statistics().predicted_steps > 0
    assert torch.equal(low, plain)


@pytest.mark.parametrize("lookahead", [0, 2])
def test_a_step_in_the_backward_pass_waits_for_its_state_to_return(lookahead: int) -> None:
    plain, _ = jumped(MemoryConfig(step_in_backward=True))
    away = PredictAwareMemoryConfig("pinned", lookahead)
    assert torch.equal(jumped(MemoryConfig(step_in_backward=True, predict_aware=away))[0], plain)


def test_many_tensors_are_taken_from_the_card_in_one_request() -> None:
    """The float32 weights of a model, as they return: one stretch for all of them, without the bf16 ones'."""
    model = wide(32)
    weights = Weights(model, torch.optim.SGD(model.parameters(), lr=0.1))
    weights.fp32.offload_()
    gc.collect()
    torch.cuda.empty_cache()
    bf16_bytes = sum(p.nbytes for p in model.parameters())
    before, others = torch.cuda.memory_stats()["num_device_alloc"], torch.cuda.memory_reserved() - bf16_bytes
    weights.fp32.restore_()
    assert torch.cuda.memory_stats()["num_device_alloc"] - before <= 3
    assert torch.cuda.memory_reserved() - others <= 2.2 * bf16_bytes


def test_every_jump_leaves_as_little_on_the_card_as_the_first() -> None:
    """As on the model of a card in `test_memory`; what earlier tests have left there does not change between jumps."""
    held, bf16_bytes = reserved_in_jumps("cuda", torch.cuda.memory_reserved)
    assert max(held) - min(held) < 0.3 * bf16_bytes


def test_a_compiled_low_bit_step_inside_backward_learns_like_one_after_it() -> None:
    pytest.importorskip("torchao")
    losses = []
    for inside in (False, True):
        torch.manual_seed(0)
        model = GPT2(GPT2Config.nano()).to(CUDA)
        memory = MemoryConfig(optimizer_state="int8", step_in_backward=inside)
        optimizer = optimizer_for(model, OptimizerConfig(lr=1e-3), memory)
        for _ in range(30):
            optimizer.zero_grad()
            loss = model(batch(0), batch(0))
            loss.backward()
            optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[0] < 5.0


def test_clipping_by_the_estimate_ends_near_clipping_by_the_norm() -> None:
    """What `fit_16gb` is made of, feature by feature: 8-bit state, then steps inside backward with clipping."""
    pytest.importorskip("torchao")
    losses = {}
    for name, memory, clip_norm in (
        ("after backward", MemoryConfig(optimizer_state="int8"), 1.0),
        ("inside backward", MemoryConfig(optimizer_state="int8", step_in_backward=True, clip_in_backward=1.0), None),
    ):
        torch.manual_seed(0)
        model = GPT2(GPT2Config.nano(n_layer=12)).to(CUDA)
        optimizer = optimizer_for(model, OptimizerConfig(lr=3e-3), memory)
        trainer = HybridTrainer(model, optimizer, HybridTrainerConfig.plain(clip_norm=clip_norm, memory=memory))
        for step in range(60):
            result = trainer.step(lambda step=step, model=model: model(batch(step % 2), batch(step % 2)))  # type: ignore[misc]
        losses[name] = result.loss
    assert losses["inside backward"] == pytest.approx(losses["after backward"], rel=0.05)  # unclipped: twice as much


def test_a_plain_step_never_makes_the_host_wait() -> None:
    torch.manual_seed(0)
    model = GPT2(GPT2Config.nano()).to(CUDA)
    trainer = HybridTrainer(model, build_optimizer(model, OptimizerConfig()), HybridTrainerConfig.plain(clip_norm=1.0))
    batches = [batch(step) for step in range(8)]

    def step(tokens: Tensor) -> None:
        trainer.step(lambda: model(tokens, tokens))

    for tokens in batches[:3]:
        step(tokens)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for tokens in batches[3:]:
            step(tokens)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_weights_come_back_without_more_memory_than_full_takes() -> None:
    model = wide()
    weights = Weights(model, build_optimizer(model, OptimizerConfig()))
    parameter_bytes = sum(p.nbytes for p in weights.params)
    for _ in range(2):
        full = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        weights.fp32.offload_()
        assert torch.cuda.max_memory_allocated() - full <= 0.51 * parameter_bytes
        assert torch.cuda.memory_allocated() - full <= -0.49 * parameter_bytes
        torch.cuda.reset_peak_memory_stats()
        weights.fp32.restore_()
        assert torch.cuda.max_memory_allocated() <= full + 4096


def test_a_path_on_the_host_records_the_bits_of_one_on_the_card() -> None:
    model = wide()
    weights = Weights(model, build_optimizer(model, OptimizerConfig()))
    size = weights.flats[0].numel()
    last = {device: weights.gather_(torch.empty(size, device=device), 0) for device in ("cpu", "cuda")}
    row = {device: torch.empty(size, dtype=torch.bfloat16, device=device) for device in last}
    with torch.no_grad():
        for p in weights.params:
            p.mul_(1.01)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for device in last:
        weights.advance_(last[device], row[device], 0)
    assert torch.equal(row["cpu"], row["cuda"].cpu())
    assert torch.equal(last["cpu"], last["cuda"].cpu())
    assert torch.cuda.max_memory_allocated() - before < 64_000_000


def test_pinned_memory_is_given_up_only_when_what_is_read_from_it_has_arrived() -> None:
    params = [nn.Parameter(torch.zeros(4 << 20, device=CUDA)) for _ in range(4)]
    optimizer = HostAdamW(params, lr=1.0, weight_decay=0.0)
    torch.stack([p.sum() for p in params]).sum().backward()  # every gradient is 1, so every weight moves by -1
    torch.cuda._sleep(50_000_000)
    optimizer.step()
    del optimizer
    gc.collect()
    assert all(torch.allclose(p, torch.full_like(p, -1.0)) for p in params)


@pytest.mark.parametrize("stop_at", [9, 16])
def test_the_16gb_preset_goes_on_from_a_checkpoint(stop_at: int, tmp_path: Path) -> None:
    """In Full, and in the middle of Predict with everything put away."""
    pytest.importorskip("torchao")
    config = gpu_run(
        steps=30, checkpoint_every=1, evaluate_every=30,
        hybrid=jumping(
            2, 8, 10, correction_interval=5, correct_steps=2, path_device="host", path_dtype="bf16",
            memory=MemoryConfig.fit_16gb(predict_aware=PredictAwareMemoryConfig("pinned")),
        ),
    )  # fmt: skip
    whole = train(replace(config, checkpoint_every=0), tmp_path / "whole")

    def stop(_: object, record: StepRecord) -> None:
        if record.result.nominal_step == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "parts", watch=stop)
    parts = train(config, tmp_path / "parts", resume=True)
    assert list(parts.steps["phase"]) == list(whole.steps["phase"])
    assert parts.summary["validation_loss"] == pytest.approx(whole.summary["validation_loss"], abs=1e-2)


def test_a_card_that_was_emulated_is_whole_again_and_empty_for_the_next_run(tmp_path: Path) -> None:
    before = torch.cuda.memory_allocated()
    train(gpu_run(card_gb=8), tmp_path / "small")
    train(gpu_run(card_gb=0), tmp_path / "whole")
    assert torch.cuda.get_per_process_memory_fraction() == 1.0
    gc.collect()
    assert torch.cuda.memory_allocated() <= before + 1_000_000


def test_adam_coast_jumps_with_8_bit_moments() -> None:
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    model = GPT2(GPT2Config.nano()).to(CUDA)
    memory = MemoryConfig(optimizer_state="int8", pad_vocab_to=128)
    config = jumping(2, 4, 4, correction_interval=2, predictor="adam_coast", memory=memory)
    trainer = HybridTrainer(model, optimizer_for(model, OptimizerConfig(lr=1e-4), memory), config)
    for step in range(20):
        trainer.step(lambda step=step: model(batch(step), batch(step)))  # type: ignore[misc]
    assert trainer.statistics().predicted_steps > 0


@pytest.mark.parametrize("state", ["fp32", "int8"])
def test_muon_compiled_on_the_gpu_equals_torchs_within_the_rounding_of_bf16(state: str) -> None:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, device=CUDA)) for shape in ((64, 256), (256, 64), (64, 64)) for _ in "ab"]
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    model = nn.ParameterList(params)
    ours = optimizer_for(model, OptimizerConfig("muon", lr=1e-2), MemoryConfig(optimizer_state=state))
    theirs = torch.optim.Muon(twins, lr=1e-2, adjust_lr_fn="match_rms_adamw")
    before = [p.detach().clone() for p in params]
    for _ in range(3):
        for p, twin in zip(params, twins, strict=True):
            p.grad = torch.randn_like(p)
            twin.grad = p.grad.clone()
        ours.step()
        theirs.step()
    for p, twin, start in zip(params, twins, before, strict=True):
        assert (p - twin).norm() < (0.02 if state == "fp32" else 0.2) * (twin - start).norm()


@pytest.mark.parametrize("compiled", [False, True])
def test_the_loss_and_its_gradients_on_the_gpu_equal_torchs(compiled: bool) -> None:
    torch.manual_seed(0)
    model = GPT2(GPT2Config.nano(vocab_size=500)).to(CUDA)
    tokens = batch(0) % 500
    run = torch.compile(model) if compiled else model
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        expected = nn.functional.cross_entropy(model(tokens).flatten(0, 1).float(), tokens.flatten())
        (theirs,) = torch.autograd.grad(expected, [model.wte.weight])
        loss = run(tokens, tokens)
    (ours,) = torch.autograd.grad(loss, [model.wte.weight])
    assert loss.item() == pytest.approx(expected.item(), abs=1e-3)
    assert (ours - theirs).norm() < 0.02 * theirs.norm()
    assert not ours[500:].any()


# --- CUDA graphs ------------------------------------------------------------------------------------------


JUMPS = jumping(10, 10, 8)
GRAPHED = {
    "plain": HybridTrainerConfig.plain(clip_norm=1.0),
    "jumps": JUMPS,
    "gated jumps": replace(JUMPS, gate=True),
    "growth": HybridTrainerConfig.plain(depth=DepthSchedule(stages=((0, 1), (20, 2)))),
    "growth by the best rule": HybridTrainerConfig.plain(depth=DepthSchedule(((0, 1), (20, 2)), rule="best")),
    "growth and jumps": replace(JUMPS, depth=DepthSchedule(stages=((0, 1), (25, 2)))),
}


def with_graphs(config: HybridTrainerConfig, graphs: bool, loss_at: dict[int, float] | None = None) -> list[Any]:
    """Losses, events and final weights of a nano GPT-2, its passes replayed or not; some losses are made up."""
    torch.manual_seed(0)
    model = GPT2(GPT2Config.nano()).to(CUDA)
    run = CudaGraphs(model) if graphs else model
    optimizer = build_optimizer(model, OptimizerConfig())
    trainer, results = HybridTrainer(model, optimizer, config), []
    for step in range(60):
        x, factor = batch(step), (loss_at or {}).get(step, 1.0)
        results.append(trainer.step(lambda x=x, factor=factor: run(x, x) * factor))  # type: ignore[misc]
    told = [(r.measured_loss, r.gradient_norm, r.event, r.depth) for r in results]
    return [told, vector(model).tolist()]


@pytest.mark.parametrize("name", GRAPHED)
def test_replayed_passes_are_the_ordinary_ones_bit_for_bit(name: str) -> None:
    told, weights = with_graphs(GRAPHED[name], graphs=True)
    assert [told, weights] == with_graphs(GRAPHED[name], graphs=False)
    if "jumps" in name:
        assert any(event == "accepted" for *_, event, _ in told)


def test_weights_that_are_rolled_back_reach_the_graph() -> None:
    exploding = dict.fromkeys(range(24, 30), float("nan"))
    told, weights = with_graphs(JUMPS, graphs=True, loss_at=exploding)
    expected = with_graphs(JUMPS, graphs=False, loss_at=exploding)
    assert any(event and event.startswith("rolled back") for *_, event, _ in told)
    assert repr([told, weights]) == repr(expected)


def test_a_run_in_cuda_graphs_resumes_where_it_was_stopped(tmp_path: Path) -> None:
    depth = DepthSchedule.shares(((0.0, 1), (0.5, 2)))
    config = RunConfig(
        "graphs",
        TextTaskConfig("nano", data="markov", vocab_size=512, validation_batches=2),
        steps=24,
        compiled=True,
        precision="bf16",
        device="cuda",
        checkpoint_every=5,
        hybrid=HybridTrainerConfig.plain(depth=depth),
    )
    whole = train(config, tmp_path / "whole")
    assert whole.closing_figures["cuda_graphs"] == "in use"
    for stop in (7, 17):

        def stop_there(run: Any, record: StepRecord, stop: int = stop) -> None:
            if record.result.nominal_step == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / f"{stop}", watch=stop_there)
        resumed = train(config, tmp_path / f"{stop}", resume=True)
        losses = [run.steps["measured_loss"].tolist() for run in (resumed, whole)]
        assert losses[0] == pytest.approx(losses[1], abs=0.01), "compiled sums are not repeated bit for bit"


def stepping_inside_backward(memory: MemoryConfig, graphs: bool, **settings: Any) -> tuple[GPT2, Optimizer, nn.Module]:
    """A model, its optimizer, and what to call in the model's place."""
    torch.manual_seed(0)
    model = GPT2(GPT2Config.nano(**memory.model_settings, **settings)).to(CUDA)
    prepare_model_(model, memory)
    optimizer = optimizer_for(model, OptimizerConfig(), memory)
    run: nn.Module = model
    if graphs:
        run = CudaGraphs(model)
        run.replay_steps_of(optimizer)  # type: ignore[arg-type]
    return model, optimizer, run


def trained_inside_backward(memory: MemoryConfig, *, graphs: bool, **settings: Any) -> list[Any]:
    """A loop of one's own that keeps its last loss: losses, weights, and why passes were not captured."""
    model, optimizer, run = stepping_inside_backward(memory, graphs, **settings)
    losses = []
    for step in range(8):
        loss = run(batch(step), batch(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return [losses, [p.tolist() for p in model.parameters()], getattr(run, "fails", None)]


def test_a_loop_that_keeps_its_loss_is_captured() -> None:
    pytest.importorskip("torchao")
    memory = MemoryConfig.fit_16gb()
    replayed = trained_inside_backward(memory, graphs=True)
    assert replayed == trained_inside_backward(memory, graphs=False)
    assert replayed[-1] is None


def test_dropout_s_numbers_are_right_where_steps_are_replayed() -> None:
    """Or the passes run as they are: blocks that are computed again draw them again."""
    pytest.importorskip("torchao")
    memory = MemoryConfig.fit_16gb()
    replayed = trained_inside_backward(memory, graphs=True, dropout=0.1)
    assert replayed[:2] == trained_inside_backward(memory, graphs=False, dropout=0.1)[:2]


@pytest.mark.parametrize("depth", [None, DepthSchedule(stages=((0, 1), (12, 2)))])
@pytest.mark.parametrize(
    ("weights", "state"), [("24bit", "int8"), ("24bit", "int4"), ("fp32", "int8"), ("fp32", "int4")]
)
def test_steps_inside_backward_are_replayed_as_they_would_be_taken(
    weights: str, state: str, depth: DepthSchedule | None
) -> None:
    """Blocks computed again, clipping, counts and rates that change, and gradients that never all exist at once."""
    pytest.importorskip("torchao")
    memory = MemoryConfig.fit_16gb(weights=weights, optimizer_state=state)

    def trained(graphs: bool) -> list[Any]:
        model, optimizer, run = stepping_inside_backward(memory, graphs)
        trainer, told = HybridTrainer(model, optimizer, HybridTrainerConfig.plain(memory=memory, depth=depth)), []
        for step in range(24):
            x = batch(step)
            set_lr_(optimizer, 1e-3 / (1 + step))
            result = trainer.step(lambda x=x: run(x, x))
            told.append((result.measured_loss, result.gradient_norm, result.depth))
        if isinstance(run, CudaGraphs):
            assert run.fails is None
            assert len(run._captured) == 1, "a stage that has ended leaves its memory"
        counts = [float(state["step"]) for state in optimizer.state.values()]
        return [told, counts, [p.tolist() for p in model.parameters()]]

    assert trained(graphs=True) == trained(graphs=False)


def test_a_compiled_run_replays_steps_inside_backward(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    memory = MemoryConfig.fit_16gb()
    task = TextTaskConfig("mini", data="markov", vocab_size=512, validation_batches=2)
    config = RunConfig(
        "steps", task, steps=24, compiled=True, device="cuda", hybrid=HybridTrainerConfig.plain(memory=memory)
    )
    runs = {graphs: train(replace(config, cuda_graphs=graphs), tmp_path / f"{graphs}") for graphs in (True, False)}
    assert runs[True].closing_figures["cuda_graphs"] == "in use"
    losses = [run.steps["measured_loss"].tolist() for run in runs.values()]
    assert losses[0] == pytest.approx(losses[1], abs=0.01), "compiled sums are not repeated bit for bit"


@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_of_several_replayed_passes_add_up_bit_for_bit(to_none: bool) -> None:
    def gradients(graphs: bool) -> list[Any]:
        torch.manual_seed(0)
        model = GPT2(GPT2Config.nano()).to(CUDA)
        run, told = CudaGraphs(model) if graphs else model, []
        for step in range(0, 9, 3):
            model.zero_grad(set_to_none=to_none)
            for part in range(step, step + 3):
                (run(batch(part), batch(part)) / 3).backward()
            told += [p.grad.tolist() for p in model.parameters()]  # type: ignore[union-attr]
        return told

    assert gradients(graphs=True) == gradients(graphs=False)


class Asks(nn.Module):
    """Asks the GPU for a number, once dropout has drawn some."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(width, width), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        drawn = self.layer(x).sum()
        return drawn * (2.0 if drawn.item() > 0 else 1.0)


def test_a_pass_that_cannot_be_captured_runs_as_it_is_with_a_warning() -> None:
    model = Asks(4, dropout=0.0).to(CUDA)
    graphs, x = CudaGraphs(model), torch.ones(2, 4, device=CUDA)
    with pytest.warns(UserWarning, match="runs without CUDA graphs"):
        loss = graphs(x)
    loss.backward()
    assert loss.item() == model(x).item()
    assert graphs(-x).item() == model(-x).item()


def test_random_numbers_are_drawn_on_after_a_capture_that_failed() -> None:
    model, x = Asks(64, dropout=0.5).to(CUDA), torch.ones(2, 64, device=CUDA)
    torch.manual_seed(0)
    expected = [model(x).item() for _ in range(2)]
    torch.manual_seed(0)
    graphs = CudaGraphs(model)
    with pytest.warns(UserWarning, match="runs without CUDA graphs"):
        losses = [graphs(x).item() for _ in range(2)]
    assert losses == expected


def test_muon_s_replayed_updates_are_the_ordinary_ones() -> None:
    """At changing rates, through growth and a jump."""
    config = replace(JUMPS, depth=DepthSchedule(stages=((0, 1), (25, 2))))

    def trained_by_muon(graphs: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = GPT2(GPT2Config.nano()).to(CUDA)
        run = CudaGraphs(model)
        optimizer: Any = build_optimizer(model, OptimizerConfig("muon"))
        optimizer.use_cuda_graphs(graphs)
        trainer = HybridTrainer(model, optimizer, config)
        schedule = Schedule("wsd", warmup_steps=5, total_steps=60)
        for step in range(60):
            set_lr_(optimizer, schedule(step))
            x = batch(step)
            trainer.step(lambda x=x: run(x, x))  # type: ignore[misc]
        assert bool(optimizer.methods["muon"]._captured) is graphs
        return [p.detach().clone() for p in model.parameters()]

    for replayed, ordinary in zip(trained_by_muon(True), trained_by_muon(False), strict=True):
        assert torch.equal(replayed, ordinary)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("state", ["fp32", "int8", "int4"])
def test_nothing_is_compiled_once_a_run_has_begun(optimizer: str, state: str) -> None:
    """Or its compilation would be counted as time of steps; growth and changing rates included."""
    memory = None
    if state != "fp32":
        if optimizer != "adamw":
            pytest.skip("in few bits Muon's momenta alone are kept")
        pytest.importorskip("torchao")
        memory = MemoryConfig.fit_16gb(optimizer_state=state)
    task = TextTaskConfig("nano", "markov", vocab_size=512, block_size=64, batch_size=8, validation_batches=1)
    depth = DepthSchedule(((0, 1), (6, 2)))
    hybrid = HybridTrainerConfig.plain(clip_norm=None if memory else 1.0, depth=depth, memory=memory)
    rates, precision = OptimizerConfig.tuned(optimizer), "fp32" if memory else "bf16"
    config = RunConfig("ready", task, 12, rates, hybrid=hybrid, precision=precision, compiled=True, device="cuda")
    training = Training(config, CUDA)
    training.warm_up_()
    training.make_state_()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for step in range(12):
        training.step(step)
    training.evaluate()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


def test_a_step_as_a_graph_is_launched_less_often_and_gives_the_gpu_as_much_to_do():
    task = TextTaskConfig("nano", "markov", vocab_size=512, block_size=64, batch_size=8, validation_batches=1)
    compiled = RunConfig("compiled", task, steps=100, precision="bf16", compiled=True, cuda_graphs=False)
    one_by_one, graphs = step_work(compiled), step_work(replace(compiled, cuda_graphs=True))
    assert graphs.launches < one_by_one.launches
    assert graphs.busy_ms == pytest.approx(one_by_one.busy_ms, rel=0.5)
    assert graphs.operations == one_by_one.operations


def test_running_means_are_the_ordinary_ones_where_passes_are_replayed() -> None:
    def trained_norm(graphs: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)).to(CUDA)
        run, optimizer = CudaGraphs(model) if graphs else model, torch.optim.SGD(model.parameters(), lr=0.1)
        trainer = HybridTrainer(model, optimizer, HybridTrainerConfig.plain())
        for step in range(5):
            x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step)).to(CUDA)
            trainer.step(lambda x=x: run(x).square().mean())  # type: ignore[misc]
        return list(model.buffers())

    for replayed, ordinary in zip(trained_norm(True), trained_norm(False), strict=True):
        assert torch.equal(replayed, ordinary)
