"""The plan of one of several ranks, against what FSDP2 itself allocates, and against arithmetic."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from hybridlab.base.errors import UserError
from hybridlab.benchmarks.ranks import Question, planned
from hybridlab.cli import main
from hybridlab.depth import DepthSchedule
from hybridlab.engine.config import HybridTrainerConfig
from hybridlab.memory import GradientAccumulationConfig, MemoryConfig, MixedPrecisionConfig
from hybridlab.memory.checkpointing import checkpoint_blocks_
from hybridlab.memory.config import CheckpointingConfig
from hybridlab.models import GPT2, GPT2Config
from hybridlab.planner import GpuOverhead, Plan, TrainingSpec, plan
from hybridlab.planner.caching_allocator import CachingAllocator
from hybridlab.planner.dry_run import DryRun
from hybridlab.planner.fake_gpu import fake_gpu
from hybridlab.planner.ranks import GATHERING, REDUCING
from hybridlab.planner.suggest import FEATURES
from hybridlab.planner.text_report import _in_python
from hybridlab.planner.trace import Event, Key, Segment, Trace
from hybridlab.study import RunConfig, TextTaskConfig
from hybridlab.study.planning import training_spec_of
from hybridlab.weights.gram import PathNeeds

SIZE = GPT2Config(n_layer=7, n_head=2, n_embd=50, vocab_size=1031, block_size=64, pad_vocab_to=0)
SHALLOW = replace(SIZE, n_layer=2, n_embd=100)
WINDOWS, TOKENS = 24, 64
PARTS: dict[str, Any] = {"gradient_accumulation": GradientAccumulationConfig(2)}
BARE = GpuOverhead(workspace_bytes=0)


class TraceOfShards(Trace):
    """Sees storages shrink and grow, as FSDP2's whole weights do."""

    def _count(self, tensor: Tensor) -> None:
        if not isinstance(tensor, DTensor):  # its shard counts
            super()._count(tensor)

    def _forget(self, identity: int) -> None:
        if identity in self._keys:
            super()._forget(identity)

    def shrink(self, tensor: Tensor) -> None:
        if (storage := tensor.untyped_storage()).size():
            self.drop([tensor])
            del self._keys[storage._cdata]
            storage.resize_(0)

    def grow(self, tensor: Tensor) -> None:
        if not (storage := tensor.untyped_storage()).size():
            storage.resize_(tensor.numel() * tensor.itemsize)
            self._count(tensor)


@contextmanager
def fake_ranks(count: int) -> Iterator[Any]:
    distributed.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (count,))
    finally:
        distributed.destroy_process_group()


