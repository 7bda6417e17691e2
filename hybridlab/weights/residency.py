"""Where tensors that take part in training lie at the moment."""

from __future__ import annotations

from enum import Enum


class Residency(Enum):
    """Where the exact values of weights, optimizer state, path or snapshots lie.

    DEVICE: in memory of the compute device, ready for use
    OFFLOADED: elsewhere, and their memory on the device is free: in host memory (pinned where the device is a GPU), or
        as the 8-bit codes of `compress`
    ALLOCATED: still elsewhere; memory on the device is taken again, and not filled
    RETURNING: copies to the device are under way; who uses the values waits for these first
    """

    DEVICE = "device"
    OFFLOADED = "offloaded"
    ALLOCATED = "allocated"
    RETURNING = "returning"
