"""Reads memory now, by torch, NVML and the system, and keeps its peak."""

from __future__ import annotations

import gc
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import psutil
import pynvml
import torch

from hybridlab.base.errors import UserError


class GpuMemory(NamedTuple):
    """A GPU's memory in bytes, in one reading.

    used_bytes: by everybody's contexts: what nvidia-smi calls memory.used
    held_bytes: used, and what the driver keeps for itself: so much of the GPU nobody can have
    total_bytes: what nvidia-smi calls memory.total
    """

    used_bytes: int | None = None
    held_bytes: int | None = None
    total_bytes: int | None = None


class NvmlGpu:
    """One GPU, as NVML sees it: all processes, their contexts included.

    NVML may be missing altogether (no driver library, other systems), or hide single figures: containers see no
    processes, Windows gives none of their memory. Such a figure is None, never 0.
    """

    def __init__(self, device: torch.device) -> None:
        self._gpu = _read(lambda: _handle(device))

    def _ask(self, question: Callable[[Any], Any]) -> Any:
        return None if self._gpu is None else _read(lambda: question(self._gpu))

    def memory(self) -> GpuMemory:
        """By all processes together."""
        return self._ask(_memory) or GpuMemory()

    def process_bytes(self) -> int | None:
        """By this process, its context included."""
        found: int | None = self._ask(_process_bytes)
        return found

    def load(self) -> dict[str, Any]:
        """How busy and how hot the GPU is, in the fields of `MemoryReading`."""
        milliwatts = self._ask(pynvml.nvmlDeviceGetPowerUsage)
        return {
            "utilization_percent": self._ask(lambda gpu: pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu),
            "power_watts": None if milliwatts is None else milliwatts / 1000,
            "temperature_celsius": self._ask(
                lambda gpu: pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU)
            ),
        }


