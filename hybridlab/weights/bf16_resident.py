"""The float32 weights, which may leave the device while bf16 ones stand in for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hybridlab.base.device import reserve_contiguous, wait_for_stream
from hybridlab.base.pinned_memory import host_empty_like, to_device_async
from hybridlab.weights.motion import PIECE, Flat, Motion, chunks_of, views
from hybridlab.weights.residency import Residency

Moves = list[tuple[Flat, float]]
"""Rows to move along one by one, and the length along each."""


class Fp32Weights:
    """The float32 weights of some parameters: on the device, or offloaded with bf16 ones in their place.

        exact weights = base + the motions since, one by one

    The base is a copy that exists already, such as a jump's rollback snapshot, wherever that lies; where there is none,
    one is made in host memory. Only bf16 weights are written while the others are offloaded: no rounding adds up, a
    motion crosses the bus in one direction, and what was interrupted can be called again.

    groups: the parameters, all of them on one device

    residency: DEVICE: the parameters are float32; OFFLOADED: they are bf16, 2 bytes per number, in one piece of memory;
        ALLOCATED: memory for the float32 ones is taken again, 4 bytes per number
    """

    def __init__(self, groups: Sequence[Sequence[Tensor]]) -> None:
        self._groups, self._params = groups, [p for group in groups for p in group]
        self._device = self._params[0].device
        self._templates = [torch.empty_like(p, device="meta") for p in self._params]  # strides too
        self._motions: list[Motion] | None = None
        self._base: Sequence[Tensor] = ()
        self._host_copy: list[Tensor] = []
        self._bf16: list[Flat] = []
        self._fp32: list[Flat] = []
        self._rounded = 0  # motions that are in the bf16 weights
        self.residency = Residency.DEVICE

    # --- where the exact ones are ------------------------------------------------------------------------

    def set_base(self) -> None:
        """The weights equal a snapshot of the caller's, who hands it to `offload_`: motions are recorded from here."""
        self._motions = []

    @property
    def has_base(self) -> bool:
        """Whether all motions since the base are known."""
        return self._motions is not None

    def record(self, motions: Sequence[Motion]) -> None:
        """The weights move along rows that stay as they are until `restore_`."""
        if self._motions is not None:
            self._motions += motions

    def _copy_to_host(self) -> list[Tensor]:
        """The weights in host memory, which is taken once and used again."""
        self._host_copy = self._host_copy or host_empty_like(self._templates, pinned=self._device.type == "cuda")
        for param, copy in zip(self._params, self._host_copy, strict=True):
            copy.copy_(param, non_blocking=True)
        wait_for_stream(self._device)
        return self._host_copy

    # --- leaving and returning ---------------------------------------------------------------------------

    @torch.no_grad()
    def offload_(self, base: Sequence[Tensor] | None = None) -> None:
        """Leave bf16 weights on the device; those that are there already follow the motions since.

        They lie in one piece: a small one of them would fit in, and hold, a stretch of memory that others have left.

        base: the weights as they were at `set_base`, parameter by parameter, and whatever comes after them; it stays as
            it is until `restore_`. None, or a base that was never set, has the weights copied to host memory

        Raises UserError where host memory is short or cannot be pinned; nothing has been changed then.
        """
        if self._bf16:
            self._round_again_()
            return
        self.restore_(keep_base=True)  # where that had begun, and was interrupted
        sizes = [sum(p.numel() for p in group) for group in self._groups]
        bf16 = list(torch.split(torch.empty(sum(sizes), dtype=torch.bfloat16, device=self._device), sizes))
        if base is None or self._motions is None:
            base, self._motions = self._copy_to_host(), []
        self._base, self._bf16, self.residency = base, bf16, Residency.OFFLOADED
        self._rounded = len(self._motions)
        places = self._views(bf16)
        torch._foreach_copy_(places, self._params)
        for param, place in zip(self._params, places, strict=True):
            param.data = place

    def _round_again_(self) -> None:
        """Bring the bf16 weights to where the exact ones are by now."""
        motions = self._motions or []
        if self._rounded == len(motions):
            return
        places = self._views(self._bf16)
        for members, moves in self._chunks():
            if moves:
                self._place_([place.view(-1) for place in places[members]], self._base[members], moves)
        self._rounded = len(motions)

    def allocate_(self) -> None:
        """Take the float32 weights' memory on the device, and free that of the bf16 ones: `restore_` comes next.

        Apart from it, so that others take theirs in between: while copies are under way, the driver gives no memory.
        """
        if self.residency is not Residency.OFFLOADED:
            return
        for param, base in zip(self._params, self._base, strict=False):
            param.data = base
        self._bf16 = []
        reserve_contiguous(self._device, self._templates)
        self._fp32 = [torch.empty(t.numel(), dtype=t.dtype, device=self._device) for t in self._templates]
        self.residency = Residency.ALLOCATED

    @torch.no_grad()
    def restore_(self, *, keep_base: bool = False) -> None:
        """Bring the float32 weights back to the device. Copies nothing where they are there.

        keep_base: they are looked at, and the jump goes on; else they may be trained, and no copy stands for them
        """
        if self.residency is not Residency.DEVICE:
            self.allocate_()
            for members, moves in self._chunks():
                self._place_(self._fp32[members], self._base[members], moves)
            for param, like, flat in zip(self._params, self._templates, self._fp32, strict=True):
                exact = flat.view(like.shape)
                param.data = exact if like.is_contiguous() else torch.empty_like(like, device=self._device).copy_(exact)
            keep_base = keep_base and self._base is not self._host_copy
            self._base, self._fp32, self.residency = (), [], Residency.DEVICE
        if not keep_base:
            self._motions = None

    def _chunks(self) -> Iterator[tuple[slice, Moves]]:
        """Parameters that are copied together, and the motions of each chunk since the base."""
        begin = 0
        for g, group in enumerate(self._groups):
            motions = [(row, length) for to, row, length in self._motions or [] if to == g]
            for members, stretch in chunks_of(self._templates[begin : begin + len(group)]):
                moves = [(row[stretch], length) for row, length in motions]
                yield slice(begin + members.start, begin + members.stop), moves
            begin += len(group)

    def _place_(self, targets: list[Flat], bases: Sequence[Tensor], moves: Moves) -> None:
        """One chunk; a parameter that is longer than a piece is copied piece by piece."""
        for start in range(0, sum(target.numel() for target in targets), PIECE):
            piece = slice(start, start + PIECE)
            there, flats = [target[piece] for target in targets], [base.reshape(-1)[piece] for base in bases]
            self._place_piece_(there, flats, [(row[piece], length) for row, length in moves])

    def _place_piece_(self, targets: list[Flat], bases: list[Flat], moves: Moves) -> None:
        """The exact weights are copied, and move; narrower targets have them rounded.

        A row that is used several times is copied once.
        """
        dtype, rounds = bases[0].dtype, targets[0].dtype != bases[0].dtype
        exact = [torch.empty_like(target, dtype=dtype) for target in targets] if rounds else targets
        for place, base in zip(exact, bases, strict=True):
            place.copy_(base, non_blocking=True)
        rows = {row.data_ptr(): row for row, _ in moves}
        copied = {place: views(to_device_async(row, self._device, dtype), exact) for place, row in rows.items()}
        for row, length in moves:
            torch._foreach_add_(exact, copied[row.data_ptr()], alpha=length)
        if rounds:
            torch._foreach_copy_(targets, exact)

    def _views(self, flats: Sequence[Flat]) -> list[Tensor]:
        """Each parameter's place in its group's piece of memory."""
        return [view for flat, group in zip(flats, self._groups, strict=True) for view in views(flat, group)]
