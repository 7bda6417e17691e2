"""What a training will take of a GPU's memory, before it runs and without the GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any

import pandas as pd
from torch import nn

from hybridlab.depth import DepthSchedule
from hybridlab.memory.config import MemoryConfig
from hybridlab.optim import OptimizerConfig
from hybridlab.planner.architectures import example_loss, rebuilt, shape_of
from hybridlab.planner.caching_allocator import CachingAllocator
from hybridlab.planner.dry_run import UPDATE, Rehearsal, StepCosts, rehearse
from hybridlab.planner.spec import BatchShape, GpuOverhead, Model, TrainingSpec
from hybridlab.planner.trace import COMMUNICATION, GATHERED, WORKSPACE, Segment

PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "path", WORKSPACE)

MOST_TOKENS = 2**20
"""Of a micro batch that is rehearsed. The loss goes in pieces, which take the more time the more there are: here a few
seconds."""


@dataclass(frozen=True)
class Plan:
    """Predicted memory of a training, in bytes, and the work of a step.

    phases: "Full" (Warmup is Full without the path), "Predict" and "Correct", "Evaluation" where weights are averaged,
        and "Start", until the model is sharded among ranks: part -> bytes at that phase's peak
    reserved_bytes: what torch's allocator then holds of the GPU
    overhead: what the GPU takes beside tensors
    graphs_bytes: of these, what CUDA graphs hold for good; torch counts it as reserved, and not as allocated
    costs: of a gradient step: operations, and traffic on the GPU, the bus and the host
    host_memory: use -> bytes of host memory that the training takes and keeps
    trained_numbers: parameters that are trained; of several ranks, those whose state this one has
    stages: blocks that take part -> plan of that stage of a growing model, whose last one this is of

    As text it says all of this, in a table by part and phase, and one by stage.
    """

    phases: dict[str, dict[str, int]]
    reserved_bytes: int
    overhead: GpuOverhead
    costs: StepCosts
    host_memory: dict[str, int]
    trained_numbers: int
    stages: dict[int, Plan] = field(default_factory=dict)
    graphs_bytes: int = 0

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
    def most_on_gpu_bytes(self) -> int:
        """`peak_on_gpu_bytes` of the stage that needs the most."""
        return max(plan.peak_on_gpu_bytes for plan in (self, *self.stages.values()))

    @property
    def host_memory_bytes(self) -> int:
        """Host memory in all, beside the process itself and its data."""
        return _total(self.host_memory)

    def fits(self, gpu_bytes: int) -> bool:
        """Whether a GPU of this size holds it all, in every stage."""
        return self.most_on_gpu_bytes <= gpu_bytes

    def record(self) -> dict[str, Any]:
        """Everything, for JSON."""
        peaks = {name: getattr(self, name) for name in ("peak_allocated_bytes", "peak_on_gpu_bytes", "parts")}
        stages = {str(blocks): stage.record() for blocks, stage in self.stages.items()}
        return peaks | asdict(replace(self, stages={})) | {"stages": stages}

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        phases = pd.DataFrame(self.phases)
        phases.loc["allocated"] = phases.sum()
        yield phases.map(in_gigabytes).rename_axis("at the peak of", axis="columns").to_string()
        yield (
            f"On the GPU: {in_gigabytes(self.peak_on_gpu_bytes)}: {in_gigabytes(self.reserved_bytes)} that torch's "
            f"allocator holds{self._in_graphs}, and {in_gigabytes(self.overhead.context_bytes)} of CUDA context "
            "(assumed)."
        )
        if self.host_memory:
            yield f"Host memory, {self.in_host_memory}."
        if self.stages:
            peaks = [(p.peak_allocated_bytes, p.peak_on_gpu_bytes) for p in self.stages.values()]
            stages = pd.DataFrame(peaks, list(self.stages), ["allocated", "on GPU"]).map(in_gigabytes)
            yield "\n" + stages.rename_axis("stage: blocks that are active", axis="columns").to_string()

    @property
    def _in_graphs(self) -> str:
        return f" ({in_gigabytes(self.graphs_bytes)} for CUDA graphs)" if self.graphs_bytes else ""

    @property
    def in_host_memory(self) -> str:
        """What the training keeps in host memory, in words."""
        uses = ", ".join(f"{use} {in_gigabytes(size)}" for use, size in self.host_memory.items())
        return f"most of it page-locked: {in_gigabytes(self.host_memory_bytes)} ({uses})"


def in_gigabytes(size: int) -> str:
    """Bytes as text; in megabytes, or less, where two digits behind the point would not show them."""
    if size >= 10**7:
        return f"{size / 1e9:.2f} GB"
    return f"{size / 1e6:.2f} MB" if size >= 10**4 else f"{size} B" if size else "0"


def _total(parts: dict[str, int]) -> int:
    return sum(parts.values())


def plan(
    model: Model | nn.Module,
    batch: BatchShape | Any,
    memory: MemoryConfig | None = None,
    optimizer: str | OptimizerConfig = "adamw",
    schedule: DepthSchedule | None = None,
    **others: Any,
) -> Plan:
    """Predict peak memory, as `plan_training` does, of a training given by its settings.

    model: see `TrainingSpec`, or a module; its weights are not touched, and no memory is taken for others
    batch: (windows, tokens), or an example of what the module is called with: a tensor, or a tuple or dict of tensors
    memory: None is plain float32 training
    optimizer: its settings, or its name
    schedule: of predicted depth; each of its stages is planned
    others: further fields of `TrainingSpec`, such as `path` and `loss`

    Raises TypeError, ValueError or UserError for what makes no training; the message says what would.
    """
    if isinstance(model, nn.Module):
        model = rebuilt(model)
    if not _is_shape(batch):
        batch, others = shape_of(batch), {"loss": example_loss(batch)} | others
    settings = OptimizerConfig(optimizer) if isinstance(optimizer, str) else optimizer
    memory = MemoryConfig() if memory is None else memory
    return plan_stages(TrainingSpec(model, tuple(batch), memory, settings, depth=schedule, **others))


def _is_shape(batch: Any) -> bool:
    return isinstance(batch, tuple | list) and all(isinstance(length, int) for length in batch)


def plan_stages(spec: TrainingSpec) -> Plan:
    """As `plan_training`, with the plans of all stages of a growing model."""
    spec.check()
    stages = {blocks: plan_training(stage) for blocks, stage in spec.stages.items()}
    return replace(stages[max(stages)], stages=stages) if stages else plan_training(spec)


def plan_training(spec: TrainingSpec) -> Plan:
    """Predict peak memory by part and phase from the real autograd graph, without a GPU and without computing it.

        peak = max over time of the sum of all live storages, each as large as the allocator's block for it

    The model, its loss, backward pass and torch's optimizer run on fake tensors, and every storage is followed from
    birth to death. torchao's state is counted by its format: its compiled step takes next to nothing besides.
    A gradient that has not reached its parameter yet counts among the activations. Where a micro batch has more than
    `MOST_TOKENS`, a line through two smaller ones gives all figures but the allocator's, which are in proportion.

    Raises TypeError, ValueError or UserError for what makes no training; the message says what would.
    """
    spec.check()
    windows, tokens = spec.batch
    few = spec.parts * max(1, MOST_TOKENS // 4 // tokens)
    if windows * tokens > MOST_TOKENS * spec.parts and windows > 2 * few:
        first, second = (_rehearsed(spec.resized((count, tokens))) for count in (few, 2 * few))
        return _beyond(first, second, windows / few - 1)
    return _rehearsed(spec)


def _beyond(first: Plan, second: Plan, place: float) -> Plan:
    """On the line through two plans; the allocator holds as many times what tensors and graphs take as in one."""
    found: Plan = _on_the_line(first, second, place)
    more = (found.peak_allocated_bytes + found.graphs_bytes) / (second.peak_allocated_bytes + second.graphs_bytes)
    return replace(found, reserved_bytes=round(more * second.reserved_bytes))


def _on_the_line(first: Any, second: Any, place: float) -> Any:
    """What a line through two numbers, at 0 and 1, has at another place; of plans that of each of their numbers."""
    if is_dataclass(second):
        names = [field.name for field in fields(second)]
        return replace(second, **{n: _on_the_line(getattr(first, n), getattr(second, n), place) for n in names})  # type: ignore[type-var]
    if isinstance(second, dict):
        return {name: _on_the_line(first.get(name, 0), value, place) for name, value in second.items()}
    return round(first + place * (second - first))


def _rehearsed(spec: TrainingSpec) -> Plan:
    training = rehearse(spec)
    phases, reserved, in_graphs = _found(training, spec)
    of_some = {"Evaluation": spec.judges_mean, "Start": spec.is_sharded}
    phases = {phase: peak for phase, peak in phases.items() if of_some.get(phase, True)}
    parts = (*PARTS, *((GATHERED, COMMUNICATION) if spec.ranks else ()))
    by_part = {phase: {part: peak.get(part, 0) for part in parts} for phase, peak in phases.items()}
    known = training.costs, training.host_memory, training.trained_numbers
    overhead = spec.overhead.of(ranks=spec.ranks, sharded=spec.is_sharded)
    return Plan(by_part, reserved, overhead, *known, graphs_bytes=in_graphs)


Found = tuple[dict[str, dict[str, int]], int, int]
"""Phase -> part -> bytes at its peak; what torch's allocator then holds of the GPU; and of that, what graphs do."""


