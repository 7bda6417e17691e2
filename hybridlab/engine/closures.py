"""What a user gives to a step, and what is noticed about it."""

from __future__ import annotations

import gc
import math
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hybridlab.base.device import gpus
from hybridlab.base.errors import UserError

Closure = Callable[[], Tensor]
"""Forward only: returns the scalar loss of one batch, or of one part of it; backward is the trainer's."""

CHAIN = 8
"""Nodes of the backward graph, from the loss down, in which its last operations are looked for."""


@dataclass(frozen=True)
class MicroBatches:
    """A batch, whole or in parts.

    closures: one for each part; shares: of the batch, by part; None where the parts are equal
    weight: what all parts count together, such as tokens; None where that was not given
    """

    closures: Sequence[Closure]
    shares: Sequence[float] | None = None
    weight: float | None = None

    @classmethod
    def of(cls, closure: Closure | Sequence[Closure], weights: Sequence[float] | None) -> MicroBatches:
        """The parts of a batch, and what each counts. Raises UserError for what is neither."""
        closures = [closure] if callable(closure) else closure
        if isinstance(closures, Tensor) or not all(callable(part) for part in closures):
            raise UserError("give step() a function that computes the loss, as in step(lambda: loss_of(model, batch))")
        if weights is None:
            return cls(closures)
        counts = [float(weight) for weight in weights]
        if len(counts) != len(closures) or not all(0 < count < math.inf for count in counts):
            raise UserError(
                f"weights is {counts}: give one number above 0 for each part, such as its count of tokens, and leave "
                "out parts that count nothing"
            )
        return cls(closures, [count / sum(counts) for count in counts], sum(counts))

    def share_of(self, loss: Tensor, part: int) -> Tensor:
        """What a part's loss adds to the batch's."""
        if self.shares is not None:
            return loss * self.shares[part]
        return loss / len(self.closures) if len(self.closures) > 1 else loss

    def mean(self, losses: list[Tensor]) -> Tensor:
        """The batch's loss; of one part, its very loss."""
        if len(losses) == 1:
            return losses[0].detach()
        if self.shares is None:
            return torch.stack(losses).mean().detach()
        return torch.stack([self.share_of(loss, part) for part, loss in enumerate(losses)]).sum().detach()


def loss_of(closure: Closure) -> Tensor:
    """The loss that a closure returns. Raises UserError where it is none."""
    loss: object = closure()
    if not isinstance(loss, Tensor):
        raise UserError(f"the closure returned a {type(loss).__name__}: let it return the loss, a tensor of one number")
    if loss.numel() != 1:
        raise UserError(
            f"the closure returned a tensor of shape {tuple(loss.shape)}: let it return the batch's mean loss"
        )
    return loss


# --- random numbers and batches ------------------------------------------------------------------------------


@contextmanager
def same_noise(device: torch.device) -> Iterator[None]:
    """Leave the global random streams of Python, NumPy and torch as they were."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (the global stream is what is kept)
    try:
        with torch.random.fork_rng(gpus(device)):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def calls_next(closure: Closure) -> bool:
    """Whether a closure plainly takes the next item of something."""
    return "next" in getattr(getattr(closure, "__code__", None), "co_names", ())


def warn_of_drawing() -> None:
    """The closure draws its own batch."""
    warnings.warn(
        "the closure draws a batch of its own, and is called up to six times a step, so that lengths of a jump are "
        "compared on different data: draw it before the step, as in "
        "batch = next(batches); trainer.step(lambda: loss_of(model, batch))",
        stacklevel=1,  # one place for all who call: Python shows it once
    )


# --- looking at the backward graph ---------------------------------------------------------------------------


def counted_targets(loss: Tensor) -> Tensor | None:
    """How many targets a mean cross-entropy counts, on the device; None where the loss is not plainly one."""
    for node in _chain(loss.grad_fn):
        if hasattr(node, "counted_targets"):
            return node.counted_targets  # type: ignore[no-any-return]
        if node.name().startswith("NllLoss"):
            is_count = node._saved_reduction == 1 and node._saved_weight is None  # a mean without class weights
            return node._saved_total_weight if is_count else None
    return None


def refuse_float16(loss: Tensor) -> None:
    """Refuse a loss that a GradScaler has scaled, or that was computed in float16 and would need one.

    Looks through the whole backward graph: call it once. A compiled function is one node of it, and is not seen into.
    """
    factor = getattr(loss.grad_fn, "_saved_other", None)
    if isinstance(factor, Tensor) and any(_is_scaler(owner, factor) for owner in gc.get_referrers(factor)):
        raise UserError(
            "the closure's loss was scaled by a GradScaler, and every loss and gradient norm would be too: leave the "
            "scaler out and let autocast compute in torch.bfloat16, which needs none"
        )
    if any(meta.dtype is torch.float16 for node in _nodes(loss.grad_fn) for meta in node._input_metadata):
        raise UserError(
            "the closure computes in float16, whose small gradients vanish without a GradScaler, which the trainer "
            "does not support: let autocast compute in torch.bfloat16"
        )


def _is_scaler(owner: object, factor: Tensor) -> bool:
    if isinstance(owner, dict):
        return owner.get("_scale") is factor
    return isinstance(owner, torch.amp.GradScaler)


def _chain(node: Any) -> list[Any]:
    """The first nodes of the backward graph, breadth first."""
    chain = [node] if node is not None else []
    for at in chain:
        chain += [following for following, _ in at.next_functions if following is not None]
        if len(chain) >= CHAIN:
            break
    return chain[:CHAIN]


def _nodes(root: Any) -> set[Any]:
    """All nodes of the backward graph."""
    seen, open_nodes = {root} - {None}, [root]
    while open_nodes:
        following = {node for node, _ in open_nodes.pop().next_functions if node is not None} - seen
        seen |= following
        open_nodes += following
    return seen
