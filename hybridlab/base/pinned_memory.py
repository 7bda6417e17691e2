"""Host memory that the GPU copies from and to at full speed, and copies beside the computation."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from hybridlab.base.errors import UserError

ALIGNMENT_BYTES = 256
"""Every view begins at a multiple of this, as tensors on the GPU do."""

LEFT_TO_OTHERS_BYTES = 500_000_000
"""Of the host's available memory: an arena that would take more is refused, before the machine starts to swap."""


class HostArena:
    """One stretch of host memory, handed out as aligned views that look like the tensors they stand in for.

    total_bytes: its size; `arena_bytes` says what some tensors need
    pinned: page-locked, so that copies run beside the computation; without CUDA it is ordinary memory

    It takes `total_bytes` and no more: torch's own pinned tensors are each rounded up to a power of two. The memory
    lives as long as the arena or any view of it. Each view is a storage of its own, so that a checkpoint holds views
    of any types, and no byte beside them.

    Raises UserError where the host has less to give, or the driver refuses to pin it.
    """

    def __init__(self, total_bytes: int, *, pinned: bool) -> None:
        _refuse_more_than_the_host_has(total_bytes)
        self._memory = _empty(total_bytes)
        if pinned and total_bytes and torch.cuda.is_available():
            _pin_(self._memory)
        self.total_bytes, self.pinned = total_bytes, pinned
        self._pieces: list[weakref.ref[np.ndarray]] = []
        self._taken = 0

    def take(self, like: Tensor) -> Tensor:
        """The next view, uninitialized, contiguous, of the shape and type of `like`.

        Raises ValueError when the arena is used up.
        """
        start, self._taken = self._taken, self._taken + arena_bytes([like])
        if self._taken > self.total_bytes:
            raise ValueError(f"the arena of {self.total_bytes} bytes is used up: make it arena_bytes(tensors) long")
        piece = self._memory[start : start + like.nbytes]
        self._pieces.append(weakref.ref(piece))  # the view's storage keeps the piece alive
        return torch.from_numpy(piece).view(like.dtype).view(like.shape)

    @property
    def is_in_use(self) -> bool:
        """Whether any of the views is still referenced, or a tensor that shares its memory."""
        return any(piece() is not None for piece in self._pieces)

    def rewind_(self) -> None:
        """Hand out the same memory again, from its start. It must not be in use."""
        self._pieces, self._taken = [], 0


class ArenaPool:
    """Host memory that is taken once, and used again as soon as no tensor that lies in it is in use.

    Pinning takes far longer than filling: what is kept again and again, such as a snapshot before each jump, has one
    place.
    """

    def __init__(self) -> None:
        self._arenas: list[HostArena] = []

    def empty_like(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Memory for each of these, as `host_empty_like` makes it; pinned where any of them lies on a GPU.

        Raises UserError as `HostArena` does; what is in use stays as it is.
        """
        if not tensors:
            return []
        total_bytes, pinned = arena_bytes(tensors), any(tensor.is_cuda for tensor in tensors)
        free = (arena for arena in self._arenas if not arena.is_in_use)
        arena = next((arena for arena in free if (arena.total_bytes, arena.pinned) == (total_bytes, pinned)), None)
        if arena is None:
            self._arenas = [arena for arena in self._arenas if arena.is_in_use]  # first free what no longer fits
            self._arenas.append(arena := HostArena(total_bytes, pinned=pinned))
        arena.rewind_()
        return [arena.take(tensor) for tensor in tensors]


def host_empty_like(tensors: Sequence[Tensor], *, pinned: bool) -> list[Tensor]:
    """Uninitialized host memory for each of these, all of it in one arena.

    tensors: only their shapes and types count, and they may be on "meta"

    Raises UserError as `HostArena` does.
    """
    arena = HostArena(arena_bytes(tensors), pinned=pinned)
    return [arena.take(tensor) for tensor in tensors]


def to_device_async(source: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The values on a device, in another type: they cross the bus in their own, and are converted where they arrive."""
    return source.to(device, non_blocking=True).to(dtype)


def arena_bytes(tensors: Iterable[Tensor]) -> int:
    """How long an arena must be to hold views of all of these."""
    return sum(-(-tensor.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES for tensor in tensors)


def host_holds(total_bytes: int, available_bytes: int) -> bool:
    """Whether the host, with so much available, can give that much and leave others something."""
    return total_bytes <= available_bytes - LEFT_TO_OTHERS_BYTES


def _refuse_more_than_the_host_has(total_bytes: int) -> None:
    available = psutil.virtual_memory().available
    if not host_holds(total_bytes, available):
        raise UserError(
            f"{total_bytes / 1e9:.1f} GB of host memory are wanted and {available / 1e9:.1f} GB are available: "
            "close other programs, or keep less of the training on the host"
        )


def _empty(total_bytes: int) -> np.ndarray:
    """Ordinary memory whose first byte is aligned."""
    memory = np.empty(total_bytes + ALIGNMENT_BYTES, dtype=np.uint8)
    start = -memory.ctypes.data % ALIGNMENT_BYTES
    return memory[start : start + total_bytes]


def _pin_(memory: np.ndarray) -> None:
    """Lock the pages until the last tensor over them is gone."""
    address, cudart = memory.ctypes.data, torch.cuda.cudart()  # type: ignore[no-untyped-call]
    try:
        torch.cuda.check_error(cudart.cudaHostRegister(address, memory.nbytes, 0))
    except RuntimeError as error:
        with suppress(RuntimeError):
            torch.ones(1, device="cuda")  # or the refusal is reported once more, by whichever kernel comes next
        raise UserError(
            f"the driver refuses to pin {memory.nbytes / 1e9:.1f} GB of host memory ({error}): "
            "keep less of the training on the host, or keep it in unpinned memory"
        ) from error
    weakref.finalize(memory.base, _unpin, cudart, address).atexit = False  # each view keeps the base


def _unpin(cudart: Any, address: int) -> None:
    """Unlock the pages, when no copy is on its way from or to them any more."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
    cudart.cudaHostUnregister(address)


SMALL_BYTES = 4096
"""Tensors below this stay where they are: step counts, lookup tables, short biases."""


class CopyStream:
    """A CUDA stream for copies; without a GPU, copies happen in line with everything else.

    The computation is whatever stream is current when a method is called.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @contextmanager
    def copying(self) -> Iterator[None]:
        """What is asked for inside begins when all that the computation was asked for before is done."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            yield

    def record_use(self, tensor: Tensor) -> None:
        """Its memory, once freed, is not used again before the copies asked for by then are done."""
        if self._stream is not None:
            tensor.record_stream(self._stream)

    def record_event(self) -> torch.cuda.Event | None:
        """The moment at which the copies asked for so far are done."""
        return self._stream.record_event() if self._stream is not None else None

    def wait_event(self, event: torch.cuda.Event | None) -> None:
        """The computation goes on when that moment has come; the host does not wait."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def join(self) -> None:
        """The computation goes on when all copies are done; the host does not wait."""
        self.wait_event(self.record_event())
