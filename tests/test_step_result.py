"""What a nominal step says of itself."""

from __future__ import annotations

import pytest
import torch

from hybridlab.engine.phases import Phase
from hybridlab.engine.result import AsyncScalar, Statistics, StepResult


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


def test_statistics_count_what_finished_steps_say() -> None:
    counts = Statistics()
    counts.count(StepResult(1, Phase.FULL, forward_only_passes=4, jump_accepted=True), seconds=2.0)
    counts.count(StepResult(2, Phase.PREDICT, forward_only_passes=1, diverged=True, rolled_back=True), seconds=1.0)
    counts.count(StepResult(3, Phase.FULL, jump_accepted=False, diverged=True), seconds=0.5)
    assert counts == Statistics(
        nominal_steps=3, gradient_steps=2, forward_only_passes=5, predicted_steps=1, proposals_accepted=1,
        proposals_rejected=1, rollbacks=1, divergences=2,
        seconds_by_phase={"warmup": 0.0, "full": 2.5, "predict": 1.0, "correct": 0.0},
    )  # fmt: skip
