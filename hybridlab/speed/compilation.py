"""torch.compile of a model, or of its repeated blocks alone, and CUDA graphs around what is compiled."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten

from hybridlab.base.compiler import require_compiler
from hybridlab.base.device import give_back_cached
from hybridlab.base.errors import UserError
from hybridlab.memory.checkpointing import blocks_of, compile_block_
from hybridlab.optim.in_backward import StepInBackward

_compiled_for: Hashable = None


def compile_(model: nn.Module, *, by_block: bool = False, settings: Hashable = None) -> None:
    """Compile a model in place; names and weights stay as they are.

    Models of one shape share what was compiled: fifty runs that follow each other compile as often as one. Before a
    model of another shape all compiled code is dropped, since torch silently runs uncompiled once it has compiled a
    function too often.

    by_block: compile one block of the model's repeated blocks, for all of them, and the methods that the model names in
        `compiled_methods`: much sooner done, the same for any depth, and more work for the host, which a CUDA graph
        takes away. A model that repeats no block is compiled as a whole
    settings: further ones that the code depends on, such as the number format

    Raises UserError where nothing can compile.
    """
    global _compiled_for
    require_compiler(next(model.parameters()).device.type, "compiled=True")
    shapes = tuple((name, tuple(t.shape), t.dtype, t.device) for name, t in model.state_dict().items())
    key = (str(model), shapes, by_block, settings)
    if key != _compiled_for:
        torch._dynamo.reset()
        _compiled_for = key
    blocks = blocks_of(model) if by_block else []
    if not blocks:
        model.compile()
        return
    torch._dynamo.config.optimize_ddp = False  # which would cut a block where a bucket of gradients ends
    for block in blocks:
        compile_block_(block)
    for name in getattr(model, "compiled_methods", ()):
        setattr(model, name, torch.compile(getattr(model, name), dynamic=False))


MOST_GRAPHS = 12
"""Captured for one model; beyond it the passes differ too often for graphs to pay."""

WARM_UP_PASSES = 3


class CudaGraphs(nn.Module):
    """A model whose passes are captured when they are first asked for, and replayed from then on.

    One graph for each shape of the input, with gradients and without, in training and evaluation, for each set of
    blocks that take part. Weights are read at their addresses: moved in place by an optimizer, a jump, a rollback or a
    growth, they reach the next replay; a pass whose weights have other addresses is captured anew. All graphs share one
    pool of memory, which holds their activations and gradients as long as this object exists.

    The next backward writes over the gradients in the pool. Those that are still there when the next pass begins are
    copied to memory of their own first, to which that pass's are added: set them to None before each step, as
    `optimizer.zero_grad()` does, and nothing is copied. A pass without gradients may write over them too: step
    before you evaluate.

    An optimizer that steps inside backward is captured with the pass, once `replay_steps_of` has named it: its
    gradients never all exist at once. Such a pass moves weights, so the first `WARM_UP_PASSES` run as they are. Where
    other weights take part than before, the graphs of before give their memory back.

    A pass that cannot be captured, since it asks the GPU for a number, moves data to the host or puts another tensor in
    a buffer's place, warns once, and is run as it is from then on. Capturing leaves buffers as they were.

    model: on a GPU; call this object in its place, and give the model itself to the trainer. Parameters that are added
        later are not known
    fails: why passes are run as they are; None where they are captured

    Raises UserError for a model that is not on a GPU.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._params, self._modules_within = list(model.parameters()), list(model.modules())
        if not all(p.is_cuda for p in self._params):
            raise UserError("CUDA graphs need the model on a GPU: move it there first, or leave cuda_graphs off")
        self._pool: Any = None
        self._stepping: StepInBackward | None = None
        self._stream: Any = None
        self._seen: Counter[Hashable] = Counter()
        self._at: Hashable = None
        self._moves = 0
        self._captured: dict[Hashable, Callable[..., Any]] = {}
        self._sums: dict[Tensor, Tensor] = {}
        self.fails: str | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns."""
        if self.fails:
            return self.model(*args, **kwargs)
        leaves, form = tree_flatten((args, kwargs))
        places = tuple((p.data_ptr(), p.requires_grad) for p in self._params)
        key: Hashable = (*self._call(leaves, form), places)
        if self._stepping:
            self._keep_graphs_of(places)
        if self._stepping and torch.is_grad_enabled():
            key = (key, stepping := self._stepping.replays_as)
            self._seen[key] += 1
            if stepping is None or self._seen[key] <= WARM_UP_PASSES:
                return self._beside(*args, **kwargs)
        if key not in self._captured and not self._capture(key, leaves, form):
            return self.model(*args, **kwargs)
        if torch.is_grad_enabled() or self._stepping:
            self._set_gradients_aside()
        return self._captured[key](*(leaf for leaf in leaves if isinstance(leaf, Tensor)))

    def replay_steps_of(self, optimizer: StepInBackward) -> None:
        """Capture these steps with the backward pass that they are taken in."""
        self._stepping, self._stream = optimizer, torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def _beside(self, *args: Any, **kwargs: Any) -> Any:
        """The pass as it is, on the stream that will capture: a loss that a loop keeps holds on to its stream."""
        here = torch.cuda.current_stream()
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream), _as_captured():
            output = self.model(*args, **kwargs)
        here.wait_stream(self._stream)
        return output

    def _set_gradients_aside(self) -> None:
        """Where gradients of earlier passes lie in the pool, copy them out of it: the next are added to the copies."""
        found = {p: p.grad for p in self._params if p.grad is not None and p.grad is not self._sums.get(p)}
        if not found:
            return
        if self._stepping:
            raise UserError(
                "gradients are still there, and the steps inside this backward pass are captured: call "
                "optimizer.step() and optimizer.zero_grad() between two passes"
            )
        self._sums |= {p: torch.empty_like(p) for p in found if p not in self._sums}
        sums = [self._sums[p] for p in found]
        torch._foreach_copy_(sums, list(found.values()))
        for p, total in zip(found, sums, strict=True):
            p.grad = total

    def _keep_graphs_of(self, places: Hashable) -> None:
        """Let go of graphs in which other weights take part, such as those of a stage that has ended."""
        if places == self._at:
            return
        self._at, self._moves = places, self._moves + 1
        self._captured.clear()
        self._pool = None
        give_back_cached()

    def _call(self, leaves: list[Any], form: TreeSpec) -> tuple[Hashable, ...]:
        """All that a captured pass depends on, but for the weights' places and the numbers in tensors."""
        given = tuple((x.shape, x.dtype, x.device) if isinstance(x, Tensor) else x for x in leaves)
        mode = (torch.is_grad_enabled(), torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"))
        modules = tuple((m.training, id(vars(m).get("forward"))) for m in self._modules_within)
        return form, given, mode, modules

    def _capture(self, key: Hashable, leaves: list[Any], form: TreeSpec) -> bool:
        if max(len(self._captured), self._moves - 1) >= MOST_GRAPHS:
            return self._give_up(f"{MOST_GRAPHS} graphs were captured, and the next pass differs again")
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        capture = self._with_gradients if torch.is_grad_enabled() else self._without_gradients
        stream = torch.cuda.stream(torch.cuda.current_stream())  # a capture that fails may leave another one behind
        try:
            streams = torch.random.fork_rng([self._params[0].device])
            with stream, _as_captured(), streams, buffers_kept(self._modules_within) as replaced:
                self._captured[key] = capture(_Pass(self.model, leaves, form), leaves, self._pool)
                if replaced():  # which a replay would not repeat
                    raise ValueError("forward puts another tensor in a buffer's place")
        except (RuntimeError, ValueError, TypeError) as error:
            _leave_capture_(self._params[0].device)
            if isinstance(error, torch.OutOfMemoryError):
                raise
            return self._give_up(str(error).split("\n")[0])
        return True

    def _without_gradients(self, call: _Pass, leaves: list[Any], pool: Any) -> Callable[..., Any]:
        try:
            return _forward_only(call, leaves, pool, self._stream)
        finally:
            if self._stepping:
                give_back_cached()

    def _with_gradients(self, call: _Pass, leaves: list[Any], pool: Any) -> Callable[..., Any]:
        if not self._stepping:
            return _with_backward(call, leaves, pool)
        try:
            return _CapturedSteps(call, leaves, pool, self._stepping, self._stream)
        finally:  # what the capture computed is none of the next pass's gradients
            self._stepping.zero_grad()
            give_back_cached()

    def _give_up(self, reason: str) -> bool:
        self.fails = reason
        self._captured.clear()
        warnings.warn(f"runs without CUDA graphs: {reason}", stacklevel=4)
        return False


def _leave_capture_(device: torch.device) -> None:
    """Let random numbers be drawn again: a capture that failed leaves the generator's state as that of a graph."""
    generator: Any = torch.cuda.default_generators[device.index]
    generator.graphsafe_set_state(generator.clone_state())


def _as_captured() -> torch.autocast:
    """The number format of the caller, without a cache of lowered weights, which a replay would not make anew."""
    dtype, enabled = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
    return torch.autocast("cuda", dtype=dtype, enabled=enabled, cache_enabled=False)


@contextmanager
def buffers_kept(modules: Iterable[nn.Module]) -> Iterator[Callable[[], bool]]:
    """Put back the buffers that passes change or replace; what it gives says whether one is replaced by then."""
    before = [(m._buffers, name, b, b.clone()) for m in modules for name, b in m._buffers.items() if b is not None]
    try:
        yield lambda: any(buffers[name] is not b for buffers, name, b, _ in before)
    finally:
        for buffers, name, b, value in before:
            buffers[name] = b.copy_(value)


class _Pass(nn.Module):
    """A call of the model in which the tensors alone are arguments."""

    def __init__(self, model: nn.Module, leaves: list[Any], form: TreeSpec) -> None:
        super().__init__()
        self.model, self._form = model, form
        self._leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def forward(self, *tensors: Tensor) -> Any:
        given = iter(tensors)
        args, kwargs = tree_unflatten([next(given) if x is None else x for x in self._leaves], self._form)
        return self.model(*args, **kwargs)


def _with_backward(call: _Pass, leaves: list[Any], pool: Any) -> Callable[..., Any]:
    call.training = call.model.training
    torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)  # of the passes that warm up: harmless
    tensors = tuple(leaf.clone() for leaf in leaves if isinstance(leaf, Tensor))
    graphed = torch.cuda.make_graphed_callables(
        call, tensors, num_warmup_iters=WARM_UP_PASSES, allow_unused_input=True, pool=pool
    )
    return lambda *given: tree_map_only(Tensor, _kept, graphed(*given))


