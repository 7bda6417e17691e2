"""What a nominal step reports, and the counts over all of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from hybridlab.engine.phases import Phase


class AsyncScalar:
    """A number that is copied from the device without a wait; reading it waits for that number alone.

    tensor: the same number, a scalar on the device
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()
        self._number = self.tensor.to("cpu", non_blocking=True)
        self._copied = torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None

    @property
    def is_ready(self) -> bool:
        """Whether the number can be read without waiting."""
        return self._copied is None or self._copied.query()

    def __float__(self) -> float:
        if self._copied is not None:
            self._copied.synchronize()
        return float(self._number)


@dataclass(frozen=True)
class StepResult:
    """What one nominal step did.

    nominal_step: its number, from 1
    phase: the phase that it took place in
    predicted_loss: in nats, where the step was predicted; None for gradient steps
    confidence: of the predictor, in [0, 1], where it was asked
    acceptance_probability: that the gate accepts, from its earlier decisions, where a trial was opened
    event: what was decided at this step; None mostly. Of a jump: "proposed", then "accepted" or "rejected". Of the
        divergence monitor, each with its finding behind a colon: "shortened", "left Predict", "rolled back",
        "diverged" (nothing to roll back), or "noted" (outside of a jump). Of a depth schedule: "grown" or
        "not grown yet", and how
    async_loss, async_norm: the measured loss and the gradient norm, perhaps still on the device
    forward_only_passes: forward passes without backward, those of the gate included
    jump_accepted: whether the proposal that was decided at this step was accepted; None where none was
    diverged: whether training had gone wrong; rolled_back: whether a jump, or a growth, was rolled back for it
    depth: blocks that took part; None without a depth schedule; grown: whether blocks joined at this step
    cost: of a gradient step, its floating-point operations over those of one with all blocks, and a third more for each
        pass in which a growth was tried; 0 of a predicted step. NaN with fewer blocks, before
        `HybridTrainer.weigh_blocks_`

    Reading the loss or the norm of a step after the next one has begun does not stall the device.
    """

    nominal_step: int
    phase: Phase
    predicted_loss: float | None = None
    confidence: float | None = None
    acceptance_probability: float | None = None
    event: str | None = None
    async_loss: AsyncScalar | None = None
    async_norm: AsyncScalar | None = None
    forward_only_passes: int = 0
    jump_accepted: bool | None = None
    diverged: bool = False
    rolled_back: bool = False
    depth: int | None = None
    grown: bool = False
    cost: float = 0.0

    @cached_property
    def measured_loss(self) -> float | None:
        """The loss of a forward on this step's batch, in nats; None where none was run."""
        return None if self.async_loss is None else float(self.async_loss)

    @cached_property
    def gradient_norm(self) -> float | None:
        """Norm of the gradient before clipping; None where no backward was run."""
        return None if self.async_norm is None else float(self.async_norm)

    @property
    def loss(self) -> float:
        """The measured loss where there is one, else the predicted one; in nats."""
        loss = self.predicted_loss if self.measured_loss is None else self.measured_loss
        return float("nan") if loss is None else loss

    def __repr__(self) -> str:
        parts = (
            f"step {self.nominal_step}",
            str(self.phase),
            self._measured_in_words(),
            self.predicted_loss is not None and f"predicted loss {self.predicted_loss:.4f}",
            self.confidence is not None and f"confidence {self.confidence:.2f}",
            self.depth is not None and f"depth {self.depth}",
            self.event,
        )
        return f"StepResult({', '.join(part for part in parts if part)})"

    def _measured_in_words(self) -> str:
        """The measured loss, unless the device would have to be waited for."""
        if self.async_loss is None:
            return ""
        return f"measured loss {self.measured_loss:.4f}" if self.async_loss.is_ready else "measured loss under way"


@dataclass
class Statistics:
    """Counts over finished steps; nothing else writes them.

    nominal_steps = gradient_steps + predicted_steps; forward_only_passes counts forwards without backward,
    those of the gate included; cost_in_full_steps adds up what gradient steps cost, where blocks were left out;
    seconds_by_phase is wall time, in seconds.
    """

    nominal_steps: int = 0
    gradient_steps: int = 0
    forward_only_passes: int = 0
    predicted_steps: int = 0
    proposals_accepted: int = 0
    proposals_rejected: int = 0
    rollbacks: int = 0
    divergences: int = 0
    growths: int = 0
    cost_in_full_steps: float = 0.0
    seconds_by_phase: dict[str, float] = field(default_factory=lambda: {str(phase): 0.0 for phase in Phase})

    def count(self, result: StepResult, seconds: float) -> None:
        """Add one finished step, and the wall time that it took."""
        self.nominal_steps += 1
        self.gradient_steps += result.phase is not Phase.PREDICT
        self.predicted_steps += result.phase is Phase.PREDICT
        self.forward_only_passes += result.forward_only_passes
        self.proposals_accepted += result.jump_accepted is True
        self.proposals_rejected += result.jump_accepted is False
        self.divergences += result.diverged
        self.rollbacks += result.rolled_back
        self.growths += result.grown
        self.cost_in_full_steps += result.cost
        self.seconds_by_phase[str(result.phase)] += seconds
