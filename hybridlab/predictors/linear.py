"""Straight-line extrapolation of the weights."""

from __future__ import annotations

import numpy as np

from hybridlab.gram import Gram
from hybridlab.predictors.base import Proposal, path_confidence
from hybridlab.predictors.trend import TrendFollower


class Linear(TrendFollower):
    """Goes on along the path's newest stretch at the same speed.

        theta[t + H] = theta[t] + (H / k) (theta[t] - theta[t - k])

    k is the number of gradient steps that the newest displacement spans and H the horizon in nominal
    steps. Source: weight extrapolation in its plainest form, the prediction that the plan starts from.
    """

    needs_direction = False

    def propose(self, gram: Gram, horizon: float) -> Proposal:
        """H / k on the newest displacement, nothing on the others."""
        newest = max(i for i, row in enumerate(gram.rows) if row.kind == "displacement")
        coefficients = np.zeros(gram.products.shape[:2])
        coefficients[:, newest] = horizon / gram.rows[newest].steps
        return Proposal(coefficients, path_confidence(gram, newest), self.slope * horizon)
