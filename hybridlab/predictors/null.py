"""The predictor that predicts no motion."""

from __future__ import annotations

from typing import Any

from hybridlab.predictors.base import Proposal, Signals
from hybridlab.weights.gram import Gram, PathNeeds


class Null:
    """Jumps nowhere: the control that every other predictor is held against.

        theta[t + H] = theta[t]

    Its confidence is 0 and its jump is empty, so that a run with it takes gradient steps alone and shows
    what recording, proposing and judging cost.
    """

    def needs(self, full_steps: int) -> PathNeeds:
        """As much as `linear`, so that the cost of recording shows."""
        return PathNeeds(rows=4, every=-(-full_steps // 4))

    def observe(self, signals: Signals) -> None:
        """Nothing to note."""

    def propose(self, gram: Gram, horizon: float) -> Proposal:
        """The empty jump."""
        return Proposal(gram.zeros(), confidence=0.0, loss_change=0.0)

    def state_dict(self) -> dict[str, Any]:
        """Nothing to carry."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""
