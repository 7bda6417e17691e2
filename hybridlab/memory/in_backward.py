"""The optimizer's step, taken inside the backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hybridlab.errors import UserError


class StepInBackward(Optimizer):
    """Steps a bucket of weights as soon as its gradients are there, and frees these: they never all exist at once.

    One ordinary optimizer to whoever looks at it: groups and state are this object's, and are lent to `method` for each
    bucket. The norm of all gradients is known only when the backward pass has ended.

        g = g min(1, clip_last_norm / |g of the step before|)

    method: an optimizer that treats its parameters one by one, such as AdamW, SGD or Muon
    buckets: parameters whose gradients arrive together, such as a block's (`hybridlab.memory.blocks.buckets_of`)
    clip_last_norm: None leaves gradients alone. The first step has no step before it: take one backward pass under
        `held` before it, or it is not clipped

    Source: https://docs.pytorch.org/tutorials/intermediate/optimizer_step_in_backward_tutorial.html.
    """

    def __init__(
        self, method: Optimizer, buckets: Sequence[Sequence[nn.Parameter]], clip_last_norm: float | None = None
    ) -> None:
        super().__init__(method.param_groups, defaults={})
        self.method = method
        self._clip = clip_last_norm
        self._buckets = [list(bucket) for bucket in buckets]
        self._arrived = [0] * len(self._buckets)
        self._is_held, self._seen = False, 0
        device = self._buckets[0][0].device
        self._square_norm = torch.zeros((), device=device)
        self.param_groups[0].setdefault("clip_scale", torch.ones((), device=device))
        arrive = weakref.WeakMethod(self._arrive)
        for i, bucket in enumerate(self._buckets):
            for param in bucket:
                param.register_post_accumulate_grad_hook(partial(_call, arrive, i))  # type: ignore[no-untyped-call]

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Close the step: what got only some of its gradients steps now, and the next step's clipping is known."""
        self._clip_next_by_(self.clip_(None))

    def clip_(self, limit: float | None) -> Tensor:
        """Norm of all gradients since `zero_grad`, before clipping; no other limit than `clip_last_norm` is possible.

        Raises UserError for a limit.
        """
        if limit is not None:
            raise UserError("a step in the backward pass cannot clip by the norm of all gradients: use clip_last_norm")
        for i, arrived in enumerate(self._arrived):
            if arrived:
                self._step_bucket_(i)
        return self._square_norm.sqrt()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Begin a new step."""
        self._arrived = [0] * len(self._buckets)
        self._square_norm = torch.zeros_like(self._square_norm)
        super().zero_grad(set_to_none)

    @contextmanager
    def held(self) -> Iterator[None]:
        """While this lasts, gradients are thrown away and nothing steps; their norm sets the next step's clipping."""
        self._is_held, self._square_norm, self._seen = True, torch.zeros_like(self._square_norm), 0
        try:
            yield
        finally:
            self._is_held = False
            if self._seen:
                passes = self._seen / sum(map(len, self._buckets))
                self._clip_next_by_((self._square_norm / passes).sqrt())

    def _arrive(self, i: int, param: Tensor) -> None:
        """A gradient is there; the last of its bucket sets off the step."""
        if self._is_held:
            self._square_norm += param.grad.square().sum()  # type: ignore[union-attr]
            self._seen += 1
            param.grad = None
            return
        self._arrived[i] += 1
        if self._arrived[i] == len(self._buckets[i]):
            self._step_bucket_(i)

    @torch.no_grad()
    def _step_bucket_(self, i: int) -> None:
        self._arrived[i] = 0
        gradients = [p.grad for p in self._buckets[i] if p.grad is not None]
        self._square_norm += torch.stack(torch._foreach_norm(gradients)).square().sum()
        if self._clip is not None:
            torch._foreach_mul_(gradients, self.param_groups[0]["clip_scale"].to(gradients[0].device))
        self._lend_(set(self._buckets[i]))
        self.method.step()
        for param in self._buckets[i]:
            param.grad = None

    def _clip_next_by_(self, norm: Tensor) -> None:
        if self._clip is not None:
            self.param_groups[0]["clip_scale"] = (self._clip / (norm + 1e-6)).clamp(max=1.0)

    def _lend_(self, bucket: set[nn.Parameter]) -> None:
        """Let the method see the bucket alone, with this object's settings and state."""
        groups = [group | {"params": [p for p in group["params"] if p in bucket]} for group in self.param_groups]
        self.method.param_groups = [group for group in groups if group["params"]]
        self.method.state = self.state


def _call(method: weakref.WeakMethod[Any], i: int, param: Tensor) -> None:
    """A hook must not keep a forgotten optimizer alive."""
    if alive := method():
        alive(i, param)
