"""In which number format a run computes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from hybridlab.errors import nearest

PRECISIONS = ("fp32", "tf32", "bf16")


def check_precision(name: str) -> None:
    """Raise ValueError for a name that is not in `PRECISIONS`."""
    if name not in PRECISIONS:
        raise ValueError(f"precision {name!r} is unknown: {nearest(name, PRECISIONS)}")


def set_matmul_precision(name: str) -> None:
    """Allow TF32 in float32 matrix products and convolutions, or forbid it, for the whole process.

    fp32 forbids it, so that "FP32" means what it says; tf32 and bf16 allow it for what stays in float32.
    """
    check_precision(name)
    torch.set_float32_matmul_precision("highest" if name == "fp32" else "high")
    torch.backends.cudnn.allow_tf32 = name != "fp32"


def autocast(name: str, device: torch.device) -> AbstractContextManager[object]:
    """The region that one forward pass runs in; weights stay float32.

    A fresh region for every forward, and no weight cache: with the cache, weights that were moved in place
    are ignored until the region ends, and at XL scale it costs 2.5 GB.
    """
    check_precision(name)
    if name != "bf16":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False)
