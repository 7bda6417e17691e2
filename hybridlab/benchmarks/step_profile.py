"""What one step of a run takes: its time, and the work that it gives the GPU."""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from typing import Any, Self

import torch
from torch.profiler import ProfilerActivity, profile

from hybridlab.base.device import find_device, wait_for
from hybridlab.base.operations import operations_of
from hybridlab.depth import DepthSchedule
from hybridlab.memory.precision import autocast
from hybridlab.study.config import RunConfig
from hybridlab.study.process_settings import ProcessSettings
from hybridlab.study.training import Training

ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of a trace that keep the GPU busy."""

LAUNCHES = ("LaunchKernel", "GraphLaunch")
"""In the names of calls by which the host starts work on the GPU."""


@dataclass(frozen=True)
class GpuWork:
    """Of a loop, as torch's profiler saw it.

    busy_ms: time in which the GPU computed or copied, work that overlaps counted once
    launches: kernels and graphs that the host started
    """

    busy_ms: float
    launches: int

    @classmethod
    def of(cls, turn: Callable[[], object], device: torch.device) -> Self | None:
        """Profile one call; None where it saw nothing of a GPU.

        It slows the host, then and afterwards, and leaves the GPU's own time as it is.
        """
        if device.type != "cuda":
            return None
        wait_for(device)
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            turn()
            wait_for(device)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profiled.export_chrome_trace(str(path))
            work = cls.of_events(json.loads(path.read_bytes())["traceEvents"])
        return work if work.busy_ms else None

    @classmethod
    def of_events(cls, events: Iterable[Mapping[str, Any]]) -> Self:
        """From the events of a trace in Chrome's format, times in microseconds."""
        complete = [event for event in events if event.get("ph") == "X"]
        spans = sorted((event["ts"], event["ts"] + event["dur"]) for event in complete if event.get("cat") in ON_GPU)
        busy, end = 0.0, -float("inf")
        for start, stop in spans:
            busy += max(0.0, stop - max(start, end))
            end = max(end, stop)
        return cls(busy / 1e3, sum(any(call in event["name"] for call in LAUNCHES) for event in complete))


SETTLING_STEPS, PROFILED_STEPS = 5, 5
FORWARD_AND_BACKWARD = 3
"""Times the operations of a forward pass."""


@dataclass(frozen=True)
class StepWork:
    """What a gradient step gives the GPU to do.

    busy_ms: time in which it computes; launches: kernels and graphs that the host starts; both None where nothing was
        profiled, as without a GPU
    operations: of floating-point numbers, by the model in forward and backward, nothing counted twice
    """

    busy_ms: float | None
    launches: float | None
    operations: float


def time_step(config: RunConfig, steps: int = 20) -> float:
    """Milliseconds per step over so many steps of a run, after a few to settle; nothing is evaluated or recorded."""

    def timed(stage: RunConfig) -> float:
        with _settled(stage) as take:
            started = time.perf_counter()
            take(steps)
        return 1e3 * (time.perf_counter() - started) / steps

    return sum(share * timed(stage) for share, stage in stages_of(config))


def step_work(config: RunConfig) -> StepWork:
    """Profile a few steps of a run. Time nothing afterwards in this process: the profiler goes on slowing its host."""
    device = find_device(config.device)

    def profiled(stage: RunConfig) -> tuple[GpuWork | None, int]:
        with _settled(stage) as take:
            work = GpuWork.of(partial(take, PROFILED_STEPS), device)
        return work, FORWARD_AND_BACKWARD * _operations(stage, device)

    stages = [(share / PROFILED_STEPS, *profiled(stage)) for share, stage in stages_of(config)]
    operations = sum(share * PROFILED_STEPS * count for share, _, count in stages)
    works = [(share, work) for share, work, _ in stages if work]
    if len(works) < len(stages):
        return StepWork(None, None, operations)
    busy_ms, launches = (sum(share * getattr(work, name) for share, work in works) for name in ("busy_ms", "launches"))
    return StepWork(busy_ms, launches, operations)


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


@contextmanager
def _settled(config: RunConfig) -> Iterator[Callable[[int], None]]:
    """Inside, what takes so many further steps of the run; at its end all are done."""
    device = find_device(config.device)
    gc.collect()  # the graphs of a run before hold memory of the GPU
    with ProcessSettings.of(config).applied():
        training, numbers = Training(config, device), count()
        training.warm_up_()
        training.make_state_()

        def take(steps: int) -> None:
            for _ in range(steps):
                training.step(next(numbers))

        take(SETTLING_STEPS)
        wait_for(device)
        yield take
        wait_for(device)


def _operations(config: RunConfig, device: torch.device) -> int:
    """Floating-point operations of a forward pass, with the blocks that take part."""
    training = Training(replace(config, compiled=False), device)
    task = training.task
    with torch.no_grad(), autocast(config.precision, device):
        task.loss(task.model, task.batch(0))  # a bypassed block runs once to show what it returns
        return operations_of(lambda: task.loss(task.model, task.batch(0)))