class _CapturedSteps:
    """Forward in one graph; backward in another, with the steps that the optimizer takes in it."""

    def __init__(self, call: _Pass, leaves: list[Any], pool: Any, stepping: StepInBackward, stream: Any) -> None:
        give_back_cached()
        self._tensors = [leaf.clone() for leaf in leaves if isinstance(leaf, Tensor)]
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()  # type: ignore[no-untyped-call]
        with torch.cuda.graph(self._forward, pool=pool, stream=stream):
            loss = call(*self._tensors)
        if not isinstance(loss, Tensor) or loss.numel() > 1:
            raise ValueError("forward returns more than its loss")
        self._scale = torch.ones_like(loss)
        as_trained = torch.autocast("cuda", enabled=False)  # as a trainer's backward runs
        with torch.cuda.graph(self._backward, pool=pool, stream=stream), as_trained:
            loss.backward(self._scale)  # type: ignore[no-untyped-call]
        self._stepping, self._buckets, self._loss = stepping, stepping.captured(), loss.detach()
        self._gradients = [(p, p.grad) for p in call.model.parameters() if p.grad is not None]
        self._anchor = torch.empty((), device=loss.device, requires_grad=True)

    def __call__(self, *given: Tensor) -> Any:
        return _Replayed.apply(self._anchor, self, *given)  # type: ignore[no-untyped-call]

    def forward_(self, given: tuple[Tensor, ...]) -> Tensor:
        for mine, theirs in zip(self._tensors, given, strict=True):
            mine.copy_(theirs)
        self._forward.replay()
        return self._loss.clone()

    def backward_(self, gradient: Tensor) -> None:
        self._scale.copy_(gradient)
        self._stepping.advance_(self._buckets)
        self._backward.replay()
        for p, of_graph in self._gradients:
            p.grad = of_graph


