"""What a jump did to the loss, against what gradient steps without it would have done."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

WINDOW = 40
"""Latest losses before a jump that the line goes through."""

FEWEST = 4
"""Losses that a line goes through: fewer show no deviation from it."""


@dataclass
class Aftermath:
    """Remembers losses of gradient steps before and after a jump, and tells by what the jump raised them.

    before, after: in nats, one per gradient step; after is None where no jump is looked at
    predicted_steps: of the jump
    """

    before: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    after: list[float] | None = None
    predicted_steps: int = 0

    def begin(self) -> None:
        """A jump was accepted."""
        self.after, self.predicted_steps = [], 0

    def observe(self, loss: float, *, before_jump: bool) -> None:
        """Take in the loss of a gradient step; it may become known after the jump that followed it was accepted."""
        if math.isfinite(loss):
            (self.before if self.after is None or before_jump else self.after).append(loss)

    def end(self) -> float:
        """Nats per predicted step that the jump cost for certain; below 0 where it cost none. Begins anew."""
        cost = certain_rise(self.before, self.after or []) / max(1, self.predicted_steps)
        if self.after:
            self.before = deque(self.after, maxlen=WINDOW)
        self.after = None
        return cost

    def state_dict(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self) | {"before": list(self.before)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with them."""
        vars(self).update(state | {"before": deque(state["before"], maxlen=WINDOW)})


def certain_rise(before: Sequence[float], after: Sequence[float]) -> float:
    """By how much the losses after a jump lie above the line through those before it, less two standard errors.

        rise  = mean(after) - line(middle of after)          in nats
        error = s sqrt(1 / n + 1 / k + d^2 / sum_i i^2)

    n, k: losses before and after, gradient steps alone; i: steps from the middle of those before; d: to the middle of
        those after; s: standard deviation about the line. Minus infinity where there is no line

    Source: linear regression's prediction interval, for the mean of k new observations.
    """
    n, k = len(before), len(after)
    if n < FEWEST or not k:
        return -math.inf
    losses, i, d = np.array(before), np.arange(n) - (n - 1) / 2, (n + k) / 2
    slope = i @ losses / (i @ i)
    s = math.sqrt(float(np.square(losses - losses.mean() - slope * i).sum()) / (n - 2))
    error = s * math.sqrt(1 / n + 1 / k + d * d / float(i @ i))
    return float(np.mean(after) - losses.mean() - slope * d) - 2 * error
