"""What a computation allocates, frees and multiplies, as a list of events."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from hybridlab.base.swapped import swapped

GRAIN_BYTES = 512
"""The CUDA caching allocator hands out multiples of this."""

GATHERED, COMMUNICATION = "gathered", "communication"
"""Parts of a rank's memory: whole weights of what is computed, and buffers that other ranks fill or read."""

WORKSPACE = "workspace"
"""The part that cuBLAS takes at a thread's first product, and keeps."""

aten = torch.ops.aten
FLOPS = dict(flop_registry) | {aten._grouped_mm: lambda a, b, *_, **__: 2 * a.numel() * b.shape[-1]}
"""Operation -> what counts its floating-point operations."""

RANDOM_FILLS = (aten.normal_.default, aten.uniform_.default)
"""They change no memory; drawing fake numbers would take longer than all the rest of building a model."""

NO_KERNEL = (aten.empty, aten.empty_like, aten.empty_strided, aten._unsafe_view, torch.ops.prim.device)


class Key(NamedTuple):
    """A storage: the number-th that was made in a segment of this name and block."""

    name: str
    block: int | None
    number: int

    def moved(self, further: int) -> Key:
        """The storage that was made so many later."""
        return self._replace(number=self.number + further)


class Event(NamedTuple):
    """A storage is new, is freed, or belongs to another part from now on.

    size: in bytes; stream: of the GPU, "" is the one that computes; both of a new one alone
    """

    kind: Literal["new", "free", "is"]
    key: Key
    size: int = 0
    part: str = ""
    stream: str = ""


@dataclass
class Segment:
    """A stretch of a computation: one block's, or what lies between blocks (`block` None).

    work: floating-point operations by number type, as `torch.utils.flop_counter` counts them; "moved": bytes that all
        other kernels read and write, nothing fused; "kernels": how many are started; and what `Trace.add` was told
    """

    name: str
    block: int | None = None
    events: list[Event] = field(default_factory=list)
    work: Counter[str] = field(default_factory=Counter)


class Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records, while it is active, the life of every tensor's storage and the work of every kernel.

    logit_widths: lengths of a last dimension that make a new tensor of two dimensions or more "logits"
    new_part: the part that other new tensors belong to until `tag` says better; None: they are not on the GPU
    new_stream: of the GPU, on which they are allocated
    workspace_bytes: that cuBLAS takes for forward's thread, and as much for backward's; workspace_stream: beside which
        other memory they lie

    Sizes are rounded up as the CUDA caching allocator does. Views count once, with what they look at.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.segments = [Segment("setup")]
        self._phase, self._is_paused = "setup", False
        self.logit_widths: frozenset[int] = frozenset()
        self.new_part: str | None = "activations"
        self.new_stream, self.workspace_bytes, self.workspace_stream = "", 0, ""
        self._products: set[tuple[str, bool]] = set()
        self._made: Counter[tuple[str, int | None]] = Counter()
        self._keys: dict[int, Key | None] = {}

    def begin(self, name: str) -> None:
        """What follows is a new phase, outside of any block."""
        self._phase = name
        self.segments.append(Segment(name))

    def enter(self, block: int | None) -> None:
        """What follows, of the same phase, is a block's; None: it comes after all of them."""
        self.segments.append(Segment(self._phase if block is not None else f"after {self._phase}", block))

    def take(self) -> list[Segment]:
        """The segments so far, which the trace forgets."""
        taken, self.segments = self.segments, [Segment("between")]
        return taken

    def add(self, work: str, amount: int) -> None:
        """Count further work in the present segment."""
        self.segments[-1].work[work] += amount

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in RANDOM_FILLS:
            return args[0]
        kwargs = kwargs or {}
        if func is aten.add.Tensor and _is_last_of(args[0]):
            func = aten.add_.Tensor  # as autograd adds gradients up, but of fake tensors
        out = func(*args, **kwargs)
        if not self._is_paused:
            self.count_work(func, args, kwargs, out)
            self.count(out)
        return out

    def paused(self) -> AbstractContextManager[None]:
        """Record nothing inside the context; what is made in it and stays is told to `count`."""
        return swapped(self, _is_paused=True)

    def count(self, out: Any) -> None:
        """Follow the storages of an operation's results from here on."""
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor) and not self._is_paused:
                self._count(value)

    def counting_as(self, part: str | None, stream: str = "") -> AbstractContextManager[None]:
        """Set `new_part` and `new_stream` inside the context."""
        return swapped(self, new_part=part, new_stream=stream)

    def recalled(self, act: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A function that is computed once for each form of its arguments; later, what was recorded of it is copied.

        It may keep nothing of what it makes but its result, one float32 number.
        """
        known: dict[Any, tuple[int, list[Event], Counter[str], Key | None]] = {}

        def run(*args: Any) -> Tensor:
            if torch.compiler.is_compiling():  # into a graph, which must have all of it
                return act(*args)
            segment = self.segments[-1]
            label = segment.name, segment.block
            form = label, *((arg.shape, arg.dtype) if isinstance(arg, Tensor) else arg for arg in args)
            if form not in known:
                first, begun, before = self._made[label], len(segment.events), segment.work.copy()
                out = act(*args)
                key = self._keys[out.untyped_storage()._cdata]
                known[form] = first, segment.events[begun:], segment.work - before, key
                return out
            first, events, work, key = known[form]
            further = self._made[label] - first
            segment.events += [event._replace(key=event.key.moved(further)) for event in events]
            segment.work += work
            self._made[label] += sum(event.kind == "new" for event in events)
            with self.paused():
                out = torch.empty(())
            self._follow(out.untyped_storage(), key and key.moved(further))
            return out

        return run

    def tag(self, tensors: Iterable[Tensor], part: str) -> None:
        """Say what these tensors are."""
        for tensor in tensors:
            if key := self._keys[tensor.untyped_storage()._cdata]:
                self.segments[-1].events.append(Event("is", key, part=part))

    def drop(self, tensors: Iterable[Tensor]) -> None:
        """Count these no more: they stand for what lies elsewhere."""
        for tensor in tensors:
            identity = tensor.untyped_storage()._cdata
            if key := self._keys[identity]:
                self.segments[-1].events.append(Event("free", key))
            self._keys[identity] = None

    def count_work(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Count what an operation computes, or moves, and its kernel."""
        work, count = self.segments[-1].work, FLOPS.get(func._overloadpacket)
        if count is not None:
            work[str(args[0].dtype).removeprefix("torch.")] += count(*args, **kwargs, out_val=out)
            self._take_workspace()
        elif func.is_view or func._overloadpacket in NO_KERNEL:
            return
        else:
            work["moved"] += sum(leaf.nbytes for leaf in tree_leaves((args, out)) if isinstance(leaf, Tensor))
        work["kernels"] += 1

    def _take_workspace(self) -> None:
        """At the first product of a phase's forward or backward."""
        thread = self._phase, torch._C._current_graph_task_id() != -1
        if self.workspace_bytes and thread not in self._products:
            self._products.add(thread)
            key = Key(WORKSPACE, None, thread[1])
            self.segments[-1].events.append(Event("new", key, self.workspace_bytes, WORKSPACE, self.workspace_stream))

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._keys:
            return
        if self.new_part is None:
            self._follow(storage, None)
            return
        is_logits = self.new_part == "activations" and tensor.ndim > 1 and tensor.shape[-1] in self.logit_widths
        segment = self.segments[-1]
        label = segment.name, segment.block
        self._follow(storage, key := Key(*label, self._made[label]))
        self._made[label] += 1
        size = -(-storage.nbytes() // GRAIN_BYTES) * GRAIN_BYTES
        segment.events.append(Event("new", key, size, "logits" if is_logits else self.new_part, self.new_stream))

    def _follow(self, storage: Any, key: Key | None) -> None:
        """Until it is freed; None: it is not on the GPU."""
        self._keys[storage._cdata] = key
        weakref.finalize(storage, self._forget, storage._cdata).atexit = False

    def _forget(self, identity: int) -> None:
        if key := self._keys.pop(identity):
            self.segments[-1].events.append(Event("free", key))


def _is_last_of(gradient: Tensor) -> bool:
    """Whether autograd adds to a gradient that nobody else holds.

    Source: torch/csrc/autograd/input_buffer.cpp.
    """
    if torch.is_grad_enabled() or torch._C._current_graph_task_id() == -1:
        return False
    return torch._C._storage_Use_Count(gradient.untyped_storage()._cdata) == 2  # its own, and that of the call itself
