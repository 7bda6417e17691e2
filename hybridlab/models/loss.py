"""The cross-entropy of a linear output layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

IGNORED_TARGET = -100

ROWS_IN_FLOAT32 = 256
"""Tokens whose log-probabilities exist at a time; compiled code has no need of them."""

ROWS_AT_ONCE = 8192
"""Of the layer's weight: of a piece's gradient so many exist at a time, beside the sum of all pieces."""

Hidden = Float[Tensor, "tokens dim"]
Head = Float[Tensor, "rows dim"]


def linear_cross_entropy(
    x: Hidden, weight: Head, targets: Int[Tensor, " tokens"], vocab_size: int, chunk_tokens: int = 0
) -> Float[Tensor, ""]:
    """Mean cross-entropy in nats, in float32, of the logits that a linear layer gives.

        L = -1/N sum over tokens n of log softmax(x_n weight^T)[target_n]

    The gradients are computed beside the loss and written over the logits: of these there is one copy, in the format in
    which the layer computes, and nothing is computed twice.

    x: what the layer is given; weight: of the layer; rows beyond vocab_size take no part
    targets: -100 does not count; N is the number of the others. Where all are -100, as in a batch of padding, loss and
        gradients are 0, where `torch.nn.functional.cross_entropy` gives NaN
    chunk_tokens: tokens whose logits exist at a time; 0 takes all
    """
    chunk = chunk_tokens or max(1, len(targets))
    compute: Callable[..., Tensor] = _LinearCrossEntropy.apply
    return compute(x, weight, targets, vocab_size, chunk, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    """The loss in its forward pass, together with both gradients, which the backward pass scales."""

    @staticmethod
    def forward(
        ctx: Any, x: Hidden, weight: Head, targets: Tensor, vocab_size: int, chunk: int, with_gradients: bool
    ) -> Tensor:
        count = (targets != IGNORED_TARGET).sum()
        if not torch.compiler.is_compiling():
            ctx.counted_targets = count  # for whoever compares the parts of a batch
        scale = 1.0 / count.clamp(min=1)
        layer = weight.to(_computing_dtype(weight))
        losses: list[Tensor] = []
        to_x: list[Tensor] = []
        to_weight: Tensor | None = None
        for piece, goals in _pairs(x.to(layer.dtype), targets, chunk):
            logits = F.linear(piece, layer)
            rows = len(goals) if torch.compiler.is_compiling() else ROWS_IN_FLOAT32
            for part, its_goals in _pairs(logits[:, :vocab_size], goals, rows):
                losses.append(_loss_of_(part, its_goals, scale if with_gradients else None))
            if with_gradients:
                logits[:, vocab_size:] = 0.0
                to_x.append(logits @ layer)
                to_weight = _added_to_(to_weight, logits, piece, whole=chunk >= len(targets))
        if with_gradients:
            ctx.save_for_backward(torch.cat(to_x).to(x.dtype), to_weight)
            ctx.weight_dtype = weight.dtype
        return torch.stack(losses).sum() * scale

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        to_x, to_weight = ctx.saved_tensors
        return to_x * scale, to_weight.to(ctx.weight_dtype, copy=True).mul_(scale), None, None, None, None


def _added_to_(to_weight: Tensor | None, to_logits: Tensor, piece: Hidden, *, whole: bool) -> Tensor:
    """The gradient of the layer's weight after one more piece. Of what is added, `ROWS_AT_ONCE` rows exist at a time.

    whole: whether this is the only piece: the gradient is in the format in which the layer computes then, else float32
    """
    if whole:
        return to_logits.mT @ piece
    if to_weight is None:
        to_weight = to_logits.new_zeros(to_logits.shape[1], piece.shape[1], dtype=torch.float32)
    for rows, columns in zip(
        torch.split(to_weight, ROWS_AT_ONCE), torch.split(to_logits, ROWS_AT_ONCE, 1), strict=True
    ):
        rows += columns.mT @ piece
    return to_weight


def _pairs(x: Tensor, goals: Tensor, rows: int) -> Iterable[tuple[Tensor, Tensor]]:
    """Both, so many rows at a time."""
    return zip(torch.split(x, rows), torch.split(goals, rows), strict=True)


def _computing_dtype(weight: Tensor) -> torch.dtype:
    """The format in which a linear layer of this weight computes here."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def _loss_of_(logits: Float[Tensor, "tokens vocab"], goals: Tensor, scale: Tensor | None) -> Tensor:
    """The sum of their cross-entropies; with a scale, the logits are replaced by scale (softmax - one-hot)."""
    log_probs = F.log_softmax(logits, dim=1, dtype=torch.float32)
    loss = F.nll_loss(log_probs, goals, ignore_index=IGNORED_TARGET, reduction="sum")
    if scale is not None:
        each, columns = scale * (goals != IGNORED_TARGET).unsqueeze(1), goals.clamp(min=0).unsqueeze(1)
        if torch.compiler.is_compiling():  # computed where it is used: a scatter would be another copy of the logits
            to_log_probs = torch.where(torch.arange(logits.shape[1], device=goals.device) == columns, -each, 0.0)
        else:
            to_log_probs = torch.zeros_like(log_probs).scatter_(1, columns, -each)
        logits.copy_(torch.ops.aten._log_softmax_backward_data(to_log_probs, log_probs, 1, torch.float32))
    return loss
