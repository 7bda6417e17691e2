"""Lookahead along an average of the latest steps."""

from __future__ import annotations

from hybridlab.predictors.base import Proposal, TrendFollower, path_confidence
from hybridlab.weights.gram import Coefficients, Gram, PathNeeds

BETA, GAMMA = 0.6, 0.99


class EmaNesterov(TrendFollower):
    """Steps along the average velocity, which decays as if no further gradients came in.

        theta[t + H] = theta[t] + beta s (1 - gamma^H) / (1 - gamma) v[t]
        v[t] = gamma v[t - 1] + (1 - gamma) (theta[t] - theta[t - 1])

    v: the average of the single gradient steps; gamma: its decay, 0.99; beta: the length of the lookahead, 0.6
    s: the learning rate over the highest so far; H: the horizon in nominal steps

    H = 1 is the published lookahead, beta s v, and on a steady path a jump is worth at most beta of the steps that it
    replaces. All groups take one factor: the recurrence has no place for another.

    Source: Yau et al. 2026, EMA-Nesterov (arXiv 2605.25395).
    """

    def needs(self, full_steps: int) -> PathNeeds:
        """The velocity, and four displacements over its memory of 1 / (1 - gamma) steps, whatever a block's length."""
        return PathNeeds(rows=4, every=25, velocity=GAMMA)

    def propose(self, gram: Gram, horizon: float) -> Proposal:
        """The decaying velocity, summed over the horizon."""
        coefficients = gram.zeros()
        coefficients[:, gram.indices("velocity")] = BETA * self.lr_share * (1 - GAMMA**horizon) / (1 - GAMMA)
        return Proposal(coefficients, path_confidence(gram, _velocity_of_path(gram)), self.slope * horizon)


def _velocity_of_path(gram: Gram) -> Coefficients:
    """The velocity from the displacements: the average itself contains the stretch that must confirm it."""
    coefficients, age_steps = gram.zeros(), 0
    for i in reversed(gram.indices("displacement")):
        coefficients[:, i] = GAMMA**age_steps
        age_steps += gram.rows[i].steps
    return coefficients
