"""Decides from measured losses whether a jump is taken."""

from __future__ import annotations

import math
from collections.abc import Mapping

LENGTHS = (1.0, 0.5)
"""Fractions of the proposed jump that are tried, longest first."""


def judge(loss_here: float, loss_after: Mapping[float, float]) -> float:
    """The fraction of the jump to take: the tried length with the lowest loss, or 0 where none is better.

    loss_here: loss on the probe batch at the current weights, in nats
    loss_after: loss on the same batch after each tried fraction of the jump, in nats

    The comparison is paired (one batch, one dropout mask), so that it needs no estimate of the batch noise.
    A loss that is not finite is never better.
    """
    finite = {length: loss for length, loss in loss_after.items() if math.isfinite(loss)}
    best = min(finite, key=lambda length: finite[length], default=0.0)
    return best if finite and finite[best] < loss_here else 0.0
