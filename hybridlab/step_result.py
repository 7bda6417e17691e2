"""What a nominal step reports, and the counts that are kept over all of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from hybridlab.phases import Phase


@dataclass(frozen=True)
class StepResult:
    """What one nominal step did.

    nominal_step: its number, from 1
    phase: the phase that it took place in
    predicted_loss: in nats, where the step was predicted; None for gradient steps
    confidence: of the predictor, where it was asked
    event: "accepted", "rejected", "shortened", "rolled back: ..." or another verdict of the monitor; None mostly

    Losses and norms stay on the device until somebody reads them, so that watching does not stall it.
    """

    nominal_step: int
    phase: Phase
    predicted_loss: float | None = None
    confidence: float | None = None
    event: str | None = None
    loss_tensor: Tensor | None = field(default=None, repr=False)
    norm_tensor: Tensor | None = field(default=None, repr=False)

    @cached_property
    def measured_loss(self) -> float | None:
        """The loss of a forward on this step's batch, in nats; None where none was run."""
        return None if self.loss_tensor is None else float(self.loss_tensor)

    @cached_property
    def gradient_norm(self) -> float | None:
        """Norm of the gradient before clipping; None where no backward was run."""
        return None if self.norm_tensor is None else float(self.norm_tensor)

    @property
    def loss(self) -> float:
        """The measured loss where there is one, else the predicted one."""
        loss = self.predicted_loss if self.measured_loss is None else self.measured_loss
        return float("nan") if loss is None else loss


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
