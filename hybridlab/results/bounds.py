"""The plan's bounds that several places hold numbers against."""

from __future__ import annotations

import math

CARD_BYTES = 16 * 10**9
"""The plan's card."""

SAFE_PEAK_BYTES = 14 * 10**9
"""A run whose peak stays below it fits that card with room to spare."""

QUALITY_TOLERANCE_NATS = math.log1p(0.02)
"""The perplexity that a faster run may lose, 2 %, as a change of the loss."""
