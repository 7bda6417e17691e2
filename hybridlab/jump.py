"""An accepted prediction, on its way from the first of its steps to the last."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from hybridlab.predictors import Proposal


@dataclass
class Jump:
    """An accepted proposal on its way.

    length: nominal steps that it replaces; taken: how many of them have passed
    loss_before, loss_after: measured (gate) or forecast (no gate) at its two ends, in nats
    """

    proposal: Proposal
    horizon: int
    length: int
    loss_before: float
    loss_after: float
    taken: int = 0

    @property
    def predicted_loss(self) -> float:
        """Straight line between the two ends, at the steps taken so far."""
        return self.loss_before + (self.loss_after - self.loss_before) * self.taken / self.length

    @property
    def is_over(self) -> bool:
        """Whether all its steps have passed."""
        return self.taken >= self.length

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and a tensor."""
        return asdict(self) | {
            "proposal": asdict(self.proposal) | {"coefficients": torch.from_numpy(self.proposal.coefficients)}
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Jump:
        """The jump that `state_dict` described."""
        proposal = state["proposal"]
        return cls(**state | {"proposal": Proposal(**proposal | {"coefficients": proposal["coefficients"].numpy()})})