class _Replayed(torch.autograd.Function):
    """A pass of `_CapturedSteps`; no class of each capture's own, which would keep its memory until it is collected."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, captured: _CapturedSteps, *given: Tensor) -> Tensor:
        ctx.captured, ctx.count = captured, len(given)
        return captured.forward_(given)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        ctx.captured.backward_(gradient)
        return (None,) * (ctx.count + 2)


def _kept(output: Tensor) -> Tensor:
    """A loss outlives the next replay; what is larger is used before it."""
    return output.clone() if output.numel() == 1 else output


def _forward_only(call: _Pass, leaves: list[Any], pool: Any, stream: Any | None) -> Callable[..., Any]:
    """stream: of the other passes, whose memory in the pool it shares; None takes one of its own."""
    tensors = [leaf.clone() for leaf in leaves if isinstance(leaf, Tensor)]
    graph, beside = torch.cuda.CUDAGraph(), stream or torch.cuda.Stream()  # type: ignore[no-untyped-call]
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(WARM_UP_PASSES):
            call(*tensors)
    torch.cuda.current_stream().wait_stream(beside)
    if stream:
        give_back_cached()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        outputs = call(*tensors)

    def replay(*given: Tensor) -> Any:
        for mine, theirs in zip(tensors, given, strict=True):
            mine.copy_(theirs)
        graph.replay()
        return tree_map_only(Tensor, Tensor.clone, outputs)

    return replay
