"""After a jump: how long it should have been, and what that says about the next ones."""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64

GroupValues = Float64[np.ndarray, " group"]

LONGEST = 1.5
"""Upper bound of a wanted length, in units of the jump: beyond it the straight line is not to be trusted."""

NEIGHBOURS = 8
STORED_CASES = 64


def wanted_length(slope_before: GroupValues, slope_after: GroupValues) -> GroupValues:
    """Where along the jump each parameter group's slope vanishes, in units of the jump: a secant step.

        length = s0 / (s0 - s1)

    slope_before (s0), slope_after (s1): derivative of the loss along the jump at its two ends, in nats a jump. A group
    whose slope was not falling at the start wants length 0; one that falls at least as steeply at the end, `LONGEST`.
    Slopes that are not finite leave the jump as it is (1). Source: the secant method on the derivative (Nocedal &
    Wright, Numerical Optimization, section 3.5).
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        length = slope_before / (slope_before - slope_after)
    length = np.where(slope_after <= slope_before, LONGEST, length)
    length = np.where(slope_before >= 0, 0.0, length)
    known = np.isfinite(slope_before) & np.isfinite(slope_after)
    return np.where(known, np.clip(length, 0.0, LONGEST), 1.0)


@dataclass(frozen=True)
class Case:
    """One jump that was corrected.

    confidence: of its proposal; loss_error: measured minus predicted loss at its end, in nats
    wanted: length that the correction asked for, mean over groups, in units of the length taken
    """

    confidence: float
    loss_error: float
    wanted: float


class ResidualStore:
    """Remembers how earlier jumps turned out, and lets the similar ones weigh what is done next."""

    def __init__(self) -> None:
        self._cases: deque[Case] = deque(maxlen=STORED_CASES)

    def add(self, case: Case) -> None:
        """Remember a case; one that is not finite teaches nothing."""
        if np.isfinite([case.confidence, case.loss_error, case.wanted]).all():
            self._cases.append(case)

    def blend(self, length: GroupValues, confidence: float) -> GroupValues:
        """A wanted length, drawn toward what similar jumps wanted: half of it comes from them."""
        return length if not self._cases else 0.5 * length + 0.5 * self.expected_length(confidence)

    def expected_length(self, confidence: float) -> float:
        """Mean wanted length of the `NEIGHBOURS` cases nearest in confidence; 1 where there are none.

        Scales the next proposal.
        """
        nearest = sorted(self._cases, key=lambda case: abs(case.confidence - confidence))[:NEIGHBOURS]
        return float(np.mean([case.wanted for case in nearest])) if nearest else 1.0

    def state_dict(self) -> dict[str, Any]:
        """All cases."""
        return {"cases": [asdict(case) for case in self._cases]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with remembered cases."""
        self._cases = deque((Case(**case) for case in state["cases"]), maxlen=STORED_CASES)
