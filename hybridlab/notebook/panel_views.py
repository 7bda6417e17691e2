"""What a notebook shows of the live panel's cost, beside the control that could refute it."""

from __future__ import annotations

from dataclasses import asdict

from hybridlab.notebook.panel_cost import PanelCost, Ratio
from hybridlab.notebook.results import Claim, Numbers, Verdict, verdict_below
from hybridlab.notebook.tables import Table, table

BOUND = 1.01
"""A step with the panel on may take so many steps without it."""


def panel_table(cost: PanelCost) -> Table:
    """A step with the panel and one without it again, both over one without; and the panel's own time."""
    rows = [
        {"a step": "with the panel"} | asdict(cost.panel_over_none),
        {"a step": "without it again: the control"} | asdict(cost.none_over_none),
        {"a step": "the panel's own code alone", "median": _itself_over_none(cost)},
    ]
    caption = (
        f"In steps without the panel, of {cost.step_ms:.1f} ms: medians over paired rounds, with the ends of their "
        f"95 % intervals. The panel's own code takes the host {cost.panel_itself_ms:.3f} ms a step, "
        f"{cost.drawings:.1f} drawings a round included"
    )
    return table(rows, caption)


def panel_claim(cost: PanelCost) -> Claim:
    """That watching is cheap; open where the control is told apart from 1, since then so may anything be."""
    numbers: Numbers = {
        **_numbers("panel_over_none", cost.panel_over_none),
        **_numbers("none_over_none", cost.none_over_none),
        "panel_itself_over_none_ratio_time": _itself_over_none(cost),
        "panel_itself_ms": cost.panel_itself_ms,
        "step_ms": cost.step_ms,
    }
    text = f"a step with the panel on takes at most {BOUND} of one without"
    return Claim("panel-is-cheap", text, _verdict(cost), numbers)


def _verdict(cost: PanelCost) -> Verdict:
    panel, control = cost.panel_over_none, cost.none_over_none
    return verdict_below(panel.low, panel.high, BOUND) if control.low <= 1 <= control.high else "open"


def _numbers(name: str, ratio: Ratio) -> Numbers:
    name = f"{name}_ratio_time"
    return {name: ratio.median, f"{name}_low": ratio.low, f"{name}_high": ratio.high}


def _itself_over_none(cost: PanelCost) -> float:
    return cost.panel_itself_ms / cost.step_ms
