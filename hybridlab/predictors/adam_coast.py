"""Coasting along the optimizer's own direction."""

from __future__ import annotations

from hybridlab.predictors.base import Proposal, path_confidence
from hybridlab.predictors.trend import TrendFollower
from hybridlab.weights.gram import Gram, PathNeeds


class AdamCoast(TrendFollower):
    """Repeats the step that Adam would take if every next gradient equalled the running mean.

        theta[t + H] = theta[t] - H lr m / (sqrt(v) + eps)

    m and v are Adam's bias-corrected first and second moments, lr its learning rate and H the horizon in nominal
    steps. The trajectory computes the direction; here stands its length. Source: Kingma & Ba 2015 (arXiv 1412.6980)
    for the step, held fixed over the horizon.
    """

    def needs(self, full_steps: int) -> PathNeeds:
        """The optimizer's direction, and an older stretch of the path to hold it against."""
        return PathNeeds(rows=4, every=-(-full_steps // 4), direction=True)

    def propose(self, gram: Gram, horizon: float) -> Proposal:
        """H on the optimizer's direction, nothing on the path."""
        coefficients = gram.zeros()
        coefficients[:, gram.indices("direction")] = horizon
        return Proposal(coefficients, path_confidence(gram, coefficients), self.slope * horizon)
