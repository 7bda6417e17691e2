"""Extrapolation to the limit of the path."""

from __future__ import annotations

from math import ceil

import numpy as np
from jaxtyping import Float64

from hybridlab.predictors.base import Proposal, TrendFollower
from hybridlab.weights.gram import Gram, PathNeeds

LAMBDA = 1e-6


class Rre(TrendFollower):
    """Aims at the weights at which the remembered displacements would cancel: the path's limit.

        gamma = argmin |sum_i gamma_i d_i|^2 + lambda tr(G) |gamma|^2        subject to sum_i gamma_i = 1
        theta[t + H] = theta[t] + min(1, H / S) sum_i gamma_i (theta_i - theta[t])
                     = theta[t] - min(1, H / S) sum_m (gamma_1 + ... + gamma_(m - 1)) d_m

    d_i: the R = 8 remembered displacements, oldest first; theta_i: the weights after each; G: their Gram matrix
    lambda: 1e-6; S: gradient steps that the path spans; H: the horizon in nominal steps

    gamma is proportional to (G + lambda tr(G))^-1 1. Where displacements shrink like a geometric series this reaches
    its limit; a steady or a purely noisy path has none, gamma becomes uniform, and the jump turns back to the path's
    mean, with confidence 0. One gamma for all groups: the point must be a combination of whole weights, and pooling
    carries the least noise.

    Sources: Scieur et al. 2016, regularized nonlinear acceleration (arXiv 1606.04133); reduced rank extrapolation is
    its limit for lambda = 0.
    """

    def needs(self, full_steps: int) -> PathNeeds:
        """Eight displacements over two Full blocks; at least two steps each, or momentum would correlate them."""
        return PathNeeds(rows=8, every=max(2, ceil(full_steps / 4)))

    def propose(self, gram: Gram, horizon: float) -> Proposal:
        """Towards the limit, as far as the horizon is a share of the path."""
        path, coefficients = gram.indices("displacement"), gram.zeros()
        gamma = _cancelling_weights(gram.products.sum(axis=0)[np.ix_(path, path)])
        share = min(1.0, horizon / sum(gram.rows[i].steps for i in path))
        coefficients[:, path] = -share * (np.cumsum(gamma) - gamma)
        return self.proposal(gram, coefficients, horizon)


def _cancelling_weights(products: Float64[np.ndarray, "row row"]) -> Float64[np.ndarray, " row"]:
    """Gamma; all of it on the newest row where the path has no length."""
    size, rows = np.trace(products), len(products)
    if not 0 < size < np.inf:
        return np.eye(rows)[-1]
    solved = np.linalg.solve(products / size + LAMBDA * np.eye(rows), np.ones(rows))
    return solved / solved.sum()
