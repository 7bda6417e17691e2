"""A training on a fake GPU: every phase's real graph, and nothing computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hybridlab.memory.checkpointing import BlockInputs, buckets_of, checkpoint_blocks_
from hybridlab.optim import OptimizerConfig, build_optimizer
from hybridlab.optim.host_adamw import LEAVING_BYTES
from hybridlab.planner.flops import Work
from hybridlab.planner.live_bytes import LiveBytes
from hybridlab.planner.spec import TrainingSpec
from hybridlab.weights.gram import PathNeeds
from hybridlab.weights.path import PathStorage

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
    """

    flops: dict[str, int]
    moved_bytes: int
    bus_bytes: int
    host_bytes: int


class DryRun:
    """One training, set up on the fake GPU and then taken through its phases, once and in this order.

    `gradient_step`, then `predict`, which frees for good what leaves the GPU.
    """

    def __init__(self, live: LiveBytes, spec: TrainingSpec) -> None:
        self._live, self._spec, self._memory = live, spec, spec.memory
        self._work, self._sent_bytes = Work(), 0
        self._model = spec.build()
        live.logit_widths = _vocabulary(self._model)
        if self._memory.checkpointing:
            checkpoint_blocks_(self._model, self._memory.checkpointing, BlockInputs(self._on_host))
        if self._memory.weights == "bf16":
            _lower_(self._model)
        live.tag({*self._model.parameters(), *self._model.buffers()}, "weights")
        self._params = [p for p in self._model.parameters() if p.requires_grad]
        self._size = sum(p.numel() for p in self._params)
        self._leaving: deque[Tensor] = deque()
        steps_on_gpu = self._memory.optimizer_state == "fp32" and not self._memory.state_on_host
        self._optimizer = _optimizer_on_cuda(self._model, spec.optimizer) if steps_on_gpu else None
        self._state = self._new_state()
        live.tag(self._state, "optimizer")
        self._path = self._new_path(spec.path, spec.path_storage) if spec.path else []
        live.tag(self._path, "path")
        self._free_gradients_early()

    # --- phases ------------------------------------------------------------------------------------------

    def gradient_step(self) -> dict[str, int]:
        """Bytes by part at the peak of Full and Correct: forward, backward and optimizer, the state being there."""
        self._forget_gradients()
        self._live.reset_peak()
        with self._work:
            for _ in range(self._parts_run):
                with self._precision("training"):
                    loss = self._spec.part_loss(self._model)
                loss.backward()  # type: ignore[no-untyped-call]
                del loss
        with self._live.counting_as("optimizer"):
            if self._optimizer and not self._memory.step_in_backward:
                self._optimizer.step()
        self._leaving.clear()
        with self._live.counting_as("path"):
            self._read_slopes()
        return self._live.peak

    @torch.no_grad()
    def predict(self) -> dict[str, int]:
        """Bytes by part at the peak of Predict: what has not left the GPU, and a forward pass."""
        self._forget_gradients()
        self._offload_state()
        if self._memory.offloads_weights:
            _lower_(self._model)
            self._live.tag(self._model.parameters(), "weights")
        self._live.reset_peak()
        with self._precision("predict"):
            self._spec.part_loss(self._model)
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

    def host_memory(self) -> dict[str, int]:
        """Bytes of host memory that the training takes and keeps, by use; most of it page-locked."""
        weights, path = _bytes(self._params), self._spec.path
        uses = {"inputs of blocks": self._sent_bytes}
        if self._memory.state_on_host:
            uses["gradients, state and masters"] = 16 * self._size
        if path and self._spec.path_storage.on_host:
            rows = path.rows + (path.velocity is not None)
            uses["path"] = rows * self._size * self._spec.path_storage.dtype.itemsize + weights
            uses["rollback snapshot"] = weights + _bytes(self._model.buffers()) + _bytes(self._state)
        return {use: size for use, size in uses.items() if size}

    def _whole(self, counted: int) -> int:
        """Of all micro batches, from those that were run."""
        return counted * self._memory.micro_batches // self._parts_run

    @property
    def _parts_run(self) -> int:
        return min(self._memory.micro_batches, 2)  # further ones find what the second found

    # --- optimizer ---------------------------------------------------------------------------------------

    def _new_state(self) -> list[Tensor]:
        """What the optimizer keeps on the GPU."""
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

    def _offload_state(self) -> None:
        """Leave on the GPU what Predict's strategy keeps there of the state."""
        strategy = self._memory.predict_strategy
        if strategy == "none":
            return
        moments = [t for t in self._state if t.numel() > 1] if strategy == "compress" else []
        self._state = [piece for moment in moments for piece in _moment(moment, FORMATS["int8"])]
        if self._optimizer:
            self._optimizer.state.clear()
        self._live.tag(self._state, "optimizer")

    # --- gradients ---------------------------------------------------------------------------------------

    def _free_gradients_early(self) -> None:
        """Where the memory configuration wants it, a gradient goes as soon as it may."""
        for bucket in buckets_of(self._model) if self._memory.step_in_backward else [self._params]:
            for p in bucket:
                p.register_post_accumulate_grad_hook(partial(self._arrived, bucket))  # type: ignore[no-untyped-call]

    def _arrived(self, bucket: list[nn.Parameter], p: nn.Parameter) -> None:
        gradient = p.grad
        assert gradient is not None
        self._live.tag([gradient], "gradients")
        if self._memory.state_on_host:
            self._send(gradient)
            p.grad = None
        elif self._memory.step_in_backward and all(member.grad is not None for member in bucket):
            for member in bucket:
                if member.ndim > 1:  # the others wait for the step's end
                    member.grad = None

    def _send(self, gradient: Tensor) -> None:
        """Gradients on their way to the host stay until the bus has caught up."""
        self._leaving.append(gradient)
        while _bytes(self._leaving) > LEAVING_BYTES:
            self._leaving.popleft()

    def _forget_gradients(self) -> None:
        self._leaving.clear()
        for p in self._params:
            p.grad = None

    # --- path --------------------------------------------------------------------------------------------

    def _new_path(self, path: PathNeeds, storage: PathStorage) -> list[Tensor]:
        """Rows, last weights, velocity and direction, and the copy of weights and state that a jump can go back to."""
        made = [torch.empty(self._size)] if path.direction else []
        if storage.on_host:
            return made
        made += [torch.empty(path.rows + (path.velocity is not None), self._size, dtype=storage.dtype)]
        made += [torch.empty(self._size, dtype=self._params[0].dtype)]
        return made + [torch.empty_like(t) for t in (*self._params, *self._model.buffers(), *self._state)]

    def _read_slopes(self) -> None:
        """Each group's gradients in one piece and, if it lies elsewhere or in bf16, the row that they multiply."""
        for matrices in (True, False) if self._spec.path else ():
            gradients = [p.grad.flatten() for p in self._params if p.grad is not None and (p.ndim > 1) is matrices]
            count = 1 if self._spec.path_storage == PathStorage() else 2
            copies = [torch.cat(gradients) for _ in range(count if gradients else 0)]
            del copies

    # --- helpers -----------------------------------------------------------------------------------------

    def _on_host(self, tensor: Tensor) -> Tensor:
        """A place for the values of a block's input; it is used again by the next part of a batch."""
        self._sent_bytes += tensor.nbytes
        with self._live.counting_as(None):
            return torch.empty_like(tensor)

    def _precision(self, phase: str) -> torch.autocast:
        numbers = getattr(self._memory.mixed_precision, phase, "fp32")
        cached = self._spec.weight_cache
        return torch.autocast("cpu", torch.bfloat16, enabled=numbers != "fp32", cache_enabled=cached)


def _optimizer_on_cuda(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """The optimizer in the form that it takes on a CUDA GPU."""
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


def _vocabulary(module: nn.Module) -> frozenset[int]:
    """Widths that logits may have: rows of the largest embedding, with and without padding."""
    rows = max((m.num_embeddings for m in module.modules() if isinstance(m, nn.Embedding)), default=0)
    return frozenset({rows, getattr(getattr(module, "config", None), "vocab_size", rows)})
