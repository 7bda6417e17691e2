"""A training on a fake GPU: every phase's real graph, and nothing computed."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from hybridlab.base.errors import UserError
from hybridlab.base.swapped import swapped
from hybridlab.depth import DepthSchedule
from hybridlab.memory.checkpointing import BlockInputs, blocks_of, buckets_of, checkpoint_blocks_
from hybridlab.models import loss as own_loss
from hybridlab.optim import build_optimizer, hidden_matrices
from hybridlab.optim.host_adamw import LEAVING_BYTES
from hybridlab.optim.low_bit import MOST_AT_ONCE
from hybridlab.optim.muon import Muon
from hybridlab.planner.architectures import one_text_per_window
from hybridlab.planner.fake_gpu import fake_gpu
from hybridlab.planner.ranks import Shards, ddp_buckets
from hybridlab.planner.repeat import EXAMPLE, FIRST, LAST, NotRepeated, keep_blocks_, runs_alike, unfold
from hybridlab.planner.spec import TrainingSpec
from hybridlab.planner.trace import WORKSPACE, Segment, Trace
from hybridlab.weights.path import PathStorage
from hybridlab.weights.tail_average import TailAverage, put_back

UPDATE = "update"
"""The name of the segment in which the optimizer steps."""

LowBit = tuple[int, int]
"""Bits per number, and numbers that share one float32 scale."""

FORMATS: dict[str, LowBit] = {"int8": (8, 256), "fp8": (8, 256), "int4": (4, 128)}
"""torchao's."""

SMALLEST_QUANTIZED = 4096
"""Numbers of a tensor below which torchao leaves its state in float32."""


@dataclass(frozen=True)
class StepCosts:
    """What a gradient step takes besides memory on the GPU.

    flops: by number format ("float32", "bfloat16"), what is computed twice included
    moved_bytes: that its other kernels, the optimizer's included, read and write on the GPU
    bus_bytes: to the host and back: inputs of blocks, gradients and their sums, and weights
    host_bytes: that it reads and writes in host memory
    kernels: that the host starts
    """

    flops: dict[str, int]
    moved_bytes: int
    bus_bytes: int
    host_bytes: int
    kernels: int


@dataclass(frozen=True)
class Rehearsal:
    """A training's events, in stretches that can be put one behind the other.

    setup: the model; passes: forward and backward; update: the rest of a step, at whose end gradients are freed
    state: the optimizer's, which the first update makes
    path: what is kept on the GPU of the weights' past: a predictor's path, a snapshot, a mean
    evaluation: a forward pass of the mean of the weights, if there is one
    offload: what leaves in Predict; predict: a forward pass
    costs: of a gradient step; host_memory: use -> bytes that the training takes of the host and keeps
    """

    setup: list[Segment]
    passes: list[Segment]
    update: list[Segment]
    state: list[Segment]
    path: list[Segment]
    evaluation: list[Segment]
    offload: list[Segment]
    predict: list[Segment]
    costs: StepCosts
    host_memory: dict[str, int]
    trained_numbers: int


def rehearse(spec: TrainingSpec) -> Rehearsal:
    """Take a training through all its phases; of many equal blocks a few stand for all, where they are found equal.

    Raises UserError where shapes or values in the model depend on its numbers.
    """
    # on ranks a plan with transformers' mask is nearer to the 7 billion parameters that were measured
    with fake_gpu(), nullcontext() if spec.ranks else one_text_per_window():
        try:
            return DryRun(spec, shortened=True).rehearse()
        except (NotRepeated, IndexError):  # IndexError: the model counts its blocks itself
            return DryRun(spec, shortened=False).rehearse()
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise UserError(
                f"what the model computes depends on its numbers, so it cannot be planned: {error}"
            ) from error