def _read(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except pynvml.NVMLError:
        return None


def _handle(device: torch.device) -> Any:
    pynvml.nvmlInit()
    return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")


def _memory(gpu: Any) -> GpuMemory:
    found = pynvml.nvmlDeviceGetMemoryInfo(gpu, version=pynvml.nvmlMemory_v2)
    return GpuMemory(found.used, found.used + found.reserved, found.total)


def _process_bytes(gpu: Any) -> int | None:
    processes = pynvml.nvmlDeviceGetComputeRunningProcesses(gpu)
    return next((p.usedGpuMemory for p in processes if p.pid == os.getpid()), None)


SAME_GPU = 1.1
"""A GPU up to this much larger than the one to emulate is taken for that GPU: 16 GB GPUs differ by the gigabyte."""


@dataclass(frozen=True)
class MemoryReading:
    """Memory at one moment, in bytes; what could not be read is None, never 0.

    source: "nvml" (the GPU's own count beside torch's), "torch" (its allocator alone: there is no NVML) or "process"
        (resident memory: there is no GPU)
    used_bytes: reserved by torch; or the resident size of the process
    allocated_bytes: in live tensors
    device_used_bytes: on the whole GPU, by everybody's contexts
    process_used_bytes: of these by this process, its context included; containers hide it
    other_bytes: device_used_bytes - used_bytes: other processes, and this one's context
    context_bytes: of this process beyond torch's reserve, or of all where containers hide processes
    device_total_bytes: the GPU's size
    utilization_percent: how busy the GPU was just before
    power_watts, temperature_celsius: of the GPU
    """

    source: str
    used_bytes: int
    allocated_bytes: int | None = None
    device_used_bytes: int | None = None
    process_used_bytes: int | None = None
    other_bytes: int | None = None
    context_bytes: int | None = None
    device_total_bytes: int | None = None
    utilization_percent: int | None = None
    power_watts: float | None = None
    temperature_celsius: int | None = None


class MemoryMeter:
    """Reads memory now, and the peak since `reset_peak`.

        peak = max_memory_reserved + context

    context is what NVML says the process uses beyond torch's reserve, or, where containers hide processes,
    what the GPU has used beyond it. Without a GPU the peak is the process's own, over its whole life.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else None
        self._gpu = NvmlGpu(self._device) if self._device else None
        self._peaks = PhasePeaks(self._device) if self._device else None

    def share_of(self, gpu_bytes: int) -> float:
        """The share of the GPU that torch may reserve, for the process to fit a GPU of `gpu_bytes`; at most 1.

            share = (gpu_bytes - context) / total        1 for a GPU that is no larger

        The context counts, as it does on the GPU. Raises UserError where there is no CUDA device.
        """
        if not self._device:
            raise UserError("a GPU can only be emulated on a larger one, with CUDA: set card_gb to 0")
        if not exceeds(self._device, gpu_bytes):
            return 1.0
        torch.empty(1, device=self._device)  # so that there is a context to measure
        total = torch.cuda.get_device_properties(self._device).total_memory
        return max(0.0, (gpu_bytes - (self.read().context_bytes or 0)) / total)

    def reset_peak(self) -> None:
        """Begin a new peak, without what earlier runs left behind. Without a GPU the process has one peak for life."""
        if self._peaks:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_accumulated_memory_stats(self._device)
            self._peaks.reset()

    def enter(self, phase: str) -> None:
        """Count the peak of `phase` from here on; does nothing without a GPU."""
        if self._peaks:
            self._peaks.enter(phase)

    def read(self) -> MemoryReading:
        """Memory at this moment; never waits for the device."""
        if not self._device or not self._gpu:
            return MemoryReading("process", psutil.Process().memory_info().rss)
        counted, on_gpu, mine = allocator_stats(self._device), self._gpu.memory(), self._gpu.process_bytes()
        reserved = counted["reserved_bytes.all.current"]
        return MemoryReading(
            source="torch" if on_gpu.used_bytes is None else "nvml",
            used_bytes=reserved,
            allocated_bytes=counted["allocated_bytes.all.current"],
            device_used_bytes=on_gpu.used_bytes,
            process_used_bytes=mine,
            other_bytes=_beyond(on_gpu.used_bytes, reserved),
            context_bytes=_beyond(mine or on_gpu.held_bytes, reserved),
            device_total_bytes=on_gpu.total_bytes,
            **self._gpu.load(),
        )

    def in_torch(self) -> tuple[int, int] | None:
        """Bytes in live tensors and bytes reserved at this moment; None without a GPU. Asks nothing of the driver."""
        if not self._device:
            return None
        counted = allocator_stats(self._device)
        return counted["allocated_bytes.all.current"], counted["reserved_bytes.all.current"]

    def other_processes_bytes(self) -> int | None:
        """Used on the GPU by other processes; None without a GPU, or where NVML does not say whose it is.

        Where containers hide processes, all that is used is others' as long as torch has allocated nothing: ask before
        a `reset_peak` lets that be forgotten.
        """
        if not self._device or not self._gpu or (used := self._gpu.memory().used_bytes) is None:
            return None
        mine = self._gpu.process_bytes()
        if mine is None and allocator_stats(self._device)["reserved_bytes.all.peak"]:
            return None
        return max(0, used - (mine or 0))

    def peak(self) -> dict[str, Any]:
        """The figures of a run's summary; what could not be read is None, never 0."""
        if not self._device or not self._peaks:
            return {"memory_source": "process", "peak_memory_bytes": _process_peak_bytes()}
        now = self.read()
        return {
            "memory_source": "cuda",
            "peak_memory_bytes": self.peak_beside(now),
            "peak_allocated_bytes": self._peaks.allocated_bytes(),
            "peak_reserved_bytes": self._peaks.reserved_bytes(),
            "context_bytes": now.context_bytes,
            "allocator_retries": allocator_stats(self._device)["num_alloc_retries"],
            **{f"peak_allocated_bytes_in_{phase}": peak for phase, peak in self._peaks.by_phase().items()},
        }

    def peak_beside(self, reading: MemoryReading) -> int:
        """The peak in bytes, with the context as a reading has it: asks nothing of the driver."""
        return self._peaks.reserved_bytes() + (reading.context_bytes or 0) if self._peaks else _process_peak_bytes()


def allocator_stats(device: torch.device) -> Counter[str]:
    """Everything that torch's allocator counts, under the names of `torch.cuda.memory_stats`, at one look.

    Asking torch for each figure apart takes as long each time. All are 0 while the process has not touched the GPU.
    """
    return Counter(torch.cuda.memory_stats(device))


class PhasePeaks:
    """Splits the allocator's one peak into one per phase, and loses nothing of the whole.

        peak of the run = max over phases of (peak since the phase was entered)

    The allocator is reset whenever a phase begins; what it had counted by then is kept here. A phase that comes back
    keeps its highest peak.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._phase = ""
        self._allocated: dict[str, int] = {}
        self._reserved = 0

    def reset(self) -> None:
        """Forget all phases, and begin again outside of any."""
        self._phase, self._allocated, self._reserved = "", {}, 0
        torch.cuda.reset_peak_memory_stats(self._device)

    def enter(self, phase: str) -> None:
        """Count for `phase` from here on; costs nothing while the phase stays."""
        if phase != self._phase:
            self._note()
            torch.cuda.reset_peak_memory_stats(self._device)
            self._phase = phase

    def reserved_bytes(self) -> int:
        """The most that torch has held of the GPU."""
        self._note()
        return self._reserved

    def allocated_bytes(self) -> int:
        """The most that live tensors have taken."""
        self._note()
        return max(self._allocated.values())

    def by_phase(self) -> dict[str, int]:
        """The most that live tensors have taken in each phase that was entered, in bytes."""
        self._note()
        return {phase: peak for phase, peak in self._allocated.items() if phase}

    def _note(self) -> None:
        now = allocator_stats(self._device)
        peak = now["allocated_bytes.all.peak"]
        self._allocated[self._phase] = max(peak, self._allocated.get(self._phase, 0))
        self._reserved = max(self._reserved, now["reserved_bytes.all.peak"])


def exceeds(device: torch.device, gpu_bytes: int) -> bool:
    """Whether a device is a GPU larger than one of `gpu_bytes`, beyond what GPUs of one name differ by."""
    if device.type != "cuda":
        return False
    return torch.cuda.get_device_properties(device).total_memory > gpu_bytes * SAME_GPU


def _beyond(used_bytes: int | None, reserved_bytes: int) -> int | None:
    return None if used_bytes is None else max(0, used_bytes - reserved_bytes)


def _process_peak_bytes() -> int:
    """The most that this process was ever resident with."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # Unix alone has it

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
