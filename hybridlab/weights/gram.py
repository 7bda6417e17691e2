"""The inner products of the path's rows: all that a predictor sees of the weights."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count

import numpy as np
from jaxtyping import Float64

from hybridlab.base.settings import check_bounds, check_types

Coefficients = Float64[np.ndarray, "group row"]
"""Weights of the rows, by parameter group: a combination of rows is a motion of the weights."""


@dataclass(frozen=True)
class PathNeeds:
    """What a predictor wants remembered.

    rows: displacements in the ring; every: gradient steps that each of them spans
    velocity: decay gamma of an average of the single steps, v <- gamma v + (1 - gamma) (theta[t] - theta[t-1]);
        None for none
    direction: whether the optimizer's own direction is wanted
    """

    rows: int
    every: int
    velocity: float | None = None
    direction: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        check_bounds(self, "rows", "every", least=1)
        check_bounds(self, "velocity", least=0, below=1)

    def ends_block(self, steps: int, full_steps: int) -> bool:
        """Whether a displacement recorded after so many steps of Full is the first since a block was completed."""
        return steps >= full_steps and steps % full_steps < self.every

    def first_asked(self, full_steps: int) -> int:
        """Gradient steps of Full after which the predictor is asked for the first time."""
        records = count(max(self.rows, -(-full_steps // self.every)))
        return next(n * self.every for n in records if self.ends_block(n * self.every, full_steps))


@dataclass(frozen=True)
class PathRow:
    """One remembered direction of the weights.

    kind: "displacement" of the weights over `steps` consecutive gradient steps; "velocity", the running average of
        single steps; or "direction", the optimizer's own step at the current weights
    steps: gradient steps that the row stands for; 1 for velocity and direction
    """

    kind: str
    steps: int


@dataclass(frozen=True)
class Gram:
    """The inner products of all rows: displacements from oldest to newest, then velocity, then direction, if any.

    products: float64 [group, row, row]; a group is one of the optimizer's parameter groups
    rows: what each row is
    """

    products: Float64[np.ndarray, "group row row"]
    rows: tuple[PathRow, ...]

    def indices(self, kind: str) -> list[int]:
        """Where the rows of a kind stand, in order."""
        return [i for i, row in enumerate(self.rows) if row.kind == kind]

    def zeros(self) -> Coefficients:
        """The combination that moves nothing."""
        return np.zeros(self.products.shape[:2])

    def dot(self, a: Coefficients, b: Coefficients) -> float:
        """Inner product of two combinations of rows, over all groups."""
        return float(np.einsum("gi,gij,gj->", a, self.products, b))

    def cosine(self, a: Coefficients, b: Coefficients) -> float:
        """Cosine of the angle between two combinations; 0 where one of them has no length or is not finite."""
        length = np.sqrt(max(0.0, self.dot(a, a)) * max(0.0, self.dot(b, b)))
        return self.dot(a, b) / float(length) if np.isfinite(length) and length > 0 else 0.0

    def to_mean(self) -> Coefficients:
        """The motion from the newest recorded weights to the mean of all recorded weights.

        mean_j theta_j - theta_R = - sum_i (i / (R + 1)) row_i        i = 1 (oldest) ... R
        """
        coefficients, path = self.zeros(), self.indices("displacement")
        coefficients[:, path] = -np.arange(1, len(path) + 1) / (len(path) + 1)
        return coefficients
