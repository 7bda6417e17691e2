"""Where the optimizer's state is while weights are predicted and no optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Shaped
from torch import Tensor
from torch.optim import Optimizer

from hybridlab.base.copy_stream import SMALL_BYTES, SideStream
from hybridlab.base.device import take_at_once
from hybridlab.base.pinned_memory import host_room
from hybridlab.memory.config import PredictAwareMemoryConfig
from hybridlab.optim.ao import torchao_optim
from hybridlab.weights.snapshot import inside, plain_tensors

BLOCK = 256
"""Numbers that share one scale in `compress`."""

Copies = Callable[[], Mapping[int, Tensor]]
"""Says of which memory, by its address, there is a copy already; it stays as it is until the state is back."""

CHUNK = BLOCK << 14
"""Numbers that `compress` works on at a time: its intermediate results take some hundred MB."""


class StateOffload:
    """Takes the optimizer's state off the card for the length of a Predict phase, and brings it back.

        none       it stays
        cpu        to ordinary host memory; the computation waits
        pinned     to page-locked host memory and back, beside the computation
        compress   float32 moments become 8-bit codes, a scale for every 256, on the card; inexact
        drop       it is thrown away and the optimizer starts anew, its step count too; inexact

    cpu and pinned return every bit, and copy nothing where there is a copy already, as a jump's way back has it. The
    state's tensors stay the same objects: only their memory on the card is given up, so whoever holds one finds it
    filled again. Host memory is taken at the first use, and used again.

    optimizer: any whose `state` maps parameters to their tensors, torchao's low-bit ones among them. Asked to step,
        or for its `state_dict`, while its state is away, it has the state brought back first
    config: `PredictAwareMemoryConfig`; of it, the strategy. Whoever counts steps minds its lookahead

    Raises UserError where torchao is wanted and missing, and, from `leave_`, where host memory is short or cannot be
    pinned; the state is then where it was.
    """

    def __init__(self, optimizer: Optimizer, config: PredictAwareMemoryConfig) -> None:
        self._optimizer, self._strategy = optimizer, config.strategy
        self._device: torch.device = optimizer.param_groups[0]["params"][0].device
        self._refuge: _Refuge
        match config.strategy:
            case "compress":
                self._refuge = _EightBits()
            case strategy:
                self._refuge = _HostMemory(self._device, pinned=strategy == "pinned")
        self._away: list[_Content] = []
        self._has_room = self._is_returning = False
        for ask_first in (
            optimizer.register_step_pre_hook,
            optimizer.register_state_dict_pre_hook,
            optimizer.register_load_state_dict_pre_hook,
        ):
            ask_first(lambda *_: self.return_())  # type: ignore[operator]

    @property
    def is_away(self) -> bool:
        """Whether the state must be brought back before it may be used."""
        return bool(self._away)

    def leave_(self, copies: Copies = dict) -> None:
        """Predict begins: free the state's memory on the card.

        copies: what `cpu` and `pinned` need not copy again
        """
        if self._strategy == "drop":
            for state in self._optimizer.state.values():
                state.clear()
        if self._strategy in ("none", "drop") or self.is_away:
            return
        self._own_state_()
        contents = list(_contents(self._optimizer, self._device))
        self._refuge.take(contents, copies)
        self._has_room = self._is_returning = False
        self._away = contents  # first: an interrupt now finds all of it on the host
        for content in contents:
            content.free_()

    def _own_state_(self) -> None:
        """Copy what lies in memory that cannot be given up, such as a loaded checkpoint's."""
        for state in self._optimizer.state.values():
            for name, value in state.items():
                if not all(tensor.untyped_storage().resizable() for tensor in plain_tensors(value)):
                    state[name] = inside(value, Tensor.clone)

    def make_room_(self) -> None:
        """Take the state's memory on the card, if it is away."""
        if self._has_room or not self._away:
            return
        take_at_once(self._device, [content.flat for content in self._away])
        for content in self._away:
            content.allocate_()
        self._has_room = True

    def prefetch_(self) -> None:
        """The state is wanted soon: begin its return, if it is away, beside what the computation does."""
        if self._is_returning or not self._away:
            return
        self.make_room_()
        self._refuge.give_back_(self._away)
        self._is_returning = True

    def return_(self) -> None:
        """Predict is over: what the computation does next finds the state in place."""
        if self.is_away:
            self.prefetch_()
            self._refuge.join()
            self._away = []


@dataclass(frozen=True)
class _Content:
    """All the memory that one or more of the state's tensors lie in, whether or not it is there at present."""

    flat: Shaped[Tensor, " element"]
    is_square: bool

    def free_(self) -> None:
        self.flat.untyped_storage().resize_(0)

    def allocate_(self) -> None:
        self.flat.untyped_storage().resize_(self.flat.nbytes)


