"""The predictor that predicts no motion."""

from __future__ import annotations

from hybridlab.predictors.base import Proposal, TrendFollower
from hybridlab.weights.gram import Gram


class Null(TrendFollower):
    """Jumps nowhere: the control that every other predictor is compared with.

        theta[t + H] = theta[t]

    Its confidence is 0 and its jump is empty, so that a run with it takes gradient steps alone and shows
    what recording, proposing and judging cost. It records as much of the path as `linear`.
    """

    def propose(self, gram: Gram, horizon: float) -> Proposal:
        """The empty jump."""
        return Proposal(gram.zeros(), confidence=0.0, loss_change=0.0)
