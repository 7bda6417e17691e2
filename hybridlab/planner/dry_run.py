"""A training on an emulated card: every phase's real graph, and nothing computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hybridlab.memory.block_inputs import BlockInputs
from hybridlab.memory.checkpointing import buckets_of, checkpoint_blocks_
from hybridlab.memory.config import MemoryConfig
from hybridlab.optim import OptimizerConfig, build_optimizer
from hybridlab.optim.host_adamw import LEAVING_BYTES
from hybridlab.planner.flops import Work
from hybridlab.planner.live_bytes import LiveBytes
from hybridlab.weights.gram import PathNeeds
from hybridlab.weights.path import PathStorage

LowBit = tuple[int, int]
"""Bits of a number, and numbers that share one float32 scale."""

FORMATS: dict[str, LowBit] = {"int8": (8, 256), "fp8": (8, 256), "int4": (4, 128)}
"""torchao's."""

SMALLEST_QUANTIZED = 4096
"""Numbers of a tensor below which torchao leaves its state in float32."""

Loss = Callable[[nn.Module], Tensor]
"""The loss of one part of a batch; it makes its inputs itself, and they are fake."""


@dataclass(frozen=True)
class StepCosts:
    """What a gradient step takes besides memory on the card.

    flops: by number format ("float32", "bfloat16"), what is computed twice included
    moved_bytes: that its other kernels, the optimizer's included, read and write on the card
    bus_bytes: to the host and back: inputs of blocks, gradients and their sums, and weights
    host_bytes: that it reads and writes in host memory
    """

    flops: dict[str, int]
    moved_bytes: int
    bus_bytes: int
    host_bytes: int


