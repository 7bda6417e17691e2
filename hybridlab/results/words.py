"""Quantities as notebooks and documents write them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hybridlab.results.claims import Quantity, Unit, rounded
from hybridlab.study.statistics import formatted

NAMES = {
    "loss_to_control": "loss against a plain run with as many gradient steps",
    "loss_to_baseline": "loss against the full baseline",
    "loss_change": "loss against the control",
    "perplexity_change": "perplexity",
    "perplexity_gap": "perplexity",
    "error_share": "error",
    "time_over_baseline": "time over the baseline's",
    "busy_ratio": "step ratio, of the time in which the GPU was busy",
    "p_value": "p, corrected",
    "step_value": "worth of a predicted step",
    "loss_to_shallow": "loss against the shallow model",
    "loss_to_shallow_control": "loss against the shallow model of as much computation",
    "compute_to_loss": "computation to its loss",
    "time_to_loss": "time to its loss",
    "steps_over_vanilla": "steps to the loss over the vanilla run's",
    "stack_time_ratio": "the vanilla run's time over the stack's",
    "gpu_busy": "GPU busy",
    "control_gpu_busy": "control's GPU busy",
}
"""Names of quantities that read better in other words."""

OF_GROWN = {"loss_to_control": "loss against a plain run of as much computation"}
"""The same of an arm that predicted depth: its claim says what its steps cost."""

MAY_BE_OPEN = ("step_value", "compute_to_loss", "time_to_loss", "steps_over_vanilla", "stack_time_ratio")
"""How the names of quantities begin that plain runs of several lengths may leave open."""

FORMATS: dict[Unit, tuple[float, str, str]] = {
    "count": (1, ".0f", ""),
    "steps": (1, ".1f", ""),
    "nats": (1, ".3f", " nats"),
    "share": (100, "+.1f", " %"),
    "bytes": (1e-9, ".2f", " GB"),
    "ms": (1, ".3f", " ms"),
    "s": (1, ".3f", " s"),
    "percent": (1, ".0f", " %"),
    "ratio": (1, ".3f", ""),
    "time ratio": (1, ".3f", ""),
    "probability": (1, ".2g", ""),
    "rate": (1, "g", ""),
}
"""By unit: what a value is multiplied with, its format, and what stands behind it."""


def quantities_in_words(quantities: Sequence[Quantity], among: Sequence[Quantity] = ()) -> str:
    """A claim's quantities with units, the bounds of an interval behind its value; among: all of the claim's."""
    grown = any(q.name == "cost_in_full_steps" for q in among or quantities)
    return "; ".join(f"{name_in_words(q, grown=grown)} {in_words(q)}" for q in quantities)


def name_in_words(q: Quantity, *, grown: bool = False) -> str:
    """What a quantity is called; grown: of an arm that predicted depth."""
    return (NAMES | (OF_GROWN if grown else {})).get(q.name, q.name.replace("_", " "))


def bound_in_words(q: Quantity) -> str | None:
    """The bound that decides, in the quantity's unit; None where it has none."""
    said = amount(q.bound, q.unit)
    return said and said.lstrip("+")


def amount(value: float | None, unit: Unit) -> str | None:
    """A number with its unit, None as it is."""
    scale, spec, behind = FORMATS[unit]
    return None if value is None else f"{formatted(scale * value, spec)}{behind}"


def in_words(q: Quantity) -> str:
    """A quantity with its unit, the bounds of an interval behind its value."""
    if q.value is not None and not math.isfinite(q.value):
        return "not finite"
    if q.value is None and q.low is None and q.high is None:
        return "open" if q.name.startswith(MAY_BE_OPEN) else "not finite"
    scale, spec, unit = FORMATS[q.unit]
    kept = (None if number is None else scale * rounded(number) for number in (q.value, q.low, q.high))
    value, low, high = kept  # as results.json has them, so that both show the same last digit
    if value is not None and low is None and high is None:
        ends = " [open, open]" if q.name.startswith(MAY_BE_OPEN) else ""
        return formatted(value, spec).removesuffix(".0" if q.unit == "steps" else "") + ends + unit  # means over seeds
    signed = spec if q.unit in ("ratio", "time ratio", "share") else "+.3f"
    return f"{interval(value, low, high, signed)}{unit}"


def quantity_interval(quantity: Quantity | None, *, digits: int = 3) -> str | None:
    """A signed value with its bounds, as `interval` writes it, without a unit; None where there is no quantity."""
    if quantity is None:
        return None
    return interval(quantity.value, quantity.low, quantity.high, f"+.{digits}f") or "open"


def interval(value: float | None, low: float | None, high: float | None, spec: str = "+.3f") -> str | None:
    """A value with its bounds, "+0.115 [-0.120, +0.349]"; None where nothing was measured.

    Of a value with one bound, what is missing is open: "+0.940 [+0.800, open]", "open [+1.000, open]". Bounds that are
    the value itself (one seed) are left out.
    """
    if value is None and low is None and high is None:
        return None
    first, *ends = ("open" if number is None else formatted(number, spec) for number in (value, low, high))
    return first if low == high and low in (None, value) else f"{first} [{', '.join(ends)}]"
