"""What a nominal step says of itself."""

from __future__ import annotations

import pytest
import torch

from hybridlab.engine.phases import Phase
from hybridlab.engine.result import AsyncScalar, StepResult


def test_a_gradient_step_says_its_loss() -> None:
    result = StepResult(
        12, Phase.FULL, async_loss=AsyncScalar(torch.tensor(2.5)), async_norm=AsyncScalar(torch.ones(()))
    )
    assert str(result) == repr(result) == "StepResult(step 12, full, measured loss 2.5000)"


def test_a_predicted_step_says_what_was_predicted_and_decided() -> None:
    result = StepResult(13, Phase.PREDICT, predicted_loss=2.25, confidence=0.0, event="proposed")
    assert repr(result) == "StepResult(step 13, predict, predicted loss 2.2500, confidence 0.00, proposed)"


def test_a_loss_under_way_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AsyncScalar, "is_ready", False)
    monkeypatch.setattr(AsyncScalar, "__float__", lambda _: pytest.fail("waits for the device"))
    result = StepResult(1, Phase.WARMUP, async_loss=AsyncScalar(torch.tensor(2.5)))
    assert repr(result) == "StepResult(step 1, warmup, measured loss under way)"
