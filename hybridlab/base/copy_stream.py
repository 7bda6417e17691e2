"""Copies between the GPU and the host, beside the computation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

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
