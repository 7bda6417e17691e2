"""The mean of the weights over the last steps of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hybridlab.base.ranks import local, spread


class TailAverage:
    """The mean of weights over steps, in float32: uniform, or exponential.

        mean <- mean + (weights - mean) / n                  at the n-th step; uniform
        mean <- decay mean + (1 - decay) weights             exponential; the first step's weights begin it

    It costs 4 bytes per weight beside the weights from its first step on, as much again while it is `in_place`, and a
    pass over both at each step.

    params: the weights, of which each rank averages the parts that it holds; decay: 0 is the uniform mean

    Source: Izmailov et al. 2018 (arXiv 1803.05407).
    """

    def __init__(self, params: Sequence[Tensor], decay: float = 0.0) -> None:
        self._params, self._parts, self._decay = list(params), [local(p) for p in params], decay
        self._mean: list[Tensor] = []
        self.count = 0

    @property
    def nbytes(self) -> int:
        """What the mean takes beside the weights."""
        return sum(mean.nbytes for mean in self._mean)

    @torch.no_grad()
    def add_(self) -> None:
        """Take in the weights as they are."""
        self.count += 1
        weights = [p.detach().float() for p in self._parts]
        if self.count == 1:
            self._mean = [weight.clone() for weight in weights]
        else:
            torch._foreach_lerp_(self._mean, weights, 1.0 - self._decay if self._decay else 1.0 / self.count)

    def begin_anew(self) -> None:
        """Forget the steps so far, as after a rollback."""
        self.count = 0

    @contextmanager
    @torch.no_grad()
    def in_place(self) -> Iterator[None]:
        """Inside, the weights are their mean; after it, what they were, bit for bit."""
        with put_back(self._parts):
            torch._foreach_copy_(self._parts, self._mean)
            yield

    def state_dict(self) -> dict[str, Any]:
        """The mean, and the number of its steps."""
        mean = [spread(mean, like=p) for mean, p in zip(self._mean, self._params, strict=False)]
        return {"count": self.count, "mean": mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.count = state["count"]
        self._mean = [local(mean).to(p.device) for mean, p in zip(state["mean"], self._parts, strict=False)]


@contextmanager
@torch.no_grad()
def put_back(weights: Sequence[Tensor]) -> Iterator[None]:
    """After it, the weights are what they were, bit for bit, whatever was written into them inside."""
    kept = [weight.detach().clone() for weight in weights]
    try:
        yield
    finally:
        if kept:
            torch._foreach_copy_(list(weights), kept)
