"""The plan's bounds that several folders compare numbers with."""

from __future__ import annotations

import math

GPU_BYTES = 16 * 10**9
"""Memory of the plan's GPU."""

SAFE_PEAK_BYTES = 14 * 10**9
"""A run whose peak stays below it fits that GPU with room to spare."""

QUALITY_TOLERANCE_NATS = math.log1p(0.02)
"""The perplexity that a faster run may lose, 2 %, as a change of the loss."""
