"""A deep model's computation from a shallow one's: equal blocks take the same, so a few stand for all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from hybridlab.memory.checkpointing import blocks_of
from hybridlab.planner.trace import Event, Key, Segment

FIRST, LAST = 4, 2
"""Blocks that are run at a stack's start and at its end. The last of the first ones stands for those left out."""

EXAMPLE = FIRST - 1


class NotRepeated(Exception):
    """Blocks with equal parameters differ in what they compute."""


def runs_alike(model: nn.Module, last: int = LAST) -> bool:
    """Whether the model has more blocks than are run, and those left out have the parameters of the example."""
    blocks = blocks_of(model)
    shapes = [[(name, p.shape, p.requires_grad) for name, p in block.named_parameters()] for block in blocks]
    return len(blocks) > FIRST + last and all(shape == shapes[EXAMPLE] for shape in shapes[2 : len(blocks) - last])


def keep_blocks_(model: nn.Module, first: int, last: int) -> list[nn.Module]:
    """Take all blocks but the first and last few out of the stack that the model calls; gives those that it keeps."""
    blocks = blocks_of(model)
    kept = blocks[:first] + blocks[len(blocks) - last :]
    for stack in model.modules():
        if isinstance(stack, nn.ModuleList | nn.Sequential) and list(stack) == blocks:
            stack._modules = {str(i): block for i, block in enumerate(kept)}
    return kept


def unfold(segments: Sequence[Segment], left_out: int) -> list[Segment]:
    """The computation with the blocks that were left out, each as the example.

    A block's events name storages by how far their block is from its own, so that a copy's names follow. What is
    freed between blocks is freed of all copies. Raises NotRepeated where the block before the example differs from it.
    """
    if not left_out:
        return list(segments)
    unfolded: list[Segment] = []
    for i, segment in enumerate(segments):
        if segment.block is None:
            unfolded.append(Segment(segment.name, None, list(_between(segment, left_out)), segment.work))
        elif segment.block != EXAMPLE:
            unfolded.append(_moved(segment, _renumbered(segment.block, left_out)))
        else:
            _check_equal(segment, segments)
            copies = [_moved(segment, EXAMPLE + m) for m in range(left_out + 1)]
            is_forward = any((s.name, s.block) == (segment.name, EXAMPLE - 1) for s in segments[:i])
            unfolded += copies if is_forward else copies[::-1]
    return unfolded


def _moved(segment: Segment, block: int) -> Segment:
    """The segment as another block's."""
    return Segment(segment.name, block, list(_shifted(segment, block)), segment.work)


def _shifted(segment: Segment, block: int) -> Iterator[Event]:
    assert segment.block is not None
    for event in segment.events:
        name, of, number = event.key
        if of is not None and abs(of - segment.block) > LAST:
            raise NotRepeated(f"block {segment.block} touches what block {of} made")
        yield event if of is None else event._replace(key=Key(name, of - segment.block + block, number))


def _between(segment: Segment, left_out: int) -> Iterator[Event]:
    """Events between blocks; what befalls a storage of the example befalls those of its copies."""
    for event in segment.events:
        name, block, number = event.key
        if block is None:
            yield event
            continue
        yield event._replace(key=Key(name, _renumbered(block, left_out), number))
        if block == EXAMPLE:
            yield from (event._replace(key=Key(name, block + m, number)) for m in range(1, left_out + 1))


def _renumbered(block: int, left_out: int) -> int:
    return block if block <= EXAMPLE else block + left_out


def _check_equal(example: Segment, segments: Sequence[Segment]) -> None:
    twin = next(s for s in segments if (s.name, s.block) == (example.name, EXAMPLE - 1))
    if list(_shifted(twin, EXAMPLE)) != example.events:
        raise NotRepeated(f"blocks {EXAMPLE - 1} and {EXAMPLE} differ in {example.name}")
