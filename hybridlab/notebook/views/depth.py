"""What predicted depth brings, as tables and claims."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hybridlab.charts.tables import Table, table
from hybridlab.results.claims import Claim, Quantity, holds_below, on_losses
from hybridlab.study.comparison import Comparison, base_of
from hybridlab.study.statistics import Interval
from hybridlab.study.study import StudyResult


def depth_table(result: StudyResult, comparisons: Sequence[Comparison]) -> Table:
    """Each arm's loss and cost beside the baseline's, the lowest loss first."""
    ordered = sorted(comparisons, key=lambda c: c.validation_loss.mean)
    rows: list[dict[str, Any]] = [
        {
            "arm": c.name,
            "blocks": _blocks(result, c.name),
            "final loss (nats)": c.validation_loss.mean,
            "against the baseline (nats)": str(c.to_baseline),
            "against as much computation (nats)": str(c.to_control) if c.grown else None,
            "answer": c.answer if c.grown else "a control",
            "cost (full steps)": round(c.cost),
            "computation to its loss": str(c.compute_to_loss) if c.compute_to_loss else None,
            "time to its loss": str(c.time_to_loss) if c.time_to_loss else None,
            "time over the baseline's": c.time_ratio.mean,
        }
        for c in ordered
    ]
    caption = (
        "A difference below 0 is better. Computation and time to its loss are those of a plain run over the arm's own: "
        "above 1, growing pays. They are open where the loss lies outside those of the plain runs"
    )
    return table(rows, caption, {"cost (full steps)": ",d", "time over the baseline's": ".2f"})


def shallow_claim(result: StudyResult, grown: str, shallow: str) -> Claim:
    """That the grown model ends below the shallow one that it began as: that depth pays at this budget."""
    pairs = (
        (result.value("validation_loss", grown, s), result.value("validation_loss", shallow, s)) for s in result.seeds
    )
    change = Interval.of([mine - other for mine, other in pairs])
    quantities = (Quantity.over_seeds("loss_to_shallow", change, "nats", 0.0), Quantity("seeds", change.seeds))
    text = (
        f"{grown}: depth pays at this budget, as the grown model ends below the {shallow.replace(',', ' control of')}"
    )
    return on_losses("depth-pays", grown, text, holds_below(*change.ends, 0.0), quantities, base_of(result))


def _blocks(result: StudyResult, name: str) -> str:
    """As "2 -> 6"."""
    depths = result.runs[name, result.seeds[0]].steps["depth"].dropna()
    return " -> ".join(f"{depth:.0f}" for depth in dict.fromkeys(depths))
