"""What is claimed of the panel's cost, and when its control takes the claim back."""

from __future__ import annotations

import math

import pytest

from hybridlab.notebook.panel_cost import PanelCost, Ratio
from hybridlab.notebook.panel_views import panel_claim, panel_table
from hybridlab.notebook.results import Verdict, is_volatile

WIDE = (0.9, 1.1)
NONE = (-math.inf, math.inf)


def cost(panel: tuple[float, float], control: tuple[float, float]) -> PanelCost:
    return PanelCost(Ratio(1.0, *panel), Ratio(1.0, *control), step_ms=14.0, panel_itself_ms=0.07, drawings=3.5)


@pytest.mark.parametrize(
    ("panel", "control", "verdict"),
    [
        ((0.999, 1.005), (0.998, 1.002), "holds"),
        ((1.02, 1.05), (0.998, 1.002), "fails"),
        ((0.999, 1.02), (0.998, 1.002), "open"),
        ((0.999, 1.005), WIDE, "holds"),
        ((1.02, 1.05), WIDE, "fails"),
        ((0.999, 1.005), (1.001, 1.004), "open"),
        ((1.02, 1.05), (0.95, 0.99), "open"),
        (NONE, NONE, "open"),
    ],
)
def test_the_panels_interval_decides_unless_the_control_is_told_apart_from_one(
    panel: tuple[float, float], control: tuple[float, float], verdict: Verdict
) -> None:
    assert panel_claim(cost(panel, control)).verdict == verdict


def test_the_claim_rests_on_times_alone() -> None:
    numbers = panel_claim(cost((0.999, 1.005), WIDE)).numbers
    assert all(map(is_volatile, numbers))
    assert numbers["panel_over_none_ratio_time_high"] == 1.005
    assert numbers["none_over_none_ratio_time_low"] == 0.9
    assert numbers["panel_itself_over_none_ratio_time"] == pytest.approx(0.005)


def test_the_control_stands_beside_the_panel() -> None:
    text = panel_table(cost((0.999, 1.005), WIDE)).text()
    assert "of 14.0 ms" in text
    assert "0.070 ms a step, 3.5 drawings a round included" in text
    rows = [line.split("  ") for line in text.splitlines()[3:]]
    assert [[cell.strip() for cell in row if cell] for row in rows] == [
        ["with the panel", "1.0000", "0.9990", "1.0050"],
        ["without it again: the control", "1.0000", "0.9000", "1.1000"],
        ["the panel's own code alone", "0.0050", "–", "–"],
    ]
