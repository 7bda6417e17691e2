"""A linear law of motion, fitted to the path."""

from __future__ import annotations

from math import ceil

import numpy as np
from jaxtyping import Complex128, Float64

from hybridlab.predictors.base import Proposal, TrendFollower
from hybridlab.weights.gram import Gram, PathNeeds

NOISE_RATIO = 2**0.5
"""Singular values are kept above this many times their median: the optimal cut for a matrix far taller than wide."""
ROUNDING = 1e-6
"""... and above this share of the largest, below which a Gram matrix in float64 knows nothing."""


class Dmd(TrendFollower):
    """Fits the linear map from each displacement to the next, and applies it to the newest one.

        d[r + 1] = A d[r],   A = Y X^+,   X = (d[1] ... d[R - 1]),   Y = (d[2] ... d[R])
        theta[t + H] = theta[t] + sum_{j = 1 ... H / k} A^j d[R]        a last part row counts for its part

    d[r]: the R = 8 remembered displacements of k gradient steps each; H: the horizon in nominal steps

    With X = U S V^T truncated, all of it follows from the Gram matrix: S and V from X^T X, the reduced map
    U^T A U = S^-1 V^T (X^T Y) V S^-1, and the jump as the combination V S^-1 q of Y's columns. The map's eigenvalues
    are clipped to modulus 1, so that nothing grows; a path in which nothing stands out from noise gets no jump.
    One map for all groups: seven pairs of rows fit few numbers, and pooled inner products carry the least noise.

    Sources: Tu et al. 2014, exact DMD (arXiv 1312.0041); Gavish & Donoho 2014 for the cut (arXiv 1305.5870).
    """

    def needs(self, full_steps: int) -> PathNeeds:
        """Eight displacements over two Full blocks; at least two steps each, or momentum would correlate them."""
        return PathNeeds(rows=8, every=max(2, ceil(full_steps / 4)))

    def propose(self, gram: Gram, horizon: float) -> Proposal:
        """The sum of the coming displacements, as a combination of the remembered ones."""
        path, coefficients = gram.indices("displacement"), gram.zeros()
        products = gram.products.sum(axis=0)[np.ix_(path, path)]
        if len(path) > 1 and np.isfinite(products).all():
            coefficients[:, path[1:]] = _sum_of_next(products, horizon / gram.rows[path[-1]].steps)
        return self.proposal(gram, coefficients, horizon)


def _sum_of_next(products: Float64[np.ndarray, "row row"], rows_ahead: float) -> Float64[np.ndarray, " later_row"]:
    """Sum of A^j d[R] over the rows ahead, as weights of d[2] ... d[R]: Y's columns have taken one step already."""
    x_by_x, x_by_y = products[:-1, :-1], products[:-1, 1:]
    modes = _above_noise(x_by_x)
    reduced_map = modes.T @ x_by_y @ modes
    newest = modes.T @ x_by_y[:, -1:]
    eigenvalues, eigenvectors = np.linalg.eig(reduced_map)
    amplitudes = np.linalg.pinv(eigenvectors) @ newest
    growth = np.maximum(1.0, np.abs(eigenvalues))
    sums = _sum_of_powers(eigenvalues / growth, rows_ahead) / growth
    return (modes @ (eigenvectors @ (sums[:, None] * amplitudes)).real)[:, 0]


def _above_noise(x_by_x: Float64[np.ndarray, "column column"]) -> Float64[np.ndarray, "column mode"]:
    """V S^-1 of the singular values that stand out."""
    energies, vectors = np.linalg.eigh(x_by_x)
    singular_values = np.sqrt(np.maximum(energies, 0.0))
    floor = max(ROUNDING * singular_values.max(initial=0.0), NOISE_RATIO * float(np.median(singular_values)))
    kept = singular_values > floor
    return vectors[:, kept] / singular_values[kept]


def _sum_of_powers(eigenvalues: Complex128[np.ndarray, " mode"], terms: float) -> Complex128[np.ndarray, " mode"]:
    """1 + z + z^2 + ... to `terms` terms, the last one in part."""
    powers = np.arange(int(terms) + 1)
    return eigenvalues[:, None] ** powers @ np.clip(terms - powers, 0.0, 1.0)
