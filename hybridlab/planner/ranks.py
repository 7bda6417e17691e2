"""What one of several ranks holds of a model, and what passes through its memory to and from the others."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hybridlab.base.errors import UserError
from hybridlab.memory.checkpointing import blocks_of
from hybridlab.planner.trace import COMMUNICATION, GATHERED, Trace

GATHERING, REDUCING = "gathering", "reducing"
"""Streams on which FSDP2 receives weights and adds gradients up."""

BUCKET_NUMBERS = 25 * 2**20 // 4
"""Of DistributedDataParallel's buckets: 25 MiB of float32."""


def ddp_buckets(trace: Trace, numbers: int) -> list[Tensor]:
    """In which DistributedDataParallel adds gradients up; each gradient is copied there, and is a view of it then."""
    sizes = [min(BUCKET_NUMBERS, numbers - start) for start in range(0, numbers, BUCKET_NUMBERS)]
    with trace.counting_as(COMMUNICATION):
        return [torch.empty(size) for size in sizes]


@dataclass(eq=False)
class _Group:
    """Weights that are gathered together: a block's, or all that are in none.

    numbers: of the whole, each weight filled up to a multiple of the ranks
    received: what all ranks sent; weights: the same, copied to where it is computed with
    waiting: weights whose gradient is not there yet in this backward pass
    """

    params: list[nn.Parameter]
    shards: list[Tensor]
    numbers: int
    received: Tensor | None = None
    weights: list[Tensor] = field(default_factory=list)
    waiting: set[nn.Parameter] = field(default_factory=set)

    @property
    def trained(self) -> set[nn.Parameter]:
        return {p for p in self.params if p.requires_grad}


