"""The phases' order, as a pure function."""

from __future__ import annotations

import pytest

from hybridlab import HybridTrainerConfig, Phase
from hybridlab.engine.phases import PhaseInput, first_phase, may_propose, next_phase

CONFIG = HybridTrainerConfig(warmup_steps=10, full_steps=5, max_predict_steps=8, correct_steps=2)


@pytest.mark.parametrize(
    ("after", "following"),
    [
        (PhaseInput(Phase.WARMUP, 9), Phase.WARMUP),
        (PhaseInput(Phase.WARMUP, 10), Phase.FULL),
        (PhaseInput(Phase.WARMUP, 3, diverged=True), Phase.WARMUP),
        (PhaseInput(Phase.FULL, 4), Phase.FULL),
        (PhaseInput(Phase.FULL, 5, jump_accepted=True), Phase.PREDICT),
        (PhaseInput(Phase.FULL, 5, jump_accepted=True, diverged=True), Phase.FULL),
        (PhaseInput(Phase.PREDICT, 3), Phase.PREDICT),
        (PhaseInput(Phase.PREDICT, 8, jump_ended=True), Phase.CORRECT),
        (PhaseInput(Phase.PREDICT, 3, diverged=True), Phase.FULL),
        (PhaseInput(Phase.CORRECT, 1), Phase.CORRECT),
        (PhaseInput(Phase.CORRECT, 2), Phase.FULL),
    ],
)
def test_next_phase(after: PhaseInput, following: Phase) -> None:
    assert next_phase(after, CONFIG) is following


def test_without_warmup_the_first_phase_is_full() -> None:
    assert first_phase(CONFIG) is Phase.WARMUP
    assert first_phase(HybridTrainerConfig(warmup_steps=0)) is Phase.FULL


def test_without_correction_steps_predict_leads_to_full() -> None:
    config = HybridTrainerConfig(correct_steps=0)
    assert next_phase(PhaseInput(Phase.PREDICT, 8, jump_ended=True), config) is Phase.FULL


def test_a_proposal_needs_confidence_and_steps_to_predict() -> None:
    assert may_propose(0.60, CONFIG)
    assert not may_propose(0.59, CONFIG)
    assert not may_propose(1.0, HybridTrainerConfig.plain())


def test_presets_are_the_plan_s() -> None:
    conservative, aggressive = HybridTrainerConfig.conservative(), HybridTrainerConfig.aggressive()
    settings = ("confidence_threshold", "max_predict_steps", "correction_interval")
    assert [getattr(conservative, name) for name in settings] == [0.60, 50, 15]
    assert [getattr(aggressive, name) for name in settings] == [0.55, 75, 10]


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"full_steps": 0}, ValueError, "full_steps is 0: it must be at least 1"),
        ({"confidence_threshold": 1.5}, ValueError, "at least 0 and at most 1"),
        ({"clip_norm": "1e-4"}, TypeError, "write 1.0e-4"),
        ({"max_predict_steps": True}, TypeError, "int is wanted"),
        ({"predictor": "liner"}, ValueError, "did you mean 'linear'"),
        ({"divergence_threshold": 0.0}, ValueError, "above 0"),
    ],
)
def test_nonsense_is_refused_with_the_fix(settings: dict[str, object], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        HybridTrainerConfig(**settings)  # type: ignore[arg-type]
