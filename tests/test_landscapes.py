"""Predictors under default guards on landscapes that move, and on some where they pay: `python -m tests.landscapes`."""

from __future__ import annotations

import pytest

from hybridlab import HybridTrainerConfig
from tests.landscapes import excess


@pytest.mark.parametrize(
    ("landscape", "predictor"), [("saddle", "snoo"), ("saddle", "ema_nesterov"), ("change", "dmd")]
)
def test_where_the_landscape_moves_a_run_with_jumps_ends_no_more_than_2_per_cent_above_its_control(
    landscape: str, predictor: str
) -> None:
    """They ended 12, 5 and 17 per cent above it where jumps were tried around the mean of the path alone."""
    above, _, jumps = excess(landscape, 0, HybridTrainerConfig(predictor=predictor))
    assert jumps > 0
    assert above <= 0.02


@pytest.mark.parametrize(("landscape", "predictor", "gain"), [("valley", "snoo", 0.05), ("valley", "river", 0.5)])
def test_where_the_path_is_steady_jumps_still_pay(landscape: str, predictor: str, gain: float) -> None:
    above, predicted_steps, _ = excess(landscape, 0, HybridTrainerConfig(predictor=predictor))
    assert predicted_steps >= 400
    assert above <= -gain