class DryRun:
    """One training, set up on the fake GPU and then taken through its phases, once."""

    def __init__(self, spec: TrainingSpec, *, shortened: bool) -> None:
        self._spec, self._memory = spec, spec.memory
        self._trace, self._leaving = Trace(), deque[Tensor]()
        self._trace.workspace_bytes = spec.overhead.workspace_bytes
        # without graphs apart from all else: nine runs of ranks were nearer to that, and four of graphs to this
        self._trace.workspace_stream = "" if spec.replays_graphs else WORKSPACE
        self._shortened, self._is_last_part = shortened, False

    def rehearse(self) -> Rehearsal:
        """All phases. Raises NotRepeated where blocks that should be equal are not."""
        of_piece = self._trace.recalled(own_loss._loss_of_)  # once for all that are alike: a long batch has thousands
        with self._trace, swapped(own_loss, _loss_of_=of_piece):
            setup = self._set_up()
            state, update = self._set_up_optimizer()
            path = self._set_up_path()
            self._free_gradients_early()
            if self._left_out:
                _mark(keep_blocks_(self._model, FIRST, self._last), self._trace)
            if self._shards:
                numbers = {"bf16": torch.bfloat16}.get(self._spec.gather, torch.float32)
                at_once, keep = self._spec.blocks_per_group, self._spec.keep_gathered
                self._shards.gather_by_block_(self._model, numbers, at_once, keep=keep)
            passes = self._unfolded(self._gradient_step())
            after = self._stretch("slopes", self._read_slopes) + self._stretch("mean", self._average)
            update += self._unfolded(after + self._stretch("end", self._drop_gradients))
            costs, host_memory = self._costs(passes, update), self._host_memory(passes)
            evaluation = self._unfolded(self._stretch("evaluation", self._evaluate))
            offload = self._stretch("offload", self._offload)
            predict = self._unfolded(self._stretch("predict", partial(self._forward_alone, "predict")))
            kept = (state, path, evaluation, offload, predict)
            return Rehearsal(setup, passes, update, *kept, costs, host_memory, self._size)

    # --- phases ------------------------------------------------------------------------------------------

    def _set_up(self) -> list[Segment]:
        with self._trace.counting_as("weights" if self._spec.is_sharded else "activations"):
            self._model = model = self._spec.build()
        self._weights = list(model.parameters())
        self._trace.logit_widths = _vocabulary(model)
        if self._spec.compiled:
            from hybridlab.planner.compiled import compile_  # takes a second to import

            compile_(model, self._trace)
        if self._memory.checkpointing:
            checkpoint_blocks_(model, self._memory.checkpointing, BlockInputs(self._on_host))
        if self._memory.lowers_weights:
            _lower_(model.parameters())
        averaged = [p for p in self._weights if p.requires_grad]
        self._joined = _deactivate_(model, self._spec.depth) if self._spec.depth else set()
        self._trace.tag({*self._weights, *model.buffers()}, "weights")
        self._params = [p for p in model.parameters() if p.requires_grad]
        sharing = self._spec.ranks // self._spec.copies
        self._shards = Shards(self._trace, self._weights, sharing) if self._spec.is_sharded else None
        self._mean = TailAverage(self._own(averaged)) if self._spec.averages else None
        self._size = sum(p.numel() for p in self._own(self._params))
        adds_up = self._spec.ranks > 1 and self._spec.wrap == "ddp" and not self._spec.replays_graphs
        self._buckets = ddp_buckets(self._trace, self._size if adds_up else 0)
        self._left_out = self._countable()
        return self._trace.take()

    def _own(self, params: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """What this rank holds of these parameters; without ranks that is all."""
        return [self._shards.own[p] if self._shards else p for p in params]

    def _countable(self) -> int:
        """How many blocks need not be run; of several ranks none: a block is gathered while another one runs."""
        if not (self._shortened and not self._spec.ranks and runs_alike(self._model, self._last)):
            return 0
        return len(blocks_of(self._model)) - FIRST - self._last

    @property
    def _last(self) -> int:
        checkpointing = self._memory.checkpointing
        return LAST + (checkpointing.keep_last if checkpointing else 0)

    def _gradient_step(self) -> list[Segment]:
        for part in range(self._parts_run):
            self._trace.begin(f"forward {part}")
            with self._precision("training"):
                loss = self._spec.part_loss(self._model)
            self._trace.begin(f"loss {part}")
            self._is_last_part = part == self._parts_run - 1
            if self._shards:
                self._shards.last = self._is_last_part
            loss.backward()  # type: ignore[no-untyped-call]
            del loss
            if self._shards:
                self._trace.begin(f"scattered {part}")
                self._shards.end_backward()
        self._trace.begin("sent")
        self._leaving.clear()
        return self._trace.take()

    @torch.no_grad()
    def _forward_alone(self, phase: str) -> None:
        with self._precision(phase):
            self._spec.part_loss(self._model)

    def _average(self) -> None:
        """A step more in the mean of the weights."""
        if self._mean:
            self._mean.add_()

    def _evaluate(self) -> None:
        """The mean of the weights, the optimizer's too, takes their place, and they wait beside it."""
        if not self._spec.judges_mean:
            return
        with ExitStack() as exit_stack:
            with self._trace.counting_as("weights"):
                exit_stack.enter_context(self._mean.in_place() if self._mean else put_back(self._own(self._params)))
            self._forward_alone("training")

    def _offload(self) -> None:
        """Leave on the GPU what Predict keeps there of state and weights."""
        self._offload_state()
        if self._memory.offloads_weights:
            _lower_(self._own(self._weights))
            self._trace.tag(self._own(self._weights), "weights")

    def _stretch(self, name: str, act: Callable[[], object]) -> list[Segment]:
        self._trace.begin(name)
        act()
        return [segment for segment in self._trace.take() if segment.events or segment.work]

    def _unfolded(self, segments: list[Segment]) -> list[Segment]:
        return unfold(segments, self._left_out)

    # --- work, and the host ------------------------------------------------------------------------------

    def _costs(self, passes: list[Segment], update: list[Segment]) -> StepCosts:
        """Of the gradient step: AdamW reads weight, gradient and two moments, and writes all but the gradient.

        A mean beside the weights takes five more passes over both, 14 reads and writes, 2 of them the state's.
        """
        weights, state = _bytes(self._own(self._params)), _bytes(self._states(self._params))
        on_host, work = self._memory.state_on_host, _work(passes + update)
        moved, sent, kernels = (work.pop(name) for name in ("moved", "sent", "kernels"))
        if self._spec.replays_graphs:
            kernels = _work(update)["kernels"] + 2
        return StepCosts(
            flops={name: self._whole(count) for name, count in work.items()},
            moved_bytes=self._whole(moved) + (0 if on_host else (15 if self._averages else 3) * weights + 2 * state),
            bus_bytes=2 * self._memory.micro_batches * ((weights if on_host else 0) + sent),
            host_bytes=28 * self._size if on_host else 0,
            kernels=self._whole(kernels),
        )

    def _host_memory(self, passes: list[Segment]) -> dict[str, int]:
        """Bytes of host memory that the training takes and keeps, by use; most of it page-locked."""
        weights, path = _bytes(self._own(self._params)), self._spec.path
        uses = {"inputs of blocks": _work(passes)["sent"]}
        if self._memory.state_on_host:
            uses["gradients, state and masters"] = 16 * self._size
        if path and self._spec.path_storage.on_host:
            rows = path.rows + (path.velocity is not None)
            uses["path"] = rows * self._size * self._spec.path_storage.dtype.itemsize + weights
        if self._spec.path_storage.on_host:
            uses["rollback snapshot"] = _bytes(self._in_snapshot())
        return {use: size for use, size in uses.items() if size}

    def _whole(self, counted: int) -> int:
        """Of all micro batches, from those that were run."""
        return counted * self._memory.micro_batches // self._parts_run

    @property
    def _averages(self) -> bool:
        """Whether the optimizer keeps a mean of the weights."""
        return self._spec.optimizer.average_decay > 0

    @property
    def _parts_run(self) -> int:
        return min(self._memory.micro_batches, 2)  # further ones find what the second found

    # --- optimizer ---------------------------------------------------------------------------------------

    def _set_up_optimizer(self) -> tuple[list[Segment], list[Segment]]:
        """What the first update makes for good, and what each update makes and frees, where it waits for the end."""
        self._muons = set(hidden_matrices(self._model)) if self._spec.optimizer.name == "muon" else set()
        with self._trace.counting_as("optimizer"):
            self._state = self._new_state()
        made = self._trace.take()
        with self._trace.counting_as(None):
            for p in self._muons:
                p.grad = torch.empty_like(p)
        update = self._stretch(UPDATE, partial(self._step, self._params))
        self._drop_gradients()
        return made, [] if self._memory.step_in_backward else update

    def _new_state(self) -> dict[nn.Parameter, list[Tensor]]:
        """What the optimizer keeps on the GPU of each parameter."""
        if self._memory.state_on_host:
            return {}
        if self._memory.optimizer_state != "fp32":
            leads = {p: [torch.empty_like(p)] if self._averages else [] for p in self._params}
            return {p: self._low_bit_state(p) + leads[p] for p in self._params}
        with self._trace.counting_as(None):
            kept = self._stepped_state()
        own = dict(zip(kept, self._own(kept), strict=True))
        return {
            p: [torch.empty_like(own[p] if value.shape == p.shape else value, dtype=value.dtype) for value in state]
            for p, state in kept.items()
        }

    def _stepped_state(self) -> dict[nn.Parameter, list[Tensor]]:
        """The state that torch's optimizer makes at its first step, in the form that it takes on a CUDA GPU."""
        optimizer, examples = build_optimizer(self._model, self._spec.optimizer), self._examples()
        for group in optimizer.param_groups:
            if "fused" in group:
                group.update(fused=True, foreach=False)
        for p in self._params:
            p.grad = None if p in examples else torch.empty_like(p)
        optimizer.step()
        self._drop_gradients()
        states = {p: optimizer.state[examples.get(p, p)] for p in self._params}
        return {p: [v for v in state.values() if isinstance(v, Tensor)] for p, state in states.items()}

    def _examples(self) -> dict[nn.Parameter, nn.Parameter]:
        """Parameter of a block that others stand for -> the one whose state it shares in kind."""
        if not self._left_out:
            return {}
        blocks = [dict(block.named_parameters()) for block in blocks_of(self._model)]
        left_out = blocks[FIRST : FIRST + self._left_out]
        return {p: blocks[EXAMPLE][name] for block in left_out for name, p in block.items() if p.requires_grad}

    def _step(self, params: list[nn.Parameter]) -> None:
        """What the update of these parameters takes while it lasts: AdamW's takes something in 4 bits alone."""
        self._step_muon(params)
        if self._memory.optimizer_state == "int4" and self._memory.weights != "24bit":
            self._step_in_4_bits(p for p in params if p.ndim > 1 and p not in self._muons)

    def _step_in_4_bits(self, matrices: Iterable[nn.Parameter]) -> None:
        """Two codes share a byte: each moment's scaled values and int64 codes are written before they are packed."""
        for numbers in (min(p.numel(), MOST_AT_ONCE) for p in matrices):
            with self._trace.counting_as("optimizer"):
                written = [
                    torch.empty(numbers, dtype=dtype) for dtype in (torch.float32, torch.int64) for _ in range(2)
                ]
            del written

    def _step_muon(self, params: list[nn.Parameter]) -> None:
        mine = [p for p in params if p in self._muons and p.grad is not None]
        if not mine:
            return
        with self._trace.counting_as(None):
            momenta: dict[Tensor, Tensor] = {p: torch.empty_like(p) for p in mine}
        with self._trace.counting_as("optimizer"):
            Muon(mine, new_buffer=momenta.__getitem__).step()

    def _low_bit_state(self, p: nn.Parameter) -> list[Tensor]:
        further = [torch.empty_like(p, dtype=torch.int8)] if self._memory.weights == "24bit" else []
        if p.ndim < 2:
            return [*further, *(torch.empty_like(p, dtype=torch.float32) for _ in range(2))]
        bits = FORMATS[self._memory.optimizer_state]
        return [*further, *(t for _ in range(1 if p in self._muons else 2) for t in _moment(p, bits))]

    def _offload_state(self) -> None:
        """Leave on the GPU what Predict's strategy keeps there of the state."""
        strategy = self._memory.predict_strategy
        if strategy == "none":
            return
        kept = self._state.items() if strategy == "compress" else ()
        self._state = {p: [c for t in state if t.numel() > 1 for c in _moment(t, FORMATS["int8"])] for p, state in kept}
        self._trace.tag(self._states(self._params), "optimizer")

    def _states(self, params: Iterable[nn.Parameter]) -> list[Tensor]:
        return [t for p in params for t in self._state.get(p, ())]

    # --- gradients ---------------------------------------------------------------------------------------

    def _free_gradients_early(self) -> None:
        """Where the memory configuration wants it, a gradient goes as soon as it may."""
        for bucket in buckets_of(self._model) if self._memory.step_in_backward else [self._params]:
            for p in bucket:
                p.register_post_accumulate_grad_hook(partial(self._arrived, bucket))  # type: ignore[no-untyped-call]

    def _arrived(self, bucket: list[nn.Parameter], p: nn.Parameter) -> None:
        gradient = p.grad
        assert gradient is not None
        self._trace.tag([gradient], "gradients")
        if self._memory.state_on_host:
            self._send(gradient)
            p.grad = None
        elif self._buckets and self._is_last_part:
            p.grad = None
        elif self._memory.step_in_backward and all(member.grad is not None for member in bucket):
            self._step(bucket)
            for member in bucket:
                if member.ndim > 1:  # the others wait for the step's end
                    member.grad = None

    def _send(self, gradient: Tensor) -> None:
        """Gradients on their way to the host stay until the bus has caught up."""
        self._leaving.append(gradient)
        while _bytes(self._leaving) > LEAVING_BYTES:
            self._leaving.popleft()

    def _drop_gradients(self) -> None:
        self._leaving.clear()
        if self._shards:
            self._shards.drop_gradients()
        for p in self._params:
            p.grad = None

    # --- path --------------------------------------------------------------------------------------------

    def _set_up_path(self) -> list[Segment]:
        with self._trace.counting_as("path"):
            self._path = self._new_path()
        with self._trace.counting_as("weights"):
            self._average()
        return self._trace.take()

    def _new_path(self) -> list[Tensor]:
        """Rows, last weights, velocity and direction, and the rollback snapshot."""
        path, storage = self._spec.path, self._spec.path_storage
        made = [torch.empty(self._size)] if path and path.direction else []
        if storage.on_host:
            return made
        if path:
            made += [torch.empty(path.rows + (path.velocity is not None), self._size, dtype=storage.dtype)]
            made += [torch.empty(self._size, dtype=self._own(self._params)[0].dtype)]
        return made + [torch.empty_like(t) for t in self._in_snapshot()]

    def _in_snapshot(self) -> list[Tensor]:
        """What a rollback snapshot copies: before a jump all that is trained, before a growth all but what joins."""
        grown = self._spec.depth is not None and self._spec.depth.grows
        params = [p for p in self._params if self._spec.path or (grown and p not in self._joined)]
        return [*self._own(params), *self._model.buffers(), *self._states(params)] if params else []

    def _read_slopes(self) -> None:
        """Each group's gradients in one piece and, if it lies elsewhere or in bf16, the row that they multiply."""
        freed = self._memory.state_on_host or self._memory.step_in_backward
        for matrices in (True, False) if self._spec.path else ():
            kept = [p for p in self._params if (p.ndim > 1) is matrices and not (freed and p.ndim > 1)]
            count = 1 if self._spec.path_storage == PathStorage() else 2
            with self._trace.counting_as("path"):
                copies = [torch.empty(sum(p.numel() for p in self._own(kept))) for _ in range(count if kept else 0)]
            del copies

    # --- helpers -----------------------------------------------------------------------------------------

    def _on_host(self, tensor: Tensor) -> Tensor:
        """A place for the values of a block's input; it is used again by the next part of a batch."""
        self._trace.add("sent", tensor.nbytes)
        with self._trace.counting_as(None):
            return torch.empty_like(tensor)

    def _precision(self, phase: str) -> torch.autocast:
        numbers = getattr(self._memory.mixed_precision, phase, "fp32")
        cached = self._spec.weight_cache
        return torch.autocast("cpu", torch.bfloat16, enabled=numbers != "fp32", cache_enabled=cached)


def _deactivate_(model: nn.Module, depth: DepthSchedule) -> set[nn.Parameter]:
    """Bypass all blocks that take no part in the last stage; gives the parameters of those that join in it.

    Raises UserError for more than there are.
    """
    active, blocks = depth.depths[-1], blocks_of(model)
    if active > len(blocks):
        raise UserError(f"{active} blocks cannot be active: {type(model).__name__} has {len(blocks)}")
    kept = keep_blocks_(model, max(active - 1, 0), min(active, 1))
    for block in blocks:
        if all(block is not other for other in kept):
            block.requires_grad_(False)
    return {p for block in kept[(0, *depth.depths)[-2] :] for p in block.parameters()}


def _mark(blocks: list[nn.Module], trace: Trace) -> None:
    """Tell the trace where each block begins, forward and backward."""
    for i, block in enumerate(blocks):
        block.register_forward_pre_hook(partial(_enters, trace, i), with_kwargs=True)
        block.register_forward_hook(partial(_leaves, trace, i, i == len(blocks) - 1))


def _enters(trace: Trace, i: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if i == 0:
        _when_differentiated([*args, *kwargs.values()], lambda _: trace.enter(None))
    trace.enter(i)


def _leaves(trace: Trace, i: int, is_last: bool, block: nn.Module, args: Any, out: Any) -> None:
    _when_differentiated(out if isinstance(out, tuple | list) else [out], lambda _: trace.enter(i))
    if is_last:
        trace.enter(None)


def _when_differentiated(values: Iterable[Any], act: Callable[[Tensor], None]) -> None:
    """Act as soon as the gradient of the first of these that has one is known."""
    first = next((v for v in values if isinstance(v, Tensor) and v.requires_grad), None)
    if first is not None and torch.is_grad_enabled():
        first.register_hook(act)  # type: ignore[no-untyped-call]


def _work(segments: Iterable[Segment]) -> Counter[str]:
    total: Counter[str] = Counter(moved=0, sent=0, kernels=0)
    for segment in segments:
        total.update(segment.work)
    return total


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _moment(like: Tensor, bits: LowBit) -> list[Tensor]:
    """One moment of a parameter: codes and scales, or float numbers where the format does not take it."""
    width, block = bits
    numbers = like.numel()
    if numbers < SMALLEST_QUANTIZED or numbers % block:
        return [torch.empty_like(like, dtype=torch.float32)]
    return [torch.empty(numbers * width // 8, dtype=torch.uint8), torch.empty(numbers // block)]


def _lower_(weights: Iterable[nn.Parameter]) -> None:
    """Floating-point parameters become bf16, one at a time."""
    for p in weights:
        p.data = p.data.to(torch.bfloat16)


def _vocabulary(module: nn.Module) -> frozenset[int]:
    """Widths that logits may have: rows of the largest embedding, with and without padding."""
    rows = max((m.num_embeddings for m in module.modules() if isinstance(m, nn.Embedding)), default=0)
    return frozenset({rows, getattr(getattr(module, "config", None), "vocab_size", rows)})