def _found(training: Rehearsal, spec: TrainingSpec) -> Found:
    if not spec.replays_graphs:
        return _without_graphs(training, spec)
    phases, reserved, in_graphs = _with_graphs(training, spec)
    if spec.memory.step_in_backward:  # its first steps run as they are, since they move weights
        as_they_are, _, _ = _without_graphs(training, spec)
        phases |= {phase: max(phases[phase], as_they_are[phase], key=_total) for phase in ("Full", "Correct")}
    return phases, reserved, in_graphs


def _without_graphs(training: Rehearsal, spec: TrainingSpec) -> Found:
    """By the third step: one pass warms up, the first step makes the state, or it is made before."""
    passes, update, end = training.passes, training.update[:-1], training.update[-1:]
    steps = {event.key for segment in passes for event in segment.events if event.part == "optimizer"}
    resting = [replace(s, events=[event for event in s.events if event.key not in steps]) for s in passes]
    warm_up = [*resting, *(segment for segment in update if segment.name != UPDATE), *end]
    memory = CachingAllocator()
    start = memory.follow(training.setup)
    memory.follow(warm_up)
    if spec.memory.low_bit_in_backward(spec.optimizer):
        memory.empty_cache()
        memory.follow([*training.state, *passes, *update, *end, *training.path])
    else:
        memory.follow([*passes, *update, *training.state, *end, *training.path])
    memory.reset_peak()
    step = memory.follow(2 * [*passes, *update, *end])
    memory.reset_peak()
    evaluation, held = memory.follow(training.evaluation), memory.reserved
    memory.follow(training.offload)
    memory.reset_peak()
    predict = memory.follow(training.predict)
    return {"Full": step, "Predict": predict, "Correct": step, "Evaluation": evaluation, "Start": start}, held, 0


