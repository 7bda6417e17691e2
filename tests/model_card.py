"""A GPU that exists on paper: torch's CUDA caching allocator, as far as it decides what goes back to the GPU.

And jumps that ask the same of it as of a real one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hybridlab.memory import predict_offload, state_offload
from hybridlab.memory.config import MemoryConfig, MixedPrecisionConfig, PredictAwareMemoryConfig
from hybridlab.memory.predict_offload import PredictOffload
from hybridlab.weights import bf16_resident as low_weights
from hybridlab.weights.residency import Residency
from hybridlab.weights.snapshot import Weights

GRAIN, SMALL, LARGE, STEP = 512, 1 << 20, 10 << 20, 2 << 20
"""Bytes: of which blocks are multiples; up to which they come from small segments, and rests of large ones stay with
their block; from which a segment is made for one block alone; and of which such a segment is a multiple."""


@dataclass(eq=False)
class Block:
    """A stretch of a segment."""

    size: int
    is_free: bool = True


@dataclass(eq=False)
class Segment:
    """What the GPU gave in one request, block by block."""

    is_small: bool
    blocks: list[Block]


class ModelCard(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is active, every tensor that is made on the CPU takes memory of this GPU instead.

    A tensor goes into the smallest free block that holds it, or into a new segment; what is left over stays free. A
    segment goes back to the GPU when all of it is free. What lies in host arenas is not of the GPU.

    Source: https://zdevito.github.io/2022/08/04/cuda-caching-allocator.html; c10/cuda/CUDACachingAllocator.cpp.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._segments: list[Segment] = []
        self._held: dict[int, Block] = {}
        free_, allocate_ = state_offload._Storage.free_, state_offload._Storage.allocate_
        for module in (low_weights, state_offload):
            patch.setattr(module, "reserve_contiguous", lambda _, tensors: self.reserve_contiguous(tensors))
        patch.setattr(state_offload._Storage, "free_", lambda it: (self._forget(_key(it.flat)), free_(it)))
        patch.setattr(state_offload._Storage, "allocate_", lambda it: (allocate_(it), self._count(it.flat)))
        patch.setattr(predict_offload.PredictOffload, "_release_cache", lambda _: self.empty_cache())

    @property
    def reserved_bytes(self) -> int:
        """What all segments take of the GPU."""
        return sum(block.size for segment in self._segments for block in segment.blocks)

    def empty_cache(self) -> None:
        """Give back the segments that are free."""
        self._segments = [segment for segment in self._segments if not all(block.is_free for block in segment.blocks)]

    def reserve_contiguous(self, tensors: Iterable[Tensor]) -> None:
        """As `hybridlab.base.device.reserve_contiguous`."""
        total = sum(tensor.nbytes for tensor in tensors)
        if total > self.reserved_bytes - sum(block.size for block in self._held.values()):
            self.empty_cache()
            self._release(self._allocate(total))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {_key(value) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
        for value in tree_leaves(out):
            if isinstance(value, Tensor) and value.device.type == "cpu" and _key(value) not in given:
                self._count(value)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        if key not in self._held and storage.nbytes():
            self._held[key] = self._allocate(storage.nbytes())
            weakref.finalize(storage, self._forget, key).atexit = False

    def _forget(self, key: int) -> None:
        if block := self._held.pop(key, None):
            self._release(block)

    def _allocate(self, wanted: int) -> Block:
        size = -(-wanted // GRAIN) * GRAIN
        is_small = size <= SMALL
        alike = [segment for segment in self._segments if segment.is_small == is_small]
        free = [(block, segment) for segment in alike for block in segment.blocks if block.is_free]
        block, segment = min(
            ((block, segment) for block, segment in free if block.size >= size),
            key=lambda found: found[0].size,
            default=(None, None),
        )
        if block is None or segment is None:
            block = Block(_segment_bytes(size))
            segment = Segment(is_small, [block])
            self._segments.append(segment)
        rest = block.size - size
        if rest >= GRAIN if is_small else rest > SMALL:
            block.size = size
            segment.blocks.insert(segment.blocks.index(block) + 1, Block(rest))
        block.is_free = False
        return block

    def _release(self, block: Block) -> None:
        """Free it, and make one of it and its free neighbours."""
        block.is_free = True
        blocks = next(segment.blocks for segment in self._segments if block in segment.blocks)
        for i in range(len(blocks) - 1, 0, -1):
            if blocks[i - 1].is_free and blocks[i].is_free:
                blocks[i - 1].size += blocks.pop(i).size


def _segment_bytes(size: int) -> int:
    """Of a new segment for a block of that size."""
    if size <= SMALL:
        return STEP
    return 2 * LARGE if size < LARGE else -(-size // STEP) * STEP


def _key(tensor: Tensor) -> int:
    """Of the memory that a tensor lies in, for as long as that is there."""
    return tensor.untyped_storage()._cdata


def reserved_in_jumps(device: str, reserved_bytes: Callable[[], int]) -> tuple[list[int], float]:
    """What `reserved_bytes` says in the midst of six jumps with all away, and what the bf16 weights alone take.

    Weights and states of many sizes, and a second group that is small.
    """
    shapes = [(1024, 1024), (512, 500)] * 12 + [(1024, 700)]
    model = nn.ParameterList(torch.zeros(shape, device=device) for shape in shapes)
    *most, last = model
    optimizer = torch.optim.AdamW([{"params": most}, {"params": [last]}])
    weights = Weights(model, optimizer, snapshots=Residency.OFFLOADED)
    memory = MemoryConfig(
        mixed_precision=MixedPrecisionConfig("fp32", "bf16_weights"), predict_aware=PredictAwareMemoryConfig("pinned")
    )
    offload = PredictOffload(model, weights, optimizer, memory)
    held = []
    for _ in range(6):
        offload.prefetch_()
        torch.stack([p.sum() for p in model]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        snapshot = weights.snapshot()
        weights.fp32.set_base()
        offload.offload_(10, snapshot, last_motion_made=False)
        held.append(reserved_bytes())
        weights.move_([])
        offload.offload_(9, snapshot, last_motion_made=True)
        del snapshot  # so that the next one has its memory
    return held, sum(p.nbytes for p in model) / 2
