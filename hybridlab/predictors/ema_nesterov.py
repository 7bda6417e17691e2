"""Looking ahead along an average of the latest steps."""

from __future__ import annotations

from hybridlab.predictors.base import Proposal, path_confidence
from hybridlab.predictors.trend import TrendFollower
from hybridlab.weights.gram import Coefficients, Gram, PathNeeds

BETA, GAMMA = 0.6, 0.99


class EmaNesterov(TrendFollower):
    """Looks ahead along the velocity average, which is taken to fade as it does when nothing new comes in.

        theta[t + H] = theta[t] + beta s (1 - gamma^H) / (1 - gamma) v[t]
        v[t] = gamma v[t - 1] + (1 - gamma) (theta[t] - theta[t - 1])

    v is the average of the single gradient steps, gamma = 0.99 its decay, beta = 0.6 the length of the look ahead, s
    the learning rate as a share of the highest so far, and H the horizon in nominal steps. H = 1 is the published look
    ahead, beta s v, and on a steady path a jump is worth at most beta of the steps that it replaces. All groups take
    one factor: the recurrence has no place for another. Source: Yau et al. 2026, EMA-Nesterov (arXiv 2605.25395).
    """

    def needs(self, full_steps: int) -> PathNeeds:
        """The velocity, and four displacements over its memory of 1 / (1 - gamma) steps, whatever a block's length."""
        return PathNeeds(rows=4, every=25, velocity=GAMMA)

    def propose(self, gram: Gram, horizon: float) -> Proposal:
        """The fading velocity, summed over the horizon."""
        coefficients = gram.zeros()
        coefficients[:, gram.indices("velocity")] = BETA * self.lr_share * (1 - GAMMA**horizon) / (1 - GAMMA)
        return Proposal(coefficients, path_confidence(gram, _velocity_of_path(gram)), self.slope * horizon)


def _velocity_of_path(gram: Gram) -> Coefficients:
    """The velocity as the displacements tell it: the average itself still holds the stretch that must confirm it."""
    coefficients, age_steps = gram.zeros(), 0
    for i in reversed(gram.indices("displacement")):
        coefficients[:, i] = GAMMA**age_steps
        age_steps += gram.rows[i].steps
    return coefficients
