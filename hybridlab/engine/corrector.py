"""After a jump: how long it should have been, and what that says about the next ones."""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64

GroupValues = Float64[np.ndarray, " group"]

MAX_LENGTH = 1.5
"""Upper bound of a wanted length, in units of the jump: further out the straight line is no good model."""

MIN_LENGTH = 0.05
"""Lower bound of an expected length: a jump that moves nothing would never teach that jumps pay again."""

NEIGHBOURS = 8
STORED_OUTCOMES = 64


def wanted_length(slope_before: GroupValues, slope_after: GroupValues) -> GroupValues:
    """Where along the jump each parameter group's slope vanishes, in units of the jump: a secant step.

        length = s0 / (s0 - s1)

    slope_before (s0), slope_after (s1): [group], derivative of the loss along the jump at its two ends, in nats per
        jump. A group whose slope was not falling at the start wants length 0; one that falls at least as steeply at the
        end, `MAX_LENGTH`. Slopes that are not finite leave the jump as it is (1)

    Source: the secant method on the derivative (Nocedal & Wright, Numerical Optimization, section 3.5).
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        length = slope_before / (slope_before - slope_after)
    length = np.where(slope_after <= slope_before, MAX_LENGTH, length)
    length = np.where(slope_before >= 0, 0.0, length)
    known = np.isfinite(slope_before) & np.isfinite(slope_after)
    return np.where(known, np.clip(length, 0.0, MAX_LENGTH), 1.0)


@dataclass(frozen=True)
class JumpOutcome:
    """One jump that was corrected.

    confidence: of its proposal; loss_error: measured minus predicted loss at its end, in nats
    wanted: length at which the slope of the loss along the jump vanishes, all groups together, in units of the
        predictor's own proposal: those in which `expected_length` scales the next one
    """

    confidence: float
    loss_error: float
    wanted: float


class ResidualStore:
    """Remembers how earlier jumps turned out, and draws the next ones toward what similar jumps wanted."""

    def __init__(self) -> None:
        self._outcomes: deque[JumpOutcome] = deque(maxlen=STORED_OUTCOMES)

    def add(self, outcome: JumpOutcome) -> None:
        """Remember an outcome, unless it is not finite."""
        if np.isfinite([outcome.confidence, outcome.loss_error, outcome.wanted]).all():
            self._outcomes.appendleft(outcome)  # the latest first

    def blend(self, length: GroupValues, confidence: float, taken: float) -> GroupValues:
        """The mean of a wanted length [group] and of what similar jumps wanted, in units of the jump.

        taken: length of the jump, in units of the predictor's proposal
        """
        if not self._outcomes:
            return length
        return 0.5 * length + 0.5 * min(MAX_LENGTH, self.expected_length(confidence) / taken)

    def expected_length(self, confidence: float) -> float:
        """Mean wanted length of the `NEIGHBOURS` outcomes nearest in confidence, of these the latest; 1 at first.

        Scales the next proposal; within [`MIN_LENGTH`, `MAX_LENGTH`].
        """
        nearest = sorted(self._outcomes, key=lambda outcome: abs(outcome.confidence - confidence))[:NEIGHBOURS]
        mean = float(np.mean([outcome.wanted for outcome in nearest])) if nearest else 1.0
        return min(MAX_LENGTH, max(MIN_LENGTH, mean))

    def state_dict(self) -> dict[str, Any]:
        """All outcomes."""
        return {"outcomes": [asdict(outcome) for outcome in self._outcomes]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with remembered outcomes."""
        self._outcomes = deque((JumpOutcome(**outcome) for outcome in state["outcomes"]), maxlen=STORED_OUTCOMES)
