"""Counting live memory, tensor by tensor."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

GRAIN_BYTES = 512
"""The CUDA caching allocator hands out multiples of this."""

RANDOM_FILLS = (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default)
"""They change no memory; drawing fake numbers would take longer than all the rest of building a model."""


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts, while it is active, the bytes of every tensor's storage from its first use to its end, by part.

    now: bytes alive at this moment, by part; peak: the same when their sum was greatest since `reset_peak`
    logit_widths: lengths of a last dimension that make a new tensor of two dimensions or more "logits"
    new_part: the part that other new tensors belong to until `tag` says better; None: they are not on the GPU

    Sizes are rounded up as the CUDA caching allocator does. Views count once, with what they look at.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: Counter[str] = Counter()
        self.peak: dict[str, int] = {}
        self.logit_widths: frozenset[int] = frozenset()
        self.new_part: str | None = "activations"
        self._total = self._peak_total = 0
        self._storages: dict[int, tuple[int, str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in RANDOM_FILLS:
            return args[0]
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor):
                self._count(value)
        return out

    def reset_peak(self) -> None:
        """Begin a new peak at what is alive now."""
        self._peak_total, self.peak = self._total, dict(self.now)

    @contextmanager
    def counting_as(self, part: str | None) -> Iterator[None]:
        """Set `new_part` inside the context."""
        self.new_part, before = part, self.new_part
        try:
            yield
        finally:
            self.new_part = before

    def tag(self, tensors: Iterable[Tensor], part: str) -> None:
        """Say what these tensors are."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            size, before = self._storages[key]
            self._storages[key] = size, part
            self.now[before] -= size
            self.now[part] += size

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size, part = -(-storage.nbytes() // GRAIN_BYTES) * GRAIN_BYTES, self.new_part
        if part is None:
            size, part = 0, "elsewhere"
        elif tensor.ndim > 1 and tensor.shape[-1] in self.logit_widths:
            part = "logits"
        self._storages[key] = size, part
        weakref.finalize(storage, self._forget, key).atexit = False
        self.now[part] += size
        self._total += size
        if self._total > self._peak_total:
            self.reset_peak()

    def _forget(self, key: int) -> None:
        size, part = self._storages.pop(key)
        self.now[part] -= size
        self._total -= size
