"""The closure that torch lets a step be given."""

from __future__ import annotations

from collections.abc import Callable

import torch


def run_closure(closure: Callable[[], float] | None) -> float | None:
    """The loss of a step's closure, computed with gradients; None where none was given."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