def _contents(optimizer: Optimizer, device: torch.device) -> Iterator[_Content]:
    """The pieces of memory on the device that the state lies in, each once."""
    seen: set[int] = set()
    for name, value in [item for state in optimizer.state.values() for item in state.items()]:
        for tensor in plain_tensors(value):
            storage = tensor.untyped_storage()
            if tensor.device != device or storage.nbytes() < SMALL_BYTES or storage.data_ptr() in seen:
                continue
            seen.add(storage.data_ptr())
            flat = torch.empty(0, dtype=tensor.dtype, device=device).set_(storage)  # type: ignore[call-overload]
            yield _Content(flat, is_square=name.endswith("exp_avg_sq"))


# --- refuges ---------------------------------------------------------------------------------------------


class _Refuge(Protocol):
    """Keeps what the state's memory holds, while the memory itself is away."""

    def take(self, contents: Sequence[_Content], copies: Copies) -> None: ...

    def give_back_(self, contents: Sequence[_Content]) -> None: ...

    def join(self) -> None: ...


class _HostMemory:
    """The same bytes, where there is a copy of them all already, or else in one arena of the host."""

    def __init__(self, device: torch.device, *, pinned: bool) -> None:
        self._pinned = pinned
        self._stream = SideStream(device if pinned else torch.device("cpu"))
        self._room: list[Tensor] = []
        self._places: list[Tensor] = []

    def take(self, contents: Sequence[_Content], copies: Copies) -> None:
        flats, known = [content.flat for content in contents], copies()
        self._places = [known[flat.data_ptr()].view(-1) for flat in flats if flat.data_ptr() in known]
        if not _are_like(self._places, flats):
            self._places = self._copied(flats)

    def _copied(self, flats: Sequence[Tensor]) -> list[Tensor]:
        """Into the room that there is, if it fits; else into an arena that does."""
        if not _are_like(self._room, flats):
            self._room = []
            self._room = host_room(flats, pinned=self._pinned)
        with self._stream.copying():
            for place, flat in zip(self._room, flats, strict=True):
                place.copy_(flat, non_blocking=self._pinned)
                self._stream.keep(flat)
        return self._room

    def give_back_(self, contents: Sequence[_Content]) -> None:
        with self._stream.copying():
            for place, content in zip(self._places, contents, strict=True):
                content.flat.copy_(place, non_blocking=self._pinned)
                self._stream.keep(content.flat)

    def join(self) -> None:
        self._stream.join()
        self._places = []


def _are_like(places: Sequence[Tensor], flats: Sequence[Tensor]) -> bool:
    return [(p.dtype, p.shape) for p in places] == [(f.dtype, f.shape) for f in flats]


class _EightBits:
    """Codes of a logarithmic kind, relative to the largest number of a block (torchao's `OptimState8bit`).

    Second moments are kept as their roots. What enters a step is the root, and their own range is wider than the
    codes': the smallest would become zero, and the steps that are divided by them immense.

    Source: https://arxiv.org/abs/2110.02861
    """

    def __init__(self) -> None:
        self._zeros = torchao_optim("strategy 'compress'").subclass_8bit.OptimState8bit.zeros
        self._kept: list[list[Tensor]] = []

    def take(self, contents: Sequence[_Content], copies: Copies) -> None:
        self._kept = [[self._coded(piece, content) for piece in _pieces(content.flat)] for content in contents]

    def give_back_(self, contents: Sequence[_Content]) -> None:
        for content, kept in zip(contents, self._kept, strict=True):
            for piece, codes in zip(_pieces(content.flat), kept, strict=True):
                piece.copy_(codes)
                if content.is_square and _is_coded(piece):
                    piece.square_()
        self._kept = []

    def join(self) -> None: ...

    def _coded(self, piece: Tensor, content: _Content) -> Tensor:
        """The codes of whole blocks; a copy of what is no whole block, or no float32."""
        if not _is_coded(piece):
            return piece.clone()
        codes: Tensor = self._zeros(piece.shape, not content.is_square, BLOCK, piece.device)
        return codes.copy_(piece.sqrt() if content.is_square else piece)


def _pieces(flat: Shaped[Tensor, " element"]) -> list[Tensor]:
    """Chunks of whole blocks, then the rest that fills none."""
    whole = flat.numel() // BLOCK * BLOCK
    return [piece for piece in (*torch.split(flat[:whole], CHUNK), flat[whole:]) if piece.numel()]


def _is_coded(piece: Tensor) -> bool:
    return piece.dtype == torch.float32 and piece.numel() % BLOCK == 0