def _with_graphs(training: Rehearsal, spec: TrainingSpec) -> Found:
    """What a part of the batch takes, and a pass without gradients, is in a pool of the graphs, where gradients stay.

    Those of further parts are added up outside. Passes warm up on a stream of their own. Capturing gives back what is
    cached, but for what cuBLAS's workspaces lie in. Passes that step inside backward move weights: three such steps are
    taken before the capture, beside the graph that evaluates.
    """
    passes = [segment for segment in training.passes if not segment.name.endswith(" 1")]
    pool, warm_up, beside = CachingAllocator(), CachingAllocator(), CachingAllocator()
    pool.follow([*passes, *training.predict])
    warm_up.follow([*passes, *training.update[-1:]])
    warm_up.empty_cache()
    beside.follow([*training.setup, *training.state, *training.path])
    beside.empty_cache()
    beside.reset_peak()
    before = 0
    if spec.memory.step_in_backward:
        before = beside.reserved + _reserved(3 * [*training.passes, *training.update]) + _reserved(training.predict)
    sums = pool.now["gradients"] if len(passes) < len(training.passes) else 0
    kept = pool.now + warm_up.now + Counter(gradients=sums)
    step = kept + Counter(beside.follow(training.update[:-1]))
    rest = kept + beside.now
    beside.follow(training.evaluation)
    reserved = max(before, beside.reserved + warm_up.reserved + pool.reserved + sums)
    return {"Full": step, "Predict": rest, "Correct": step, "Evaluation": rest}, reserved, pool.reserved


def _reserved(segments: list[Segment]) -> int:
    """What an allocator of their own takes of the GPU for them."""
    allocator = CachingAllocator()
    allocator.follow(segments)
    return allocator.reserved
