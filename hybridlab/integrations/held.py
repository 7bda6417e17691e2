"""Keeps an optimizer from stepping when an outer loop says so: the hybrid trainer alone decides about steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import MethodType
from typing import Any

from torch.optim import Optimizer


def hold_(optimizer: Optimizer) -> Callable[[], AbstractContextManager[None]]:
    """Let `optimizer.step()` do nothing, but within the context that is returned."""
    take, held = optimizer.step, [True]

    def step(self: Optimizer, closure: Callable[[], float] | None = None) -> Any:
        return None if held[0] else take(closure) if closure else take()

    @contextmanager
    def stepping() -> Iterator[None]:
        held[0] = False
        try:
            yield
        finally:
            held[0] = True

    optimizer.step = MethodType(step, optimizer)  # type: ignore[method-assign]
    return stepping
