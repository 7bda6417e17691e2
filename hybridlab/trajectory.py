"""The weights' recent path: the only file that reads or writes parameter storage."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn
from torch.optim import Optimizer

from hybridlab.errors import UserError
from hybridlab.gram import Coefficients, Gram, PathNeeds, Row

_CHUNK_ELEMENTS = 1 << 24
"""Elements of a row whose products are summed in float32, and that are brought to the device at a time."""


@dataclass(frozen=True)
class PathStorage:
    """Where the path is kept. `on_host`: in pinned host memory instead of beside the weights; `dtype`: of its rows."""

    on_host: bool = False
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Snapshot:
    """Weights and buffers as they were, and the optimizer's state unless it is None; holds copies of its own."""

    tensors: tuple[Tensor, ...]
    optimizer: dict[int, dict[str, Any]] | None

    def state_dict(self) -> dict[str, Any]:
        """The fields, by name."""
        return {"tensors": self.tensors, "optimizer": self.optimizer}


class Trajectory:
    """Remembers displacements of the weights, and moves the weights along combinations of them.

        row[i]   = theta[t_i] - theta[t_(i-1)]              t_i - t_(i-1) = `needs.every` gradient steps
        velocity = gamma^s velocity + (1 - gamma^s) row / s    at each new row, s = `needs.every`

    The rows live in a ring, each as large as the trainable weights; one more such copy holds the last recorded
    weights, one the velocity where it is wanted. Each parameter group lies in one flat piece of memory, so that
    products of rows take a few kernels, whatever the number of parameters. All of it is allocated at the first
    `anchor`. Only parameters in the optimizer's groups that require gradients take part; buffers are part of snapshots.

    Raises UserError for an optimizer that keeps a copy of the weights which a jump would not reach.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, needs: PathNeeds, storage: PathStorage) -> None:
        self._optimizer, self._needs, self._storage = optimizer, needs, storage
        groups = [[p for p in group["params"] if p.requires_grad] for group in optimizer.param_groups]
        self._groups = [group for group in groups if group]
        self._settings = [settings for settings, group in zip(optimizer.param_groups, groups, strict=True) if group]
        self._params = [p for group in self._groups for p in group]
        self._buffers = list(model.buffers())
        self._rows: list[Float[Tensor, "row element"]] = []
        self._last: list[Float[Tensor, " element"]] = []
        self._velocity: list[Float[Tensor, " element"]] = []
        self._direction: list[Float[Tensor, " element"]] = []
        self._steps = self._recorded = 0

    # --- recording ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def anchor(self) -> None:
        """Begin a new stretch at the current weights; earlier rows stay, since they are real motion still."""
        self._allocate()
        self._steps = 0
        for last, group in zip(self._last, self._groups, strict=True):
            _gather_(last, group)

    @torch.no_grad()
    def observe(self) -> bool:
        """Count a gradient step; every `needs.every`-th writes a row. Returns whether this one did."""
        self._steps += 1
        if self._steps % self._needs.every:
            return False
        for g, group in enumerate(self._groups):
            row, last = self._rows[g][self._recorded % self._needs.rows], self._last[g]
            if row.dtype == last.dtype:
                torch.sub(_gather_(row, group), last, out=row)
                _gather_(last, group)
            else:
                before = last.clone()
                row.copy_(_gather_(last, group) - before)
            if self._needs.velocity is not None:
                keep = self._needs.velocity**self._needs.every
                self._velocity[g].mul_(keep).add_(row, alpha=(1 - keep) / self._needs.every)
        self._recorded += 1
        return True

    def _allocate(self) -> None:
        """Take the memory of the path when it is first needed, and once."""
        if self._rows:
            return
        sizes = [(group[0], sum(p.numel() for p in group)) for group in self._groups]
        self._rows = [self._empty(like, self._needs.rows, size) for like, size in sizes]
        self._last = [self._empty(like, size, dtype=like.dtype) for like, size in sizes]
        if self._needs.velocity is not None:
            self._velocity = [self._empty(like, size).zero_() for like, size in sizes]

    def _empty(self, like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self._storage.dtype
        if not self._storage.on_host:
            return torch.empty(shape, dtype=dtype, device=like.device)
        return torch.empty(shape, dtype=dtype, pin_memory=like.is_cuda)

    @property
    def is_full(self) -> bool:
        """Whether every slot holds a displacement."""
        return self._recorded >= self._needs.rows

    # --- looking -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def gram(self) -> Gram:
        """Inner products of the rows by parameter group: displacements, then velocity, then direction.

        Summed in float32 over millions of elements, in float64 over those sums.
        """
        refuse_hidden_weights(self._optimizer, self._params)
        self._direction = self._optimizer_directions() if self._needs.direction else []
        rows = [Row("displacement", self._needs.every)] * len(self._slots)
        rows += [Row("velocity", 1)] * bool(self._velocity) + [Row("direction", 1)] * bool(self._direction)
        device = self._params[0].device
        products = torch.stack([_products(self._row_vectors(g), device) for g in range(len(self._groups))])
        return Gram(products.cpu().numpy(), tuple(rows))

    @torch.no_grad()
    def slopes(self, coefficients: Coefficients) -> Float64[Tensor, " group"]:
        """Derivative of the loss along a combination of rows, by group, from the gradients of the last backward."""
        device = self._params[0].device
        slopes = torch.zeros(len(self._groups), dtype=torch.float64, device=device)
        for g, group in enumerate(self._groups):
            gradient = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in group])
            for row in np.flatnonzero(coefficients[g]):
                along = self._row_vectors(g)[row].to(device, gradient.dtype)
                slopes[g] += float(coefficients[g, row]) * _dot(gradient, along)
        return slopes

    @property
    def _slots(self) -> list[int]:
        """Ring slots in use, oldest first."""
        capacity = self._needs.rows
        return [i % capacity for i in range(max(0, self._recorded - capacity), self._recorded)]

    def _row_vectors(self, g: int) -> list[Float[Tensor, " element"]]:
        """The rows of one group, in the order of the Gram matrix."""
        more = [kind[g] for kind in (self._velocity, self._direction) if kind]
        return [self._rows[g][slot] for slot in self._slots] + more

    def _optimizer_directions(self) -> list[Float[Tensor, " element"]]:
        return [
            torch.cat([optimizer_direction(self._optimizer, p, settings).flatten() for p in group])
            for group, settings in zip(self._groups, self._settings, strict=True)
        ]

    # --- moving ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def move_(self, coefficients: Coefficients, fraction: float = 1.0) -> None:
        """Add `fraction` times the combination of rows to the weights, in place. Every jump passes here.

        coefficients: of the rows in the order of the last `gram()`
        """
        for g, group in enumerate(self._groups):
            for row in np.flatnonzero(coefficients[g] * fraction):
                motion = self._row_vectors(g)[row].to(group[0].device, group[0].dtype)
                torch._foreach_add_(group, _views(motion, group), alpha=float(coefficients[g, row] * fraction))
        tell_of_jump(self._optimizer)

    @torch.no_grad()
    def snapshot(self, *, optimizer: bool = True) -> Snapshot:
        """A copy of weights and buffers, and of the optimizer's state unless told otherwise, where the path is kept."""
        states = self._optimizer.state
        saved = {i: self._copied(states[p]) for i, p in enumerate(self._params) if p in states} if optimizer else None
        return Snapshot(tuple(self._stored(t) for t in self._tensors), saved)

    def _copied(self, state: dict[str, Any]) -> dict[str, Any]:
        return {key: self._stored(value) if isinstance(value, Tensor) else value for key, value in state.items()}

    def _stored(self, tensor: Tensor) -> Tensor:
        if not (self._storage.on_host and tensor.is_cuda):
            return tensor.detach().clone()
        return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor.detach())

    @torch.no_grad()
    def restore_(self, snapshot: Snapshot) -> None:
        """Put everything that a snapshot holds back exactly as it was."""
        _copy_(self._tensors, snapshot.tensors)
        if snapshot.optimizer is not None:
            for i, param in enumerate(self._params):
                _restore_state_(self._optimizer.state, param, snapshot.optimizer.get(i))
        tell_of_jump(self._optimizer)

    @property
    def _tensors(self) -> list[Tensor]:
        return [*self._params, *self._buffers]

    # --- checkpoints -------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The remembered path."""
        stored = {"rows": self._rows, "last": self._last, "velocity": self._velocity, "direction": self._direction}
        return stored | {"recorded": self._recorded, "steps": self._steps}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with a remembered path of the same model."""
        if state["rows"]:
            self._allocate()
        for mine, saved in ((self._rows, "rows"), (self._last, "last"), (self._velocity, "velocity")):
            _copy_(mine, state[saved])
        self._direction = [
            saved.to(group[0].device) for saved, group in zip(state["direction"], self._groups, strict=False)
        ]
        self._recorded, self._steps = state["recorded"], state["steps"]


# --- optimizers ------------------------------------------------------------------------------------------


def optimizer_direction(optimizer: Optimizer, param: Tensor, group: dict[str, Any]) -> Tensor:
    """The step that an Adam-like optimizer would repeat if the next gradient equalled its running mean.

        -lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    Raises UserError where the optimizer keeps no such moments for the parameter.
    """
    state = optimizer.state.get(param, {})
    if "exp_avg" not in state or "betas" not in group:
        raise UserError(
            f"adam_coast needs Adam's moments, and {type(optimizer).__name__} keeps none for a parameter of shape "
            f"{tuple(param.shape)}: use AdamW, or predictor='linear'"
        )
    beta1, beta2 = group["betas"]
    step = float(state["step"])
    spread = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
    return (state["exp_avg"] / spread).mul_(-float(group["lr"]) / (1 - beta1**step))


HOLD_THE_WEIGHTS = ("CPUOffloadOptimizer",)
"""Optimizers whose own copy of the weights, kept outside their state, is the one that counts."""


def refuse_hidden_weights(optimizer: Optimizer, params: Iterable[Tensor]) -> None:
    """Refuse an optimizer whose state holds a copy of the weights: its next step would undo or misread a jump.

    An optimizer that offers `weights_moved()` is told of every jump and looks after its copies itself. A state tensor
    counts as a copy when it has the parameter's shape and lies nearer to the parameter than half its length.

    Raises UserError that names the optimizer and the state.
    """
    if hasattr(optimizer, "weights_moved") or type(optimizer).__module__.startswith(("torch.optim", "hybridlab.")):
        return
    if type(optimizer).__name__ in HOLD_THE_WEIGHTS:
        raise UserError(
            f"{type(optimizer).__name__} holds the weights itself and would overwrite a prediction: use another"
        )
    for param in params:
        for name, value in optimizer.state.get(param, {}).items():
            if isinstance(value, Tensor) and value.shape == param.shape and _lies_near(value, param):
                raise UserError(
                    f"{type(optimizer).__name__} keeps a copy of the weights in its state {name!r}, which a prediction "
                    "would not reach: use an optimizer without one, or give it a method weights_moved()"
                )


def tell_of_jump(optimizer: Optimizer) -> None:
    """Let an optimizer that keeps its own copy of the weights know that they were moved."""
    if hasattr(optimizer, "weights_moved"):
        optimizer.weights_moved()


def _lies_near(value: Tensor, param: Tensor) -> bool:
    weights = param.detach().float()
    length = weights.norm()
    return bool(length > 0) and bool((value.to(weights) - weights).norm() < 0.5 * length)


# --- lists of tensors ------------------------------------------------------------------------------------


def _copy_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(list(targets), list(sources))


def _gather_(flat: Float[Tensor, " element"], group: Sequence[Tensor]) -> Float[Tensor, " element"]:
    """Copy parameters into their flat piece of memory, and return it."""
    torch._foreach_copy_(_views(flat, group), list(group))
    return flat


def _views(flat: Float[Tensor, " element"], group: Sequence[Tensor]) -> list[Tensor]:
    """A flat piece of memory in the shapes of the parameters."""
    pieces = torch.split(flat, [p.numel() for p in group])
    return [piece.view(p.shape) for piece, p in zip(pieces, group, strict=True)]


def _products(rows: Sequence[Float[Tensor, " element"]], device: torch.device) -> Float64[Tensor, "row row"]:
    """Inner products of rows, brought to the device piece by piece."""
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=device)
    for start in range(0, rows[0].numel() if rows else 0, _CHUNK_ELEMENTS):
        pieces = [row[start : start + _CHUNK_ELEMENTS].to(device, torch.float32) for row in rows]
        for i, j in itertools.combinations_with_replacement(range(len(rows)), 2):
            total[i, j] += torch.dot(pieces[i], pieces[j])
    return torch.triu(total) + torch.triu(total, diagonal=1).T


def _dot(a: Float[Tensor, " element"], b: Float[Tensor, " element"]) -> Float64[Tensor, ""]:
    """Inner product of two vectors, in float32 by the piece, in float64 over the pieces."""
    pieces = zip(torch.split(a, _CHUNK_ELEMENTS), torch.split(b, _CHUNK_ELEMENTS), strict=True)
    return torch.stack([torch.dot(x, y) for x, y in pieces]).sum(dtype=torch.float64)


def _restore_state_(states: Any, param: Tensor, saved: dict[str, Any] | None) -> None:
    """Copy into the tensors that are there, so that graphs and fused kernels keep their addresses."""
    if saved is None:
        states.pop(param, None)
        return
    state = states[param]
    for key in state.keys() - saved.keys():
        del state[key]
    for key, value in saved.items():
        if isinstance(value, Tensor) and isinstance(state.get(key), Tensor):
            state[key].copy_(value)
        else:
            state[key] = value.clone() if isinstance(value, Tensor) else value
