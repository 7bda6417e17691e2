"""The weights' recent path: the only file that reads or writes parameter storage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Float64
from torch import Tensor, nn
from torch.optim import Optimizer

from hybridlab.errors import UserError
from hybridlab.gram import Coefficients, Gram, PathNeeds, Row

_PIECE_ELEMENTS = 1 << 10
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
    weights, one the velocity where it is wanted. All of it is allocated at the first `anchor`. Only parameters in the
    optimizer's groups that require gradients take part; buffers are part of snapshots.

    Raises UserError for an optimizer that keeps a copy of the weights which a jump would not reach.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, needs: PathNeeds, storage: PathStorage) -> None:
        self._optimizer, self._needs, self._storage = optimizer, needs, storage
        trained = [[p for p in group["params"] if p.requires_grad] for group in optimizer.param_groups]
        self._params = [p for group in trained for p in group]
        self._groups = _slices([len(group) for group in trained])
        self._buffers = list(model.buffers())
        self._rows: list[Tensor] = []
        self._last: list[Tensor] = []
        self._velocity: list[Tensor] = []
        self._direction: list[Tensor] = []
        self._steps = self._recorded = 0

    # --- recording ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def anchor(self) -> None:
        """Begin a new stretch at the current weights; earlier rows stay, since they are real motion still."""
        self._allocate()
        self._steps = 0
        _copy_(self._last, self._params)

    @torch.no_grad()
    def observe(self) -> bool:
        """Count a gradient step; every `needs.every`-th writes a row. Returns whether this one did."""
        self._steps += 1
        if self._steps % self._needs.every:
            return False
        slot = [rows[self._recorded % self._needs.rows] for rows in self._rows]
        _subtract_(slot, self._params, self._last)
        _copy_(self._last, self._params)
        if self._needs.velocity is not None:
            self._follow(slot, self._needs.velocity**self._needs.every)
        self._recorded += 1
        return True

    def _follow(self, slot: Sequence[Tensor], keep: float) -> None:
        torch._foreach_mul_(self._velocity, keep)
        torch._foreach_add_(self._velocity, list(slot), alpha=(1 - keep) / self._needs.every)

    def _allocate(self) -> None:
        """Take the memory of the path when it is first needed, and once."""
        if self._rows:
            return
        self._rows = [self._empty(p, self._needs.rows, *p.shape) for p in self._params]
        self._last = [self._empty(p, *p.shape, dtype=p.dtype) for p in self._params]
        if self._needs.velocity is not None:
            self._velocity = [self._empty(p, *p.shape).zero_() for p in self._params]

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
        """Inner products of the rows by parameter group, in float64: displacements, then velocity, then direction."""
        refuse_hidden_weights(self._optimizer, self._params)
        self._direction = self._optimizer_directions() if self._needs.direction else []
        rows = [Row("displacement", self._needs.every)] * len(self._slots)
        rows += [Row("velocity", 1)] * bool(self._velocity) + [Row("direction", 1)] * bool(self._direction)
        products = np.stack([self._group_products(group, len(rows)) for group in self._groups])
        return Gram(products, tuple(rows))

    @torch.no_grad()
    def slopes(self, coefficients: Coefficients) -> Float64[Tensor, " group"]:
        """Derivative of the loss along a combination of rows, by group, from the gradients of the last backward."""
        slopes = torch.zeros(len(self._groups), dtype=torch.float64, device=self._params[0].device)
        for g, group in enumerate(self._groups):
            for row in np.flatnonzero(coefficients[g]):
                weight = float(coefficients[g, row])
                for i in group:
                    if (gradient := self._params[i].grad) is not None:
                        moved = self._row(i, int(row)).to(gradient.device, gradient.dtype)
                        slopes[g] += weight * torch.sum(gradient * moved, dtype=torch.float64)
        return slopes

    @property
    def _slots(self) -> list[int]:
        """Ring slots in use, oldest first."""
        capacity = self._needs.rows
        return [i % capacity for i in range(max(0, self._recorded - capacity), self._recorded)]

    def _optimizer_directions(self) -> list[Tensor]:
        settings = self._optimizer.param_groups
        return [
            optimizer_direction(self._optimizer, self._params[i], settings[g])
            for g, group in enumerate(self._groups)
            for i in group
        ]

    def _group_products(self, group: range, count: int) -> Float64[np.ndarray, "row row"]:
        total = torch.zeros(count, count, dtype=torch.float64, device=self._params[0].device)
        with _exact_products():
            for i in group:
                total += _products(self._stacked_rows(i), total.device)
        order = [*self._slots, *range(len(self._slots), count)]
        return total.cpu().numpy()[np.ix_(order, order)]

    def _stacked_rows(self, i: int) -> Float[Tensor, "row element"]:
        """All rows of one parameter, displacements in the order of the ring, where and as the path is stored."""
        path = self._rows[i][: len(self._slots)].flatten(1)
        more = [kind[i].flatten()[None].to(path) for kind in (self._velocity, self._direction) if kind]
        return torch.cat([path, *more]) if more else path

    def _row(self, i: int, row: int) -> Tensor:
        """One row of one parameter."""
        if row < len(self._slots):
            return self._rows[i][self._slots[row]]
        more = [kind for kind in (self._velocity, self._direction) if kind]
        return more[row - len(self._slots)][i]

    # --- moving ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def move_(self, coefficients: Coefficients, fraction: float = 1.0) -> None:
        """Add `fraction` times the combination of rows to the weights, in place. Every jump passes here.

        coefficients: of the rows in the order of the last `gram()`
        """
        for group, weights in zip(self._groups, coefficients * fraction, strict=True):
            for row in np.flatnonzero(weights):
                for i in group:
                    motion = self._row(i, int(row)).to(self._params[i].device, self._params[i].dtype)
                    self._params[i].add_(motion, alpha=float(weights[row]))
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
        self._direction = [saved.to(p.device) for saved, p in zip(state["direction"], self._params, strict=False)]
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


def _subtract_(targets: Sequence[Tensor], a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    """Write a - b into the targets, in the precision of a, in one pass where all lie together."""
    for target, x, y in zip(targets, a, b, strict=True):
        if target.device == x.device and target.dtype == x.dtype:
            torch.sub(x, y, out=target)
        else:
            target.copy_(x - y.to(x.device))


def _products(rows: Float[Tensor, "row element"], device: torch.device) -> Float64[Tensor, "row row"]:
    """Inner products of rows: float32 over pieces of a thousand elements, float64 over the pieces."""
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=device)
    for chunk in torch.split(rows, _CHUNK_ELEMENTS, dim=1):
        chunk = chunk.to(device, torch.float32)
        whole = chunk.shape[1] // _PIECE_ELEMENTS * _PIECE_ELEMENTS
        pieces = rearrange(chunk[:, :whole], "row (piece element) -> piece row element", element=_PIECE_ELEMENTS)
        total += torch.bmm(pieces, pieces.mT).sum(dim=0, dtype=torch.float64)
        rest = chunk[:, whole:].double()
        total += rest @ rest.T
    return total


@contextmanager
def _exact_products() -> Iterator[None]:
    """Float32 products without TF32, whatever the run's setting."""
    setting = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(setting)


def _slices(lengths: Sequence[int]) -> list[range]:
    ends = np.cumsum(lengths).tolist()
    return [range(end - length, end) for length, end in zip(lengths, ends, strict=True)]


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
