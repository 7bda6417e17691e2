"""Where the optimizer's state is while weights are predicted and no optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Shaped
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from hybridlab.base.device import reserve_contiguous
from hybridlab.base.pinned_memory import SMALL_BYTES, CopyStream, host_empty_like
from hybridlab.base.weak_hook import register_hook
from hybridlab.memory.config import PredictAwareMemoryConfig
from hybridlab.optim.low_bit import torchao_optim
from hybridlab.weights.residency import Residency
from hybridlab.weights.snapshot import inside, plain_tensors

BLOCK = 256
"""Numbers that share one scale in `compress`."""

Copies = Callable[[], Mapping[int, Tensor]]
"""Says of which memory, by its address, there is a copy already; it stays as it is until the state is back."""

CHUNK = BLOCK << 14
"""Numbers that `compress` works on at a time: its intermediate results take some hundred MB."""


class StateOffload:
    """Takes the optimizer's state off the GPU for the length of a Predict phase, and brings it back.

        none       it stays
        cpu        to ordinary host memory; the computation waits
        pinned     to page-locked host memory and back, beside the computation
        compress   float32 moments become 8-bit codes, a scale for every 256, on the GPU; inexact
        drop       it is thrown away and the optimizer starts anew, its step count too; inexact

    cpu and pinned return every bit, and copy nothing where there is a copy already, as a jump's rollback snapshot has
    it. The state's tensors stay the same objects: only their memory on the GPU is freed, so whoever holds one finds it
    filled again. Host memory, as many bytes as the state, is taken at the first use, and used again.

    optimizer: any whose `state` maps parameters to their tensors, torchao's low-bit ones among them. Asked to step,
        or for its `state_dict`, while its state is away, it has the state brought back first
    config: `PredictAwareMemoryConfig`; of it, the strategy. Whoever counts steps minds its lookahead

    residency: of the state; also DEVICE where there is none to offload

    Raises UserError where torchao is wanted and missing, and, from `offload_`, where host memory is short or cannot be
    pinned; the state is then where it was.
    """

    def __init__(self, optimizer: Optimizer, config: PredictAwareMemoryConfig) -> None:
        self._optimizer, self._strategy = optimizer, config.strategy
        self._device: torch.device = optimizer.param_groups[0]["params"][0].device
        self._store: _HostStore | _EightBitStore
        if config.strategy == "compress":
            self._store = _EightBitStore()
        else:
            self._store = _HostStore(self._device, pinned=config.strategy == "pinned")
        self._storages: list[_Storage] = []
        self.residency = Residency.DEVICE
        self._hooks: list[RemovableHandle] = []
        if config.strategy not in ("none", "drop"):
            self._hook_()  # refused now, or never
            self._unhook_()

    def offload_(self, copies: Copies = dict) -> None:
        """Predict begins: free the state's memory on the GPU.

        copies: what `cpu` and `pinned` need not copy again
        """
        if self._strategy == "drop":
            for state in self._optimizer.state.values():
                state.clear()
        if self._strategy in ("none", "drop") or self.residency is not Residency.DEVICE:
            return
        self._own_state_()
        storages = list(_storages(self._optimizer, self._device))
        self._store.save(storages, copies)
        self._hook_()
        self._storages = storages  # first: an interrupt now finds all of it on the host
        self.residency = Residency.OFFLOADED if storages else Residency.DEVICE
        for storage in storages:
            storage.free_()

    def _own_state_(self) -> None:
        """Copy what lies in memory that cannot be freed, such as a loaded checkpoint's."""
        for state in self._optimizer.state.values():
            for name, value in state.items():
                if not all(tensor.untyped_storage().resizable() for tensor in plain_tensors(value)):
                    state[name] = inside(value, Tensor.clone)

    def allocate_(self) -> None:
        """Take the state's memory on the GPU, if it is offloaded."""
        if self.residency is not Residency.OFFLOADED:
            return
        reserve_contiguous(self._device, [storage.flat for storage in self._storages])
        for storage in self._storages:
            storage.allocate_()
        self.residency = Residency.ALLOCATED

    def prefetch_(self) -> None:
        """The state is wanted soon: begin its return, if it is away, beside what the computation does."""
        if self.residency in (Residency.DEVICE, Residency.RETURNING):
            return
        self.allocate_()
        self._store.load_(self._storages)
        self.residency = Residency.RETURNING

    def restore_(self) -> None:
        """Predict is over: what the computation does next finds the state in place."""
        if self.residency is not Residency.DEVICE:
            self.prefetch_()
            self._store.join()
            self._storages, self.residency = [], Residency.DEVICE
        self._unhook_()

    def _hook_(self) -> None:
        """While the state is away, whoever uses the optimizer has it brought back, and keeps this object alive."""
        for moment in ("step_pre", "state_dict_pre", "load_state_dict_pre"):
            self._hooks.append(register_hook(self._optimizer, moment, lambda *_: self.restore_()))

    def _unhook_(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()


@dataclass(frozen=True)
class _Storage:
    """All the memory that one or more of the state's tensors lie in, whether or not it is there at present."""

    flat: Shaped[Tensor, " element"]
    is_square: bool

    def free_(self) -> None:
        self.flat.untyped_storage().resize_(0)

    def allocate_(self) -> None:
        self.flat.untyped_storage().resize_(self.flat.nbytes)


def _storages(optimizer: Optimizer, device: torch.device) -> Iterator[_Storage]:
    """The pieces of memory on the device that the state lies in, each once."""
    seen: set[int] = set()
    for name, value in [item for state in optimizer.state.values() for item in state.items()]:
        for tensor in plain_tensors(value):
            storage = tensor.untyped_storage()
            if tensor.device != device or storage.nbytes() < SMALL_BYTES or storage.data_ptr() in seen:
                continue
            seen.add(storage.data_ptr())
            flat = torch.empty(0, dtype=tensor.dtype, device=device).set_(storage)  # type: ignore[call-overload]
            yield _Storage(flat, is_square=name.endswith("exp_avg_sq"))


# --- what keeps the values while the state is away -------------------------------------------------------


class _HostStore:
    """The same bytes: in copies of them all that exist already, or else in one arena of the host."""

    def __init__(self, device: torch.device, *, pinned: bool) -> None:
        self._pinned = pinned
        self._stream = CopyStream(device if pinned else torch.device("cpu"))
        self._arena: list[Tensor] = []
        self._places: list[Tensor] = []

    def save(self, storages: Sequence[_Storage], copies: Copies) -> None:
        flats, known = [storage.flat for storage in storages], copies()
        self._places = [known[flat.data_ptr()].view(-1) for flat in flats if flat.data_ptr() in known]
        if not _are_like(self._places, flats):
            self._places = self._copied(flats)

    def _copied(self, flats: Sequence[Tensor]) -> list[Tensor]:
        """Into the arena that there is, if it fits; else into one that does."""
        if not _are_like(self._arena, flats):
            self._arena = []
            self._arena = host_empty_like(flats, pinned=self._pinned)
        with self._stream.copying():
            for place, flat in zip(self._arena, flats, strict=True):
                place.copy_(flat, non_blocking=self._pinned)
                self._stream.record_use(flat)
        return self._arena

    def load_(self, storages: Sequence[_Storage]) -> None:
        with self._stream.copying():
            for place, storage in zip(self._places, storages, strict=True):
                storage.flat.copy_(place, non_blocking=self._pinned)
                self._stream.record_use(storage.flat)

    def join(self) -> None:
        self._stream.join()
        self._places = []


def _are_like(places: Sequence[Tensor], flats: Sequence[Tensor]) -> bool:
    return [(p.dtype, p.shape) for p in places] == [(f.dtype, f.shape) for f in flats]


class _EightBitStore:
    """Codes of a logarithmic kind, relative to the largest number of a block (torchao's `OptimState8bit`).

    Second moments are kept as their roots. What enters a step is the root, and their own range is wider than the
    codes': the smallest would become zero, and the steps that are divided by them immense.

    Source: https://arxiv.org/abs/2110.02861
    """

    def __init__(self) -> None:
        self._zeros = torchao_optim("strategy 'compress'").subclass_8bit.OptimState8bit.zeros
        self._kept: list[list[Tensor]] = []

    def save(self, storages: Sequence[_Storage], copies: Copies) -> None:
        self._kept = [[self._coded(piece, storage) for piece in _pieces(storage.flat)] for storage in storages]

    def load_(self, storages: Sequence[_Storage]) -> None:
        for storage, kept in zip(storages, self._kept, strict=True):
            for piece, codes in zip(_pieces(storage.flat), kept, strict=True):
                piece.copy_(codes)
                if storage.is_square and _is_coded(piece):
                    piece.square_()
        self._kept = []

    def join(self) -> None: ...

    def _coded(self, piece: Tensor, storage: _Storage) -> Tensor:
        """The codes of whole blocks; a copy of what is no whole block, or no float32."""
        if not _is_coded(piece):
            return piece.clone()
        codes: Tensor = self._zeros(piece.shape, not storage.is_square, BLOCK, piece.device)
        return codes.copy_(piece.sqrt() if storage.is_square else piece)


def _pieces(flat: Shaped[Tensor, " element"]) -> list[Tensor]:
    """Chunks of whole blocks, then the rest that fills none."""
    whole = flat.numel() // BLOCK * BLOCK
    return [piece for piece in (*torch.split(flat[:whole], CHUNK), flat[whole:]) if piece.numel()]


def _is_coded(piece: Tensor) -> bool:
    return piece.dtype == torch.float32 and piece.numel() % BLOCK == 0
