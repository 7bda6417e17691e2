"""An optimizer that trains beside the mean of its own weights: Generalized Primal Averaging."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hybridlab.base.ranks import local
from hybridlab.optim.stepping import run_closure, step_with_
from hybridlab.weights.tail_average import put_back

LEAD = "lead"


class PrimalAveraging(Optimizer):
    """A method that steps z, by gradients at y, which lies between z and the mean x of all z so far; x is the result.

        z <- z + the method's step, by the gradient at y
        x <- decay x + (1 - decay) z
        y  = share x + (1 - share) z

    The parameters hold y. Their state holds lead = z - x beside the method's own, as many numbers as the weights:

        z = y + share lead;    lead <- decay (lead + step);    y = z - share lead;    x = y - (1 - share) lead

    so that whatever moves the parameters, as a jump does, moves z and x along, and what copies weights and state copies
    all three. A parameter without a gradient stays as it is. `averaged_weights` puts x in place.

    With decay 0 it is the method, bit for bit; with share 0, the method and an exponential `TailAverage` of its run.

    method: any optimizer; groups and state are this object's, and are lent to it (`step_with_`)
    decay: of the mean, in [0, 1), which remembers 1 / (1 - decay) steps; share: of the mean in y, in [0, 1]. Both may
        be a group's own, as "average_decay" and "average_share"

    Raises ValueError for others, and for a method that is a PrimalAveraging.

    Source: Defazio et al. 2025 (arXiv 2512.17131), whose mu_x is decay and mu_y is share.
    """

    def __init__(self, method: Optimizer, decay: float, share: float) -> None:
        if not (0 <= decay < 1 and 0 <= share <= 1):
            raise ValueError(f"decay {decay} is to lie in [0, 1), and share {share} in [0, 1]")
        if isinstance(method, PrimalAveraging):
            raise ValueError("the method keeps a mean of its own already: give the optimizer within")
        own = {"average_decay": decay, "average_share": share}
        super().__init__(method.param_groups, method.defaults | own)
        self.method = method

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step every parameter that has a gradient, and the mean after it."""
        loss = run_closure(closure)
        stepped = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        groups = [(group, params) for group, params in zip(self.param_groups, stepped, strict=True) if params]
        leads = {p: self.state[p][LEAD] if LEAD in self.state[p] else torch.zeros_like(p) for ps in stepped for p in ps}
        for group, params in groups:
            weights, lead = _parts(params, leads)
            torch._foreach_add_(weights, lead, alpha=group["average_share"])
            torch._foreach_sub_(lead, weights)
        step_with_(self.method, self.param_groups, self.state)
        for group, params in groups:
            weights, lead = _parts(params, leads)
            torch._foreach_add_(lead, weights)
            torch._foreach_mul_(lead, group["average_decay"])
            torch._foreach_sub_(weights, lead, alpha=group["average_share"])
        for p, value in leads.items():
            self.state[p][LEAD] = value
        return loss

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"method": self.method}


@contextmanager
@torch.no_grad()
def averaged_weights(optimizer: Optimizer) -> Iterator[None]:
    """Inside, the parameters of a `PrimalAveraging` are their mean; after it, what they were, bit for bit.

    Of any other optimizer they stay as they are. It takes the memory of the weights once more.
    """
    groups = [(g, [p for p in g["params"] if LEAD in optimizer.state.get(p, {})]) for g in optimizer.param_groups]
    averaged = [(g["average_share"], *_parts(ps, {p: optimizer.state[p][LEAD] for p in ps})) for g, ps in groups if ps]
    with put_back([weight for _, weights, _ in averaged for weight in weights]):
        for share, weights, lead in averaged:
            torch._foreach_sub_(weights, lead, alpha=1.0 - share)
        yield


def method_of(optimizer: Optimizer) -> Optimizer:
    """What steps the weights in the end: of an optimizer around another one, the inner one."""
    while isinstance(inner := getattr(optimizer, "method", None), Optimizer):
        optimizer = inner
    return optimizer


def _parts(params: list[Tensor], leads: dict[Tensor, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """What lies on this rank of parameters and of their leads."""
    return [local(p) for p in params], [local(leads[p]) for p in params]
