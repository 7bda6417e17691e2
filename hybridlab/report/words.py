"""Numbers, tables and templates as documents write them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hybridlab.results.claims import Quantity, Unit

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
    "gpu_busy": "GPU busy",
    "control_gpu_busy": "control's GPU busy",
}
"""Names of quantities that read better in other words."""

FORMATS: dict[Unit, tuple[float, str, str]] = {
    "count": (1, ".0f", ""),
    "steps": (1, ".1f", ""),
    "nats": (1, ".3f", " nats"),
    "share": (100, "+.1f", " %"),
    "bytes": (1e-9, ".2f", " GB"),
    "ms": (1, ".3f", " ms"),
    "s": (1, ".3f", " s"),
    "percent": (1, ".0f", " %"),
    "time ratio": (1, ".3f", ""),
    "probability": (1, ".2g", ""),
    "rate": (1, "g", ""),
}
"""By unit: what a value is multiplied with, its format, and what stands behind it."""

VERDICTS = {"holds": "**holds**", "fails": "**fails**", "open": "open"}


def render(template: str, **context: Any) -> str:
    """Fill in a file of `templates/`.

    There, `rows | table` is a Markdown table, or "Not run yet."; `pictures | beginning("vram")` shows the pictures
    whose names begin so, or nothing. Of several empty lines one stays.

    Raises jinja2's UndefinedError for a name that `context` lacks.
    """
    folder = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(loader=folder, undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    environment.filters |= {"table": _table_or_not_run, "beginning": _pictures_beginning}
    return re.sub(r"\n{3,}", "\n\n", environment.get_template(template).render(context))


def quantities_in_words(quantities: Iterable[Quantity]) -> str:
    """A claim's quantities with units, the bounds of an interval behind its value."""
    return "; ".join(f"{NAMES.get(q.name, q.name.replace('_', ' '))} {_value(q)}" for q in quantities)


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
    first, *ends = ("open" if number is None else format(number, spec) for number in (value, low, high))
    return first if low == high and low in (None, value) else f"{first} [{', '.join(ends)}]"


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Records as a table, a column for each key; None is a dash; texts stand left, numbers right.

    Raises ValueError without rows.
    """
    if not rows:
        raise ValueError("a table needs at least one row")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    sides = ["---" if any(isinstance(row.get(column), str) for row in rows) else "---:" for column in columns]
    return "\n".join(f"| {' | '.join(line)} |" for line in [columns, sides, *cells])


def known_columns(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same records without the columns that are None in all of them."""
    known = {key for row in rows for key, value in row.items() if value is not None}
    return [{key: value for key, value in row.items() if key in known} for row in rows]


def gigabytes(count: float | None) -> str | None:
    """Bytes in decimal gigabytes, None as it is."""
    return None if count is None else f"{count / 1e9:.2f} GB"


def percent(value: float | None) -> str | None:
    """A share in percent, None as it is."""
    return None if value is None else f"{value:.0f} %"


def verdict_word(verdict: str) -> str:
    """A verdict as documents set it: what decides stands out."""
    return VERDICTS.get(verdict, verdict)


def _table_or_not_run(rows: Sequence[Mapping[str, Any]]) -> str:
    return markdown_table(rows) if rows else "Not run yet."


def _pictures_beginning(pictures: Mapping[str, str], name: str) -> str:
    """pictures: file name below docs/images -> its title"""
    shown = [f"![{title}](images/{file})" for file, title in pictures.items() if file.startswith(name)]
    return "\n\n".join(shown)


def _value(q: Quantity) -> str:
    if q.value is None and q.low is None and q.high is None:
        return "open" if q.name.startswith("step_value") else "not finite"
    scale, spec, unit = FORMATS[q.unit]
    if q.value is not None and q.low is None and q.high is None:
        return f"{scale * q.value:{spec}}".removesuffix(".0" if q.unit == "steps" else "") + unit  # means over seeds
    value, low, high = (None if number is None else scale * number for number in (q.value, q.low, q.high))
    signed = spec if q.unit in ("time ratio", "share") else "+.3f"
    return f"{interval(value, low, high, signed)}{unit}"


def _cell(value: Any) -> str:
    return "–" if value is None else str(value).replace("|", "\\|")
