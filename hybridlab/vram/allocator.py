"""What torch's allocator counts on a card."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch


@dataclass(frozen=True)
class Allocator:
    """Everything at one look, in bytes: asking torch for each figure apart takes as long each time.

    allocated: in live tensors; reserved: held of the card; peak_allocated, peak_reserved: since they were last reset
    retries: how often memory was short and everything unused was given back, since they were last reset
    """

    allocated: int
    reserved: int
    peak_allocated: int
    peak_reserved: int
    retries: int

    @classmethod
    def read(cls, device: torch.device) -> Self:
        """As it stands; all zero while the process has not touched the card."""
        stats = torch.cuda.memory_stats(device)
        return cls(
            allocated=stats.get("allocated_bytes.all.current", 0),
            reserved=stats.get("reserved_bytes.all.current", 0),
            peak_allocated=stats.get("allocated_bytes.all.peak", 0),
            peak_reserved=stats.get("reserved_bytes.all.peak", 0),
            retries=stats.get("num_alloc_retries", 0),
        )
