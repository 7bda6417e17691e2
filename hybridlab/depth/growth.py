"""The weights and the optimizer state of blocks that join."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hybridlab.base.errors import UserError
from hybridlab.depth.schedule import RULES
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
    """
    made = made_from(rule, to, stack.active)
    nearest = {position: max(shares, key=lambda pair: pair[1])[0] for position, shares in made.items() if shares}
    states = {position: _copies_of_state(optimizer, stack.blocks[source]) for position, source in nearest.items()}
    fill_(stack, made, outputs)
    for position, copies in states.items():
        for param, state in zip(stack.blocks[position].parameters(), copies, strict=True):
            if state:
                optimizer.state[param] = state
    stack.activate_(to)


@torch.no_grad()
def losses_by_rule(
    stack: BlockStack,
    to: Sequence[int],
    forward: Callable[[], Tensor],
    outputs: Sequence[str] = (),
    host: bool = False,
    buffers: Iterable[Tensor] = (),
) -> list[Tensor]:
    """Losses without a growth, then after it by each of `RULES`; everything is put back as it was.

    host: where the copies of all blocks wait meanwhile: in the host's memory, or beside them
    buffers: of the model, which `forward` may change
    """
    active, of_blocks = stack.active, [t for block in stack.blocks for t in tensors_of(block).values()]
    tensors = {id(t): t for t in (*of_blocks, *buffers)}.values()
    saved = [t.detach().to("cpu" if host else t.device, copy=True) for t in tensors]
    losses = [forward()]
    for rule in RULES:
        try:
            fill_(stack, made_from(rule, to, active), outputs)
            stack.activate_(to)
            losses.append(forward())
        finally:
            stack.activate_(active)
            for tensor, copy in zip(tensors, saved, strict=True):
                tensor.copy_(copy)
    return losses


def made_from(rule: str, to: Sequence[int], trained: Sequence[int]) -> dict[int, Shares]:
    """The blocks that a growth writes, and what each is made from; nothing of one that is fresh.

    A stack repeats the trained sequence: where that was spread over the model, trained blocks move.
    """
    if rule == "stack":
        moved = {position: trained[j % len(trained)] for j, position in enumerate(to)}
        return {position: [(source, 1.0)] for position, source in moved.items() if source != position}
    new = (position for position in to if position not in trained)
    return {position: [] if rule == "fresh" else sources(rule, position, trained) for position in new}


@torch.no_grad()
def fill_(stack: BlockStack, made: Mapping[int, Shares], outputs: Sequence[str]) -> None:
    """Write the weights of blocks, as `made_from` says; a source that is written too gives what it was."""
    used = {source for shares in made.values() for source, _ in shares}
    given = {source: tensors_of(stack.blocks[source]) for source in used}
    for source in used & made.keys():
        given[source] = {name: tensor.clone() for name, tensor in given[source].items()}
    for position, shares in made.items():
        block = stack.blocks[position]
        if shares:
            combine_(block, [(given[source], share) for source, share in shares])
        else:
            for weight in output_projections(block, outputs):
                weight.zero_()


def forget_(stack: BlockStack, optimizer: Optimizer) -> None:
    """Give bypassed blocks, which a growth may have spoilt, the weights of the block before, and no optimizer state."""
    for position, block in enumerate(stack.blocks):
        if position in stack.active:
            before = block
            continue
        if stack.active:
            combine_(block, [(tensors_of(before), 1.0)])
        for param in block.parameters():
            optimizer.state.pop(param, None)


def sources(rule: str, position: int, trained: Sequence[int]) -> Shares:
    """The trained blocks beside a new one that it is made from; shares add up to 1.

    trained: positions, rising; the first lies before every new one
    """
    before = max(source for source in trained if source < position)
    after = min((source for source in trained if source > position), default=None)
    if rule == "interleave" or after is None:
        return [(before, 1.0)]
    share = (position - before) / (after - before)
    return [(before, 1.0 - share), (after, share)]


@torch.no_grad()
def combine_(block: nn.Module, given: Sequence[tuple[Mapping[str, Tensor], float]]) -> None:
    """Set a block's weights and buffers to a weighted sum of other blocks'; integers are the first one's."""
    for name, target in tensors_of(block).items():
        first, share = given[0][0][name], given[0][1]
        if len(given) == 1 or not target.is_floating_point():
            target.copy_(first)
            continue
        total = first * share
        for source, its_share in given[1:]:
            total.add_(source[name], alpha=its_share)
        target.copy_(total)


def output_projections(block: nn.Module, outputs: Sequence[str] = ()) -> list[Tensor]:
    """The weights by which a block adds to the residual stream: where they are zero, it adds nothing.

    Raises UserError where no layer has one of the names.
    """
    names = outputs or OUTPUTS
    layers = [m for name, m in block.named_modules() if name.rpartition(".")[2] in names or name in names]
    tensors: list[Tensor] = [p for layer in layers for p in layer.parameters(recurse=False)]
    if not tensors:
        raise UserError(
            f"the rule 'fresh', which 'best' tries too, sets a block's output projections to zero, and "
            f"{type(block).__name__} has no layer named {', '.join(names)}: name it as DepthSchedule(outputs=('proj',))"
        )
    return tensors


def _copies_of_state(optimizer: Optimizer, block: nn.Module) -> list[dict[str, Any]]:
    """By parameter; empty of one that has none."""
    states = (optimizer.state.get(param, {}) for param in block.parameters())
    return [
        {key: inside(v, Tensor.clone) if isinstance(v, Tensor) else v for key, v in state.items()} for state in states
    ]
