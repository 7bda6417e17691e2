"""Trainings that several processes run together, to be held against one process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hybridlab import DepthSchedule, HybridTrainer, HybridTrainerConfig
from hybridlab.base.errors import UserError
from hybridlab.base.rank_checkpoints import RankCheckpoints
from hybridlab.base.ranks import Replica, from_each, is_first, whole
from hybridlab.memory import GradientAccumulationConfig, MemoryConfig
from hybridlab.models import GPT2, GPT2Config
from hybridlab.optim import OptimizerConfig, PrimalAveraging, build_optimizer
from hybridlab.optim.build import ShardedAdamW
from hybridlab.study import RunConfig, TextTaskConfig
from hybridlab.study.ranks import RanksConfig
from hybridlab.study.run import TrainingRun
from tests.conftest import TINY_TEXT, full_disk

WINDOWS = 12
UNGUARDED = {"warmup_steps": 4, "full_steps": 8, "max_predict_steps": 4, "correct_steps": 1, "clip_norm": 0.5}
UNGUARDED |= {"confidence_threshold": 0.0, "gate": False}
GROWING = DepthSchedule(((0, 1), (12, 2)), rule="interleave")
PARTS_OF_STATE = ("net", "optimizer", "trainer")
PARTS = MemoryConfig(gradient_accumulation=GradientAccumulationConfig(micro_batches=2))


@dataclass(frozen=True)
class Case:
    """One training.

    spoilt_at: a step at which the loss of the last rank's part of the batch is huge
    resumed_at: a step before which model, optimizer and trainer are made anew from a checkpoint
    killed_at: a step before which the last rank is killed while it writes its part of a checkpoint
    optimizer: adamw, averaged (AdamW beside the mean of its weights) or muon
    """

    config: HybridTrainerConfig
    steps: int = 30
    spoilt_at: int | None = None
    resumed_at: int | None = None
    killed_at: int | None = None
    optimizer: str = "adamw"


def jumping(predictor: str = "linear", steps: int = 30, **settings: Any) -> Case:
    """Without guards, so that jumps happen at the same steps whatever they are worth."""
    return Case(HybridTrainerConfig(predictor=predictor, **UNGUARDED | settings), steps)


CASES: dict[str, Case] = {
    "plain": Case(HybridTrainerConfig.plain(clip_norm=0.5)),
    **{name: jumping(name) for name in ("linear", "adam_coast", "dmd", "rre", "rssm")},
    **{name: jumping(name, steps=130, full_steps=24) for name in ("ema_nesterov", "snoo")},
    "river": jumping("river", steps=210, full_steps=24),  # its window is 200 steps long
    "gated": jumping(gate=True, gate_budget=1.0),
    "path on the host": jumping(path_device="host"),
    "parts": jumping(memory=PARTS),
    "grown": Case(HybridTrainerConfig.plain(clip_norm=0.5, depth=GROWING)),
    "plain, grown by the best rule": Case(
        HybridTrainerConfig.plain(clip_norm=0.5, depth=DepthSchedule(GROWING.stages, rule="best"))
    ),
    "grown and jumping": jumping(depth=GROWING),
    "averaged": Case(jumping(depth=GROWING).config, resumed_at=20, optimizer="averaged"),
    "muon": Case(jumping(depth=GROWING).config, resumed_at=20, optimizer="muon"),
    "rolled back": Case(jumping().config, spoilt_at=28),
    "resumed": Case(jumping().config, resumed_at=20),
    "resumed in a jump": Case(jumping().config, resumed_at=14),
}
KILLED = {"killed": Case(jumping().config, resumed_at=8, killed_at=14)}
CHAINS = {"grown and jumping": (13, 19, 27, 30), "adam_coast": (9, 14, 20, 30)}
"""Trainings on 1, 2, 3 and 1 ranks, and the step at which each of these ends."""
AS_ONE = ("ema_nesterov", "snoo", "river", "dmd", "rre", "rssm")
BY_WRAP = {
    "sharded": tuple(name for name in CASES if name not in AS_ONE),
    "sharded as one": AS_ONE,
    "sharded in two dimensions": ("grown and jumping",),
    "sharded in one group, kept gathered": ("grown and jumping", "gated", "parts", "resumed"),
    "replicated": ("adam_coast", "gated", "parts", "rolled back"),
    "averaged by the trainer": ("adam_coast", "gated", "parts", "rolled back"),
}


def sharded(net: GPT2) -> nn.Module:
    """Each block, then what is left."""
    for block in net.h:
        fully_shard(block)
    return fully_shard(net)


def sharded_in_two_dimensions(net: GPT2) -> nn.Module:
    """Copies along one dimension of the ranks, shards along the other."""
    mesh = init_device_mesh("cpu", (distributed.get_world_size(), 1), mesh_dim_names=("copies", "shards"))
    for block in net.h:
        fully_shard(block, mesh=mesh)
    return fully_shard(net, mesh=mesh)


WRAPS: dict[str, Callable[[GPT2], nn.Module]] = {
    "one process": lambda net: net,
    "sharded": sharded,
    "sharded as one": fully_shard,
    "sharded in two dimensions": sharded_in_two_dimensions,
    "sharded in one group, kept gathered": RanksConfig(blocks_per_group=2, keep_gathered=True).wrapped,
    "replicated": partial(DistributedDataParallel, gradient_as_bucket_view=True),
    "averaged by the trainer": Replica,
}


@dataclass
class Training:
    """A wrapped model with its optimizer and trainer."""

    net: nn.Module
    optimizer: torch.optim.Optimizer
    trainer: HybridTrainer

    @classmethod
    def of(cls, wrap: str, case: Case) -> Training:
        torch.manual_seed(0)
        size = GPT2Config(n_layer=2, n_head=2, n_embd=10, vocab_size=31, block_size=7, pad_vocab_to=0)
        net = WRAPS[wrap](GPT2(size).double())  # few of its shapes divide by two or three
        method = ShardedAdamW if wrap in ("sharded", "sharded in one group, kept gathered") else torch.optim.AdamW
        optimizer: torch.optim.Optimizer = method(net.parameters(), lr=1e-3, fused=True)
        if case.optimizer == "averaged":
            optimizer = PrimalAveraging(optimizer, decay=0.9, share=0.7)
        elif case.optimizer == "muon":
            optimizer = build_optimizer(net, OptimizerConfig.tuned("muon", lr=1e-2))
        return cls(net, optimizer, HybridTrainer(net, optimizer, case.config))

    def save(self, checkpoints: RankCheckpoints, step: int) -> None:
        state = {name: getattr(self, name).state_dict() for name in PARTS_OF_STATE}
        checkpoints.save(step, {"steps_done": step, **state}, meta={})

    @classmethod
    def loaded(cls, checkpoints: RankCheckpoints, wrap: str, case: Case) -> tuple[Training, int]:
        """One that goes on where the newest checkpoint is, if there is one; and its step."""
        anew = cls.of(wrap, case)
        state = checkpoints.load(anew.net, expect={})
        for name in PARTS_OF_STATE if state else ():
            getattr(anew, name).load_state_dict(state[name])
        return anew, state["steps_done"] if state else 0


def batches(steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Of this rank, its part of each global batch."""
    ranks, rank = place()
    stream = torch.Generator().manual_seed(1)
    for _ in range(steps):
        tokens = torch.randint(0, 31, (WINDOWS, 8), generator=stream) // 2 * 2
        mine = tokens.chunk(ranks)[rank]
        yield mine[:, :-1], mine[:, 1:]


