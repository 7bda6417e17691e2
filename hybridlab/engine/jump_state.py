"""A jump under trial, and an accepted one."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from hybridlab.engine.gate import LENGTHS, SAME, GateResult, best_length
from hybridlab.predictors import Proposal
from hybridlab.weights.gram import Coefficients

Slopes = Float64[Tensor, " group"]
"""Slope of the loss along a jump, per parameter group, in nats per horizon."""


@dataclass
class _Record:
    """A proposal and what was measured along it.

    proposal: the jump, scaled by what earlier jumps have taught; horizon: nominal steps that the whole of it stands for
    scale: of the proposal, in units of the predictor's own
    """

    proposal: Proposal
    horizon: float
    scale: float

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors."""
        return asdict(self, dict_factory=_plain)

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> Self:
        """The record that `state_dict` described, its measurements on `device`."""
        return cls(**{name: _restored(name, value, device) for name, value in state.items()})


@dataclass
class Trial(_Record):
    """A proposal that the gate is trying, one fresh batch per step, while training goes on.

    to_mean: [group, row], motion from the current weights to the mean of the path
    losses: one tensor [motion] per batch, in nats, on the device; slopes: one per gradient step
    repeated: two losses of one batch at the same weights, where the closure was put to the test
    """

    to_mean: Coefficients
    losses: list[Float[Tensor, " motion"]] = field(default_factory=list)
    slopes: list[Slopes] = field(default_factory=list)
    repeated: list[Float[Tensor, " call"]] = field(default_factory=list)

    @property
    def motions(self) -> list[Coefficients]:
        """From the current weights to where losses are compared, [group, row] each: every length, and twice the mean.

        The lengths count from the current weights, where the jump will begin. A jump that leads back to the mean of the
        path lowers a noisy loss by averaging alone, and that is no progress: so the whole jump is tried from there too.
        The mean itself lags behind on a path that goes somewhere, and is no place to measure a length from.
        """
        jump = self.proposal.coefficients
        return [*(length * jump for length in LENGTHS), self.to_mean, self.to_mean + jump]

    def result(self, price: float) -> GateResult:
        """The best length, if the jump is progress; price: of a predicted step, in nats. Waits for the device."""
        *along, mean, beyond = torch.stack(self.losses, dim=1).tolist()
        found = best_length(dict(zip(LENGTHS, along, strict=True)), price * self.horizon)
        is_progress = best_length({0.0: mean, 1.0: beyond}).accepted
        return found if is_progress else replace(found, length=0.0)

    def differs_when_repeated(self) -> bool:
        """Whether one batch had two losses at the same weights, further apart than rounding explains; waits."""
        pairs = [pair.tolist() for pair in self.repeated]
        return any(abs(a - b) > SAME * max(abs(a), abs(b)) for a, b in pairs)


@dataclass
class Jump(_Record):
    """An accepted proposal.

    length: nominal steps that it replaces
    loss_before: expected at its start; loss_change: over its whole length, measured by the gate or forecast; in nats
    equivalent_steps_per_step: gradient steps that each of its nominal steps is worth
    slopes_before: mean slope before it began
    taken: nominal steps that have passed; chunks: for which the weights have moved
    share: of each coming chunk that is taken, halved by each shortening
    moved: horizons moved so far; loss_error: measured minus predicted loss at the latest measurement, in nats
    slopes_after: one per step of Correct
    """

    length: int
    loss_before: float
    loss_change: float
    equivalent_steps_per_step: float
    slopes_before: Slopes
    taken: int = 0
    chunks: int = 0
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
        """Horizons to move for the chunk that begins now; 0 inside a chunk."""
        begins = self.taken >= self.chunks * interval
        return self.share * min(interval, self.length - self.taken) / self.horizon if begins else 0.0

    def count_chunk(self, chunk: float) -> None:
        """The weights have moved."""
        self.moved += chunk
        self.chunks += 1

    def slopes_per_move(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean slopes before and after, float64 [group] each, in nats per distance that was really moved."""
        after = torch.stack(self.slopes_after).mean(dim=0)
        return self.slopes_before.cpu().numpy() * self.moved, after.cpu().numpy() * self.moved


def _plain(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in items}


def _restored(name: str, value: Any, device: torch.device) -> Any:
    if name == "proposal":
        return Proposal(**{field: _restored(field, part, device) for field, part in value.items()})
    if name in ("coefficients", "to_mean"):
        return value.cpu().numpy()
    return [tensor.to(device) for tensor in value] if isinstance(value, list) else value
