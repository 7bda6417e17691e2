"""The slow drift that two window means show."""

from __future__ import annotations

import numpy as np

from hybridlab.predictors.base import Proposal, TrendFollower
from hybridlab.weights.gram import Gram, PathNeeds

WINDOW_STEPS, RECORDS = 200, 8


class River(TrendFollower):
    """Continues the drift between the means of an older and a newer window of the path.

        theta[t + H] = theta[t] + H / (W / 2) (mean of theta over the window's newer half - mean over its older half)

        mean difference = sum_i (1 - |i - h - 1| / h) row_i        i = 2 ... 2 h, row 1 the oldest

    W: the window, 200 gradient steps; h: records per half of it, 4; H: the horizon in nominal steps, of which at most
        W / 4 are taken

    Oscillation across the valley averages out of both means; the drift along the valley is left. All groups take one
    set of factors: a mean has nothing to fit.

    Source: the river valley picture of Wen et al. 2024
    (arXiv 2410.05192), turned into an extrapolation here.
    """

    def needs(self, full_steps: int) -> PathNeeds:
        """Eight displacements over the window, whatever a block's length."""
        return PathNeeds(rows=RECORDS, every=WINDOW_STEPS // RECORDS)

    def propose(self, gram: Gram, horizon: float) -> Proposal:
        """The drift, for the horizon or a quarter of the window."""
        path, coefficients = gram.indices("displacement"), gram.zeros()
        half = max(1, len(path) // 2)
        mean_difference = np.convolve(np.ones(half), np.ones(half)) / half
        half_steps = half * gram.rows[path[-1]].steps
        coefficients[:, path[-len(mean_difference) :]] = min(horizon / half_steps, 0.5) * mean_difference
        return self.proposal(gram, coefficients, horizon)