def place() -> tuple[int, int]:
    """How many ranks there are, and which one this is."""
    return (distributed.get_world_size(), distributed.get_rank()) if distributed.is_initialized() else (1, 0)


def train(wrap: str, name: str, folder: Path | None = None, until: int | None = None) -> dict[str, Any]:
    """What a training did, and where its weights ended, put together from all ranks.

    folder: of its checkpoints
    until: the step before which it ends; then it goes on from the newest checkpoint, and leaves one
    """
    case, (ranks, rank) = (CASES | KILLED)[name], place()
    kept = RankCheckpoints(folder or Path(mkdtemp()), asynchronous=name == "resumed in a jump")
    training, first = Training.loaded(kept, wrap, case) if until else (Training.of(wrap, case), 0)
    results = []
    for step, (tokens, targets) in enumerate(batches(until or case.steps)):
        if step < first:
            continue
        if step == case.killed_at and rank == ranks - 1:
            FileSystemWriter.write_data = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
        if step in (case.resumed_at, case.killed_at):
            training.save(kept, step)
            kept.wait()
            training, _ = Training.loaded(kept, wrap, case)
        halves = zip(tokens.chunk(2), targets.chunk(2), strict=True)
        parts = halves if case.config.memory else [(tokens, targets)]
        extra = 100.0 * ranks if step == case.spoilt_at and rank == ranks - 1 else 0.0
        closures = [lambda x=x, y=y: training.net(x, targets=y) + extra for x, y in parts]  # noqa: B023
        results.append(training.trainer.step(closures if case.config.memory else closures[0]))
    if until:
        training.save(kept, until)
        kept.wait()
    named = training.net.named_parameters()
    return {
        "did": [(str(r.phase), r.depth, r.rolled_back, r.event is None) for r in results],
        "losses": torch.tensor([float("nan") if r.measured_loss is None else r.measured_loss for r in results]),
        "weights": {key.removeprefix("module."): whole(p).detach().clone() for key, p in named},
    }


