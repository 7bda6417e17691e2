"""The four phases of hybrid predictive training, and the one function that moves between them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol


class Phase(StrEnum):
    """What a nominal step does.

    `WARMUP` and `FULL` take gradient steps; `PREDICT` moves the weights by prediction, without a backward
    pass; `CORRECT` takes the few gradient steps that follow a prediction.
    """

    WARMUP = "warmup"
    FULL = "full"
    PREDICT = "predict"
    CORRECT = "correct"


class PhaseSettings(Protocol):
    """The part of the settings that `next_phase` reads; `HybridTrainerConfig` is one."""

    @property
    def warmup_steps(self) -> int:
        """Gradient steps before the first Full block."""

    @property
    def full_steps(self) -> int:
        """Gradient steps of a Full block."""

    @property
    def max_predict_steps(self) -> int:
        """Nominal steps that a jump may replace; 0 for none."""

    @property
    def correct_steps(self) -> int:
        """Gradient steps after a jump."""

    @property
    def confidence_threshold(self) -> float:
        """Confidence from which on Predict may begin."""


@dataclass(frozen=True)
class Moment:
    """Where the training stands after a step.

    phase: the phase of the step just taken
    steps_in_phase: nominal steps taken in it so far
    jump_accepted: a proposal passed the gate at this step
    jump_ended: the accepted jump is used up, or was cut short
    diverged: the divergence monitor spoke
    """

    phase: Phase
    steps_in_phase: int
    jump_accepted: bool = False
    jump_ended: bool = False
    diverged: bool = False


def first_phase(settings: PhaseSettings) -> Phase:
    """The phase of the first step: Full where there is no warmup."""
    return Phase.WARMUP if settings.warmup_steps else Phase.FULL


def next_phase(moment: Moment, settings: PhaseSettings) -> Phase:
    """The phase of the next step: Warmup -> Full -> Predict -> Correct -> Full -> ...

    Full goes on until a jump is accepted, and a divergence leads back to Full from everywhere but Warmup.
    """
    match moment.phase:
        case Phase.WARMUP:
            return Phase.FULL if moment.steps_in_phase >= settings.warmup_steps else Phase.WARMUP
        case _ if moment.diverged:
            return Phase.FULL
        case Phase.FULL:
            return Phase.PREDICT if moment.jump_accepted else Phase.FULL
        case Phase.PREDICT:
            return _after_jump(settings) if moment.jump_ended else Phase.PREDICT
        case Phase.CORRECT:
            return Phase.FULL if moment.steps_in_phase >= settings.correct_steps else Phase.CORRECT


def may_propose(confidence: float, settings: PhaseSettings) -> bool:
    """Whether the path is steady enough to propose a jump."""
    return settings.max_predict_steps > 0 and confidence >= settings.confidence_threshold


def _after_jump(settings: PhaseSettings) -> Phase:
    return Phase.CORRECT if settings.correct_steps else Phase.FULL
