"""What most predictors share: they follow the loss's own trend, to forecast it."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np

from hybridlab.predictors.base import Signals

WINDOW_STEPS = 20


class TrendFollower:
    """A predictor's memory of the latest losses and learning rate, and the losses' least-squares slope."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=WINDOW_STEPS)
        self.lr_share = 1.0

    def observe(self, signals: Signals) -> None:
        """Remember a loss; one that is not finite says nothing about a trend."""
        self.lr_share = signals.lr_share
        if np.isfinite(signals.loss):
            self._losses.append(signals.loss)

    @property
    def slope(self) -> float:
        """Nats a step; 0 with fewer than two losses."""
        losses = np.array(self._losses)
        if len(losses) < 2:
            return 0.0
        steps = np.arange(len(losses)) - (len(losses) - 1) / 2
        return float(steps @ losses / (steps @ steps))

    def state_dict(self) -> dict[str, Any]:
        """The remembered losses and learning rate."""
        return {"losses": list(self._losses), "lr_share": self.lr_share}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what was remembered."""
        self._losses = deque(state["losses"], maxlen=WINDOW_STEPS)
        self.lr_share = state["lr_share"]