class Rehearsal:
    """One training, set up on the emulated card and then taken through its phases, once and in this order.

    `gradient_step`, then `predict`, which puts away for good what leaves the card.

    model: built on the emulated card; loss: of one part of its batch
    path, path_storage: what of the path is remembered and where; None for a training that never predicts
    weight_cache: let autocast keep its bf16 copies of the weights for the length of a forward pass
    """

    def __init__(
        self,
        live: LiveBytes,
        model: nn.Module,
        loss: Loss,
        memory: MemoryConfig,
        optimizer: OptimizerConfig,
        path: PathNeeds | None,
        path_storage: PathStorage,
        *,
        weight_cache: bool,
    ) -> None:
        self._live, self._model, self._loss, self._memory = live, model, loss, memory
        self._weight_cache = weight_cache
        self._work = Work()
        self._sent_bytes = 0
        if memory.checkpointing:
            checkpoint_blocks_(model, memory.checkpointing, BlockInputs(self._on_host))
        if memory.weights == "bf16":
            _lower_(model)
        live.tag({*model.parameters(), *model.buffers()}, "weights")
        self._params = [p for p in model.parameters() if p.requires_grad]
        self._leaving: deque[Tensor] = deque()
        self._optimizer = _optimizer_on_cuda(model, optimizer) if self._steps_on_card else None
        self._state = self._new_state()
        live.tag(self._state, "optimizer")
        self._path_needs, self._path_storage = path, path_storage
        self._path = self._new_path(path, path_storage) if path else []
        self._slope_copies = (1 + (path_storage != PathStorage())) if path else 0
        live.tag(self._path, "path")
        self._watch_gradients()

    @property
    def _steps_on_card(self) -> bool:
        """Whether an optimizer of torch's own steps on the card."""
        return self._memory.optimizer_state == "fp32" and not self._memory.state_on_host

    # --- phases ------------------------------------------------------------------------------------------

    def gradient_step(self) -> dict[str, int]:
        """Bytes by part at the peak of Full and Correct: forward, backward and optimizer, the state being there."""
        self._forget_gradients()
        self._live.reset_peak()
        with self._work:
            for _ in range(self._rehearsed):
                with self._precision("training"):
                    loss = self._loss(self._model)
                loss.backward()  # type: ignore[no-untyped-call]
                del loss
        with self._transient("optimizer"):
            if self._optimizer and not self._memory.step_in_backward:
                self._optimizer.step()
        self._leaving.clear()
        with self._transient("path"):
            self._read_slopes()
        return self._live.peak

    @torch.no_grad()
    def predict(self) -> dict[str, int]:
        """Bytes by part at the peak of Predict: what has not left the card, and a forward pass."""
        self._forget_gradients()
        self._put_state_away()
        if self._memory.lowers_weights:
            _lower_(self._model)
            self._live.tag(self._model.parameters(), "weights")
        self._live.reset_peak()
        with self._precision("predict"):
            self._loss(self._model)
        return self._live.peak

    # --- work, and the host: ask between `gradient_step` and `predict` ------------------------------------

    def costs(self) -> StepCosts:
        """Of the gradient step: AdamW reads weight, gradient and two moments, and writes all but the gradient."""
        weights, state = _bytes(self._params), _bytes(self._state)
        on_host = self._memory.state_on_host
        return StepCosts(
            flops={str(dtype).removeprefix("torch."): self._whole(n) for dtype, n in self._work.flops.items()},
            moved_bytes=self._whole(self._work.moved_bytes) + (0 if on_host else 3 * weights + 2 * state),
            bus_bytes=2 * self._memory.micro_batches * ((weights if on_host else 0) + self._sent_bytes),
            host_bytes=28 * self._size if on_host else 0,
        )

    def held_on_host(self) -> dict[str, int]:
        """Bytes of host memory that the training takes and keeps, by what it keeps there; most of it page-locked."""
        weights, state, path = _bytes(self._params), _bytes(self._state), self._path_needs
        held = {"inputs of blocks": self._sent_bytes}
        if self._memory.state_on_host:
            held["gradients, state and masters"] = 16 * self._size
        if path and self._path_storage.on_host:
            rows = path.rows + (path.velocity is not None)
            held["path"] = rows * self._size * self._path_storage.dtype.itemsize + weights
            held["way back"] = weights + _bytes(self._model.buffers()) + state
        return {name: size for name, size in held.items() if size}

    @property
    def _size(self) -> int:
        return sum(p.numel() for p in self._params)

    def _whole(self, counted: int) -> int:
        """Of all micro batches, from those that were rehearsed."""
        return counted * self._memory.micro_batches // self._rehearsed

    @property
    def _rehearsed(self) -> int:
        return min(self._memory.micro_batches, 2)  # further ones find what the second found

    # --- optimizer ---------------------------------------------------------------------------------------

    def _new_state(self) -> list[Tensor]:
        """What the optimizer keeps on the card."""
        if self._memory.state_on_host:
            return []
        if self._optimizer is None:
            bits = FORMATS[self._memory.optimizer_state]
            vectors = [torch.empty_like(p, dtype=torch.float32) for p in self._params if p.ndim < 2 for _ in range(2)]
            return vectors + [t for p in self._params if p.ndim > 1 for _ in range(2) for t in _moment(p, bits)]
        for p in self._params:
            p.grad = torch.empty_like(p)
        self._optimizer.step()
        self._forget_gradients()
        values = [value for state in self._optimizer.state.values() for value in state.values()]
        return [value for value in values if isinstance(value, Tensor)]

    def _put_state_away(self) -> None:
        """What Predict's strategy leaves of the state on the card."""
        strategy = self._memory.predict_strategy
        if strategy == "none":
            return
        moments = [t for t in self._state if t.numel() > 1] if strategy == "compress" else []
        self._state = [piece for moment in moments for piece in _moment(moment, FORMATS["int8"])]
        if self._optimizer:
            self._optimizer.state.clear()
        self._live.tag(self._state, "optimizer")

    # --- gradients ---------------------------------------------------------------------------------------

    def _watch_gradients(self) -> None:
        """Where the memory configuration wants it, a gradient goes as soon as it may."""
        buckets = buckets_of(self._model) if self._memory.step_in_backward else [[p] for p in self._params]
        for bucket in buckets:
            waiting: list[nn.Parameter] = []
            for p in bucket:
                arrived = partial(self._arrived, waiting, len(bucket))
                p.register_post_accumulate_grad_hook(arrived)  # type: ignore[no-untyped-call]

    def _arrived(self, waiting: list[nn.Parameter], bucket_size: int, p: nn.Parameter) -> None:
        gradient = p.grad
        assert gradient is not None
        self._live.tag([gradient], "gradients")
        if self._memory.state_on_host:
            self._send(gradient)
            p.grad = None
        waiting.append(p)
        if len(waiting) < bucket_size:
            return
        for member in waiting if self._memory.step_in_backward else []:
            if member.ndim > 1:  # the others wait for the step's end
                member.grad = None
        waiting.clear()

    def _send(self, gradient: Tensor) -> None:
        """Gradients on their way to the host stay until the bus has caught up."""
        self._leaving.append(gradient)
        while sum(t.nbytes for t in self._leaving) > LEAVING_BYTES:
            self._leaving.popleft()

    def _forget_gradients(self) -> None:
        self._leaving.clear()
        for p in self._params:
            p.grad = None

    # --- path --------------------------------------------------------------------------------------------

    def _new_path(self, path: PathNeeds, storage: PathStorage) -> list[Tensor]:
        """Rows, last weights, velocity and direction, and the copy of weights and state that a jump can go back to."""
        size = self._size
        made: list[Tensor] = [torch.empty(size)] if path.direction else []
        if storage.on_host:
            return made
        made += [torch.empty(path.rows + (path.velocity is not None), size, dtype=storage.dtype)]
        made += [torch.empty(size, dtype=self._params[0].dtype)]
        return made + [torch.empty_like(t) for t in (*self._params, *self._model.buffers(), *self._state)]

    def _read_slopes(self) -> None:
        """Each group's gradients in one piece and, if it lies elsewhere or in bf16, the row that they multiply."""
        for matrices in (True, False):
            gradients = [p.grad.flatten() for p in self._params if p.grad is not None and (p.ndim > 1) is matrices]
            copies = [torch.cat(gradients) for _ in range(self._slope_copies if gradients else 0)]
            del copies

    # --- helpers -----------------------------------------------------------------------------------------

    def _on_host(self, tensor: Tensor) -> Tensor:
        """A place for the values of a block's input; it is used again by the next part of a batch."""
        self._sent_bytes += tensor.nbytes
        with self._transient(None):
            return torch.empty_like(tensor)

    def _precision(self, phase: str) -> torch.autocast:
        numbers = getattr(self._memory.mixed_precision, phase, "fp32")
        return torch.autocast("cpu", torch.bfloat16, enabled=numbers != "fp32", cache_enabled=self._weight_cache)

    @contextmanager
    def _transient(self, part: str | None) -> Iterator[None]:
        """What is made inside, beside gradients and state, belongs to this part."""
        self._live.born_as, before = part, self._live.born_as
        try:
            yield
        finally:
            self._live.born_as = before


def _optimizer_on_cuda(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """The optimizer in the form that it takes on a CUDA card."""
    optimizer = build_optimizer(model, config)
    for group in optimizer.param_groups:
        if "fused" in group:
            group.update(fused=True, foreach=False)
    return optimizer


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _moment(like: Tensor, bits: LowBit) -> list[Tensor]:
    """One moment of a parameter: codes and scales, or float numbers where the format does not take it."""
    width, block = bits
    numbers = like.numel()
    if numbers < SMALLEST_QUANTIZED or numbers % block:
        return [torch.empty_like(like)]
    return [torch.empty(numbers * width // 8, dtype=torch.uint8), torch.empty(numbers // block)]


def _lower_(model: nn.Module) -> None:
    """Floating-point parameters become bf16, one at a time."""
    for p in model.parameters():
        p.data = p.data.to(torch.bfloat16)
