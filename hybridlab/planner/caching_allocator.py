"""torch's CUDA caching allocator, on paper: how much of the GPU it reserves for what is allocated."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from hybridlab.planner.trace import Key, Segment

MIB = 2**20
SMALL_BYTES, SMALL_SEGMENT = MIB, 2 * MIB
MIDDLE_BYTES, MIDDLE_SEGMENT = 10 * MIB, 20 * MIB
LARGE_GRAIN = 2 * MIB

Pool = tuple[bool, str]


@dataclass(eq=False)
class _Block:
    """A stretch of a segment of the GPU's memory, and its neighbours there.

    pool: whether it is small, and the stream that it was allocated on
    """

    start: int
    size: int
    pool: Pool
    free: bool = True
    before: _Block | None = None
    after: _Block | None = None

    @property
    def order(self) -> tuple[int, int]:
        return self.size, self.start

    def absorb_next(self) -> None:
        """Become one with the neighbour behind."""
        assert self.after
        self.size, self.after = self.size + self.after.size, self.after.after
        if self.after:
            self.after.before = self


class CachingAllocator:
    """Allocates and frees as torch does, and counts what it takes of the GPU.

        up to 1 MiB       from segments of 2 MiB
        below 10 MiB      from segments of 20 MiB
        from 10 MiB on    from segments of its own size, rounded up to 2 MiB

    Memory that was allocated on one stream is not used again on another.
    The smallest free block that is large enough is taken, and split where more than 1 MiB is left (512 bytes of a
    small one). Freed neighbours become one block. Nothing is given back.

    reserved: bytes that it has taken of the GPU

    Source: c10/cuda/CUDACachingAllocator.cpp.
    """

    def __init__(self) -> None:
        self.reserved = 0
        self._free: defaultdict[Pool, list[_Block]] = defaultdict(list)
        self._used: dict[Key, _Block] = {}

    def follow(self, segments: Iterable[Segment]) -> int:
        """Take in all their events; gives what is reserved then."""
        for segment in segments:
            for event in segment.events:
                if event.kind == "new":
                    self._used[event.key] = self._allocate(event.size, event.stream)
                elif event.kind == "free":
                    self._release(self._used.pop(event.key))
        return self.reserved

    def _allocate(self, size: int, stream: str) -> _Block:
        size = max(size, 512)
        is_small = size <= SMALL_BYTES
        pool = is_small, stream
        free = self._free[pool]
        place = bisect_left(free, (size, 0), key=lambda block: block.order)
        block = free.pop(place) if place < len(free) else self._new_segment(size, pool)
        left = block.size - size
        if left >= 512 if is_small else left > SMALL_BYTES:
            rest = _Block(block.start + size, left, pool, before=block, after=block.after)
            if rest.after:
                rest.after.before = rest
            block.size, block.after = size, rest
            insort(free, rest, key=lambda block: block.order)
        block.free = False
        return block

    def _new_segment(self, size: int, pool: Pool) -> _Block:
        whole = MIDDLE_SEGMENT if size < MIDDLE_BYTES else -(-size // LARGE_GRAIN) * LARGE_GRAIN
        block = _Block(self.reserved, SMALL_SEGMENT if pool[0] else whole, pool)
        self.reserved += block.size
        return block

    def _release(self, block: _Block) -> None:
        if block.after and block.after.free:
            self._take_out(block.after)
            block.absorb_next()
        if block.before and block.before.free:
            block = block.before
            self._take_out(block)
            block.absorb_next()
        block.free = True
        insort(self._free[block.pool], block, key=lambda block: block.order)

    def _take_out(self, block: _Block) -> None:
        free = self._free[block.pool]
        del free[bisect_left(free, block.order, key=lambda block: block.order)]
