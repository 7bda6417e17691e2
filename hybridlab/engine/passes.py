"""Forward and backward passes over a batch, whole or in micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hybridlab.base.device import gpus
from hybridlab.base.errors import UserError
from hybridlab.memory.config import MemoryConfig
from hybridlab.memory.precision import autocast

Closure = Callable[[], Tensor]
"""Forward only: returns the scalar loss of one batch, or of one part of it; backward is the trainer's."""

MicroBatches = Sequence[Closure]
"""One closure for each of the equal parts that a batch comes in."""


@runtime_checkable
class _ClipsItself(Protocol):
    def clip_(self, limit: float | None) -> Tensor: ...


class Passes:
    """Runs the closures of a batch in the number format that the memory settings name.

    params: the trainable weights; all gradients are looked for there
    optimizer: clips by itself where it steps inside backward
    """

    def __init__(self, params: Sequence[nn.Parameter], optimizer: Optimizer, memory: MemoryConfig) -> None:
        self._params, self._optimizer = params, optimizer
        self._precision, self._accumulation = memory.mixed_precision, memory.gradient_accumulation
        self._device = params[0].device

    def micro_batches_of(self, closure: Closure | MicroBatches) -> MicroBatches:
        """The closures of a batch. Raises UserError where they are none, or not as many as the settings say."""
        batch = [closure] if callable(closure) else closure
        if isinstance(batch, Tensor) or not all(callable(part) for part in batch):
            raise UserError("give step() a function that computes the loss, as in step(lambda: loss_of(model, batch))")
        wanted = self._accumulation.micro_batches if self._accumulation else len(batch) or 1
        if len(batch) != wanted:
            raise UserError(
                f"the batch came in {len(batch)} parts and {wanted} are wanted: give a list with one closure for each, "
                "the loss of an equal part of the batch"
            )
        return batch

    def backward_(self, batch: MicroBatches) -> Tensor:
        """The batch's mean loss, a scalar in nats; gradients of all parts are added up where the optimizer looks."""
        return _mean([self._backward_(closure, i, len(batch)) for i, closure in enumerate(batch)])

    def _backward_(self, closure: Closure, part: int, parts: int) -> Tensor:
        with self._format(predicting=False):
            loss = _loss_of(closure)
        if not loss.requires_grad:
            raise UserError("the loss does not depend on the weights: leave out .detach(), .item() and no_grad()")
        if not part:
            self._refuse_gradients()
        (loss / parts if parts > 1 else loss).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def forward(self, batch: MicroBatches, *, predicting: bool = False, same_noise: bool = False) -> Tensor:
        """The batch's mean loss, a scalar in nats, without backward.

        predicting: in the number format of Predict; same_noise: leave the random streams as they were
        """
        gradients = [p.grad for p in self._params]
        streams = torch.random.fork_rng(gpus(self._device), enabled=same_noise)
        with torch.no_grad(), streams, self._format(predicting):
            losses = [_loss_of(closure) for closure in batch]
        if any(p.grad is not g for p, g in zip(self._params, gradients, strict=True)):
            self._refuse_gradients()
        return _mean(losses)

    def clip_(self, limit: float | None) -> Tensor:
        """The norm of all gradients, a scalar; gradients are scaled down where it exceeds `limit`."""
        if isinstance(self._optimizer, _ClipsItself):  # it has taken the gradients away
            return self._optimizer.clip_(limit)
        if limit is None:
            return nn.utils.get_total_norm([p.grad for p in self._params if p.grad is not None])
        return nn.utils.clip_grad_norm_(self._params, limit)

    def _format(self, predicting: bool) -> AbstractContextManager[object]:
        """The number format that the settings name; else the closure's own."""
        if self._precision is None:
            return nullcontext()
        name = self._precision.predict if predicting else self._precision.training
        return autocast("fp32" if name == "fp32" else "bf16", self._device)

    def _refuse_gradients(self) -> None:
        if any(p.grad is not None for p in self._params):
            raise UserError("the closure ran backward: let it return the loss only, the trainer decides about backward")


def _loss_of(closure: Closure) -> Tensor:
    loss: object = closure()
    if not isinstance(loss, Tensor):
        raise UserError(f"the closure returned a {type(loss).__name__}: let it return the loss, a tensor of one number")
    if loss.numel() != 1:
        raise UserError(
            f"the closure returned a tensor of shape {tuple(loss.shape)}: let it return the batch's mean loss"
        )
    return loss


def _mean(losses: list[Tensor]) -> Tensor:
    """Mean of the parts' losses; of one part, its very loss."""
    return (losses[0] if len(losses) == 1 else torch.stack(losses).mean()).detach()
