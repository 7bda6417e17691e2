"""What torch.compile makes of a module's forward: what it keeps for the backward pass, and what its kernels write."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._functorch.aot_autograd import aot_function
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch._ops import OpOverload
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from hybridlab.base.swapped import swapped
from hybridlab.memory.checkpointing import blocks_of
from hybridlab.planner.trace import FLOPS, Trace

aten, prims = torch.ops.aten, torch.ops.prims
FUSED = {
    *(aten.full, aten.index, aten.embedding, aten.gather, aten.slice_scatter, aten.select_scatter),
    *(aten.constant_pad_nd, aten.clone, aten.copy, aten.cat, aten.scatter.value, aten.rand, aten.rand_like),
    *(aten.bernoulli, prims.convert_element_type, prims.iota),
}
"""What Inductor computes where the result is used, beside what torch tags as pointwise."""


def compile_(model: nn.Module, trace: Trace) -> None:
    """Let a model compute as `hybridlab.speed.compile_` has it do by block; one without blocks is compiled as a whole.

    Raises what its operations raise where they cannot be taken apart.
    """
    graphs: dict[Any, Callable[..., Any]] = {}
    blocks = blocks_of(model)
    for block in blocks or [model]:
        block.forward = Compiled(block, "forward", trace, graphs)  # type: ignore[method-assign]
    for name in getattr(model, "compiled_methods", ()) if blocks else ():
        setattr(model, name, Compiled(model, name, trace, graphs))


class Compiled:
    """Stands for a module's method as torch.compile runs it: in two graphs, cut by AOTAutograd's minimum cut.

    graphs: those made so far, by their inputs; modules of one kind share them
    """

    def __init__(self, module: nn.Module, method: str, trace: Trace, graphs: dict[Any, Callable[..., Any]]) -> None:
        inside = {id(p) for block in blocks_of(module) for p in block.parameters()}
        named = [*module.named_parameters(), *module.named_buffers()]
        self._names = [f"module.{name}" for name, tensor in named if id(tensor) not in inside]
        self._method, self._trace, self._graphs = method, trace, graphs
        self._body = _Body(module, getattr(module, method))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph of these inputs, which their first call makes."""
        leaves, structure = tree_flatten((args, kwargs))
        state = dict(self._body.named_parameters()) | dict(self._body.named_buffers())
        tensors = [state[name] for name in self._names] + [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        modes = self._method, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
        key = *modes, *((t.shape, t.dtype, t.requires_grad) for t in tensors)
        if key not in self._graphs:
            self._graphs[key] = self._compiled(leaves, structure)
            with self._trace.paused(), saved_tensors_hooks(_same, _same):  # a checkpoint around it counts what is saved
                self._graphs[key](*map(_like, tensors))
        return self._graphs[key](*tensors)

    def _compiled(self, leaves: list[Any], structure: Any) -> Callable[..., Any]:
        body, names = self._body, self._names
        rest = [Tensor if isinstance(leaf, Tensor) else leaf for leaf in leaves]

        def run(*tensors: Tensor) -> Any:
            given = iter(tensors[len(names) :])
            args, kwargs = tree_unflatten([next(given) if leaf is Tensor else leaf for leaf in rest], structure)
            with swapped(torch.compiler, _is_compiling_flag=True):
                return torch.func.functional_call(body, dict(zip(names, tensors, strict=False)), args, kwargs)

        def cut(graph: fx.GraphModule, inputs: Any, **settings: Any) -> Any:
            settings["static_lifetime_input_indices"] = list(range(len(names)))
            return min_cut_rematerialization_partition(graph, inputs, compiler="inductor", **settings)

        def kernels(gm: fx.GraphModule, example_inputs: Any) -> Kernels:
            return Kernels(gm, self._trace)

        return aot_function(run, kernels, kernels, cut, select_decomp_table(), num_params_buffers=len(names))


class _Body(nn.Module):
    """A module that is called by one of its methods, as it is now, without its hooks."""

    def __init__(self, module: nn.Module, method: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self._run = module, method

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(*args, **kwargs)


def _like(tensor: Tensor) -> Tensor:
    """What the graph is made with, and holds on to."""
    return torch.empty_like(tensor, requires_grad=tensor.requires_grad)


def _same(tensor: Tensor) -> Tensor:
    return tensor


class Kernels(fx.Interpreter):
    """Runs a graph in the kernels that Inductor would start: only what one of them writes is memory.

    Written are results of reductions and of what has a kernel of its own, such as products and attention, what the
    latter read, and the outputs. All else is computed where it is used, and keeps alive what it is computed from. A
    fused kernel writes over an input of its result's size that it reads where it writes and that nobody needs after it.
    """

    def __init__(self, module: fx.GraphModule, trace: Trace) -> None:
        super().__init__(module, garbage_collect_values=False)
        self._trace, self._written = trace, _written(module.graph)
        self._last_used = _last_used(module.graph, self._written)

    _boxed_call = True
    """AOTAutograd then hands a list over, which is emptied."""

    def __call__(self, args_list: list[Any]) -> Any:
        """The outputs; what the list held is forgotten after its last use."""
        try:
            return self.boxed_run(args_list)
        finally:
            self.env = {}

    def run_node(self, n: fx.Node) -> Any:
        """Compute it for its shape, and count it where a kernel writes it."""
        if n.op != "call_function":
            return super().run_node(n)
        with self._trace.paused():
            out = super().run_node(n)
        if n in self._written:
            self._count(n, out)
        self._forget(self._last_used[n])
        return out

    def _count(self, n: fx.Node, out: Any) -> None:
        if n.target._overloadpacket in FLOPS:  # type: ignore[union-attr]
            self._trace.count_work(n.target, *self.fetch_args_kwargs_from_env(n), out)
        else:
            read = [source for source in _needed_by(n, self._written) if _is_memory(source, self._written)]
            self._trace.add("moved", _bytes(out) + _bytes([self.env[source] for source in read]))
            self._trace.add("kernels", 1)
            self._forget(self._overwritten(n, out))
        self._trace.count(out)

    def _overwritten(self, n: fx.Node, out: Any) -> list[fx.Node]:
        """Of what is used here for the last time, what is one storage of the result's size."""
        by_storage: dict[int, list[tuple[fx.Node, Tensor]]] = defaultdict(list)
        for node in self._last_used[n]:
            for value in _tensors(self.env.get(node)):
                if value.untyped_storage().nbytes() == _bytes(out):
                    by_storage[value.untyped_storage()._cdata].append((node, value))
        for read in by_storage.values():
            nodes = [node for node, _ in read]
            in_place = all(_lies_in_place(value, out) for _, value in read)
            if in_place and any(_is_memory(node, self._written) for node in nodes):
                return nodes
        return []

    def _forget(self, nodes: list[fx.Node]) -> None:
        for node in nodes:
            self.env.pop(node, None)


def _written(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose results are memory."""
    calls = [n for n in graph.nodes if n.op == "call_function"]
    kernels = {n for n in calls if not (_is_view(n) or _is_fused(n))}
    readers = [n for n in kernels if n.target._overloadpacket in FLOPS]  # type: ignore[union-attr]
    read = {_viewed(source) for n in [*readers, graph.output_node()] for source in n.all_input_nodes}
    return kernels | {n for n in read if n.op == "call_function"}


def _last_used(graph: fx.Graph, written: set[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """Node -> those that nothing needs after it."""
    used: set[fx.Node] = set()
    last: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for n in reversed(graph.nodes):
        needs = _needed_by(n, written) if n in written or n.op == "output" else n.all_input_nodes if _is_item(n) else []
        last[n] = [source for source in needs if source not in used]
        used.update(last[n])
    return last


def _needed_by(n: fx.Node, written: set[fx.Node]) -> set[fx.Node]:
    """What must be there when this kernel starts: what it reads, and all between that is computed in it."""
    found, waiting = set[fx.Node](), [*n.all_input_nodes]
    while waiting:
        source = waiting.pop()
        if source not in found:
            found.add(source)
            waiting += [] if _is_memory(source, written) else source.all_input_nodes
    return found


def _is_memory(n: fx.Node, written: set[fx.Node]) -> bool:
    return n.op != "call_function" or n in written or (_is_item(n) and n.all_input_nodes[0] in written)


def _viewed(n: fx.Node) -> fx.Node:
    while _is_view(n):
        n = n.all_input_nodes[0]
    return n


def _is_item(n: fx.Node) -> bool:
    return n.target is operator.getitem


def _is_view(n: fx.Node) -> bool:
    is_view = isinstance(n.target, OpOverload) and (n.target.is_view or n.target is aten._unsafe_view.default)
    return _is_item(n) or is_view


def _is_fused(n: fx.Node) -> bool:
    assert isinstance(n.target, OpOverload), n.target
    return torch.Tag.pointwise in n.target.tags or not FUSED.isdisjoint((n.target, n.target._overloadpacket))


def _lies_in_place(read: Tensor, out: Tensor) -> bool:
    """Whether each of the numbers that are read lies where the result's own will lie: all, or the first of each row."""
    return read.nbytes == out.nbytes or (read.stride(), read.storage_offset()) == (out.stride(), 0)


def _bytes(values: Any) -> int:
    return sum(tensor.nbytes for tensor in _tensors(values))


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
