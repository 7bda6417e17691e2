"""Host memory that the card copies from and to at full speed."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from contextlib import suppress

import numpy as np
import psutil
import torch
from torch import Tensor

from hybridlab.errors import UserError

ALIGNMENT_BYTES = 256
"""Every view begins at a multiple of this, as tensors on the card do."""

LEFT_TO_OTHERS_BYTES = 500_000_000
"""Of the host's available memory: an arena that would take more is refused, before the machine starts to swap."""


class HostArena:
    """One stretch of host memory, handed out as aligned views that look like the tensors they stand in for.

    total_bytes: its size; `arena_bytes` says what some tensors need
    pinned: page-locked, so that copies run beside the computation; without CUDA it is ordinary memory

    It takes `total_bytes` and no more: torch's own pinned tensors are each rounded up to a power of two. The memory
    lives as long as the arena or any view of it.

    Raises UserError where the host has less to give, or the driver refuses to pin it.
    """

    def __init__(self, total_bytes: int, *, pinned: bool) -> None:
        _refuse_more_than_the_host_has(total_bytes)
        self._memory = _empty(total_bytes)
        if pinned and total_bytes and torch.cuda.is_available():
            _pin_(self._memory)
        self._bytes = torch.from_numpy(self._memory)
        self._taken = 0

    def take(self, like: Tensor) -> Tensor:
        """The next view, uninitialized, contiguous, of the shape and type of `like`.

        Raises ValueError when the arena is used up.
        """
        start, self._taken = self._taken, self._taken + arena_bytes([like])
        if self._taken > self._bytes.numel():
            raise ValueError(f"the arena of {self._bytes.numel()} bytes is used up: make it arena_bytes(tensors) long")
        return self._bytes[start : start + like.nbytes].view(like.dtype).view(like.shape)


def arena_bytes(tensors: Iterable[Tensor]) -> int:
    """How long an arena must be to hold views of all of these."""
    return sum(-(-tensor.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES for tensor in tensors)


def _refuse_more_than_the_host_has(total_bytes: int) -> None:
    available = psutil.virtual_memory().available
    if total_bytes > available - LEFT_TO_OTHERS_BYTES:
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
    weakref.finalize(memory, cudart.cudaHostUnregister, address).atexit = False
