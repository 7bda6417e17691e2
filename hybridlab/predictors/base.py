"""What a predictor sees, and what it answers: coefficients over a remembered path, never weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from hybridlab.weights.gram import Coefficients, Gram, PathNeeds

MOMENTUM_MEMORY_STEPS = 10
"""Steps after which a momentum of 0.9 has forgotten two thirds: nearer stretches resemble each other by it alone."""


@dataclass(frozen=True)
class Signals:
    """What one gradient step measured.

    loss: in nats; gradient_norm: before clipping; lr_share: learning rate over the highest one so far, in [0, 1]
    """

    loss: float
    gradient_norm: float
    lr_share: float = 1.0


@dataclass(frozen=True)
class Proposal:
    """A jump of the weights, as a combination of the path's rows.

    coefficients: float64 [group, row]; the jump is the sum of coefficient times row
    confidence: in [0, 1], how much of such a direction was confirmed lately
    loss_change: predicted change of the loss over the whole jump, in nats
    """

    coefficients: Coefficients
    confidence: float
    loss_change: float

    @property
    def is_empty(self) -> bool:
        """Whether the jump moves nothing, or is not finite."""
        return not np.isfinite(self.coefficients).all() or not self.coefficients.any()


@runtime_checkable
class Predictor(Protocol):
    """From signals and a path to a proposal. Holds no tensor of the model."""

    def needs(self, full_steps: int) -> PathNeeds:
        """What to remember of the weights, for Full blocks of `full_steps` gradient steps."""

    def observe(self, signals: Signals) -> None:
        """Take note of one gradient step."""

    def propose(self, gram: Gram, horizon: float) -> Proposal:
        """Propose a jump over `horizon` nominal steps, a number above 0 that need not be whole."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that `propose` depends on besides its arguments: plain containers, numbers and tensors."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""


@runtime_checkable
class Forecaster(Protocol):
    """A predictor that forecasts the loss, and scores its own forecasts."""

    def skill(self) -> float | None:
        """1 - squared error over persistence's: 1 is perfect, 0 worth nothing; None before the first came due."""


def path_confidence(gram: Gram, coefficients: Coefficients) -> float:
    """How far the jump's direction was already the path's direction a while ago.

        confidence = max(0, cos(jump', row[0]))

    row[0] is the oldest displacement; jump' is the jump without its share in row[0] and in every displacement that
    begins within `MOMENTUM_MEMORY_STEPS` after it, so that the two stretches are disjoint and momentum alone does not
    look like a trend. A jump that is nothing but those rows has confidence 0.
    """
    oldest = gram.zeros()
    oldest[:, 0] = 1.0
    later = coefficients.copy()
    for i in gram.indices("displacement"):
        steps_between = (i - 1) * gram.rows[i].steps
        if i == 0 or steps_between < MOMENTUM_MEMORY_STEPS:
            later[:, i] = 0.0
    return min(1.0, max(0.0, gram.cosine(later, oldest))) if np.isfinite(later).all() else 0.0
