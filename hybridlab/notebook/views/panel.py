"""What a notebook shows of the live panel's cost, beside the control that could refute it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybridlab.charts.tables import Table, table
from hybridlab.panel.cost import PanelCost
from hybridlab.results.claims import Claim, Quantity, holds_below

BOUND = 1.01
"""A step with the panel on may take so many steps without it."""


def panel_table(costs: Mapping[str, PanelCost]) -> Table:
    """By what runs: a step with the panel and one without it again, both over one without; and the panel's own time."""
    rows: list[dict[str, Any]] = []
    for name, cost in costs.items():
        rows += [
            {"training": name, "a step": "without the panel", "ms": cost.step_ms},
            {"training": name, "a step": "without it again: the control"} | cost.none_over_none.record(),
            {"training": name, "a step": "with the panel"}
            | cost.panel_over_none.record()
            | {"drawings a round": cost.drawings},
            {"training": name, "a step": "the panel's own code alone"}
            | {"median": cost.panel_itself_over_none, "ms": cost.panel_itself_ms},
        ]
    caption = (
        "A step over one without the panel: medians over paired rounds, with the ends of their 95 % intervals. The "
        "panel's own code alone is the host's time in it, drawings included, over a step without it"
    )
    return table(rows, caption, {"ms": ".3f", "drawings a round": ".1f"})


def panel_claims(costs: Mapping[str, PanelCost]) -> list[Claim]:
    """That watching is cheap; open where the control differs from 1: then the measurement is off."""
    claims = []
    for name, cost in costs.items():
        panel, control = cost.panel_over_none, cost.none_over_none
        quantities = (
            Quantity("panel_over_none", panel.median, panel.low, panel.high, "time ratio", panel.rounds, BOUND),
            Quantity("none_over_none", control.median, control.low, control.high, "time ratio", control.rounds),
            Quantity("panel_itself_over_none", cost.panel_itself_over_none, unit="time ratio"),
            Quantity("panel_itself", cost.panel_itself_ms, unit="ms"),
            Quantity("step", cost.step_ms, unit="ms"),
        )
        control_is_off = not control.low <= 1 <= control.high
        verdict = "open" if control_is_off else holds_below(panel.low, panel.high, BOUND)
        text = f"{name}: a step with the panel on takes at most {BOUND} of one without"
        claims.append(Claim("panel-is-cheap", text, verdict, quantities, name))
    return claims
