"""The inner products of the path's rows: all that a predictor sees of the weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64


@dataclass(frozen=True)
class Row:
    """One remembered direction of the weights.

    kind: "displacement", the weights' way over `steps` consecutive gradient steps, or "direction", the
        optimizer's own step at the current weights (`steps` is 1)
    steps: gradient steps that the row spans
    """

    kind: str
    steps: int


@dataclass(frozen=True)
class Gram:
    """The inner products of all rows, oldest displacement first.

    products: float64 [group, row, row]; a group is one of the optimizer's parameter groups
    rows: what each row is
    """

    products: Float64[np.ndarray, "group row row"]
    rows: tuple[Row, ...]

    def cosine(self, first: int, second: int) -> float:
        """Cosine of the angle between two rows, over all groups; 0 where one of them has no length."""
        total = self.products.sum(axis=0)
        length = np.sqrt(total[first, first] * total[second, second])
        return float(total[first, second] / length) if np.isfinite(length) and length > 0 else 0.0
