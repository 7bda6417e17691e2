"""The four phases of hybrid predictive training, and the one function that moves between them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hybridlab.engine.config import HybridTrainerConfig


class Phase(StrEnum):
    """What a nominal step does.

    `WARMUP` and `FULL` take gradient steps; `PREDICT` moves the weights by prediction, without a backward
    pass; `CORRECT` takes the few gradient steps that follow a prediction.
    """

    WARMUP = "warmup"
    FULL = "full"
    PREDICT = "predict"
    CORRECT = "correct"


@dataclass(frozen=True)
class PhaseInput:
    """What the next phase depends on, after a step.

    phase: the phase of the step just taken
    steps_in_phase: nominal steps taken in it so far
    jump_accepted: a proposal was accepted at this step
    jump_ended: all its steps have passed, or it was cut short
    diverged: training had gone wrong at this step
    """

    phase: Phase
    steps_in_phase: int
    jump_accepted: bool = False
    jump_ended: bool = False
    diverged: bool = False


def first_phase(config: HybridTrainerConfig) -> Phase:
    """The phase of the first step: Full where there is no warmup."""
    return Phase.WARMUP if config.warmup_steps else Phase.FULL


def next_phase(after: PhaseInput, config: HybridTrainerConfig) -> Phase:
    """The phase of the next step: Warmup -> Full -> Predict -> Correct -> Full -> ...

    Full goes on until a jump is accepted, and a divergence leads back to Full from everywhere but Warmup.
    """
    match after.phase:
        case Phase.WARMUP:
            return Phase.FULL if after.steps_in_phase >= config.warmup_steps else Phase.WARMUP
        case _ if after.diverged:
            return Phase.FULL
        case Phase.FULL:
            return Phase.PREDICT if after.jump_accepted else Phase.FULL
        case Phase.PREDICT if not after.jump_ended:
            return Phase.PREDICT
        case Phase.PREDICT:
            return Phase.CORRECT if config.correct_steps else Phase.FULL
        case Phase.CORRECT:
            return Phase.FULL if after.steps_in_phase >= config.correct_steps else Phase.CORRECT


def may_propose(confidence: float, config: HybridTrainerConfig) -> bool:
    """Whether the path is steady enough to propose a jump; confidence in [0, 1]."""
    return config.max_predict_steps > 0 and confidence >= config.confidence_threshold
