"""What one step of a run takes: its time, the GPU's share in it, and how much of the GPU's arithmetic it uses."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, pairwise

import torch
from torch.utils.flop_counter import FlopCounterMode

from hybridlab.base.device import device_name, find_device, wait_for
from hybridlab.benchmarks.gpu_work import GpuWork
from hybridlab.depth import DepthSchedule
from hybridlab.memory.precision import autocast
from hybridlab.planner.gpu_specs import spec_of
from hybridlab.study.config import RunConfig
from hybridlab.study.process_settings import ProcessSettings
from hybridlab.study.training import Training

SETTLING_STEPS, PROFILED_STEPS = 5, 5
FORWARD_AND_BACKWARD = 3
"""Times the operations of a forward pass."""


@dataclass(frozen=True)
class StepProfile:
    """A gradient step of a run.

    step_ms: wall time; tokens_per_second: or images
    compile_seconds: from the model to the first step; what was compiled before in this process is kept, and not counted
        again. None where nothing is compiled
    busy_share: of the wall time, in which the GPU computed; launches: kernels and graphs that the host started for a
        step; both None without a GPU
    utilisation: of the GPU's dense bfloat16 rate, by the model's own operations (forward and backward, nothing computed
        twice); None for a GPU whose data sheet is not known
    """

    step_ms: float
    tokens_per_second: float
    compile_seconds: float | None
    busy_share: float | None
    launches: float | None
    utilisation: float | None


@dataclass(frozen=True)
class _Stage:
    """Measured at one depth; times per step in ms."""

    step_ms: float
    ready_seconds: float
    busy_ms: float
    launches: float
    operations: int


def profile_step(config: RunConfig, steps: int = 20) -> StepProfile:
    """Time so many steps of a run after a few to settle, then profile a few more; nothing is evaluated or recorded.

    A depth schedule counts stage by stage, each by its share of the run's steps.
    """
    device = find_device(config.device)
    with ProcessSettings.of(config).applied():
        stages = [(share, _measured(stage, device, steps)) for share, stage in stages_of(config)]

    def mean(name: str) -> float:
        return sum(share * getattr(stage, name) for share, stage in stages)

    step_ms, task = mean("step_ms"), config.task
    spec = spec_of(device_name(device))
    on_gpu = device.type == "cuda"
    return StepProfile(
        step_ms,
        tokens_per_second=1e3 * task.batch_size * getattr(task, "block_size", 1) / step_ms,
        compile_seconds=sum(stage.ready_seconds for _, stage in stages) if config.compiled else None,
        busy_share=min(1.0, mean("busy_ms") / step_ms) if on_gpu else None,
        launches=mean("launches") if on_gpu else None,
        utilisation=1e3 * mean("operations") / step_ms / spec.bfloat16_flops if on_gpu and spec else None,
    )


def stages_of(config: RunConfig) -> list[tuple[float, RunConfig]]:
    """The run at each of its depths, with the share of its steps; itself where all blocks take part."""
    depth = config.trainer.depth
    if depth is None:
        return [(1.0, config)]
    ends = [*(start for start, _ in depth.stages), config.steps]
    return [
        (
            (end - start) / config.steps,
            replace(config, hybrid=replace(config.hybrid, depth=DepthSchedule.constant(blocks))),
        )
        for (start, end), blocks in zip(pairwise(ends), depth.depths, strict=True)
    ]


def _measured(config: RunConfig, device: torch.device, steps: int) -> _Stage:
    gc.collect()  # the graphs of the run before hold memory of the GPU
    started = time.perf_counter()
    training, numbers = Training(config, device), count()
    training.warm_up_()
    wait_for(device)
    ready_seconds = time.perf_counter() - started

    def take(count: int) -> None:
        for _ in range(count):
            training.step(next(numbers))

    take(SETTLING_STEPS)
    wait_for(device)
    started = time.perf_counter()
    take(steps)
    wait_for(device)
    step_ms = 1e3 * (time.perf_counter() - started) / steps
    work = GpuWork.of(partial(take, PROFILED_STEPS), device) or GpuWork(0.0, 0)
    per_step = work.busy_ms / PROFILED_STEPS, work.launches / PROFILED_STEPS
    return _Stage(step_ms, ready_seconds, *per_step, FORWARD_AND_BACKWARD * _operations(training, config, device))


def _operations(training: Training, config: RunConfig, device: torch.device) -> int:
    """Floating-point operations of a forward pass."""
    task = training.task
    eager = torch.compiler.set_stance("force_eager")
    with eager, torch.no_grad(), autocast(config.precision, device), FlopCounterMode(display=False) as counter:
        task.loss(task.model, task.batch(0))
    return counter.get_total_flops()
