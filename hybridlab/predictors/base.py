"""What a predictor sees, and what it answers: coefficients over a remembered path, never weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64

from hybridlab.gram import Gram


@dataclass(frozen=True)
class Signals:
    """What one gradient step measured: the loss in nats, and the gradient's norm."""

    loss: float
    gradient_norm: float


@dataclass(frozen=True)
class Proposal:
    """A jump of the weights, as a combination of the path's rows.

    coefficients: float64 [group, row]; the jump is the sum of coefficient times row
    confidence: in [0, 1], how much of such a direction was confirmed lately
    loss_change: predicted change of the loss over the whole jump, in nats
    """

    coefficients: Float64[np.ndarray, "group row"]
    confidence: float
    loss_change: float

    @property
    def stays_put(self) -> bool:
        """Whether the jump moves nothing, or is not even finite: nothing to try."""
        return not np.isfinite(self.coefficients).all() or not self.coefficients.any()


@runtime_checkable
class Predictor(Protocol):
    """From signals and a path to a proposal. Holds no tensor of the model."""

    needs_direction: bool
    """Whether the Gram matrix must end with the optimizer's own direction."""

    def observe(self, signals: Signals) -> None:
        """Take note of one gradient step."""

    def propose(self, gram: Gram, horizon: float) -> Proposal:
        """Propose a jump over `horizon` nominal steps."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that `propose` depends on besides its arguments."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""


def path_confidence(gram: Gram, latest: int) -> float:
    """How far the direction `latest` was already the path's direction a while ago.

        confidence = max(0, cos(row[latest], row[0]))

    The two rows are disjoint stretches of the path, the oldest and the newest. With the default four rows
    of five steps the gap between them is ten steps, as long as the memory of a momentum of 0.9, so that
    momentum alone does not look like a trend.
    """
    return max(0.0, min(1.0, gram.cosine(0, latest)))