def train_chain(folder: Path, stage: int) -> dict[str, dict[str, Any]]:
    """One part of each chain of trainings, from the checkpoints that the part before has left."""
    return {name: train("sharded", name, folder / name, ends[stage]) for name, ends in CHAINS.items()}


FULL = r"^cannot write in the folder .*: File too large; make room there or choose another folder$"
"""What is said of a full disk (`full_disk`)."""


def refuse_unwritable(folder: Path) -> None:
    """Where one rank cannot write, all say so, and why, so that none goes on alone."""
    ranks, rank = place()
    room = full_disk(10_000) if rank == ranks - 1 else nullcontext()
    with room, pytest.raises(UserError, match=FULL):
        RankCheckpoints(folder).save(1, fully_shard(nn.Linear(600, 600)).state_dict(), meta={})
    with pytest.raises(UserError, match="cannot write") as refused:
        RankCheckpoints(Path(__file__) / "checkpoints").save(1, {}, meta={})
    assert isinstance(refused.value.__cause__, OSError)


def refuse_unflushed(folder: Path) -> None:
    """A record that the first rank cannot bring to the disk stops a checkpoint on every rank."""

    def full() -> None:
        raise UserError("cannot write steps.jsonl: the disk is full")

    task = TextTaskConfig(**TINY_TEXT | {"batch_size": 6})
    run = TrainingRun(RunConfig("toy", task, steps=2, device="cpu"), folder, RanksConfig())
    run.start()
    if is_first():
        run._log.flush = full  # type: ignore[method-assign]
    with pytest.raises(UserError, match="the disk is full"):
        run.save()


class Lopsided(nn.Module):
    """Begins unlike on each rank; has a buffer that follows the batch, and a weight that need not take part."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(place()[1])
        self.norm, self.head, self.spare = nn.BatchNorm1d(3), nn.Linear(3, 1), nn.Linear(1, 1)

    def forward(self, x: Tensor, spare: bool) -> Tensor:
        y = self.head(self.norm(x))
        return (self.spare(y) if spare else y).square().mean()


def check_replicas() -> None:
    """Ranks begin and stay equal; a weight that one of them alone has a gradient of is refused there."""
    net, rank = Lopsided(), place()[1]
    replica = Replica(net)
    trainer = HybridTrainer(replica, torch.optim.AdamW(net.parameters()), HybridTrainerConfig.plain())
    for _ in range(2):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(rank))
        trainer.step(lambda: replica(x, True))  # noqa: B023
        for ours, name in zip(net.state_dict().values(), net.state_dict(), strict=True):
            first, *others = from_each(ours)
            assert all(torch.equal(other, first) for other in others), name
    if rank == 1:
        with pytest.raises(UserError, match=r"2 trained weights have no gradient, the first of shape \(1, 1\)"):
            trainer.step(lambda: replica(x, False))


def main(folder: Path, *only: str) -> None:
    """Train a part of each chain, then cases in every form, or sharded those named, and leave what came of it."""
    distributed.init_process_group("gloo")
    ranks, rank = place()
    refuse_unwritable(folder / "full disk")
    refuse_unflushed(folder / "full")
    check_replicas()
    torch.save(train_chain(folder.parent / "chain", ranks - 1), folder / f"chain, {rank}.pt")
    for wrap, names in ({"sharded": only} if only else BY_WRAP).items():
        for name in names:
            torch.save(train(wrap, name, folder / f"{wrap}, {name}"), folder / f"{wrap}, {name}, {rank}.pt")
    distributed.destroy_process_group()
