"""Which memory settings to take for which model: a table over all that was measured, and a row of each model marked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hybridlab.notebook.views.memory_charts import MemoryRow
from hybridlab.report.evidence import Evidence, arm_in_words
from hybridlab.report.validation import Cells, loss_change, step_time
from hybridlab.report.words import Markdown, known_columns, notebook_link, render
from hybridlab.results.bounds import QUALITY_TOLERANCE_NATS, SAFE_PEAK_BYTES
from hybridlab.results.words import amount

TAKE, WATCH = Markdown("**take this**"), Markdown("**take this, watch its loss**")


def by_model(evidence: Evidence) -> str:
    """Every row of the tables "memory", the recommended ones marked, and a sentence on each model that has none."""
    rows = [row | {"notebook": notebook} for notebook, rows in evidence.tables("memory").items() for row in rows]
    of = {model: [row for row in rows if row["model"] == model] for model in dict.fromkeys(r["model"] for r in rows)}
    best = {model: recommended(mine) for model, mine in of.items()}
    shown = [_shown(row, row is best[row["model"]], _judged_over(evidence, row, rows)) for row in rows]
    return render(
        "recommendation.md",
        rows=known_columns(shown),
        estimated=any(row.get("estimated_5080_ms") for row in rows),
        lacking=[(model, *why_none(mine)) for model, mine in of.items() if best[model] is None],
    )


def recommended(rows: Sequence[MemoryRow]) -> MemoryRow | None:
    """The fastest arm of one model that stays below 14 GB and within 2 % of the control; None where none does."""
    good = [row for row in rows if _is_safe(row) and _within(row.get("loss_change"))]
    return min((row for row in good if row.get("step_ms")), key=lambda row: row["step_ms"], default=None)


def why_none(rows: Sequence[MemoryRow]) -> tuple[str, list[str]]:
    """Why none of one model's arms is recommended ("too large", "not judged" or "worse"), and those that are safe."""
    safe = [row for row in rows if _is_safe(row)]
    arms = [arm_in_words(row["arm"], row.get("notebook", "")) for row in safe]
    if not safe:
        return "too large", arms
    unjudged = all(row.get("loss_change") is None and control_of(row, rows) is None for row in safe)
    return "not judged" if unjudged else "worse", arms


def control_of(row: MemoryRow, rows: Sequence[MemoryRow]) -> MemoryRow | None:
    """A row's control: the arm of its notebook and model without a change of its own.

    None where it did not run: then no arm has a change.
    """
    beside = [other for other in rows if _group(other) == _group(row)]
    without = [other for other in beside if other.get("loss_change") is None]
    return without[0] if len(without) == 1 < len(beside) else None


def _group(row: MemoryRow) -> tuple[Any, Any]:
    return row.get("notebook"), row["model"]


def _is_safe(row: MemoryRow) -> bool:
    return row["peak_memory_bytes"] < SAFE_PEAK_BYTES


def _within(change: float | None) -> bool:
    """Whether a change of the loss, in nats, was measured and costs no more than is tolerated."""
    return change is not None and change < QUALITY_TOLERANCE_NATS


def _judged_over(evidence: Evidence, row: MemoryRow, rows: Sequence[MemoryRow]) -> str | None:
    """What the loss of a row rests on: how long a training, how many seeds, and how far the control came."""
    control = control_of(row, rows)
    if control is None:
        return None
    asked = (evidence.entry(row["notebook"]) or {}).get("parameters", {})
    steps, seeds = asked.get("reference_steps") or asked.get("steps"), asked.get("seeds") or 1
    length = [f"{steps} steps", f"{seeds} seed{'s' if seeds > 1 else ''}"] if steps else []
    loss = control.get("validation_loss")
    return ", ".join([*length, *([] if loss is None else [f"to a loss of {loss:.2f}"])])


def _shown(row: MemoryRow, best: bool, judged_over: str | None) -> Cells:
    estimated = row.get("estimated_5080_ms")
    return {
        "model": row["model"],
        "arm": arm_in_words(row["arm"], row["notebook"]),
        "peak VRAM": amount(row["peak_memory_bytes"], "bytes"),
        "below 14 GB": "yes" if _is_safe(row) else "no",
        **step_time(row),
        "est. on a 5080": f"{estimated:.0f} ms" if estimated else None,
        "loss against the control": loss_change(row),
        "judged over": judged_over,
        "advice": "" if not best else TAKE if _within(row.get("loss_change_high")) else WATCH,
        "notebook": notebook_link(row["notebook"], short=True),
    }
