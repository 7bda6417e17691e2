"""Moving weights along rows of a path."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hybridlab.base.pinned_memory import to_device_async

Flat = Float[Tensor, " element"]
"""One parameter group, laid out in one piece of memory."""

Motion = tuple[int, Flat, float]
"""A group's number, a row of the path, and the length to move along it."""

PIECE = 1 << 24
"""Elements of a flat piece of memory that are copied to the device, or summed in float32, at a time."""


def views(flat: Flat, group: Sequence[Tensor]) -> list[Tensor]:
    """A flat piece of memory in the shapes of the parameters."""
    pieces = torch.split(flat, [p.numel() for p in group])
    return [piece.view(p.shape) for piece, p in zip(pieces, group, strict=True)]


def chunks_of(group: Sequence[Tensor]) -> Iterator[tuple[slice, slice]]:
    """Consecutive parameters of one type, together no longer than a `PIECE`; a longer one is a chunk of its own.

    Yields which parameters, and where they lie in a flat piece of memory.
    """
    first = start = end = 0
    for i, param in enumerate(group):
        if i > first and (param.dtype != group[first].dtype or end - start + param.numel() > PIECE):
            yield slice(first, i), slice(start, end)
            first, start = i, end
        end += param.numel()
    yield slice(first, len(group)), slice(start, end)


def move_along_(group: Sequence[Tensor], row: Flat, length: float) -> None:
    """Add a row to a group's parameters, chunk by chunk: a chunk is copied where it does not lie beside them."""
    for members, stretch in chunks_of(group):
        chunk = list(group[members])
        there = to_device_async(row[stretch], chunk[0].device, chunk[0].dtype)
        torch._foreach_add_(chunk, views(there, chunk), alpha=length)
