"""What a predictor sees, what it proposes, and what most predictors share."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from math import ceil
from typing import Any, Protocol, runtime_checkable

import numpy as np

from hybridlab.weights.gram import Coefficients, Gram, PathNeeds

MOMENTUM_MEMORY_STEPS = 10
"""Steps after which a momentum of 0.9 has forgotten two thirds: nearer stretches resemble each other by it alone."""
TREND_STEPS = 20


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

        jump = sum_i coefficients[:, i] row[i]        per parameter group

    coefficients: float64 [group, row]
    confidence: in [0, 1], how much of such a direction the path has confirmed
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
    """Makes proposals from signals and a path. Holds no tensor of the model."""

    def needs(self, full_steps: int) -> PathNeeds:
        """What the path has to record, for Full blocks of `full_steps` gradient steps."""

    def observe(self, signals: Signals) -> None:
        """Take in one gradient step."""

    def propose(self, gram: Gram, horizon: float) -> Proposal:
        """Propose a jump over `horizon` nominal steps, a number above 0 that need not be whole."""

    def skill(self) -> float | None:
        """How good its forecasts of the loss were; None where it makes none, and before the first came due.

        1 - squared error over persistence's: 1 is perfect, 0 no better
        """

    def state_dict(self) -> dict[str, Any]:
        """Everything that `propose` depends on besides its arguments: plain containers, numbers and tensors."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from where `state_dict` was taken."""


def path_confidence(gram: Gram, coefficients: Coefficients) -> float:
    """How far the jump's direction was already the path's direction earlier; in [0, 1].

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


def along_newest(gram: Gram, horizon: float) -> Coefficients:
    """H / k on the newest displacement, which spans k steps: the horizon H at the path's latest speed."""
    coefficients, newest = gram.zeros(), gram.indices("displacement")[-1]
    coefficients[:, newest] = horizon / gram.rows[newest].steps
    return coefficients


class TrendFollower:
    """A predictor that forecasts the loss by its trend; subclasses choose the coefficients.

        loss change = slope H        over a horizon of H nominal steps

    slope: of the least-squares line through the latest `TREND_STEPS` losses, in nats per step
    lr_share: the latest learning rate over the highest one so far, in [0, 1]
    """

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=TREND_STEPS)
        self.lr_share = 1.0

    def needs(self, full_steps: int) -> PathNeeds:
        """Four displacements per Full block."""
        return PathNeeds(rows=4, every=ceil(full_steps / 4))

    def observe(self, signals: Signals) -> None:
        """Remember a loss, unless it is not finite."""
        self.lr_share = signals.lr_share
        if np.isfinite(signals.loss):
            self._losses.append(signals.loss)

    @property
    def slope(self) -> float:
        """Nats per step; 0 with fewer than two losses."""
        losses = np.array(self._losses)
        if len(losses) < 2:
            return 0.0
        steps = np.arange(len(losses)) - (len(losses) - 1) / 2
        return float(steps @ losses / (steps @ steps))

    def proposal(self, gram: Gram, coefficients: Coefficients, horizon: float) -> Proposal:
        """A jump by these coefficients, with the path's confidence in it and the loss change by the trend."""
        return Proposal(coefficients, path_confidence(gram, coefficients), self.slope * horizon)

    def skill(self) -> float | None:
        """None: a trend is no forecast to be scored."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """The remembered losses and learning rate."""
        return {"losses": list(self._losses), "lr_share": self.lr_share}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with what was remembered."""
        self._losses = deque(state["losses"], maxlen=TREND_STEPS)
        self.lr_share = state["lr_share"]
