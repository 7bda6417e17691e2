"""Nesterov momentum over long strides."""

from __future__ import annotations

import numpy as np

from hybridlab.predictors.base import Proposal, TrendFollower
from hybridlab.weights.gram import Gram, PathNeeds

STRIDE_STEPS, ETA, MU = 30, 0.7, 0.4


class Snoo(TrendFollower):
    """Takes the outer step that Nesterov momentum over strides of K gradient steps would take.

        b[k] = mu b[k - 1] + D[k]
        theta[t + H] = theta[t - K] + eta (D[k] + mu b[k])
                     = theta[t] + (eta - 1) D[k] + eta mu b[k]        for H >= K; H / K of it for less

    D[k]: the newest stride, theta[t] - theta[t - K], of K = 30 steps; b: the outer momentum, here over the four
        remembered strides; H: the horizon in nominal steps
    eta: the outer learning rate, 0.7; mu: the outer momentum's decay, 0.4

    Part of the newest stride is undone, so that on a steady path a whole jump is worth about 0.15 K steps. All groups
    take one set of factors: the recurrence has no place for another.

    Source: Kallusky et al. 2025, SNOO (arXiv 2510.15830).
    """

    def needs(self, full_steps: int) -> PathNeeds:
        """Four strides, whatever a block's length; what is older weighs mu^4, less than 3 %."""
        return PathNeeds(rows=4, every=STRIDE_STEPS)

    def propose(self, gram: Gram, horizon: float) -> Proposal:
        """The outer step, relative to the newest weights."""
        path, coefficients = gram.indices("displacement"), gram.zeros()
        outer_momentum = MU ** np.arange(len(path))[::-1]
        jump = ETA * MU * outer_momentum
        jump[-1] += ETA - 1
        coefficients[:, path] = min(1.0, horizon / gram.rows[path[-1]].steps) * jump
        return self.proposal(gram, coefficients, horizon)
