"""Decides from measured losses whether a jump is taken and how far, and learns when asking is worth its cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

LENGTHS = (0.0, 0.5, 1.0, 2.0)
"""Lengths that are tried, in units of the proposed jump; 0 is where the others are measured from."""

FORWARD_COST = 1 / 3
"""Of a forward pass, in gradient steps."""

RELIABILITY_BINS = 5
"""Of the reliability table, over confidences from 0 to 1."""


@dataclass(frozen=True)
class Decision:
    """What the gate found.

    length: to take, in units of the proposal; 0 refuses it
    change: mean change of the loss at the best length tried, paired by batch, in nats
    """

    length: float
    change: float

    @property
    def accepted(self) -> bool:
        """Whether the jump is taken."""
        return self.length > 0


def judge(losses: Mapping[float, Sequence[float]]) -> Decision:
    """The length with the lowest mean loss, if its paired change is below zero by two standard errors.

        change[l] = mean_b (loss[l][b] - loss[0][b])        error[l] = std_b(...) / sqrt(batches)

    losses: from length to losses on the same fresh batches, in nats; length 0 among them. A length with a loss that is
    not finite is no candidate. With one batch there is no error to speak of, and any decrease will do.
    """
    changes = {length: _paired(losses[length], losses[0.0]) for length in losses if length > 0}
    changes = {length: change for length, change in changes.items() if math.isfinite(change[0])}
    if not changes:
        return Decision(0.0, math.nan)
    best = min(changes, key=lambda length: changes[length][0])
    mean, error = changes[best]
    significant = mean < -2 * error if math.isfinite(error) else mean < 0
    return Decision(best if significant else 0.0, mean)


def _paired(after: Sequence[float], before: Sequence[float]) -> tuple[float, float]:
    """Mean difference and its standard error, which is infinite for a single pair."""
    differences = [a - b for a, b in zip(after, before, strict=True)]
    count, mean = len(differences), sum(differences) / len(differences)
    if count < 2:
        return mean, math.inf
    variance = sum((d - mean) ** 2 for d in differences) / (count - 1)
    return mean, math.sqrt(variance / count)


@dataclass
class Gate:
    """When to ask, and over what horizon.

        may ask while forwards wasted / 3 <= budget * gradient steps

    budget: share of the training that refused questions may cost, the latest aside; so a run whose predictor is
        useless asks ever more rarely, and costs this share and one question more than a plain run
    horizon: nominal steps of the next proposal; grows by half when the whole of it or more was accepted, halves when
        it was refused, within [1, longest]
    wasted_forwards: spent on questions that were refused; an accepted one has earned its own
    outcomes: (confidence, accepted) of every proposal, for the reliability table
    """

    budget: float
    longest: int
    horizon: float
    wasted_forwards: int = 0
    outcomes: list[tuple[float, bool]] = field(default_factory=list)

    def may_ask(self, gradient_steps: int) -> bool:
        """Whether refused questions have cost no more than the budget so far."""
        return self.wasted_forwards * FORWARD_COST <= self.budget * gradient_steps

    def learn(self, decision: Decision, confidence: float, forwards: int) -> None:
        """Note how a question ended."""
        self.outcomes.append((confidence, decision.accepted))
        if not decision.accepted:
            self.wasted_forwards += forwards
            self.shorten()
        elif decision.length >= 1:
            self.horizon = min(float(self.longest), 1.5 * self.horizon)

    def shorten(self) -> None:
        """Halve the horizon."""
        self.horizon = max(1.0, 0.5 * self.horizon)

    def reach(self, longest: int) -> None:
        """Change the longest horizon; the next one stays within it, and follows it where it was as long as allowed."""
        at_its_end = self.horizon >= self.longest
        self.longest, self.horizon = longest, float(longest) if at_its_end else min(self.horizon, float(longest))

    def reliability(self) -> list[dict[str, float]]:
        """Predicted confidence against how often the proposal was accepted, a row a bin that holds any."""
        rows, bins = [], RELIABILITY_BINS
        for i in range(bins):
            low, high = i / bins, (i + 1) / bins
            inside = [o for o in self.outcomes if low <= o[0] < high or (i == bins - 1 and o[0] >= high)]
            if inside:
                confidence = sum(c for c, _ in inside) / len(inside)
                accepted = sum(a for _, a in inside) / len(inside)
                rows.append({"confidence": confidence, "accepted_share": accepted, "proposals": len(inside)})
        return rows

    def state_dict(self) -> dict[str, Any]:
        """The horizon, the costs, the outcomes."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        vars(self).update(state | {"outcomes": [tuple(outcome) for outcome in state["outcomes"]]})
