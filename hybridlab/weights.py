"""The weights of a model: read, moved, put away and restored in this file, and in no other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from hybridlab.errors import UserError

Flat = Float[Tensor, " element"]
"""One parameter group, laid out in one piece of memory."""

PIECE = 1 << 24
"""Elements of the exact weights that are on the device at a time while they are lowered."""


@dataclass(frozen=True)
class Snapshot:
    """Weights and buffers as they were, and the optimizer's state unless it is None; holds copies of its own."""

    tensors: tuple[Tensor, ...]
    optimizer: dict[int, dict[str, Any]] | None

    def state_dict(self) -> dict[str, Any]:
        """The fields, by name."""
        return {"tensors": self.tensors, "optimizer": self.optimizer}


class Weights:
    """The trainable weights in the optimizer's groups, and the model's buffers.

    While they are *lowered*, the device holds them in bf16 and the host their exact float32 values; motions are added
    to the exact ones, so that roundings never pile up.

    on_host: keep snapshots in (pinned) host memory instead of beside the weights

    Raises UserError for an optimizer that keeps a copy of the weights which a jump would not reach.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, *, on_host: bool = False) -> None:
        self._optimizer, self._on_host = optimizer, on_host
        groups = [[p for p in group["params"] if p.requires_grad] for group in optimizer.param_groups]
        self.groups = [group for group in groups if group]
        self.settings = [settings for settings, group in zip(optimizer.param_groups, groups, strict=True) if group]
        self.params = [p for group in self.groups for p in group]
        self._buffers = list(model.buffers())
        self._masters: list[Flat] = []
        self._low: list[Flat] = []

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.params[0].device

    @torch.no_grad()
    def gather_(self, flat: Flat, g: int) -> Flat:
        """Copy one group's weights into a flat piece of memory, and return it."""
        torch._foreach_copy_(_views(flat, self.groups[g]), self.groups[g])
        return flat

    # --- moving ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def move_(self, motions: Iterable[tuple[int, Flat, float]]) -> None:
        """Add to each group g its motions times their lengths, in place. Every jump passes here.

        motions: g, a row of the path, and the length to go along it
        """
        move_ = self._move_masters_ if self._low else self._move_group_
        for g, row, length in motions:
            move_(g, row, length)
        tell_of_jump(self._optimizer)

    def _move_group_(self, g: int, row: Flat, length: float) -> None:
        """Along a row that lies beside the weights, or comes over one parameter at a time."""
        group, pieces = self.groups[g], _views(row, self.groups[g])
        if (row.device, row.dtype) == (group[0].device, group[0].dtype):
            torch._foreach_add_(group, pieces, alpha=length)
            return
        for param, piece in zip(group, pieces, strict=True):
            param.add_(_brought(piece, param), alpha=length)
        _wait_for(self.device)

    def _move_masters_(self, g: int, row: Flat, length: float) -> None:
        """The exact weights come to the device piece by piece, move there, and go back; so do the bf16 ones."""
        flats = (torch.split(flat, PIECE) for flat in (self._masters[g], self._low[g], row))
        for master, low, piece in zip(*flats, strict=True):
            exact = _brought(master, master, low.device)
            exact.add_(_brought(piece, master, low.device), alpha=length)
            master.copy_(exact, non_blocking=True)
            low.copy_(exact)
        _wait_for(self.device)

    # --- putting away ------------------------------------------------------------------------------------

    @torch.no_grad()
    def lower_(self) -> None:
        """Leave bf16 weights on the device, and keep the float32 ones on the host. Does nothing the second time."""
        if self._low:
            return
        if not self._masters:
            self._masters = [_host_flat(group) for group in self.groups]
        for g, group in enumerate(self.groups):
            low = torch.empty(self._masters[g].numel(), dtype=torch.bfloat16, device=self.device)  # leaves no gaps
            for param, master, copy in zip(group, _views(self._masters[g], group), _views(low, group), strict=True):
                master.copy_(param, non_blocking=True)
                param.data = copy.copy_(param)
            self._low.append(low)
        _wait_for(self.device)

    @torch.no_grad()
    def raise_(self) -> None:
        """Bring the float32 weights back to the device. Does nothing where they are there."""
        if not self._low:
            return
        for g, group in enumerate(self.groups):
            for param, master in zip(group, _views(self._masters[g], group), strict=True):
                param.data = torch.empty_like(param, dtype=master.dtype).copy_(master, non_blocking=True)
        _wait_for(self.device)
        self._low = []

    # --- keeping a way back ------------------------------------------------------------------------------

    @torch.no_grad()
    def snapshot(self, *, optimizer: bool = True) -> Snapshot:
        """A copy of weights and buffers, and of the optimizer's state unless told otherwise."""
        states = self._optimizer.state
        saved = {i: self._copied(states[p]) for i, p in enumerate(self.params) if p in states} if optimizer else None
        snapshot = Snapshot(tuple(self._stored(t) for t in self._tensors), saved)
        _wait_for(self.device)
        return snapshot

    def _copied(self, state: dict[str, Any]) -> dict[str, Any]:
        return {key: self._stored(value) if isinstance(value, Tensor) else value for key, value in state.items()}

    def _stored(self, tensor: Tensor) -> Tensor:
        if not (self._on_host and tensor.is_cuda):
            return inside(tensor, Tensor.clone)
        return inside(tensor, lambda t: torch.empty_like(t, device="cpu", pin_memory=True).copy_(t, non_blocking=True))

    @torch.no_grad()
    def restore_(self, snapshot: Snapshot) -> None:
        """Put everything that a snapshot holds back exactly as it was. The weights must not be lowered."""
        if self._tensors:
            torch._foreach_copy_(self._tensors, list(snapshot.tensors))
        if snapshot.optimizer is not None:
            for i, param in enumerate(self.params):
                _restore_state_(self._optimizer.state, param, snapshot.optimizer.get(i))
        tell_of_jump(self._optimizer)

    @property
    def _tensors(self) -> list[Tensor]:
        return [*self.params, *self._buffers]


# --- optimizers that hold weights ------------------------------------------------------------------------


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


# --- tensors ---------------------------------------------------------------------------------------------


def _views(flat: Flat, group: Sequence[Tensor]) -> list[Tensor]:
    """A flat piece of memory in the shapes of the parameters."""
    pieces = torch.split(flat, [p.numel() for p in group])
    return [piece.view(p.shape) for piece, p in zip(pieces, group, strict=True)]


def _brought(source: Tensor, like: Tensor, device: torch.device | None = None) -> Tensor:
    """A tensor on `device`, by default that of `like`, in the type of `like`; over the bus in its own, smaller type."""
    return source.to(device or like.device, non_blocking=True).to(like.dtype)


def _host_flat(group: Sequence[Tensor]) -> Flat:
    elements = sum(p.numel() for p in group)
    return torch.empty(elements, dtype=group[0].dtype, pin_memory=group[0].is_cuda)


def inside(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply `change` to a tensor, or to the plain tensors that a wrapper such as a quantized state is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return change(tensor.detach())
    names, context = tensor.__tensor_flatten__()
    parts = {name: change(getattr(tensor, name)) for name in names}
    wrapper: Any = type(tensor)
    return wrapper.__tensor_unflatten__(parts, context, tensor.shape, tensor.stride())


def _wait_for(device: torch.device) -> None:
    """Until what was asked of the device is done; host memory that it writes to is not to be read before."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


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
            state[key] = inside(value, Tensor.clone) if isinstance(value, Tensor) else value
