"""Weights that lie on the device in bf16, while every bit of the float32 ones can be had."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hybridlab.base.device import take_at_once, wait_for_stream
from hybridlab.base.pinned_memory import brought, host_room
from hybridlab.weights.motion import PIECE, Flat, Motion, flats_of, runs, views

Way = list[tuple[Flat, float]]
"""Rows to go along, and how far along each, one by one."""


class LowWeights:
    """Takes the float32 weights off the device, and brings them back.

        exact weights = origin + the motions since, one by one

    The origin is a copy that there is already, such as a jump's way back, wherever that lies; where there is none, one
    is made in host memory. Only bf16 weights are written while they are low: no rounding piles up, a motion crosses the
    bus in one direction, and what breaks off can be begun again.

    groups: the parameters, all of them on one device

    is_low: whether the device holds bf16 weights; motions since then have moved the exact ones alone
    """

    def __init__(self, groups: Sequence[Sequence[Tensor]]) -> None:
        self._groups, self._params = groups, [p for group in groups for p in group]
        self._device = self._params[0].device
        self._likes = [torch.empty_like(p, device="meta") for p in self._params]  # strides too
        self._origin: list[Tensor] = []
        self._motions: list[Motion] = []
        self._low: list[Flat] = []
        self._exact: list[Flat] = []
        self._room: list[Tensor] = []
        self.is_low = self._is_behind = False

    # --- where the exact ones are ------------------------------------------------------------------------

    def depart_from(self, origin: Sequence[Tensor]) -> None:
        """Parameter by parameter, the weights equal these, which stay as they are until `forget`."""
        self._origin, self._motions = list(origin), []

    def note(self, motions: Sequence[Motion]) -> None:
        """The weights move along rows that stay as they are until `forget`."""
        if self._origin:
            self._motions += motions
            self._is_behind = self.is_low

    def forget(self) -> None:
        """The weights, which must not be low, go their own way."""
        self._origin, self._motions = [], []

    def _copy(self) -> list[Tensor]:
        """The weights in host memory, which is taken once and used again."""
        self._room = self._room or host_room(self._likes, pinned=self._device.type == "cuda")
        for param, copy in zip(self._params, self._room, strict=True):
            copy.copy_(param, non_blocking=True)
        wait_for_stream(self._device)
        return self._room

    # --- down and up -------------------------------------------------------------------------------------

    def lower_(self) -> None:
        """Leave bf16 weights on the device; those that are there follow the exact ones.

        They lie in one piece: a small one of them would fit in, and hold, a stretch of the card that others have left.

        Raises UserError where host memory is short or cannot be pinned; nothing has been changed then.
        """
        if self._low:
            self._follow_()
            return
        self.raise_()  # where that had begun, and broke off
        sizes = [flat.numel() for flat in flats_of(self._groups)]
        lows = list(torch.split(torch.empty(sum(sizes), dtype=torch.bfloat16, device=self._device), sizes))
        if not self._origin:
            self.depart_from(self._copy())
        self._low, self.is_low = lows, True
        places = self._views(lows)
        torch._foreach_copy_(places, self._params)
        for param, place in zip(self._params, places, strict=True):
            param.data = place

    def _follow_(self) -> None:
        """Bring the bf16 weights to where the exact ones are by now."""
        if not self._is_behind:
            return
        lows = self._views(self._low)
        for members, way in self._runs():
            if way:
                self._place_([low.view(-1) for low in lows[members]], self._origin[members], way)
        self._is_behind = False

    def make_room_(self) -> None:
        """Take the float32 weights' memory on the device, and give up that of the bf16 ones: `raise_` comes next.

        Apart from it, so that others take theirs in between: while copies are under way, the driver gives no memory.
        """
        if not self.is_low or self._exact:
            return
        for param, origin in zip(self._params, self._origin, strict=True):
            param.data = origin
        self._low = []
        take_at_once(self._device, self._likes)
        self._exact = [torch.empty(like.numel(), dtype=like.dtype, device=self._device) for like in self._likes]

    def raise_(self) -> None:
        """Bring the float32 weights back to the device. Does nothing where they are there."""
        if not self.is_low:
            return
        self.make_room_()
        for members, way in self._runs():
            self._place_(self._exact[members], self._origin[members], way)
        for param, like, flat in zip(self._params, self._likes, self._exact, strict=True):
            exact = flat.view(like.shape)
            param.data = exact if like.is_contiguous() else torch.empty_like(like, device=self._device).copy_(exact)
        self._exact = []
        self.is_low = self._is_behind = False

    def _runs(self) -> Iterator[tuple[slice, Way]]:
        """Parameters that come over together, and the motions of each run since the origin."""
        begin = 0
        for g, group in enumerate(self._groups):
            motions = [(row, length) for to, row, length in self._motions if to == g]
            for members, stretch in runs(self._likes[begin : begin + len(group)]):
                way = [(row[stretch], length) for row, length in motions]
                yield slice(begin + members.start, begin + members.stop), way
            begin += len(group)

    def _place_(self, targets: list[Flat], origins: list[Tensor], way: Way) -> None:
        """One run; a parameter that is longer than a piece comes over piece by piece."""
        for start in range(0, sum(target.numel() for target in targets), PIECE):
            piece = slice(start, start + PIECE)
            there, flats = [target[piece] for target in targets], [origin.reshape(-1)[piece] for origin in origins]
            self._place_piece_(there, flats, [(row[piece], length) for row, length in way])

    def _place_piece_(self, targets: list[Flat], origins: list[Flat], way: Way) -> None:
        """The exact weights come over, and move; narrower targets have them rounded.

        A row that is gone along several times comes over once.
        """
        dtype, rounds = origins[0].dtype, targets[0].dtype != origins[0].dtype
        exact = [torch.empty_like(target, dtype=dtype) for target in targets] if rounds else targets
        for place, origin in zip(exact, origins, strict=True):
            place.copy_(origin, non_blocking=True)
        rows = {row.data_ptr(): row for row, _ in way}
        over = {place: views(brought(row, self._device, dtype), exact) for place, row in rows.items()}
        for row, length in way:
            torch._foreach_add_(exact, over[row.data_ptr()], alpha=length)
        if rounds:
            torch._foreach_copy_(targets, exact)

    def _views(self, flats: Sequence[Flat]) -> list[Tensor]:
        """Each parameter's place in its group's piece of memory."""
        return [view for flat, group in zip(flats, self._groups, strict=True) for view in views(flat, group)]
