"""Coasting along the optimizer's own direction."""

from __future__ import annotations

from dataclasses import replace

from hybridlab.predictors.base import Proposal, TrendFollower
from hybridlab.weights.gram import Gram, PathNeeds


class AdamCoast(TrendFollower):
    """Repeats the step that Adam would take if every next gradient equalled the running mean.

        theta[t + H] = theta[t] - H lr m / (sqrt(v) + eps)

    m, v: Adam's bias-corrected first and second moments; lr: its learning rate; H: the horizon in nominal steps. The
    trajectory computes the direction, the predictor its length.

    Source: Kingma & Ba 2015 (arXiv 1412.6980) for the step, held fixed over the horizon.
    """

    def needs(self, full_steps: int) -> PathNeeds:
        """The optimizer's direction, and the displacements that its confidence is computed from."""
        return replace(super().needs(full_steps), direction=True)

    def propose(self, gram: Gram, horizon: float) -> Proposal:
        """H on the optimizer's direction, nothing on the path."""
        coefficients = gram.zeros()
        coefficients[:, gram.indices("direction")] = horizon
        return self.proposal(gram, coefficients, horizon)
