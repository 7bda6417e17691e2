"""What a notebook shows of the live panel's cost, beside the control that could refute it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, astuple

from hybridlab.charts.tables import Table, table
from hybridlab.panel.cost import PanelCost
from hybridlab.results.publish import Claim, Verdict, bounded, slug, verdict_below

BOUND = 1.01
"""A step with the panel on may take so many steps without it."""


def panel_table(costs: Mapping[str, PanelCost]) -> Table:
    """By what runs: a step with the panel and one without it again, both over one without; and the panel's own time."""
    rows = [row for name, cost in costs.items() for row in _rows(name, cost)]
    caption = (
        "A step over one without the panel: medians over paired rounds, with the ends of their 95 % intervals. The "
        "panel's own code alone is the host's time in it, drawings included, over a step without it"
    )
    return table(rows, caption, {"ms": ".3f", "drawings a round": ".1f"})


def _rows(name: str, cost: PanelCost) -> list[dict[str, str | float | None]]:
    of, panel = {"training": name}, asdict(cost.panel_over_none)
    return [
        of | {"a step": "without the panel", "ms": cost.step_ms},
        of | {"a step": "without it again: the control"} | asdict(cost.none_over_none),
        of | {"a step": "with the panel"} | panel | {"drawings a round": cost.drawings},
        of | {"a step": "the panel's own code alone", "median": _itself_over_none(cost), "ms": cost.panel_itself_ms},
    ]


def panel_claims(costs: Mapping[str, PanelCost]) -> list[Claim]:
    """That watching is cheap; open where the control is told apart from 1, since then so may anything be."""
    return [
        Claim(
            f"panel-is-cheap-{slug(name)}",
            f"{name}: a step with the panel on takes at most {BOUND} of one without",
            _verdict(cost),
            {
                **bounded("panel_over_none_ratio_time", *astuple(cost.panel_over_none)),
                **bounded("none_over_none_ratio_time", *astuple(cost.none_over_none)),
                "panel_itself_over_none_ratio_time": _itself_over_none(cost),
                "panel_itself_ms": cost.panel_itself_ms,
                "step_ms": cost.step_ms,
            },
        )
        for name, cost in costs.items()
    ]


def _verdict(cost: PanelCost) -> Verdict:
    panel, control = cost.panel_over_none, cost.none_over_none
    return verdict_below(panel.low, panel.high, BOUND) if control.low <= 1 <= control.high else "open"


def _itself_over_none(cost: PanelCost) -> float:
    return cost.panel_itself_ms / cost.step_ms
