"""How several processes train one run together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from hybridlab.base.errors import UserError
from hybridlab.base.ranks import Replica, check_copies, check_sharing, group, running
from hybridlab.base.settings import check_bounds, check_types
from hybridlab.memory.checkpointing import blocks_of
from hybridlab.study.config import RunConfig


@dataclass(frozen=True)
class RanksConfig:
    """How several processes train one model; each trains on an equal part of every batch.

    wrap: "fsdp": each holds a part of weights, gradients and optimizer state, and the blocks' weights are gathered when
        they are needed (`fully_shard`); "ddp": each holds all of them, in DistributedDataParallel, or, where passes are
        CUDA graphs, as a `Replica`
    gather: number format in which weights are gathered, "fp32" or "bf16"; gradients are added up in float32
    copies: of the model: so many groups of ranks, each of which shares one among its ranks. With as many copies as
        hosts, weights are gathered within a host, and gradients alone cross from one to the next
    blocks_per_group: whose weights are gathered, and whose gradients added up, at once: the more, the less work for the
        host, and the more memory for whole weights and gradients
    keep_gathered: whole weights stay from forward to backward: they are gathered once, and take 2 bytes (bf16) or 4
        per parameter
    async_save: write checkpoints beside the training; they take the size of a rank's part in host memory meanwhile
    timeout_s: after which a rank that waits for another one ends the run

    Raises TypeError and ValueError that name the setting.
    """

    wrap: str = "fsdp"
    gather: str = "fp32"
    copies: int = 1
    blocks_per_group: int = 1
    keep_gathered: bool = False
    async_save: bool = True
    timeout_s: int = 600

    def __post_init__(self) -> None:
        check_types(self)
        check_sharing(self)
        check_bounds(self, "timeout_s", least=1, most=10**7)

    @contextmanager
    def started(self, config: RunConfig) -> Iterator[None]:
        """Inside, the processes that torchrun has started are a group, and a run of this config may be trained.

        Raises UserError where they cannot be one, and for a batch that does not split among them.
        """
        with group(config.device, self.timeout_s):
            self.check(config, running())
            yield

    def check(self, config: RunConfig, ranks: int) -> None:
        """Raise UserError where so many ranks cannot train a run of this config."""
        if self.gather == "bf16" and config.precision != "bf16":
            raise UserError(
                f"gather='bf16' computes in bfloat16, and precision is {config.precision!r}: set it to bf16"
            )
        parts = ranks * config.memory.micro_batches
        if config.task.batch_size % parts:
            raise UserError(
                f"a batch of {config.task.batch_size} does not split into {parts} equal parts, "
                f"{config.memory.micro_batches} for each of {ranks} ranks: change batch_size"
            )
        check_copies(ranks, self.copies)

    def wrapped(self, model: nn.Module, *, replayed: bool = False) -> nn.Module:
        """The model as these ranks train it; replayed: whether its passes are CUDA graphs, as "ddp" allows."""
        if self.wrap == "ddp" and running() == 1:
            return model
        if self.wrap == "ddp" and replayed:
            return Replica(model)
        if self.wrap == "ddp":
            return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        along = {"copies": self.copies, "shards": running() // self.copies}
        if self.copies == 1:
            del along["copies"]
        device = next(model.parameters()).device.type
        mesh = init_device_mesh(device, tuple(along.values()), mesh_dim_names=tuple(along))
        formats = (torch.bfloat16, torch.float32) if self.gather == "bf16" else ()
        how: dict[str, Any] = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(*formats)}
        blocks = blocks_of(model)
        for start in range(0, len(blocks), self.blocks_per_group):
            together = blocks[start : start + self.blocks_per_group]
            fully_shard(together, reshard_after_forward=not self.keep_gathered, **how)
        fully_shard(model, **how)
        return model

    def communication_bytes(self, parameters: int, ranks: int) -> dict[str, float]:
        """What each rank sends in a gradient step, "within" a copy of the model and "between" copies.

            fsdp: within  (g - 1) / g (n w + 4) P      weights gathered n times, gradients scattered
                  between 2 (c - 1) / c 4 P / g        gradients of a rank's part added up over the copies
            ddp:  within  2 (N - 1) / N 4 P            all gradients added up

        P: parameters; N: ranks; c: copies; g: N / c, the ranks of a copy; w: bytes of a gathered weight, 4 or 2
        n: 2, for forward and backward, or 1 with `keep_gathered`
        The outermost module's own weights stay gathered from forward to backward, and are counted twice all the same.
        """
        if self.wrap == "ddp":
            return {"within": 2 * (ranks - 1) / ranks * 4 * parameters, "between": 0.0}
        of_copy, weight_bytes = ranks // self.copies, 2 if self.gather == "bf16" else 4
        gathers = 1 if self.keep_gathered else 2
        return {
            "within": (of_copy - 1) / of_copy * (gathers * weight_bytes + 4) * parameters,
            "between": 2 * (self.copies - 1) / self.copies * 4 * parameters / of_copy,
        }

    def record(self) -> dict[str, Any]:
        """What the arithmetic and the form of a checkpoint depend on; not how many ranks there are."""
        others = ("keep_gathered", "async_save", "timeout_s")
        return {name: value for name, value in asdict(self).items() if name not in others}
