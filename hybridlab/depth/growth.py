"""The weights and the optimizer state of blocks that join."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hybridlab.base.errors import UserError
from hybridlab.depth.stack import BlockStack, tensors_of
from hybridlab.weights.snapshot import inside

OUTPUTS = ("c_proj", "o_proj", "out_proj", "down_proj", "fc2", "w2", "wo", "dense", "dense_4h_to_h")
"""Usual names of the layers that write into the residual stream."""

Shares = list[tuple[int, float]]
"""Positions of trained blocks, and the share that each has in a new one."""


def positions(rule: str, depths: Sequence[int], total: int) -> list[tuple[int, ...]]:
    """Which blocks take part in each stage; each stage has those of the stage before.

        stack        the first ones
        all others   spread evenly, from the first one on: block j of L lies at ceil(j total / L)

    depths: blocks of each stage, rising; total: of the model, at least as many
    """
    outer, stages = tuple(range(total)), []
    for depth in reversed(depths):
        spread = [-(-j * len(outer) // depth) for j in range(depth)]
        outer = tuple(outer[j] for j in (range(depth) if rule == "stack" else spread))
        stages.append(outer)
    return stages[::-1]


@torch.no_grad()
def grow_(stack: BlockStack, optimizer: Optimizer, to: Sequence[int], rule: str, outputs: Sequence[str] = ()) -> None:
    """Let blocks join: give them weights and optimizer state by the rule, and activate them.

    A new block's optimizer state, its counts of steps too, is a copy of its nearest source's: as if it had been
    trained all along. One that is "fresh" has none.

    to: positions that take part from here on; outputs: as in `DepthSchedule`

    Raises UserError where "fresh" finds no output projection.
    """
    trained, new = stack.active, [position for position in to if position not in stack.active]
    for position in new:
        block = stack.blocks[position]
        if rule == "fresh":
            zero_outputs_(block, outputs)
        else:
            shares = sources(rule, position, trained)
            combine_(block, [(stack.blocks[source], share) for source, share in shares])
            nearest = max(shares, key=lambda pair: pair[1])[0]
            _copy_state_(optimizer, stack.blocks[nearest], block)
    stack.activate_(to)


def forget_(stack: BlockStack, optimizer: Optimizer) -> None:
    """Give bypassed blocks, which a growth may have spoilt, the weights of the block before, and no optimizer state."""
    for position, block in enumerate(stack.blocks):
        if position in stack.active:
            before = block
            continue
        if stack.active:
            combine_(block, [(before, 1.0)])
        for param in block.parameters():
            optimizer.state.pop(param, None)


def sources(rule: str, position: int, trained: Sequence[int]) -> Shares:
    """The trained blocks that a new one is made from; shares add up to 1.

    trained: positions, rising; the first lies before every new one
    """
    if rule == "stack":
        return [(trained[position % len(trained)], 1.0)]
    before = max(source for source in trained if source < position)
    after = min((source for source in trained if source > position), default=None)
    if rule == "interleave" or after is None:
        return [(before, 1.0)]
    share = (position - before) / (after - before)
    return [(before, 1.0 - share), (after, share)]


@torch.no_grad()
def combine_(block: nn.Module, parts: Sequence[tuple[nn.Module, float]]) -> None:
    """Set a block's weights and buffers to a weighted sum of other blocks'; integers are the first one's."""
    given = [(tensors_of(source), share) for source, share in parts]
    for name, target in tensors_of(block).items():
        first, share = given[0][0][name], given[0][1]
        if len(given) == 1 or not target.is_floating_point():
            target.copy_(first)
            continue
        total = first * share
        for source, its_share in given[1:]:
            total.add_(source[name], alpha=its_share)
        target.copy_(total)


@torch.no_grad()
def zero_outputs_(block: nn.Module, outputs: Sequence[str] = ()) -> None:
    """Set a block's output projections to zero, so that it adds nothing.

    Raises UserError where no layer has one of the names.
    """
    names = outputs or OUTPUTS
    layers = [m for name, m in block.named_modules() if name.rpartition(".")[2] in names or name in names]
    tensors = [p for layer in layers for p in layer.parameters(recurse=False)]
    if not tensors:
        raise UserError(
            f"rule='fresh' sets a block's output projections to zero, and {type(block).__name__} has no layer named "
            f"{', '.join(names)}: name them as DepthSchedule(outputs=('proj',))"
        )
    for tensor in tensors:
        tensor.zero_()


def _copy_state_(optimizer: Optimizer, source: nn.Module, target: nn.Module) -> None:
    for mine, theirs in zip(target.parameters(), source.parameters(), strict=True):
        if theirs in optimizer.state:
            optimizer.state[mine] = {key: _copy(value) for key, value in optimizer.state[theirs].items()}


def _copy(value: Any) -> Any:
    return inside(value, Tensor.clone) if isinstance(value, Tensor) else value
