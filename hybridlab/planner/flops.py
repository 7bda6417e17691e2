"""Counting the work of a computation: what it multiplies, and what it moves."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
NO_KERNEL = (aten.empty, aten.empty_like, aten.empty_strided, aten._unsafe_view)


class Work(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts, while it is active, floating-point operations by number type, and bytes that kernels read and write.

    flops: of matrix products, convolutions and attention, as `torch.utils.flop_counter` counts them; an element's own
        arithmetic hides behind its memory traffic
    moved_bytes: of every kernel that is none of those: each tensor read once and written once, nothing fused
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops: Counter[torch.dtype] = Counter()
        self.moved_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops[args[0].dtype] += count(*args, **kwargs, out_val=out)
        elif not func.is_view and func._overloadpacket not in NO_KERNEL:
            self.moved_bytes += sum(leaf.nbytes for leaf in tree_leaves((args, out)) if isinstance(leaf, Tensor))
        return out
