"""Forward and backward passes over a batch, whole or in micro-batches."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hybridlab.base.errors import UserError
from hybridlab.base.ranks import local
from hybridlab.engine.closures import (
    MicroBatches,
    calls_next,
    counted_targets,
    loss_of,
    refuse_float16,
    same_noise,
    warn_of_drawing,
)
from hybridlab.engine.result import AsyncScalar
from hybridlab.memory.config import MemoryConfig
from hybridlab.memory.precision import autocast
from hybridlab.optim.in_backward import StepInBackward
from hybridlab.weights.snapshot import Weights


@runtime_checkable
class _ClipsItself(Protocol):
    def clip_(self, limit: float | None) -> Tensor: ...


class Passes:
    """Runs the closures of a batch in the number format that the memory settings name.

    Before each pass autocast's cache of lowered weights is cleared: whoever calls `step` inside an autocast region
    would else compute with the weights as they were before they moved.

    weights: the trainable ones; all gradients are looked for there
    optimizer: clips by itself where it steps inside backward
    """

    def __init__(self, weights: Weights, optimizer: Optimizer, memory: MemoryConfig) -> None:
        self._weights, self._optimizer = weights, optimizer
        self._precision, self._accumulation = memory.mixed_precision, memory.gradient_accumulation
        self._first_backward = self._first_probe = True
        self._unequal: AsyncScalar | None = None

    def check_parts(self, batch: MicroBatches) -> None:
        """Raise UserError where a batch does not come in the parts that settings and optimizer can take."""
        given = len(batch.closures)
        wanted = self._accumulation.micro_batches if self._accumulation else given or 1
        if given != wanted:
            raise UserError(
                f"the batch came in {given} parts and {wanted} are wanted: give a list with one closure for each, "
                "the loss of an equal part of the batch"
            )
        if given > 1 and isinstance(self._optimizer, StepInBackward):
            raise UserError(
                "the optimizer steps inside backward, and would step once for each part of the batch: give the batch "
                "whole, or leave step_in_backward off"
            )
        self._refuse_unequal(wait=True)

    def backward_(self, batch: MicroBatches) -> Tensor:
        """The batch's mean loss, a scalar in nats; gradients of all parts are added up where the optimizer looks."""
        torch.clear_autocast_cache()
        losses, counts = [], []
        for part, closure in enumerate(batch.closures):
            with self._format(predicting=False):
                loss = loss_of(closure)
            if not loss.requires_grad:
                raise UserError("the loss does not depend on the weights: leave out .detach(), .item() and no_grad()")
            if not part:
                self._refuse_gradients()
            if self._first_backward:
                refuse_float16(loss)
                self._first_backward = False
            if self._weights.ranks.count > 1 or len(batch.closures) > 1:
                counts.append(counted_targets(loss))
            with self._weights.without_reduction(last=part == len(batch.closures) - 1):
                batch.share_of(loss, part).backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        self._weights.average_gradients_()
        self._compare(batch, counts)
        return self._weights.ranks.mean(batch.mean(losses))

    def _compare(self, batch: MicroBatches, counts: list[Tensor | None]) -> None:
        """Whether all parts that weigh alike count equally many targets: known at once, or by the next step.

        Ranks weigh alike too: the parts of all are compared, or what each was given as its weight. One that does not
        know its own counts says -1.
        """
        ranks, known = self._weights.ranks, [count for count in counts if count is not None]
        if batch.weight is not None or len(known) < len(counts):
            weight = torch.full((), batch.weight or -1.0, device=self._weights.device)
            known = [weight] if ranks.count > 1 else []
        if known:
            self._unequal = AsyncScalar(ranks.spread(torch.stack(known).double()))
            self._refuse_unequal(wait=False)

    def _refuse_unequal(self, *, wait: bool) -> None:
        unequal = self._unequal
        if unequal is not None and (wait or unequal.is_ready):
            self._unequal = None
            if float(unequal):
                way = (
                    "give each rank as many, or train in one process"
                    if self._weights.ranks.count > 1
                    else "give step(parts, weights=[...]) the number of targets that each part counts"
                )
                raise UserError(
                    "the parts of the batch count different numbers of targets, and their mean losses would weigh "
                    f"alike: {way}"
                )

    def forward(self, batch: MicroBatches, *, predicting: bool = False, probing: bool = False) -> Tensor:
        """The batch's mean loss, a scalar in nats, without backward.

        predicting: in the number format of Predict
        probing: several of a step are compared: leave the random streams as they were
        """
        torch.clear_autocast_cache()
        gradients = [p.grad for p in self._weights.params]
        if probing and self._first_probe:
            self._first_probe = False
            if any(calls_next(closure) for closure in batch.closures):
                warn_of_drawing()
        streams = same_noise(self._weights.device) if probing else nullcontext()
        with torch.no_grad(), streams, self._format(predicting):
            losses = [loss_of(closure) for closure in batch.closures]
        self._weights.reshard_()
        if any(p.grad is not g for p, g in zip(self._weights.params, gradients, strict=True)):
            self._refuse_gradients()
        return self._weights.ranks.mean(batch.mean(losses))

    def clip_(self, limit: float | None) -> Tensor:
        """The norm of all gradients, a scalar; gradients are scaled down where it exceeds `limit`."""
        if isinstance(self._optimizer, _ClipsItself):  # it has taken the gradients away
            return self._optimizer.clip_(limit)
        params, ranks = self._weights.params, self._weights.ranks
        gradients = [local(p.grad) for p in self._weights.held if p.grad is not None]
        norm = nn.utils.get_total_norm([g.coalesce().values() if g.is_sparse else g for g in gradients])
        if ranks.sharded:
            parts = norm.to(self._weights.device, torch.float64).square()  # 0 of a rank that counts no weight
            norm = ranks.total(parts).sqrt().to(params[0].dtype)
        if limit is not None and ranks.sharded:  # on shards at once: DTensors would be taken apart one by one
            scale = (limit / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([local(p.grad) for p in params if p.grad is not None], scale)
        elif limit is not None:
            nn.utils.clip_grads_with_norm_(params, limit, norm)
        return norm

    def _format(self, predicting: bool) -> AbstractContextManager[object]:
        """The number format that the settings name; else the closure's own."""
        if self._precision is None:
            return nullcontext()
        name = self._precision.predict if predicting else self._precision.training
        return autocast("fp32" if name == "fp32" else "bf16", self._weights.device)

    def _refuse_gradients(self) -> None:
        if any(p.grad is not None for p in self._weights.params):
            raise UserError("the closure ran backward: let it return the loss only, the trainer decides about backward")