def measured(ranks: int, memory: MemoryConfig, gather: str, at_once: int, keep: bool) -> dict[str, int]:
    """Peaks of a gradient step and of a forward pass under FSDP2, on tensors without values."""
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if gather == "bf16" else MixedPrecisionPolicy()
    trace, live, peaks = TraceOfShards(), CachingAllocator(), {}
    parts = memory.micro_batches
    with (
        fake_ranks(ranks) as mesh,
        fake_gpu(),
        trace,
        patch.object(_fsdp_param, "free_storage", trace.shrink),
        patch.object(_fsdp_param, "alloc_storage", trace.grow),
    ):
        model = GPT2(SIZE)
        if memory.checkpointing:
            checkpoint_blocks_(model, memory.checkpointing)
        for start in range(0, SIZE.n_layer, at_once):
            blocks = list(model.h[start : start + at_once])
            fully_shard(blocks, mesh=mesh, mp_policy=policy, reshard_after_forward=not keep)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        tokens = torch.zeros(WINDOWS // ranks // parts, TOKENS, dtype=torch.long)
        bf16 = torch.autocast("cpu", torch.bfloat16, enabled=bool(memory.mixed_precision), cache_enabled=False)
        live.follow(trace.take())
        live.reset_peak()
        for part in range(parts):
            model.set_requires_gradient_sync(part == parts - 1)
            with bf16:
                loss = model(tokens, tokens)
            loss.backward()
            del loss
        peaks["Full"] = sum(live.follow(trace.take()).values())
        model.zero_grad()
        live.follow(trace.take())
        live.reset_peak()
        with torch.no_grad(), bf16:
            model(tokens, tokens)
        peaks["Predict"] = sum(live.follow(trace.take()).values())
    return peaks


@cache
def shallow(ranks: int, **others: Any) -> Plan:
    return plan(SHALLOW, (WINDOWS, TOKENS), ranks=ranks, overhead=BARE, **others)


@pytest.mark.slow  # FSDP2 itself, block by block
@pytest.mark.parametrize(
    ("ranks", "gather", "settings", "at_once", "keep"),
    [
        (1, "fp32", {}, 1, False),
        (2, "fp32", PARTS | {"mixed_precision": MixedPrecisionConfig()}, 1, False),
        (3, "bf16", PARTS | {"checkpointing": CheckpointingConfig()}, 1, False),
        (2, "bf16", {}, 3, False),
        (2, "bf16", PARTS, 1, True),
        (3, "fp32", {"checkpointing": CheckpointingConfig()}, 2, True),
    ],
)
def test_a_rank_takes_what_fsdp_takes(
    ranks: int, gather: str, settings: dict[str, Any], at_once: int, keep: bool
) -> None:
    if gather == "bf16":
        settings = settings | {"mixed_precision": MixedPrecisionConfig()}
    memory = MemoryConfig(**settings)
    sharing: dict[str, Any] = {"ranks": ranks, "gather": gather, "blocks_per_group": at_once, "keep_gathered": keep}
    made = plan(SIZE, (WINDOWS, TOKENS), memory, overhead=BARE, **sharing)
    peaks = measured(ranks, memory, gather, at_once, keep)
    for phase, peak in peaks.items():
        parts = made.phases[phase]
        assert sum(parts.values()) - parts["optimizer"] == pytest.approx(peak, rel=0.002)


def test_more_ranks_hold_less_each_and_parts_add_up() -> None:
    plans = {ranks: shallow(ranks, path=PathNeeds(rows=3, every=1)) for ranks in (1, 2, 4)}
    for part in ("weights", "optimizer", "path"):
        whole, half, quarter = (plans[ranks].phases["Full"][part] for ranks in (1, 2, 4))
        assert (half, quarter) == (pytest.approx(whole / 2, rel=0.05), pytest.approx(whole / 4, rel=0.1))
    assert plans[1].peak_on_gpu_bytes > plans[2].peak_allocated_bytes > plans[4].peak_allocated_bytes
    assert all(made.peak_allocated_bytes == sum(made.parts.values()) for made in plans.values())
    assert plans[1].phases["Full"]["communication"] == 0
    assert min(plans[4].phases["Full"][part] for part in ("gathered", "communication")) > 0


def test_ddp_holds_the_whole_model_and_a_bucket_for_each_gradient() -> None:
    alone, ddp, fsdp = shallow(0), shallow(2, wrap="ddp"), shallow(2)
    half = plan(SHALLOW, (WINDOWS // 2, TOKENS), overhead=BARE)
    assert ddp.phases["Full"]["weights"] == alone.phases["Full"]["weights"]
    buckets = ddp.phases["Full"]["communication"]
    assert buckets == pytest.approx(4 * SHALLOW.parameter_count, rel=0.001)
    assert ddp.peak_allocated_bytes == half.peak_allocated_bytes + buckets
    assert ddp.peak_allocated_bytes > fsdp.peak_allocated_bytes
    graphs = shallow(2, wrap="ddp", compiled=True, cuda_graphs=True)
    assert graphs.graphs_bytes > graphs.phases["Full"]["communication"] == 0, "averaged where they are"
    one, few = (plan(SHALLOW, (2, 1), overhead=BARE, **ranks) for ranks in ({}, {"ranks": 2, "wrap": "ddp"}))
    assert few.peak_allocated_bytes == pytest.approx(one.peak_allocated_bytes, rel=0.1)  # gradients are in the buckets
    assert shallow(1, wrap="ddp").phases == {
        phase: parts | {"gathered": 0, "communication": 0} for phase, parts in alone.phases.items()
    }


def test_copies_of_the_model_are_shared_by_fewer_ranks() -> None:
    four, two_by_two = shallow(4), shallow(4, copies=2)
    assert two_by_two.phases["Full"]["weights"] == shallow(2).phases["Full"]["weights"]
    assert two_by_two.phases["Full"]["activations"] == four.phases["Full"]["activations"]


def test_the_whole_model_is_there_before_it_is_sharded() -> None:
    start = shallow(8).phases["Start"]["weights"]
    assert start > 4 * SHALLOW.parameter_count
    assert "Start" not in shallow(8, wrap="ddp").phases


def test_blocks_that_join_later_are_sharded_too() -> None:
    growing = plan(SHALLOW, (WINDOWS, TOKENS), schedule=DepthSchedule(((0, 1), (10, 2))), ranks=2)
    one, both = growing.stages[1], growing.stages[2]
    assert one.phases["Full"]["weights"] == both.phases["Full"]["weights"]
    assert one.phases["Full"]["optimizer"] < both.phases["Full"]["optimizer"]


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.layer = nn.Parameter(torch.ones(())), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return (self.scale * self.layer(x)).sum()


def test_what_fsdp_refuses_is_refused() -> None:
    with pytest.raises(UserError, match="a weight without dimensions cannot be sharded"):
        plan(Scaled(), torch.ones(4, 3), ranks=2)
    assert plan(Scaled(), torch.ones(4, 3), ranks=2, wrap="ddp").peak_allocated_bytes


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ranks", "3"], "8 windows do not split into 1 equal micro_batches on each of 3 ranks"),
        (["--ranks", "4", "--copies", "3"], "4 ranks do not hold 3 copies of the model: change copies"),
        (["--ranks", "2", "--wrap", "dpp"], "wrap 'dpp' is unknown: did you mean 'ddp'? (fsdp, ddp)"),
        (["--ranks", "2", "--wrap", "ddp", "--stages", "1,2"], "a depth schedule with wrap='ddp'"),
        (
            ["--ranks", "2", "--wrap", "ddp", "--gather", "bf16"],
            "gather, copies, blocks_per_group, keep_gathered are of wrap='fsdp'",
        ),
        (["--gather", "bf16"], "say how ranks share a model: give their number as ranks too"),
        (["--keep-gathered"], "keep_gathered say how ranks share a model: give their number as ranks too"),
        (
            ["--ranks", "2", "--memory", "fit_16gb"],
            "memory.step_in_backward, memory.optimizer_state='int4', memory.weights='24bit'",
        ),
    ],
)
def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert main(["plan", "--model", "nano", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_the_command_plans_a_rank(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "nano", "--ranks", "2", "--gather", "bf16", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["settings"]["ranks"] == 2
    assert said["settings"]["memory"]["mixed_precision"]["training"] == "bf16"
    assert said["phases"]["Full"]["gathered"] > 0


def test_to_compute_in_bf16_shards_are_gathered_so() -> None:
    spec = TrainingSpec(SHALLOW, (WINDOWS, TOKENS), ranks=2, blocks_per_group=2)
    change = next(change for name, change in FEATURES if name == "bf16 autocast")
    changed = change(spec)
    assert changed
    assert changed.gather == "bf16"
    code = "\n".join(_in_python(spec, changed))
    assert "ranks = RanksConfig(gather='bf16', blocks_per_group=2)" in code
    pasted: dict[str, Any] = {}
    exec(code.replace("ranks = ", "from hybridlab.study.ranks import RanksConfig\nranks = "), pasted)
    hybrid = HybridTrainerConfig.plain(memory=pasted["memory"])
    run = RunConfig("pasted", TextTaskConfig("nano", batch_size=WINDOWS), 1, hybrid=hybrid, precision="bf16")
    pasted["ranks"].check(run, 2)


def test_the_benchmark_names_the_plan_of_each_rank() -> None:
    toy = Question("nano", 2, 16, "bf16", False, "fsdp", "bf16", device="cpu")
    found = planned(toy, 2)
    model, memory = GPT2Config.nano(block_size=16), MemoryConfig(mixed_precision=MixedPrecisionConfig())
    alone = plan(model, (4, 16), memory, ranks=2, gather="bf16")
    assert found["planned_bytes"] == alone.peak_on_gpu_bytes
    assert found["planned_allocated_bytes"] == alone.peak_allocated_bytes
    assert found["planned_with_path_bytes"] >= alone.peak_on_gpu_bytes
    assert list(planned(replace(toy, path=False), 2)) == ["planned_bytes", "planned_allocated_bytes"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "near"), [("small", 0.005), ("xl", 0.005), ("7b", 0.005), ("xl_groups", 0.025), ("small_ddp", 0.04)]
)
def test_a_rank_takes_what_was_measured(name: str, near: float, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[1]
    monkeypatch.chdir(root)  # where the config of 7B lies
    found = json.loads((root / "docs" / "experiments" / f"ranks_{name}.json").read_text(encoding="utf-8"))
    question = Question(**found["question"])
    if question.wrap == "ddp":  # replays CUDA graphs, which a plan takes in where there is a GPU
        monkeypatch.setattr(
            "hybridlab.benchmarks.ranks.training_spec_of",
            lambda *of: replace(training_spec_of(*of), cuda_graphs=True),
        )
    for row in found["rows"]:
        plans = planned(question, row["ranks"])
        for run in ["", "_with_path"] if question.path else [""]:
            assert plans[f"planned_allocated{run}_bytes"] == pytest.approx(max(row[f"allocated{run}_bytes"]), rel=near)
            assert plans[f"planned{run}_bytes"] == pytest.approx(max(row[f"peak{run}_bytes"]), rel=0.05)


def test_gradients_and_received_weights_lie_on_streams_of_their_own() -> None:
    with fake_gpu():
        rehearsal = DryRun(TrainingSpec(SHALLOW, (WINDOWS, TOKENS), ranks=2), shortened=False).rehearse()
    made = [event for segment in rehearsal.passes for event in segment.events if event.kind == "new"]
    assert {event.stream for event in made if event.part == "gathered"} == {""}
    assert {event.stream for event in made if event.part == "communication"} == {"", GATHERING}
    assert REDUCING in {event.stream for event in made if event.part == "gradients"}
    memory = CachingAllocator()
    here, there = Key("a", None, 0), Key("b", None, 0)
    once = [Event("new", here, 2**25), Event("free", here)]
    memory.follow([Segment("first", events=[*once, *once])])
    assert memory.reserved == 2**25
    memory.follow([Segment("other", events=[Event("new", there, 2**25, stream=REDUCING)])])
    assert memory.reserved == 2**26
