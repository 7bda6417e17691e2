"""The device that a run computes on: which one it is, what it is called, and waiting until it is done."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from hybridlab.base.errors import UserError
from hybridlab.base.settings import fits


def find_device(name: str = "auto") -> torch.device:
    """The device that a parameter file names: "auto" (CUDA where there is one), "cuda" or "cpu".

    Of several GPUs it is the one that this process has set, and named, so that its threads compute there too.

    Raises UserError for another name, and for CUDA where there is none.
    """
    if name not in ("auto", "cuda", "cpu"):
        raise UserError(f"device {name!r} is unknown: choose auto, cuda or cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "device is 'cuda', but torch sees no CUDA device: set device to auto or cpu, or mend the driver"
        )
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    number = torch.cuda.current_device() if torch.cuda.is_initialized() else 0  # type: ignore[no-untyped-call]
    return torch.device("cuda", number) if number else torch.device("cuda")


def check_processes(setting: str, count: int) -> None:
    """Raise UserError where a number of processes is no whole number from 1 on."""
    if not fits(count, int) or count < 1:
        raise UserError(f"{setting} is {count!r}: give a whole number, 1 or more")


def refuse_more_than_gpus(setting: str, count: int, device: str) -> None:
    """Raise UserError where a setting asks for more processes, each with a GPU of its own, than torch sees GPUs, or for
    none.

    device: as in `find_device`; any number of processes may share the CPU
    """
    check_processes(setting, count)
    if find_device(device).type == "cuda" and count > (there := torch.cuda.device_count()):
        raise UserError(f"{setting} is {count}, and torch sees {there} GPUs: each process takes one")


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's as the system gives it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def host() -> str:
    """A hash of this machine's name: times differ between machines of one kind."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def gpus(device: torch.device) -> list[torch.device]:
    """The device, if it is a GPU: whose random stream counts beside the processor's, and no other GPU's."""
    return [device] if device.type == "cuda" else []


def give_back_cached() -> None:
    """Return to the GPU what torch holds of it and no tensor needs, cuBLAS's workspaces too.

    Before a capture, so that its workspaces are in the graph's own memory; and after it, so that no other pass takes
    those.
    """
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


def reserve_contiguous(device: torch.device, tensors: Iterable[Tensor]) -> None:
    """Let torch reserve from a GPU, in one request, what as many tensors as these are about to take one by one.

    They then lie in one stretch, which can go back to the GPU whole: so what the cache holds goes back first, or some
    of them would be taken from there. Nothing happens where the cache holds enough for all; without so much in one
    piece, they are taken one by one.

    tensors: only their sizes count, and they may be on "meta" or empty of memory
    """
    if device.type != "cuda":
        return
    total_bytes = sum(tensor.nbytes for tensor in tensors)
    if total_bytes > torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device):
        torch.cuda.empty_cache()
        with suppress(torch.OutOfMemoryError):
            torch.empty(total_bytes, dtype=torch.uint8, device=device)


def wait_for_stream(device: torch.device) -> None:
    """Return when the current stream is done, whatever runs beside it; host memory that it writes may then be read."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def wait_for(device: torch.device) -> None:
    """Return when the device has done all that it was given; a processor always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
