"""torch's CUDA caching allocator, on paper: what is allocated, and how much of the GPU it reserves for it."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter, defaultdict
from collections.abc import Iterable

from hybridlab.planner.trace import WORKSPACE, Event, Key, Segment

MIB = 2**20
SMALL_BYTES, SMALL_SEGMENT = MIB, 2 * MIB
MIDDLE_BYTES, MIDDLE_SEGMENT = 10 * MIB, 20 * MIB
LARGE_GRAIN = 2 * MIB

Pool = tuple[bool, str]
"""Whether its blocks are small, and the stream that they were allocated on."""

Block = tuple[Pool, int, int]
"""Its pool, size and start."""


class CachingAllocator:
    """Allocates and frees as torch does, and counts what it takes of the GPU.

        up to 1 MiB       from segments of 2 MiB
        below 10 MiB      from segments of 20 MiB
        from 10 MiB on    from segments of its own size, rounded up to 2 MiB

    Memory that was allocated on one stream is not used again on another.
    The smallest free block that is large enough is taken, and split where more than 1 MiB is left (512 bytes of a
    small one): what is left counts as allocated otherwise. Freed neighbours become one block. Nothing is given back.

    reserved: bytes that it has taken of the GPU
    now: part -> bytes that are allocated; peak: the same when their sum was greatest since `reset_peak`

    Source: c10/cuda/CUDACachingAllocator.cpp.
    """

    def __init__(self) -> None:
        self.reserved = self._end = 0
        self._segments: list[Block] = []  # each as one block
        self._free: defaultdict[Pool, list[tuple[int, int]]] = defaultdict(list)  # size and start of each block, sorted
        self._begins: dict[int, int] = {}  # where a free block starts -> its size
        self._ends: dict[int, int] = {}  # where one ends -> its size
        self._used: dict[Key, tuple[str, Block]] = {}
        self.now: Counter[str] = Counter()
        self.peak: dict[str, int] = {}
        self._total = self._peak_total = 0

    def reset_peak(self) -> None:
        """Begin a new peak at what is allocated now."""
        self._peak_total, self.peak = self._total, dict(self.now)

    def follow(self, segments: Iterable[Segment]) -> dict[str, int]:
        """Take in all their events; gives the peak so far."""
        for segment in segments:
            for event in segment.events:
                self._take(event)
        return self.peak

    def empty_cache(self) -> None:
        """Give back the segments that are free as a whole."""
        for pool, size, start in self._segments.copy():
            if self._begins.get(start) == size:
                self._take_out(pool, size, start)
                self._segments.remove((pool, size, start))
                self.reserved -= size

    def _take(self, event: Event) -> None:
        if event.kind == "new":
            if event.part == WORKSPACE and event.key in self._used:
                return
            assert event.key not in self._used, event
            self._count(event.key, event.part, self._allocate(event.size, event.stream))
            return
        part, block = self._used.pop(event.key)
        _, size, _ = block
        self.now[part] -= size
        self._total -= size
        if event.kind == "is":
            self._count(event.key, event.part, block)
        else:
            self._release(*block)

    def _count(self, key: Key, part: str, block: Block) -> None:
        self._used[key] = part, block
        _, size, _ = block
        self.now[part] += size
        self._total += size
        if self._total > self._peak_total:
            self.reset_peak()

    def _allocate(self, size: int, stream: str) -> Block:
        size = max(size, 512)
        is_small = size <= SMALL_BYTES
        pool = is_small, stream
        free = self._free[pool]
        place = bisect_left(free, (size, 0))
        if place == len(free):
            self._add_segment(pool, size)
        found, start = free[place]
        self._take_out(pool, found, start)
        left = found - size
        if left >= 512 if is_small else left > SMALL_BYTES:
            self._put_in(pool, left, start + size)
            found = size
        return pool, found, start

    def _add_segment(self, pool: Pool, size: int) -> None:
        whole = MIDDLE_SEGMENT if size < MIDDLE_BYTES else -(-size // LARGE_GRAIN) * LARGE_GRAIN
        whole = SMALL_SEGMENT if pool[0] else whole
        self._segments.append((pool, whole, self._end))
        self._put_in(pool, whole, self._end)
        self._end += whole + 1  # a byte apart, so that segments are no neighbours
        self.reserved += whole

    def _release(self, pool: Pool, size: int, start: int) -> None:
        if behind := self._begins.get(start + size):
            self._take_out(pool, behind, start + size)
            size += behind
        if before := self._ends.get(start):
            self._take_out(pool, before, start - before)
            size, start = size + before, start - before
        self._put_in(pool, size, start)

    def _put_in(self, pool: Pool, size: int, start: int) -> None:
        insort(self._free[pool], (size, start))
        self._begins[start] = self._ends[start + size] = size

    def _take_out(self, pool: Pool, size: int, start: int) -> None:
        free = self._free[pool]
        del free[bisect_left(free, (size, start))], self._begins[start], self._ends[start + size]
