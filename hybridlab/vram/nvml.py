"""What NVML says of a card; None wherever it says nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pynvml
import torch


class NvmlCard:
    """One card, as NVML sees it: all processes, their contexts included.

    NVML may be missing altogether (no driver library, other systems), or hide single figures: containers see no
    processes, Windows gives none of their memory. Such a figure is None, never 0.
    """

    def __init__(self, device: torch.device) -> None:
        self._handle = _read(lambda: _handle(device))

    def used_bytes(self) -> int | None:
        """By everybody's contexts: what nvidia-smi calls memory.used."""
        return self._ask(lambda card: _memory(card).used)

    def held_bytes(self) -> int | None:
        """Used, and what the driver keeps for itself: so much of the card nobody can have."""
        return self._ask(lambda card: _memory(card).used + _memory(card).reserved)

    def total_bytes(self) -> int | None:
        """What nvidia-smi calls memory.total."""
        return self._ask(lambda card: _memory(card).total)

    def process_bytes(self) -> int | None:
        """By this process, its context included."""
        return self._ask(_process_bytes)

    def utilization_percent(self) -> int | None:
        """Share of the last moments in which a kernel ran."""
        return self._ask(lambda card: pynvml.nvmlDeviceGetUtilizationRates(card).gpu)

    def _ask(self, question: Callable[[Any], int | None]) -> int | None:
        return None if self._handle is None else _read(lambda: question(self._handle))


def _read(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except pynvml.NVMLError:
        return None


def _handle(device: torch.device) -> Any:
    pynvml.nvmlInit()
    return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")


def _memory(card: Any) -> Any:
    return pynvml.nvmlDeviceGetMemoryInfo(card, version=pynvml.nvmlMemory_v2)


def _process_bytes(card: Any) -> int | None:
    processes = pynvml.nvmlDeviceGetComputeRunningProcesses(card)
    return next((p.usedGpuMemory for p in processes if p.pid == os.getpid()), None)
