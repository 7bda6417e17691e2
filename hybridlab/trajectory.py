"""The weights' recent path: the only file that reads or writes parameter storage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn
from torch.optim import Optimizer

from hybridlab.errors import UserError
from hybridlab.gram import Gram, Row

_CHUNK_ELEMENTS = 1 << 22
"""Elements of a row that are widened to float64 at a time."""


@dataclass(frozen=True)
class Snapshot:
    """Weights, buffers and optimizer state as they were; holds copies of its own."""

    tensors: tuple[Tensor, ...]
    optimizer: dict[int, dict[str, Any]]

    def state_dict(self) -> dict[str, Any]:
        """The fields, by name."""
        return {"tensors": self.tensors, "optimizer": self.optimizer}


class Trajectory:
    """Remembers displacements of the weights, and moves the weights along combinations of them.

        row[i] = theta[t_i] - theta[t_(i-1)]        t_i - t_(i-1) = `record_every` gradient steps

    Rows live in a ring of `capacity` slots, each as large as the trainable weights; one more such copy holds the
    last recorded weights. All of it is allocated at the first `restart`. Only parameters in the optimizer's groups
    that require gradients take part; buffers are part of snapshots.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, capacity: int, record_every: int) -> None:
        self._optimizer = optimizer
        trained = [[p for p in group["params"] if p.requires_grad] for group in optimizer.param_groups]
        self._params = [p for group in trained for p in group]
        self._groups = _slices([len(group) for group in trained])
        self._buffers = list(model.buffers())
        self._capacity, self._record_every = capacity, record_every
        self._rows: list[Tensor] = []
        self._last: list[Tensor] = []
        self._direction: list[Tensor] = []
        self._steps = self._recorded = 0

    # --- recording ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def restart(self) -> None:
        """Begin a new path at the current weights: across a jump, displacements would mean nothing."""
        self._allocate()
        self._steps = self._recorded = 0
        torch._foreach_copy_(self._last, self._params)

    def _allocate(self) -> None:
        """Take the memory of the path when it is first needed, and once."""
        if not self._rows:
            shapes = [(self._capacity, *p.shape) for p in self._params]
            self._rows = [p.new_zeros(shape) for p, shape in zip(self._params, shapes, strict=True)]
            self._last = [torch.empty_like(p) for p in self._params]

    @torch.no_grad()
    def observe(self) -> None:
        """Count a gradient step; every `record_every`-th writes a row."""
        self._steps += 1
        if self._steps % self._record_every:
            return
        slot = [rows[self._recorded % self._capacity] for rows in self._rows]
        torch._foreach_copy_(slot, self._params)
        torch._foreach_sub_(slot, self._last)
        torch._foreach_copy_(self._last, self._params)
        self._recorded += 1

    @property
    def is_full(self) -> bool:
        """Whether every slot holds a displacement."""
        return self._recorded >= self._capacity

    # --- looking -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def gram(self, *, with_direction: bool = False) -> Gram:
        """Inner products of the rows, oldest first, by parameter group, in float64.

        with_direction: append the optimizer's own direction at the current weights as the last row
        """
        self._direction = self._optimizer_directions() if with_direction else []
        rows = [Row("displacement", self._record_every)] * len(self._slots)
        rows += [Row("direction", 1)] * with_direction
        products = np.stack([self._group_products(group) for group in self._groups])
        return Gram(products, tuple(rows))

    @property
    def _slots(self) -> list[int]:
        """Ring slots in use, oldest first."""
        return [i % self._capacity for i in range(max(0, self._recorded - self._capacity), self._recorded)]

    def _optimizer_directions(self) -> list[Tensor]:
        settings = self._optimizer.param_groups
        return [
            optimizer_direction(self._optimizer, self._params[i], settings[g])
            for g, group in enumerate(self._groups)
            for i in group
        ]

    def _group_products(self, group: range) -> Float64[np.ndarray, "row row"]:
        count = len(self._slots) + bool(self._direction)
        total = torch.zeros(count, count, dtype=torch.float64, device=self._params[0].device)
        for i in group:
            for chunk in torch.split(self._stacked_rows(i), _CHUNK_ELEMENTS, dim=1):
                wide = chunk.double()
                total += wide @ wide.T
        return total.cpu().numpy()

    def _stacked_rows(self, i: int) -> Float[Tensor, "row element"]:
        rows = self._rows[i][self._slots].flatten(1)
        return torch.cat([rows, self._direction[i].flatten()[None]]) if self._direction else rows

    # --- moving ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def move_(self, coefficients: Float64[np.ndarray, "group row"], fraction: float = 1.0) -> None:
        """Add `fraction` times the combination of rows to the weights, in place. Every jump passes here.

        coefficients: of the rows in the order of the last `gram()`
        """
        for group, weights in zip(self._groups, coefficients * fraction, strict=True):
            params = [self._params[i] for i in group]
            for row in np.flatnonzero(weights):
                torch._foreach_add_(params, [self._row(i, int(row)) for i in group], alpha=float(weights[row]))

    def _row(self, i: int, row: int) -> Tensor:
        return self._rows[i][self._slots[row]] if row < len(self._slots) else self._direction[i]

    def snapshot(self) -> Snapshot:
        """A copy of weights, buffers and optimizer state, on the same device."""
        state = {i: _copied(self._optimizer.state[p]) for i, p in enumerate(self._params) if p in self._optimizer.state}
        return Snapshot(tuple(t.detach().clone() for t in self._tensors), state)

    @torch.no_grad()
    def restore_(self, snapshot: Snapshot, *, optimizer: bool = True) -> None:
        """Put weights and buffers back exactly; the optimizer's state too unless told otherwise."""
        torch._foreach_copy_(self._tensors, snapshot.tensors)
        if optimizer:
            for i, param in enumerate(self._params):
                _restore_state(self._optimizer.state, param, snapshot.optimizer.get(i))

    @property
    def _tensors(self) -> list[Tensor]:
        return [*self._params, *self._buffers]

    # --- checkpoints -------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The remembered path."""
        return {
            "rows": self._rows,
            "last": self._last,
            "direction": self._direction,
            "recorded": self._recorded,
            "steps": self._steps,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with a remembered path of the same model."""
        if state["rows"]:
            self._allocate()
        for mine, saved in zip(self._rows + self._last, state["rows"] + state["last"], strict=True):
            mine.copy_(saved)
        self._direction = [d.to(p.device) for d, p in zip(state["direction"], self._params, strict=False)]
        self._recorded, self._steps = state["recorded"], state["steps"]


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


def _slices(lengths: list[int]) -> list[range]:
    ends = np.cumsum(lengths).tolist()
    return [range(end - length, end) for length, end in zip(lengths, ends, strict=True)]


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}


def _restore_state(states: Any, param: Tensor, saved: dict[str, Any] | None) -> None:
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
