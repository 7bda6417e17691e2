"""Moving weights along rows of a path."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hybridlab.base.pinned_memory import brought

Flat = Float[Tensor, " element"]
"""One parameter group, laid out in one piece of memory."""

Motion = tuple[int, Flat, float]
"""A group's number, a row of the path, and the length to go along it."""

PIECE = 1 << 24
"""Elements of a flat piece of memory that are brought to the device, or summed in float32, at a time."""


def flats_of(groups: Iterable[Sequence[Tensor]]) -> list[Flat]:
    """What each group takes in one piece of memory: its size and type, on "meta"."""
    return [torch.empty(sum(p.numel() for p in g), dtype=g[0].dtype, device="meta") for g in groups]


def views(flat: Flat, group: Sequence[Tensor]) -> list[Tensor]:
    """A flat piece of memory in the shapes of the parameters."""
    pieces = torch.split(flat, [p.numel() for p in group])
    return [piece.view(p.shape) for piece, p in zip(pieces, group, strict=True)]


def runs(group: Sequence[Tensor]) -> Iterator[tuple[slice, slice]]:
    """Consecutive parameters of one type, together no longer than a `PIECE`; a longer one is a run of its own.

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
    """Add a row to a group's parameters; where it does not lie beside them, it comes over run by run."""
    device = group[0].device
    if (row.device, row.dtype) == (device, group[0].dtype):
        torch._foreach_add_(list(group), views(row, group), alpha=length)
        return
    for members, stretch in runs(group):
        run = list(group[members])
        torch._foreach_add_(run, views(brought(row[stretch], device, run[0].dtype), run), alpha=length)
