"""A prediction under trial, and an accepted one on its way."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from hybridlab.engine.gate import LENGTHS, Decision, judge
from hybridlab.predictors import Proposal
from hybridlab.weights.gram import Coefficients


@dataclass
class Trial:
    """A proposal that the gate is trying, one fresh batch a step, while training goes on.

    horizon: nominal steps that the whole proposal stands for
    to_mean: motion from the current weights to the mean of the path, where the trial takes place: judged between
        averaged points, mere averaging is not taken for progress
    losses: from length to the losses measured so far, left on the device
    slopes: of the loss along the jump, a tensor [group] a gradient step
    """

    proposal: Proposal
    horizon: float
    to_mean: Coefficients
    losses: dict[float, list[Tensor]] = field(default_factory=lambda: {length: [] for length in LENGTHS})
    slopes: list[Tensor] = field(default_factory=list)

    @property
    def batches(self) -> int:
        """Fresh batches tried so far."""
        return len(self.losses[0.0])

    @property
    def forwards(self) -> int:
        """Forward passes spent so far."""
        return self.batches * len(self.losses)

    def at(self, length: float) -> Coefficients:
        """The motion from the current weights to where a length is tried."""
        return self.to_mean + length * self.proposal.coefficients

    def decide(self) -> Decision:
        """What the losses say; waits for the device."""
        return judge({length: torch.stack(losses).tolist() for length, losses in self.losses.items()})

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors."""
        return _plain(self)

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> Self:
        """The trial that `state_dict` described, its measurements on `device`."""
        trial = cls(**_restored(state))
        trial.losses = {length: _moved(losses, device) for length, losses in trial.losses.items()}
        trial.slopes = _moved(trial.slopes, device)
        return trial


@dataclass
class Jump:
    """An accepted proposal.

    horizon: nominal steps that its coefficients stand for; length: how many of them it replaces
    loss_before: expected at its start; loss_change: over its whole length, measured by the gate or forecast; in nats
    worth_per_step: gradient steps that each nominal step of it is worth, by its measured change of the loss
    slopes_before: mean slope of the loss along it before it began, [group], in nats a horizon
    taken: nominal steps that have passed; share: of the coming chunks that is really taken, cut by micro-corrections
    moved: horizons moved so far; slopes_after: a tensor [group] a step of Correct
    """

    proposal: Proposal
    horizon: float
    length: int
    loss_before: float
    loss_change: float
    worth_per_step: float
    slopes_before: Tensor
    taken: int = 0
    share: float = 1.0
    moved: float = 0.0
    loss_error: float = 0.0
    slopes_after: list[Tensor] = field(default_factory=list)

    @property
    def predicted_loss(self) -> float:
        """Straight line over its length, at the steps taken so far."""
        return self.loss_before + self.loss_change * self.taken / self.length

    @property
    def is_over(self) -> bool:
        """Whether all its steps have passed."""
        return self.taken >= self.length

    def is_settled(self, interval: int) -> bool:
        """Whether the last of several motions is made, or being made; a jump of one chunk ends where it is made."""
        return interval < self.length <= -(-self.taken // interval) * interval

    def next_chunk(self, interval: int) -> float:
        """Horizons to move for the chunk that begins now."""
        chunk = self.share * min(interval, self.length - self.taken) / self.horizon
        self.moved += chunk
        return chunk

    def slopes_per_move(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean slopes before and after, [group] each, in nats per the way that was really moved."""
        after = torch.stack(self.slopes_after).mean(dim=0)
        return self.slopes_before.cpu().numpy() * self.moved, after.cpu().numpy() * self.moved

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors."""
        return _plain(self)

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> Self:
        """The jump that `state_dict` described, its measurements on `device`."""
        jump = cls(**_restored(state))
        jump.slopes_after = _moved(jump.slopes_after, device)
        return jump


def _plain(record: Trial | Jump | Proposal) -> dict[str, Any]:
    """A record's fields with arrays as tensors and nested records as dictionaries."""
    return {field.name: _plain_value(getattr(record, field.name)) for field in fields(record)}


def _plain_value(value: Any) -> Any:
    if isinstance(value, Proposal):
        return _plain(value)
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def _restored(state: dict[str, Any]) -> dict[str, Any]:
    proposal = state["proposal"]
    restored = state | {"proposal": Proposal(**proposal | {"coefficients": proposal["coefficients"].cpu().numpy()})}
    return restored | ({"to_mean": state["to_mean"].cpu().numpy()} if "to_mean" in state else {})


def _moved(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    return [tensor.to(device) for tensor in tensors]
