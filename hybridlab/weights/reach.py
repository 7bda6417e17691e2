"""Optimizers that a prediction would not reach: those that keep weights of their own, and those around others."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from hybridlab.base.errors import UserError
from hybridlab.base.ranks import whole

KEEP_WEIGHTS = ("CPUOffloadOptimizer", "Lookahead", "ScheduleFree", "Ranger", "MADGRAD", "AccSGD")
"""Parts of the names of published optimizers that keep a copy of the weights, or the trained weights themselves."""

TORCH_STATE = {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "acc_delta", "sum"}
"""Names of the state of torch's own optimizers: never weights, whatever their numbers."""

NEAR = 0.5
"""A tensor counts as a copy of the weights where it lies nearer to them than this share of their norm."""


def refuse_own_step(optimizer: Optimizer) -> None:
    """Refuse an optimizer whose step runs forward and backward by itself.

    Raises UserError that names it.
    """
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    needs_closure = closure is not None and closure.default is inspect.Parameter.empty
    if isinstance(optimizer, torch.optim.LBFGS) or needs_closure or type(optimizer).__name__.endswith("SAM"):
        raise UserError(
            f"{type(optimizer).__name__} runs forward and backward by itself, several times per step: "
            "use AdamW, Muon or SGD"
        )


def refuse_unreachable(optimizer: Optimizer, params: Sequence[Tensor]) -> None:
    """Refuse, before training, an optimizer with weights or state where a jump and a rollback would not reach them.

    An optimizer that offers `weights_moved()` is notified of every jump, and looks after its copies itself.

    Raises UserError that names it.
    """
    name = type(optimizer).__name__
    if hasattr(optimizer, "weights_moved") or type(optimizer).__module__.startswith("hybridlab."):
        return
    if any(known.lower() in name.lower() for known in KEEP_WEIGHTS):
        raise UserError(
            f"{name} keeps weights of its own and would undo a prediction: use another, or max_predict_steps=0"
        )
    for inner in _inner_optimizers(optimizer):
        if inner.state is not optimizer.state:
            raise UserError(
                f"{name} is built around {type(inner).__name__}, whose state a rollback would not reach: give one "
                "optimizer over all weights, with a parameter group for each kind, or set max_predict_steps=0"
            )
        refuse_unreachable(inner, params)
    for attribute, value in vars(optimizer).items():
        tensors = [t for t in value if isinstance(t, Tensor)] if isinstance(value, list | tuple) else []
        if len(tensors) == len(params) and _lie_near(zip(tensors, params, strict=True)):
            raise _keeps_copy(name, attribute)
    refuse_copies_in_state(optimizer, params)


@torch.no_grad()
def refuse_copies_in_state(optimizer: Optimizer, params: Sequence[Tensor]) -> None:
    """Refuse an optimizer whose state holds a copy of the weights: its next step would undo or misread a jump.

    All tensors of one name are compared with their weights together. One alone may lie near by chance. Waits for the
    device, except for the optimizers of torch and of this library.

    Raises UserError that names the optimizer and the state.
    """
    if hasattr(optimizer, "weights_moved") or type(optimizer).__module__.startswith(("torch.optim", "hybridlab.")):
        return
    states = [(optimizer.state[p], p) for p in params if p in optimizer.state]
    for name in sorted({name for state, _ in states for name in state} - TORCH_STATE, key=str):
        if _lie_near((state[name], p) for state, p in states if isinstance(state.get(name), Tensor)):
            raise _keeps_copy(type(optimizer).__name__, name)


def notify_weights_moved(optimizer: Optimizer) -> None:
    """Let an optimizer that keeps its own copy of the weights know that they were moved."""
    if hasattr(optimizer, "weights_moved"):
        optimizer.weights_moved()


def _keeps_copy(optimizer: str, name: str) -> UserError:
    return UserError(
        f"{optimizer} keeps a copy of the weights in {name!r}, which a prediction would not reach: use an optimizer "
        "without one, give it a method weights_moved(), or set max_predict_steps=0"
    )


def _inner_optimizers(optimizer: Optimizer) -> Iterator[Optimizer]:
    for value in vars(optimizer).values():
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
        yield from (part for part in parts if isinstance(part, Optimizer))


def _lie_near(pairs: Iterable[tuple[Tensor, Tensor]]) -> bool:
    """Whether tensors lie near the weights beside them, all together."""
    alike = [(value.to(p), p) for value, p in pairs if value.shape == p.shape and not value.is_sparse]
    if not alike:
        return False
    distance = torch.nn.utils.get_total_norm([value - weight for value, weight in alike])
    norm = torch.nn.utils.get_total_norm([weight for _, weight in alike])
    return bool(whole(distance) < NEAR * whole(norm))
