"""What a GPU does while a loop runs: how long it is busy, and how often the host has to ask."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch.profiler import ProfilerActivity, profile

from hybridlab.base.device import wait_for

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
