"""In which number format a run computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from hybridlab.base.errors import UserError
from hybridlab.base.settings import check_choice

PRECISIONS = ("fp32", "tf32", "bf16")


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """Inside, allow TF32 in float32 matrix products and convolutions, or forbid it, for the whole process.

    fp32 forbids it, so that "FP32" means what it says; tf32 and bf16 allow it for what stays in float32.

    Raises UserError where torch cannot say what is allowed now, as it would have to be put back.
    """
    check_choice("precision", name, PRECISIONS)
    before = _allowed_now()
    try:
        _allow("highest" if name == "fp32" else "high", name != "fp32")
        yield
    finally:
        _allow(*before)


def autocast(name: str, device: torch.device) -> AbstractContextManager[object]:
    """The region that one forward pass runs in; weights stay float32.

    A fresh region for every forward, and no weight cache: with the cache, weights that were moved in place
    are ignored until the region ends, and at XL scale it costs 2.5 GB.
    """
    check_choice("precision", name, PRECISIONS)
    if name != "bf16":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False)


def _allowed_now() -> tuple[str, bool]:
    """In matrix products, and in convolutions."""
    try:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError as error:
        raise UserError(
            "torch's own settings were set to several formats (torch.backends...fp32_precision): leave them alone, "
            "a run's `precision` decides"
        ) from error


def _allow(products: str, tf32_in_convolutions: bool) -> None:
    torch.set_float32_matmul_precision(products)
    torch.backends.cudnn.allow_tf32 = tf32_in_convolutions
