"""What checkpointed blocks keep for the backward pass, in host memory."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from hybridlab.base.copy_stream import SMALL_BYTES, CopyStream
from hybridlab.base.pinned_memory import host_empty_like


@dataclass(eq=False)
class _Sent:
    """An input whose values are on the host, and the one that was sent before it, as long as that is wanted."""

    place: Tensor
    before: Callable[[], _Sent | None]


class BlockInputs:
    """Sends the inputs of checkpointed blocks to the host, and brings each back when its block is computed again.

        forward    a block's input leaves while the block computes
        backward   the input of the block before comes back while a block computes

    So at any moment the card holds two of them, and the bus is used beside the computation. Every bit comes back. Only
    what the training itself computed is sent: positions and masks, which blocks share, stay. Host memory is taken in
    the first pass and used again. Without a card the same copies happen in line.

    host: makes the place for a tensor's values

    The first forward pass raises UserError where host memory is short or cannot be pinned.
    """

    def __init__(self, host: Callable[[Tensor], Tensor] | None = None) -> None:
        self._host = host or _pinned
        self._free: defaultdict[tuple[object, ...], list[Tensor]] = defaultdict(list)
        self._stream = CopyStream(torch.device("cpu"))
        self._latest: Callable[[], _Sent | None] = _nothing
        self._on_the_way: tuple[_Sent, Tensor] | None = None

    def kept(self) -> saved_tensors_hooks:
        """What is saved for backward inside this context goes to the host."""
        return saved_tensors_hooks(self._send, self._fetch)

    def _send(self, tensor: Tensor) -> Tensor | _Sent:
        if tensor.is_leaf or tensor.nbytes < SMALL_BYTES:
            return tensor
        self._follow(tensor.device)
        sent, tensor = _Sent(self._place(tensor), self._latest), tensor.detach()
        self._copy(sent, tensor, to=sent.place, of=tensor)
        weakref.finalize(sent, self._free[_kind(tensor)].append, sent.place).atexit = False
        self._latest = weakref.ref(sent)
        return sent

    def _fetch(self, sent: Tensor | _Sent) -> Tensor:
        if isinstance(sent, Tensor):
            return sent
        tensor = self._brought(sent)
        self._stream.join()
        self._on_the_way = None
        if before := sent.before():
            self._brought(before)
        return tensor

    def _brought(self, sent: _Sent) -> Tensor:
        """The tensor on the card, its values at least on their way."""
        if self._on_the_way is None or self._on_the_way[0] is not sent:
            tensor = torch.empty_like(sent.place, device=self._stream.device)
            self._copy(sent, tensor, to=tensor, of=sent.place)
        assert self._on_the_way is not None
        return self._on_the_way[1]

    def _copy(self, sent: _Sent, tensor: Tensor, *, to: Tensor, of: Tensor) -> None:
        """Beside the computation. The card's tensor stays alive until the computation has been told to wait for it."""
        if self._on_the_way is not None:
            self._stream.join()
        with self._stream.copying():
            to.copy_(of, non_blocking=True)
        self._on_the_way = sent, tensor

    def _place(self, tensor: Tensor) -> Tensor:
        free = self._free[_kind(tensor)]
        return free.pop() if free else self._host(tensor)

    def _follow(self, device: torch.device) -> None:
        if device != self._stream.device:
            self._stream = CopyStream(device)


def _kind(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.dtype


def _pinned(tensor: Tensor) -> Tensor:
    return host_empty_like([tensor], pinned=tensor.is_cuda)[0]


def _nothing() -> None:
    return None
