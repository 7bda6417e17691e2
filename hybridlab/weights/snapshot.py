"""The weights of a model as a prediction sees them; every jump passes through here."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, chain, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass, transform_subclass

from hybridlab.base.device import wait_for_stream
from hybridlab.base.pinned_memory import ArenaPool, to_device_async
from hybridlab.base.ranks import Ranks, is_sharded, local, spread, take_first_
from hybridlab.weights.bf16_resident import Fp32Weights
from hybridlab.weights.motion import Flat, Motion, move_along_, views
from hybridlab.weights.reach import notify_weights_moved
from hybridlab.weights.residency import Residency


@dataclass(frozen=True)
class Snapshot:
    """Weights and buffers as they were, and the optimizer's state unless it is None; all of them copies.

    tensors: the parameters, then the model's buffers, each in its own shape and type, spread over ranks as it is
    optimizer: by the parameter's number, its state, tensors in their own shapes and types, spread as they are
    beside: by parameter, the names of the state that lay where the parameter does; state that is gone returns there
    buffers: the names of the buffers among the tensors, in order
    depth: blocks that took part, where a schedule says how many do
    """

    tensors: tuple[Tensor, ...]
    optimizer: dict[int, dict[str, Any]] | None
    beside: dict[int, list[str]] = field(default_factory=dict)
    buffers: tuple[str, ...] = ()
    depth: int | None = None

    def state_dict(self) -> dict[str, Any]:
        """The fields, by name."""
        return dict(vars(self))


class Weights:
    """The trainable weights in the optimizer's groups, and the model's buffers.

    Which weights these are may change under way: `have_changed` says so, and `list_again_` lists them anew. Buffers are
    looked up by name each time, since `forward` may put another tensor in a buffer's place.

    snapshots: where they are kept: DEVICE, beside the weights, or OFFLOADED, in (pinned) host memory, which is used
        again when neither the snapshot nor a tensor of it is in use any more

    params: the parameters that require gradients, by optimizer group, all in one list; device: where they lie
    held: those of them that this rank counts (`Ranks.holds`)
    groups: by group, the part of each that lies on this rank: the parameter itself, unless it is sharded
    trained: by group, the parameters; ranks: the processes that train the model
    fp32: offloads and restores the float32 weights; motions are added to the exact ones, so that no rounding adds up

    `snapshot` raises UserError where host memory is short or cannot be pinned; nothing has been changed then.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, *, snapshots: Residency = Residency.DEVICE) -> None:
        self._model, self._optimizer = model, optimizer
        self._pool = ArenaPool() if snapshots is Residency.OFFLOADED else None
        self.list_again_()

    def list_again_(self) -> None:
        """List weights and buffers as they are now, all on the device; earlier snapshots are of others."""
        groups = [[p for p in group["params"] if p.requires_grad] for group in self._optimizer.param_groups]
        self.trained = [group for group in groups if group]
        self.params = [p for group in self.trained for p in group]
        self.ranks = Ranks.of(self._model)
        self.held = [p for p in self.params if self.ranks.holds(p)]
        self.ranks.take_up_trained_()
        self.groups = [[local(p) for p in group] for group in self.trained]
        self._parts = [p for group in self.groups for p in group]
        self.device = self.params[0].device
        self._modules = dict(self._model.named_modules())
        self._registers = [r for m in self._modules.values() for r in (m._parameters, m._modules)]
        self._listed, self._own_buffers = self._list(), self._buffers
        self.fp32 = Fp32Weights(self.groups)

    @property
    def have_changed(self) -> bool:
        """Whether weights were frozen, unfrozen, added, removed or replaced since they were listed; no wait."""
        now = self._list()
        return len(now) != len(self._listed) or not all(map(operator.is_, now, self._listed))

    def _list(self) -> list[object]:
        """The weights that are trained, then all weights and modules that the model registers."""
        trained = [p for group in self._optimizer.param_groups for p in group["params"] if p.requires_grad]
        return [*trained, *chain.from_iterable(map(dict.values, self._registers))]

    def are_finite(self) -> bool:
        """Whether no weight is NaN or infinite, on any rank; waits for the device."""
        return self.ranks.all(bool(nn.utils.get_total_norm(self._parts).isfinite()))

    def reshard_(self) -> None:
        """Put the model's shards in the place of whole weights that a forward pass has gathered."""
        self.ranks.reshard_()

    def without_reduction(self, *, last: bool) -> AbstractContextManager[object]:
        """For a part of a batch: gradients of all ranks are added up once, in the last part's backward."""
        return self.ranks.without_reduction(self._model, last=last)

    def average_gradients_(self) -> None:
        """Of all ranks, where the backward pass has not; float buffers are the first's then."""
        self.ranks.average_(self.params)
        if self.ranks.averages:
            take_first_([b for b in self._buffers.values() if b.is_floating_point()])

    def counted(self, g: int) -> list[slice]:
        """Stretches of a group's flat piece of memory that this rank counts; others count what they hold too."""
        ends = list(accumulate((part.numel() for part in self.groups[g]), initial=0))
        held = [self.ranks.holds(param) for param in self.trained[g]]
        if all(held):
            return [slice(0, ends[-1])]
        return [slice(start, end) for (start, end), mine in zip(pairwise(ends), held, strict=True) if mine]

    @property
    def settings(self) -> list[dict[str, Any]]:
        """The optimizer's settings of each group, as they are now."""
        return [s for s in self._optimizer.param_groups if any(p.requires_grad for p in s["params"])]

    @property
    def flats(self) -> list[Flat]:
        """What each group takes in one piece of memory: its size and type, on "meta"."""
        return [torch.empty(sum(p.numel() for p in g), dtype=g[0].dtype, device="meta") for g in self.groups]

    @torch.no_grad()
    def gather_(self, flat: Flat, g: int) -> Flat:
        """Copy one group's weights into a flat piece of memory, and return it."""
        torch._foreach_copy_(views(flat, self.groups[g]), self.groups[g])
        return flat

    @torch.no_grad()
    def advance_(self, last: Flat, row: Flat, g: int) -> None:
        """Of one group, set row to weights - last, then last to the weights; computed where the weights are."""
        group = self.groups[g]
        if (row.device, row.dtype) == (self.device, last.dtype):
            torch.sub(self.gather_(row, g), last, out=row)
            self.gather_(last, g)
            return
        for param, then, moved in zip(group, views(last, group), views(row, group), strict=True):
            displacement = param - to_device_async(then, self.device, then.dtype)
            moved.copy_(displacement.to(moved.dtype), non_blocking=True)
            then.copy_(param, non_blocking=True)
        wait_for_stream(self.device)

    # --- moving ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def move_(self, motions: Iterable[Motion]) -> None:
        """Add to each group its motions times their lengths, in place. Every jump passes here.

        While the float32 weights are offloaded, they alone move: the next `fp32.offload_` rounds the bf16 ones anew.
        """
        motions = list(motions)
        self.fp32.record(motions)
        if self.fp32.residency is Residency.DEVICE:
            for g, row, length in motions:
                move_along_(self.groups[g], row, length)
        notify_weights_moved(self._optimizer)

    # --- snapshots ---------------------------------------------------------------------------------------

    def copies_of_state(self, snapshot: Snapshot | None) -> dict[int, Tensor]:
        """What the snapshot of the jump under way has of the optimizer's state, by the original's address.

        Only what lies in memory in the same order as the original; nothing once the weights may have been trained.
        """
        states, saved = self._states, (snapshot.optimizer if snapshot and self.fp32.has_base else None) or {}
        return {
            plain.data_ptr(): copy
            for i, state in saved.items()
            for key, kept in _tensors_of(state).items()
            for plain, copy in zip(plain_tensors(states[i][key]), plain_tensors(kept), strict=True)
            if plain.is_contiguous() and copy.is_contiguous()
        }

    @torch.no_grad()
    def snapshot(self, *, optimizer: bool = True) -> Snapshot:
        """A copy of weights and buffers, and of the optimizer's state unless told otherwise."""
        states, buffers = self._states if optimizer else {}, self._buffers
        tensors = tuple(self._copies([*self.params, *buffers.values()]))
        copies = iter(self._copies([value for state in states.values() for value in _tensors_of(state).values()]))
        saved = {i: {**state, **{key: next(copies) for key in _tensors_of(state)}} for i, state in states.items()}
        beside = {
            i: [key for key, value in _tensors_of(state).items() if value.device == self.params[i].device]
            for i, state in states.items()
        }
        wait_for_stream(self.device)
        return Snapshot(tensors, saved if optimizer else None, beside, tuple(buffers))

    def _copies(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """A copy of each of these, spread as it is: beside it, or all of them in one piece of host memory."""
        parts = [local(tensor) for tensor in tensors]
        if self._pool is None:
            copies = [inside(part, Tensor.clone) for part in parts]
        else:
            places = iter(self._pool.empty_like([plain for part in parts for plain in plain_tensors(part)]))
            copies = [inside(part, lambda plain: next(places).copy_(plain, non_blocking=True)) for part in parts]
        return [spread(copy, like=tensor) for copy, tensor in zip(copies, tensors, strict=True)]

    @torch.no_grad()
    def restore_(self, snapshot: Snapshot) -> None:
        """Put everything that a snapshot holds back exactly as it was. The float32 weights must be on the device."""
        buffers = self._place_buffers_(dict(zip(snapshot.buffers, snapshot.tensors[len(self.params) :], strict=True)))
        torch._foreach_copy_([*self._parts, *buffers], [local(tensor) for tensor in snapshot.tensors])
        if snapshot.optimizer is not None:
            for i, param in enumerate(self.params):
                _restore_state_(self._optimizer.state, param, snapshot.optimizer.get(i), snapshot.beside.get(i, []))
        notify_weights_moved(self._optimizer)

    @property
    def _buffers(self) -> dict[str, Tensor]:
        """The model's buffers by name, as they are now."""
        named = ((f"{path}.{name}", b) for path, m in self._modules.items() for name, b in m._buffers.items())
        return {name: buffer for name, buffer in named if buffer is not None}

    def _place_buffers_(self, saved: dict[str, Tensor]) -> list[Tensor]:
        """The tensors in the buffers' places that saved ones may be copied into, in order.

        What `forward` has put there may be somebody else's, such as the batch: a new tensor takes its place.
        """
        now = self._buffers
        for name in now.keys() | saved.keys():
            path, _, key = name.rpartition(".")
            value, own = saved.get(name), self._own_buffers.get(name)
            if value is None or own is None or now.get(name) is not own:
                device = now[name].device if name in now else self.device
                new = None if value is None else torch.empty_like(value, device=device)
                self._modules[path]._buffers[key] = new
        self._own_buffers = self._buffers
        return [self._own_buffers[name] for name in saved]

    @property
    def _states(self) -> dict[int, dict[str, Any]]:
        """The optimizer's state of each parameter that has one."""
        return {i: self._optimizer.state[p] for i, p in enumerate(self.params) if p in self._optimizer.state}


# --- tensors ---------------------------------------------------------------------------------------------


def plain_tensors(value: Any) -> Iterator[Tensor]:
    """The tensors that a value is made of: itself, or those inside a quantized one."""
    if is_traceable_wrapper_subclass(value):
        for name in value.__tensor_flatten__()[0]:
            yield from plain_tensors(getattr(value, name))
    elif isinstance(value, Tensor):
        yield value


def inside(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply `change` to a tensor, or to the plain tensors that a wrapper such as a quantized state is made of."""
    if is_sharded(tensor) or not is_traceable_wrapper_subclass(tensor):
        return change(tensor.detach())
    whole: Tensor = transform_subclass(tensor, lambda _, part: inside(part, change))
    return whole


def _tensors_of(state: dict[str, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def _restore_state_(states: Any, param: Tensor, saved: dict[str, Any] | None, beside: Sequence[str]) -> None:
    """Copy into the tensors that are there, so that graphs and fused kernels keep their addresses."""
    if saved is None:
        states.pop(param, None)
        return
    state = states[param]
    for key in state.keys() - saved.keys():
        del state[key]
    for key, value in saved.items():
        if not isinstance(value, Tensor):
            state[key] = value
        elif isinstance(state.get(key), Tensor):
            local(state[key]).copy_(local(value))
        else:
            device = param.device if key in beside else value.device
            state[key] = inside(value, partial(Tensor.to, device=device, copy=True))
