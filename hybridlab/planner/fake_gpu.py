"""A CUDA GPU without a GPU: tensors of which only shape and type exist, and CUDA's own choice of kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import _scoped_library

HALF = (torch.bfloat16, torch.float16)

FLOAT32_ON_CUDA = (
    "cumsum",
    "exp",
    "group_norm",
    "layer_norm",
    "log",
    "log_softmax.int",
    "logsumexp",
    "pow.Tensor_Scalar",
    "pow.Tensor_Tensor",
    "reciprocal",
    "rsqrt",
    "softmax.int",
    "softplus",
    "sum",
    "sum.dim_IntList",
)
"""What autocast computes in float32 on CUDA, and in whatever type it finds on a CPU."""


@contextmanager
def fake_gpu() -> Iterator[None]:
    """Inside, tensors on the CPU take no memory, and autograd keeps what it would keep on a CUDA GPU.

    CUDA's fake tensors need a torch that was built for CUDA, so those of the CPU stand in, with what differs put right:
    which operations autocast keeps in float32, the attention kernels and what they save, dropout's mask. Not put right:
    memory that a kernel takes inside itself, such as cuBLAS's workspace. No other thread may compute on the CPU
    meanwhile: kernels are exchanged for the whole process.

    Source: https://docs.pytorch.org/docs/stable/amp.html#cuda-op-specific-behavior.
    """
    with torch.device("cpu"), FakeTensorMode(), _scoped_library("aten", "IMPL") as library:
        for name in FLOAT32_ON_CUDA:
            library.impl(name, _in_float32(name), "AutocastCPU")
        library.impl("scaled_dot_product_attention", _attention, "AutogradCPU")
        library.impl("dropout", _dropout, "AutogradCPU")
        library.impl("_grouped_mm", _grouped_mm, "Meta", allow_override=True)
        _forget_kernels()
        try:
            yield
        finally:
            _forget_kernels()


def _forget_kernels() -> None:
    """What torch.compile has traced remembers the kernels of an operation: those exchanged here are looked up anew."""
    for name in (*FLOAT32_ON_CUDA, "scaled_dot_product_attention", "dropout", "_grouped_mm"):
        _operation(name)._dispatch_cache.clear()


def _operation(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _in_float32(name: str) -> Callable[..., Any]:
    """The operation, on float32 copies of what comes in half precision."""
    operation = _operation(name)
    autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(autocast):
            return operation(*map(_widened, args), **{key: _widened(value) for key, value in kwargs.items()})

    return run


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in HALF else value


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """FlashAttention where CUDA takes it, the memory-efficient kernel elsewhere."""
    if query.dtype in HALF and attn_mask is None:  # which takes shared keys as they are
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if enable_gqa:
        key, value = (t.repeat_interleave(query.size(-3) // t.size(-3), -3) for t in (key, value))
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    mask = attn_mask if attn_mask is None else attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
    keeps = torch.is_grad_enabled()
    return efficient(query, key, value, mask, keeps, dropout_p, is_causal, scale=scale)[0]


def _dropout(x: Tensor, share: float, train: bool) -> Tensor:
    """CUDA's: a mask of one byte per element, none where nothing is dropped."""
    return torch.ops.aten.native_dropout(x, share, train)[0] if train and share else x


def _grouped_mm(
    a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """CUDA's takes float32 too, which torch's own shape function refuses."""
    groups = {4: (len(offs),) if offs is not None else (), 6: tuple(a.shape[:1])}.get(a.ndim + b.ndim, ())
    return a.new_empty((*groups, a.shape[-2], b.shape[-1]), dtype=out_dtype or a.dtype)
