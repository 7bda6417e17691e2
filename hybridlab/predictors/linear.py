"""Straight-line extrapolation of the weights."""

from __future__ import annotations

from hybridlab.predictors.base import Proposal, path_confidence
from hybridlab.predictors.trend import TrendFollower
from hybridlab.weights.gram import Gram, PathNeeds


class Linear(TrendFollower):
    """Goes on along the path's newest stretch at the same speed.

        theta[t + H] = theta[t] + (H / k) (theta[t] - theta[t - k])

    k is the number of gradient steps that the newest displacement spans, a quarter of a Full block, and H the horizon
    in nominal steps. Source: weight extrapolation in its plainest form, the prediction that the plan starts from.
    """

    def needs(self, full_steps: int) -> PathNeeds:
        """Four displacements a Full block."""
        return PathNeeds(rows=4, every=-(-full_steps // 4))

    def propose(self, gram: Gram, horizon: float) -> Proposal:
        """H / k on the newest displacement, nothing on the others."""
        newest = gram.indices("displacement")[-1]
        coefficients = gram.zeros()
        coefficients[:, newest] = horizon / gram.rows[newest].steps
        return Proposal(coefficients, path_confidence(gram, coefficients), self.slope * horizon)
