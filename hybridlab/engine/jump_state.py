"""A jump under trial, and an accepted one."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from hybridlab.engine.gate import LENGTHS, GateResult, best_length
from hybridlab.predictors import Proposal
from hybridlab.weights.gram import Coefficients

Slopes = Float64[Tensor, " group"]
"""Slope of the loss along a jump, per parameter group, in nats per horizon."""


@dataclass
class Trial:
    """A proposal that the gate is trying, one fresh batch per step, while training goes on.

    proposal: the jump, scaled by what earlier jumps have taught
    horizon: nominal steps that the whole proposal stands for
    to_mean: [group, row], motion from the current weights to the mean of the path. The lengths are compared around
        that mean: averaging lowers a noisy loss by itself, and that is no progress
    losses: for each length the losses measured so far, scalars on the device, in nats
    slopes: one per gradient step so far
    """

    proposal: Proposal
    horizon: float
    to_mean: Coefficients
    losses: dict[float, list[Tensor]] = field(default_factory=lambda: {length: [] for length in LENGTHS})
    slopes: list[Slopes] = field(default_factory=list)

    @property
    def batches(self) -> int:
        """Fresh batches tried so far."""
        return len(self.losses[0.0])

    @property
    def forward_passes(self) -> int:
        """Forward passes spent so far."""
        return self.batches * len(self.losses)

    def motion_to(self, length: float) -> Coefficients:
        """The motion [group, row] from the current weights to where a length is tried."""
        return self.to_mean + length * self.proposal.coefficients

    def result(self) -> GateResult:
        """What the losses say; waits for the device."""
        return best_length({length: torch.stack(losses).tolist() for length, losses in self.losses.items()})

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors."""
        return _plain(self)

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> Self:
        """The trial that `state_dict` described, its measurements on `device`."""
        losses = {length: [loss.to(device) for loss in losses] for length, losses in state["losses"].items()}
        slopes = [slope.to(device) for slope in state["slopes"]]
        mean, proposal = state["to_mean"].cpu().numpy(), _proposal_of(state["proposal"])
        return cls(**state | {"proposal": proposal, "to_mean": mean, "losses": losses, "slopes": slopes})


@dataclass
class Jump:
    """An accepted proposal.

    horizon: nominal steps that its coefficients stand for; length: nominal steps that it replaces
    loss_before: expected at its start; loss_change: over its whole length, measured by the gate or forecast; in nats
    equivalent_steps_per_step: gradient steps that each of its nominal steps is worth
    slopes_before: mean slope before it began
    taken: nominal steps that have passed; share: of each coming chunk that is taken, halved by each shortening
    moved: horizons moved so far; loss_error: measured minus predicted loss at the latest measurement, in nats
    slopes_after: one per step of Correct
    """

    proposal: Proposal
    horizon: float
    length: int
    loss_before: float
    loss_change: float
    equivalent_steps_per_step: float
    slopes_before: Slopes
    taken: int = 0
    share: float = 1.0
    moved: float = 0.0
    loss_error: float = 0.0
    slopes_after: list[Slopes] = field(default_factory=list)

    @property
    def predicted_loss(self) -> float:
        """In nats, at the steps taken so far, on a straight line over its length."""
        return self.loss_before + self.loss_change * self.taken / self.length

    @property
    def is_over(self) -> bool:
        """Whether all its steps have passed."""
        return self.taken >= self.length

    def last_of_several_made(self, interval: int) -> bool:
        """Whether it moves the weights several times, once per `interval` steps, and has made the last motion."""
        return interval < self.length <= -(-self.taken // interval) * interval

    def next_chunk(self, interval: int) -> float:
        """Horizons to move for the chunk that begins now."""
        chunk = self.share * min(interval, self.length - self.taken) / self.horizon
        self.moved += chunk
        return chunk

    def slopes_per_move(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean slopes before and after, float64 [group] each, in nats per distance that was really moved."""
        after = torch.stack(self.slopes_after).mean(dim=0)
        return self.slopes_before.cpu().numpy() * self.moved, after.cpu().numpy() * self.moved

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors."""
        return _plain(self)

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> Self:
        """The jump that `state_dict` described, its measurements on `device`."""
        slopes = [slope.to(device) for slope in state["slopes_after"]]
        return cls(**state | {"proposal": _proposal_of(state["proposal"]), "slopes_after": slopes})


def _plain(record: Trial | Jump) -> dict[str, Any]:
    """The fields, with arrays as tensors and the proposal as a dictionary."""

    def with_tensors(items: list[tuple[str, Any]]) -> dict[str, Any]:
        return {name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in items}

    return asdict(record, dict_factory=with_tensors)


def _proposal_of(state: dict[str, Any]) -> Proposal:
    return Proposal(**state | {"coefficients": state["coefficients"].cpu().numpy()})
