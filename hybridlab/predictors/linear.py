"""Straight-line extrapolation of the weights."""

from __future__ import annotations

from hybridlab.predictors.base import Proposal, TrendFollower, along_newest
from hybridlab.weights.gram import Gram


class Linear(TrendFollower):
    """Continues the path's newest stretch at the same speed.

        theta[t + H] = theta[t] + (H / k) (theta[t] - theta[t - k])

    k: gradient steps that the newest displacement spans, a quarter of a Full block; H: the horizon in nominal steps

    Source: weight extrapolation in its plainest form, the prediction that the plan starts from.
    """

    def propose(self, gram: Gram, horizon: float) -> Proposal:
        """H / k on the newest displacement, nothing on the others."""
        return self.proposal(gram, along_newest(gram, horizon), horizon)
