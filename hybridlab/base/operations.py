"""Floating-point operations, counted while something runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


def operations_of(run: Callable[[], object]) -> int:
    """Floating-point operations of what `run` does: products of matrices, convolutions and attention, on any device."""
    with FlopCounterMode(display=False, custom_mapping=ATTENTION_ON_A_CPU) as counter:
        run()
    return counter.get_total_flops()


def _forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))  # type: ignore[no-untyped-call]


ATTENTION_ON_A_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
}
"""Which torch's counter leaves out; by the shapes of their arguments."""
