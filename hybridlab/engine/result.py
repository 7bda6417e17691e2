"""What a nominal step reports, and the counts that are kept over all of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from hybridlab.engine.phases import Phase


class Reading:
    """A number on its way from the device: who reads it waits for that number alone, not for what was asked for since.

    tensor: the same, on the device
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()
        self._number = self.tensor.to("cpu", non_blocking=True)
        self._is_there = torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None

    @property
    def is_there(self) -> bool:
        """Whether the number can be read without waiting."""
        return self._is_there is None or self._is_there.query()

    def __float__(self) -> float:
        if self._is_there is not None:
            self._is_there.synchronize()
        return float(self._number)


@dataclass(frozen=True)
class StepResult:
    """What one nominal step did.

    nominal_step: its number, from 1
    phase: the phase that it took place in
    predicted_loss: in nats, where the step was predicted; None for gradient steps
    confidence: of the predictor, where it was asked
    event: what was decided at this step; None mostly. Of a jump: "proposed", then "accepted" or "rejected". Of the
        monitor, each with its verdict behind a colon: "shortened", "left Predict", "rolled back", "diverged" (nothing
        to take back), or "noted" (outside of a jump)

    Who reads the loss or the norm of a step after the next one has begun does not stall the device.
    """

    nominal_step: int
    phase: Phase
    predicted_loss: float | None = None
    confidence: float | None = None
    event: str | None = None
    loss_reading: Reading | None = None
    norm_reading: Reading | None = None

    @cached_property
    def measured_loss(self) -> float | None:
        """The loss of a forward on this step's batch, in nats; None where none was run."""
        return None if self.loss_reading is None else float(self.loss_reading)

    @cached_property
    def gradient_norm(self) -> float | None:
        """Norm of the gradient before clipping; None where no backward was run."""
        return None if self.norm_reading is None else float(self.norm_reading)

    @property
    def loss(self) -> float:
        """The measured loss where there is one, else the predicted one."""
        loss = self.predicted_loss if self.measured_loss is None else self.measured_loss
        return float("nan") if loss is None else loss

    def __repr__(self) -> str:
        parts = (
            f"step {self.nominal_step}",
            str(self.phase),
            self._measured_in_words(),
            self.predicted_loss is not None and f"predicted loss {self.predicted_loss:.4f}",
            self.confidence is not None and f"confidence {self.confidence:.2f}",
            self.event,
        )
        return f"StepResult({', '.join(part for part in parts if part)})"

    def _measured_in_words(self) -> str:
        """The measured loss, where it can be said without waiting for the device."""
        if self.loss_reading is None:
            return ""
        return f"measured loss {self.measured_loss:.4f}" if self.loss_reading.is_there else "measured loss under way"


@dataclass
class Statistics:
    """Every count kept apart, and seconds by phase.

    nominal_steps = gradient_steps + predicted_steps; forward_only_passes counts forwards without backward,
    those of the gate included; seconds_by_phase is wall time, in seconds.
    """

    nominal_steps: int = 0
    gradient_steps: int = 0
    forward_only_passes: int = 0
    predicted_steps: int = 0
    proposals_accepted: int = 0
    proposals_rejected: int = 0
    rollbacks: int = 0
    divergences: int = 0
    seconds_by_phase: dict[str, float] = field(default_factory=lambda: {str(phase): 0.0 for phase in Phase})
