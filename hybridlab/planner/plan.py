"""What a training will take of a GPU's memory, before it runs and without the GPU."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from hybridlab.memory.config import MemoryConfig
from hybridlab.optim import OptimizerConfig
from hybridlab.planner.any_module import example_loss, rebuilt, shape_of
from hybridlab.planner.caching_allocator import CachingAllocator
from hybridlab.planner.dry_run import UPDATE, Rehearsal, StepCosts, rehearse
from hybridlab.planner.spec import BatchShape, GpuOverhead, Model, TrainingSpec
from hybridlab.planner.trace import LiveBytes

PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "path", "workspace")


@dataclass(frozen=True)
class Plan:
    """Predicted memory of a training, in bytes, and the work of a step.

    phases: "Full" (Warmup is Full without the path), "Predict" and "Correct": part -> bytes at that phase's peak
    reserved_bytes: what torch's allocator then holds of the GPU
    overhead: what the GPU takes beside tensors
    costs: of a gradient step: operations, and traffic on the GPU, the bus and the host
    host_memory: use -> bytes of host memory that the training takes and keeps
    trained_numbers: parameters that are trained
    """

    phases: dict[str, dict[str, int]]
    reserved_bytes: int
    overhead: GpuOverhead
    costs: StepCosts
    host_memory: dict[str, int]
    trained_numbers: int

    @property
    def parts(self) -> dict[str, int]:
        """Part -> bytes, at the peak of the phase that needs the most; their sum is `peak_allocated_bytes`."""
        return max(self.phases.values(), key=_total)

    @property
    def peak_allocated_bytes(self) -> int:
        """What `torch.cuda.max_memory_allocated` is expected to say."""
        return _total(self.parts)

    @property
    def peak_on_gpu_bytes(self) -> int:
        """What the GPU is expected to count: what torch's allocator holds, and the context."""
        return self.reserved_bytes + self.overhead.context_bytes

    @property
    def host_memory_bytes(self) -> int:
        """Host memory in all, beside the process itself and its data."""
        return _total(self.host_memory)

    def fits(self, gpu_bytes: int) -> bool:
        """Whether a GPU of this size holds it all."""
        return self.peak_on_gpu_bytes <= gpu_bytes

    def record(self) -> dict[str, Any]:
        """Everything, for JSON."""
        peaks = {name: getattr(self, name) for name in ("peak_allocated_bytes", "peak_on_gpu_bytes", "parts")}
        return peaks | asdict(self)


def _total(parts: dict[str, int]) -> int:
    return sum(parts.values())


def plan(
    model: Model | nn.Module,
    batch: BatchShape | Any,
    memory: MemoryConfig | None = None,
    optimizer: str | OptimizerConfig = "adamw",
    **others: Any,
) -> Plan:
    """Predict peak memory, as `plan_training` does, of a training given by its settings.

    model: see `TrainingSpec`, or a module; its weights are not touched, and no memory is taken for others
    batch: (windows, tokens), or an example of what the module is called with: a tensor, or a tuple or dict of tensors
    memory: None is plain float32 training
    optimizer: its settings, or its name
    others: further fields of `TrainingSpec`, such as `path` and `loss`

    Raises ValueError for settings that make no training; the message says what would.
    """
    if isinstance(model, nn.Module):
        model = rebuilt(model)
    if not _is_shape(batch):
        batch, others = shape_of(batch), {"loss": example_loss(batch)} | others
    settings = OptimizerConfig(optimizer) if isinstance(optimizer, str) else optimizer
    return plan_training(TrainingSpec(model, batch, memory or MemoryConfig(), settings, **others))


def _is_shape(batch: Any) -> bool:
    return isinstance(batch, tuple | list) and all(isinstance(length, int) for length in batch)


def plan_training(spec: TrainingSpec) -> Plan:
    """Predict peak memory by part and phase from the real autograd graph, without a GPU and without computing it.

        peak = max over time of the sum of all live storages, each rounded up to 512 bytes, + cuBLAS's workspace

    The model, its loss, backward pass and torch's optimizer run on fake tensors, and every storage is followed from
    birth to death. torchao's state is counted by its format: its compiled step takes next to nothing besides.
    A gradient that has not reached its parameter yet counts among the activations.

    Raises ValueError for settings that make no training; the message says what would.
    """
    spec.check()
    training = rehearse(spec)
    live = LiveBytes()
    live.follow(training.setup + training.state + training.path)
    live.reset_peak()
    step = live.follow(training.step)
    live.follow(training.offload)
    live.reset_peak()
    phases = {"Full": step, "Predict": live.follow(training.predict), "Correct": step}
    workspace = {"workspace": spec.overhead.workspace_bytes}
    by_part = {phase: {part: peak.get(part, 0) for part in PARTS} | workspace for phase, peak in phases.items()}
    reserved = _reserved(training) + spec.overhead.workspace_bytes
    return Plan(by_part, reserved, spec.overhead, training.costs, training.host_memory, training.trained_numbers)


def _reserved(training: Rehearsal) -> int:
    """What torch's allocator takes of the GPU by the third step: one pass warms up, the first step makes the state."""
    forward_backward = [segment for segment in training.step if segment.name != UPDATE]
    *step, end = training.step
    first = [*step, *training.state, end, *training.path]
    return CachingAllocator().follow([*training.setup, *forward_backward, *first, *training.step, *training.step])
