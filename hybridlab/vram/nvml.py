"""What NVML says of a GPU; None wherever it says nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import pynvml
import torch


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