class Shards:
    """A rank's part of a model under `fully_shard`: rows of each weight, and whole weights block by block.

        forward    a block's weights are received and copied out; what was received stays until the next block's are
                   copied, and the copy until the block is done
        backward   the same, and the block before is received ahead; a block's gradients, in float32, go whole into a
                   buffer that stays until the next block's, and out of it comes this rank's part of their sum
        the rest   what lies in no block is copied out from its forward to its backward

    A block stands for all that are gathered together. Weights that are kept gathered stay from forward to backward.

    model: computes on whole weights, which are not counted; parts: ranks that share a copy of it
    own: weight -> this rank's rows, as many as the rank with the most has
    last: whether gradients are added up in this backward pass, or kept whole until a later one

    Source: torch.distributed.fsdp._fully_shard.
    """

    def __init__(self, trace: Trace, weights: Iterable[nn.Parameter], parts: int) -> None:
        self._trace, self._parts, self._stays_gathered, self.last = trace, parts, False, True
        self.own: dict[nn.Parameter, nn.Parameter] = {}
        for p in weights:
            with trace.counting_as("weights"):
                self.own[p] = nn.Parameter(_rows(p, parts), p.requires_grad)
            trace.drop([p])
        self._received: Tensor | None = None
        self._summed: Tensor | None = None
        self._gradients: list[Tensor] = []
        self._kept: dict[nn.Parameter, Tensor] = {}

    def gather_by_block_(self, model: nn.Module, numbers: torch.dtype, at_once: int = 1, *, keep: bool = False) -> None:
        """From here on the model's passes gather its weights, in this format, and scatter its gradients.

        at_once: blocks that are gathered together; keep: from forward to backward
        """
        self._stays_gathered = keep
        with self._trace.counting_as(None):
            for p in model.parameters():
                p.data = p.data.to(numbers)
        blocks = blocks_of(model)
        together = [blocks[start : start + at_once] for start in range(0, len(blocks), at_once)]
        inside = {p for block in blocks for p in block.parameters()}
        rest = self._group(p for p in model.parameters() if p not in inside)
        self._groups = [*(self._group(p for block in some for p in block.parameters()) for some in together), rest]
        before: _Group | None = None
        for modules, group in zip([*together, [model]], self._groups, strict=True):
            for module in modules:
                module.register_forward_pre_hook(partial(self._enter, group))
            modules[-1].register_forward_hook(partial(self._leave, group, before))
            before = group
            for p in group.trained if group is not rest else ():
                p.register_post_accumulate_grad_hook(partial(self._arrived, group))  # type: ignore[no-untyped-call]

    def _group(self, params: Iterable[nn.Parameter]) -> _Group:
        mine = list(params)
        shards: list[Tensor] = [self.own[p] for p in mine]
        group = _Group(mine, shards, self._parts * sum(shard.numel() for shard in shards))
        group.waiting = group.trained
        return group

    # --- gathering ---------------------------------------------------------------------------------------

    def _enter(self, group: _Group, *_: object) -> None:
        """Before the forward of one of its modules."""
        if group.weights:
            return
        self._receive(group)
        self._received = None
        self._copy_out(group)
        self._received, group.received = group.received, None

    def _leave(self, group: _Group, before: _Group | None, module: nn.Module, args: Any, out: Any) -> None:
        """After its forward; and before its backward, as soon as the gradient of what it gave is known."""
        is_rest = group is self._groups[-1]
        if is_rest:
            self._received = None
        if not (torch.is_grad_enabled() and is_rest) and not self._stays_gathered:
            group.weights = []
        if is_rest and not torch.is_grad_enabled():  # the trainer puts shards in their place after each pass
            for each in self._groups:
                each.weights = []
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.requires_grad]
        if made and torch.is_grad_enabled():
            made[0].register_hook(lambda _: self._enter_backward(group, before))  # type: ignore[no-untyped-call]

    def _enter_backward(self, group: _Group, before: _Group | None) -> None:
        self._receive(group)
        self._copy_out(group)
        group.received = None
        if before:
            self._receive(before)

    def _receive(self, group: _Group) -> None:
        if self._parts > 1 and group.received is None and not group.weights:
            with self._trace.counting_as(COMMUNICATION, GATHERING):
                group.received = torch.empty(group.numbers, dtype=group.params[0].dtype)

    def _copy_out(self, group: _Group) -> None:
        if not group.weights:
            with self._trace.counting_as(GATHERED):
                sizes = [self._parts * shard.numel() for shard in group.shards]
                group.weights = [torch.empty(n, dtype=p.dtype) for n, p in zip(sizes, group.params, strict=True)]

    # --- gradients ---------------------------------------------------------------------------------------

    def _arrived(self, group: _Group, p: nn.Parameter) -> None:
        group.waiting.discard(p)
        if not group.waiting:
            self._scatter(group)

    def end_backward(self) -> None:
        """What lies in no block is added up last, and nothing stays gathered."""
        for group in self._groups:
            if group.waiting:
                self._scatter(group)
            group.received, group.weights, group.waiting = None, [], group.trained
        self._received = self._summed = None

    def _scatter(self, group: _Group) -> None:
        group.weights, group.waiting, self._summed = [], set(), None
        given = [p for p in group.params if p.grad is not None or p in self._kept]
        if not self.last:
            self._keep(given)
            return
        with self._trace.counting_as(COMMUNICATION):
            self._summed = torch.empty(sum(self._parts * self.own[p].numel() for p in given))
        for p in given:
            p.grad = None
            self._kept.pop(p, None)
        with self._trace.counting_as("gradients", REDUCING):
            self._gradients.append(torch.empty(sum(self.own[p].numel() for p in given)))

    def _keep(self, params: Iterable[nn.Parameter]) -> None:
        """Whole gradients of a part of a batch stay, in float32."""
        for p in params:
            if p.grad is not None and p.grad.dtype != torch.float32:
                with self._trace.counting_as("gradients"):
                    self._kept.setdefault(p, torch.empty_like(p, dtype=torch.float32))
                p.grad = None

    def drop_gradients(self) -> None:
        """The optimizer has stepped."""
        self._gradients.clear()


def _rows(p: nn.Parameter, parts: int) -> Tensor:
    if not p.ndim:
        raise UserError("a weight without dimensions cannot be sharded: make it one of length 1, or take wrap='ddp'")
    return torch.empty(-(-p.shape[0] // parts), *p.shape[1:], dtype=p.dtype)
