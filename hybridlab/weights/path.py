"""The weights' recent path."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from hybridlab.base.device import wait_for_stream
from hybridlab.base.errors import UserError
from hybridlab.base.pinned_memory import host_empty_like, to_device_async
from hybridlab.base.ranks import local, spread
from hybridlab.base.settings import check_types
from hybridlab.weights.gram import Coefficients, Gram, PathNeeds, PathRow
from hybridlab.weights.motion import PIECE, Flat, views
from hybridlab.weights.reach import refuse_copies_in_state
from hybridlab.weights.residency import Residency
from hybridlab.weights.snapshot import Weights

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class PathStorage:
    """Where the path is kept.

    residency: DEVICE, beside the weights, or OFFLOADED, in (pinned) host memory
    dtype: of its rows and velocity
    """

    residency: Residency = Residency.DEVICE
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        check_types(self)
        if not self.dtype.is_floating_point:
            raise ValueError(f"dtype is {self.dtype}: rows are differences of weights, take torch.bfloat16 or float32")

    @property
    def on_host(self) -> bool:
        """Whether it is kept in host memory."""
        return self.residency is Residency.OFFLOADED


class Trajectory:
    """Remembers displacements of the weights, and moves the weights along combinations of them.

        row[i]   = theta[t_i] - theta[t_(i-1)]              t_i - t_(i-1) = `needs.every` gradient steps
        velocity = gamma^s velocity + (1 - gamma^s) row / s    at each new row, s = `needs.every`

    The rows live in a ring, each as large as the trainable weights; one more such copy holds the last recorded
    weights, one the velocity where it is wanted. Each parameter group lies in one flat piece of memory, so that
    products of rows take a few kernels, whatever the number of parameters. All of it is allocated at the first
    `anchor`. Only parameters in the optimizer's groups that require gradients take part.
    """

    def __init__(self, weights: Weights, optimizer: Optimizer, needs: PathNeeds, storage: PathStorage) -> None:
        self._weights, self._optimizer, self._needs, self._storage = weights, optimizer, needs, storage
        self._rows: list[Float[Tensor, "row element"]] = []
        self._last: list[Flat] = []
        self._velocity: list[Flat] = []
        self._direction: list[Flat] = []
        self._steps = self._recorded = 0

    # --- recording ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def anchor(self) -> None:
        """Continue the path from the current weights; earlier rows stay, since they are still real motion."""
        self._allocate()
        self._steps = 0
        for g, last in enumerate(self._last):
            self._weights.gather_(last, g)

    @torch.no_grad()
    def observe(self) -> bool:
        """Count a gradient step; every `needs.every`-th writes a row. Returns whether this one did."""
        self._steps += 1
        if self._steps == 1:
            refuse_copies_in_state(self._optimizer, self._weights.params)
        if self._steps % self._needs.every:
            return False
        for g in range(len(self._weights.groups)):
            row = self._rows[g][self._recorded % self._needs.rows]
            self._weights.advance_(self._last[g], row, g)
            if self._needs.velocity is not None:
                keep = self._needs.velocity**self._needs.every
                _average_(self._velocity[g], row, keep, (1 - keep) / self._needs.every, self._weights.device)
        self._recorded += 1
        return True

    def _allocate(self) -> None:
        """Take the memory of the path when it is first needed, and once: all of it, or none where it is short."""
        if self._rows:
            return
        needs, stored = self._needs, self._storage.dtype
        last = self._weights.flats
        rows = [flat.new_empty((needs.rows, flat.numel()), dtype=stored) for flat in last]
        velocity = [flat.to(stored) for flat in last if needs.velocity is not None]
        memory = iter(self._empty_like([*rows, *last, *velocity]))
        self._rows, self._last, self._velocity = ([next(memory) for _ in kind] for kind in (rows, last, velocity))
        for mean in self._velocity:
            mean.zero_()

    def _empty_like(self, wanted: list[Tensor]) -> list[Tensor]:
        """Memory of these shapes and types, where the path is kept."""
        device = self._weights.device
        if self._storage.on_host:
            return host_empty_like(wanted, pinned=device.type == "cuda")
        return [torch.empty_like(tensor, device=device) for tensor in wanted]

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
        self._direction = self._optimizer_directions() if self._needs.direction else []
        rows = [PathRow("displacement", self._needs.every)] * len(self._slots)
        rows += [PathRow("velocity", 1)] * bool(self._velocity) + [PathRow("direction", 1)] * bool(self._direction)
        device = self._weights.device
        groups = range(len(self._weights.groups))
        products = [_products(self._row_vectors(g), self._weights.counted(g), device) for g in groups]
        return Gram(self._weights.ranks.total(torch.stack(products)).cpu().numpy(), tuple(rows))

    @torch.no_grad()
    def slopes(self, coefficients: Coefficients) -> Float64[Tensor, " group"]:
        """Derivative of the loss along a combination of rows, by group, from the gradients of the last backward.

        Unknown (NaN) where the optimizer has taken the gradients away already.
        """
        device = self._weights.device
        slopes = torch.zeros(len(self._weights.groups), dtype=torch.float64, device=device)
        if all(p.grad is None for p in self._weights.params):
            return slopes.fill_(torch.nan)
        for g, group in enumerate(self._weights.trained):
            gradient = torch.cat([self._counted_gradient(p).flatten() for p in group])
            for row in np.flatnonzero(coefficients[g]):
                along = to_device_async(self._row_vectors(g)[row], device, gradient.dtype)
                slopes[g] += float(coefficients[g, row]) * _dot(gradient, along)
        return self._weights.ranks.total(slopes)

    def _counted_gradient(self, param: Tensor) -> Tensor:
        """What this rank counts of a gradient, in the shape of its part of the weight; zeros where it counts none."""
        if param.grad is None or not self._weights.ranks.holds(param):
            return torch.zeros_like(local(param))
        gradient: Tensor = local(param.grad).to_dense()
        return gradient

    @property
    def _slots(self) -> list[int]:
        """Ring slots in use, oldest first."""
        capacity = self._needs.rows
        return [i % capacity for i in range(max(0, self._recorded - capacity), self._recorded)]

    def _row_vectors(self, g: int) -> list[Flat]:
        """The rows of one group, in the order of the Gram matrix."""
        more = [kind[g] for kind in (self._velocity, self._direction) if kind]
        return [self._rows[g][slot] for slot in self._slots] + more

    def _optimizer_directions(self) -> list[Flat]:
        return [
            torch.cat([local(optimizer_direction(self._optimizer, p, settings)).flatten() for p in group])
            for group, settings in zip(self._weights.trained, self._weights.settings, strict=True)
        ]

    # --- moving ------------------------------------------------------------------------------------------

    def move_(self, coefficients: Coefficients, fraction: float = 1.0) -> None:
        """Move the weights by `fraction` times the combination of rows.

        coefficients: of the rows in the order of the last `gram()`
        """
        lengths = coefficients * fraction
        motions = (
            (g, self._row_vectors(g)[row], float(lengths[g, row]))
            for g in range(len(lengths))
            for row in np.flatnonzero(lengths[g])
        )
        self._weights.move_(motions)

    # --- checkpoints -------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The remembered path, by parameter where ranks hold parts of it."""
        rows = [[self._as_spread(row, g) for row in rows] for g, rows in enumerate(self._rows)]
        flats = {"last": self._last, "velocity": self._velocity, "direction": self._direction}
        stored = {name: [self._as_spread(flat, g) for g, flat in enumerate(kind)] for name, kind in flats.items()}
        return {"rows": rows, **stored, "recorded": self._recorded, "steps": self._steps}

    def _as_spread(self, flat: Flat, g: int) -> list[Tensor]:
        """One group's piece of memory, as the parameters are spread over ranks; in one where they are not."""
        if not self._weights.ranks.sharded:
            return [flat]
        parts = views(flat, self._weights.groups[g])
        return [spread(part, like) for part, like in zip(parts, self._weights.trained[g], strict=True)]

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with a remembered path of the same model."""
        if state["rows"]:
            self._allocate()
        mine = self.state_dict()
        for name in ("rows", "last", "velocity"):
            for target, source in zip(tree_leaves(mine[name]), tree_leaves(state[name]), strict=True):
                local(target).copy_(local(source))
        device = self._weights.device
        self._direction = [torch.cat([local(p).flatten() for p in parts]).to(device) for parts in state["direction"]]
        self._recorded, self._steps = state["recorded"], state["steps"]


# --- optimizers ------------------------------------------------------------------------------------------


def optimizer_direction(optimizer: Optimizer, param: Tensor, group: dict[str, Any]) -> Tensor:
    """The step that an Adam-like optimizer would repeat if the next gradient equalled its running mean.

        -lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    Raises UserError where the optimizer keeps no such moments for the parameter.
    """
    state = optimizer.state.get(param, {})
    if "exp_avg" not in state or "betas" not in group or not state["step"]:  # made, and never stepped
        raise UserError(
            f"adam_coast needs Adam's moments, and {type(optimizer).__name__} keeps none for a parameter of shape "
            f"{tuple(param.shape)}: use AdamW, or predictor='linear'"
        )
    beta1, beta2 = group["betas"]
    step = float(state["step"])
    mean, square = (torch.empty_like(param, dtype=torch.float32).copy_(state[name]) for name in MOMENTS)
    spread = square.div_(1 - beta2**step).sqrt_().add_(group["eps"])
    return mean.div_(spread).mul_(-float(group["lr"]) / (1 - beta1**step))


# --- lists of tensors ------------------------------------------------------------------------------------


def _average_(mean: Flat, row: Flat, keep: float, weight: float, device: torch.device) -> None:
    """Set mean to keep mean + weight row, piece by piece, in float32 on the device: in place where it lies there so."""
    for old, new in zip(torch.split(mean, PIECE), torch.split(row, PIECE), strict=True):
        exact = to_device_async(old, device, torch.float32)
        exact.mul_(keep).add_(to_device_async(new, device, torch.float32), alpha=weight)
        if exact is not old:
            old.copy_(exact.to(old.dtype), non_blocking=True)
    if mean.device != device:
        wait_for_stream(device)


def _products(rows: Sequence[Flat], stretches: Sequence[slice], device: torch.device) -> Float64[Tensor, "row row"]:
    """Inner products of stretches of rows, copied to the device piece by piece."""
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=device)
    starts = [(start, part.stop) for part in stretches for start in range(part.start, part.stop, PIECE)]
    for start, stop in starts if rows else []:
        piece = slice(start, min(start + PIECE, stop))
        pieces = [to_device_async(row[piece], device, torch.float32) for row in rows]
        for i, j in itertools.combinations_with_replacement(range(len(rows)), 2):
            total[i, j] += torch.dot(pieces[i], pieces[j])
    return torch.triu(total) + torch.triu(total, diagonal=1).T


def _dot(a: Float[Tensor, " element"], b: Float[Tensor, " element"]) -> Float64[Tensor, ""]:
    """Inner product of two vectors, in float32 by the piece, in float64 over the pieces."""
    pieces = zip(torch.split(a, PIECE), torch.split(b, PIECE), strict=True)
    return torch.stack([torch.dot(x, y) for x, y in pieces]).sum(dtype=torch.float64)
