"""Numbers and tables as documents write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hybridlab.report.evidence import Numbers

NAMES = {
    "loss_to_control": "loss against a plain run with as many gradient steps",
    "loss_to_baseline": "loss against the full baseline",
    "loss_change": "loss against the control",
    "perplexity_change": "perplexity",
    "perplexity_gap": "perplexity",
    "error_share": "error",
    "baseline": "time over the baseline's",
    "busy": "of the time in which the card was busy",
    "step_value": "worth of a predicted step",
}
"""Names of numbers, without their units' endings, that read better in other words."""

VERDICTS = {"holds": "**holds**", "fails": "**fails**", "open": "open"}


def numbers_in_words(numbers: Numbers) -> str:
    """A claim's numbers with units, the bounds of an interval behind its value, the seeds last."""
    shown = [name for name in numbers if not _is_bound(name, numbers) and name != "seeds"]
    phrases = [f"{_name(name)} {_value(name, numbers)}" for name in shown]
    return "; ".join([*phrases, *([f"seeds {numbers['seeds']}"] if "seeds" in numbers else [])])


def interval(
    numbers: Mapping[str, Any], name: str, *, scale: float = 1.0, digits: int = 3, sign: str = "+"
) -> str | None:
    """A signed value with its bounds, "+0.115 [-0.120, +0.349]"; None where it was not measured.

    sign: of positive ones; "" for none

    Bounds that were not measured, or are the value itself (one seed), are left out.
    """
    value, *bounds = (numbers.get(key) for key in (name, f"{name}_low", f"{name}_high"))
    if value is None:
        return None
    texts = [f"{scale * bound:{sign}.{digits}f}" for bound in bounds if bound is not None and bound != value]
    return f"{scale * value:{sign}.{digits}f}" + (f" [{', '.join(texts)}]" if len(texts) == 2 else "")


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


def _is_bound(name: str, numbers: Numbers) -> bool:
    stem, _, end = name.rpartition("_")
    return end in ("low", "high") and stem in numbers


def _name(name: str) -> str:
    stem = name
    for ending in ("_bytes", "_ms", "_seconds", "_ratio_time", "_percent"):
        stem = stem.removesuffix(ending)
    return NAMES.get(stem, stem.replace("_", " "))


def _value(name: str, numbers: Numbers) -> str:
    value = numbers[name]
    if value is None:
        return "not finite"
    if isinstance(value, str):
        return value
    is_share = name.startswith("perplexity_") or name.endswith("_share")
    if f"{name}_low" in numbers or is_share:
        sign = "" if name.endswith("_ratio_time") else "+"
        scaled = interval(numbers, name, scale=100, digits=1) if is_share else interval(numbers, name, sign=sign)
        return f"{scaled}{' %' if is_share else ' nats' if 'loss' in name else ' ms' if name.endswith('_ms') else ''}"
    return _with_unit(name, value)


def _with_unit(name: str, value: float) -> str:
    if name.endswith("_bytes"):
        return f"{value / 1e9:.2f} GB"
    if name.endswith("_percent"):
        return f"{value:.0f} %"
    for ending, unit in (("_ms", "ms"), ("_seconds", "s"), ("_loss", "nats")):
        if name.endswith(ending):
            return f"{value:.3f} {unit}"
    if name.endswith("_steps"):
        return f"{value:.1f}".removesuffix(".0")  # means over seeds
    return f"{value:.0f}" if value == int(value) and not name.endswith("_ratio_time") else f"{value:.3f}"


def _cell(value: Any) -> str:
    return "–" if value is None else str(value).replace("|", "\\|")
