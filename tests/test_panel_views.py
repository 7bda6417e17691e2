"""What is claimed of the panel's cost, and when its control takes the claim back."""

from __future__ import annotations

import math

import pytest

from hybridlab.benchmarks.interleaved import Ratio
from hybridlab.notebook.views.panel import panel_claims, panel_table
from hybridlab.panel.cost import PanelCost
from hybridlab.results.claims import VOLATILE_UNITS, Claim, Verdict
from hybridlab.results.words import quantities_in_words

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
    (claim,) = panel_claims({"bf16": cost(panel, control)})
    assert (claim.id, claim.verdict) == ("bf16-panel-is-cheap", verdict)


def test_the_claim_rests_on_times_alone() -> None:
    costs = {"bf16": cost((1.5, 1.6), WIDE), "bf16, compiled": cost((0.999, 1.005), WIDE)}
    _, claim = panel_claims(costs)
    assert claim.id == "bf16-compiled-panel-is-cheap"
    assert all(quantity.unit in VOLATILE_UNITS for quantity in claim.quantities)
    panel, control = (claim.quantity(f"{name}_over_none") for name in ("panel", "none"))
    assert panel is not None
    assert control is not None
    assert panel.high == 1.005
    assert control.low == 0.9
    assert claim.value("panel_itself_over_none") == pytest.approx(0.005)


def test_under_six_rounds_there_is_no_interval_in_a_notebook_and_in_its_results() -> None:
    costs = {"bf16": cost(NONE, NONE)}
    (claim,) = panel_claims(costs)
    said = quantities_in_words(claim.quantities)
    assert said.startswith("panel over none 1.000; none over none 1.000; ")
    assert said == quantities_in_words(Claim.from_record(claim.record()).quantities)
    assert [row[4:6] for row in panel_table(costs).cells()] == [["–", "–"]] * 4


def test_the_control_stands_beside_the_panel() -> None:
    shown = panel_table({"fp32": cost((0.999, 1.005), WIDE)})
    assert shown.columns == ["training", "a step", "ms", "median", "low", "high", "drawings a round"]
    assert shown.cells() == [
        ["fp32", "without the panel", "14.000", "–", "–", "–", "–"],
        ["fp32", "without it again: the control", "–", "1.0000", "0.9000", "1.1000", "–"],
        ["fp32", "with the panel", "–", "1.0000", "0.9990", "1.0050", "3.5"],
        ["fp32", "the panel's own code alone", "0.070", "0.0050", "–", "–", "–"],
    ]
