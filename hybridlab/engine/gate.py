"""Decides from measured losses whether a jump is taken and how far, and keeps the cost of trials within a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

LENGTHS = (0.0, 0.5, 1.0)
"""Lengths that are tried, in units of the proposed jump; the others are compared with 0."""

SAME = 1e-3
"""Relative difference up to which two losses count as the same: kernels may round differently each time."""

FORWARD_COST = 1 / 3
"""Of a forward pass, in gradient steps."""

RELIABILITY_BINS = 5
"""Of a reliability table, over predictions from 0 to 1."""

FORGETTING = 0.5
"""Weight of an outcome in the acceptance probability, relative to the one after it; and what is left of the price of
predicted steps after one more outcome."""

PRIOR_WEIGHT = 0.5
"""Of an acceptance probability of 1/2 before any outcome, in outcomes."""


@dataclass(frozen=True)
class GateResult:
    """What a trial found.

    length: to take, in units of the proposal; 0 rejects it
    loss_change: mean change of the loss at the best length tried, paired by batch, in nats
    """

    length: float
    loss_change: float

    @property
    def accepted(self) -> bool:
        """Whether the jump is taken."""
        return self.length > 0


def best_length(losses: Mapping[float, Sequence[float]], price: float = 0.0) -> GateResult:
    """The length with the lowest mean loss, its price included, if that is below zero by two standard errors.

        change[l] = mean_b (loss[l][b] - loss[0][b])        error[l] = std_b(...) / sqrt(batches)
        accepted where change[l] + price l < -2 error[l]

    losses: from length to losses on the same fresh batches, in nats; length 0 among them. A length with a loss that is
    not finite is no candidate. With one batch there is no error estimate, and any decrease is accepted.
    price: what a jump of length 1 has to be better by, in nats
    """
    changes = {length: _paired(losses[length], losses[0.0]) for length in losses if length > 0}
    changes = {length: change for length, change in changes.items() if math.isfinite(change[0])}
    if not changes:
        return GateResult(0.0, math.nan)
    best = min(changes, key=lambda length: changes[length][0] + price * length)
    mean, error = changes[best]
    margin = 2 * error if math.isfinite(error) else 0.0
    return GateResult(best if mean + price * best < -margin else 0.0, mean)


def best_growth(losses: Mapping[str, Sequence[float]], before: Sequence[float]) -> tuple[str | None, dict[str, float]]:
    """The rule with the lowest mean loss, and each rule's change of the loss; no rule where that one raises it too.

        change[r] = mean_b (loss[r][b] - before[b])     error[r] = std_b(...) / sqrt(batches)
        raises the loss where change[r] > 2 error[r], and more than rounding explains

    A growth that costs nothing is taken: the schedule asks for it. losses, before: on the same fresh batches, in nats
    """
    paired = {rule: _paired(after, before) for rule, after in losses.items()}
    changes = {rule: change for rule, (change, _) in paired.items() if math.isfinite(change)}
    best = min(changes, key=lambda rule: changes[rule], default=None)
    if best is None:
        return None, changes
    error, rounding = paired[best][1], SAME * abs(sum(before) / len(before))
    margin = max(2 * error if math.isfinite(error) else 0.0, rounding)
    return (best if changes[best] <= margin else None), changes


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
    """Whether a trial is within the budget, and over what horizon.

        within budget while rejected_passes / 3 <= budget * gradient steps

    budget: share of the training that rejected trials may cost, the latest one excepted: a run whose predictor is
        useless tries ever more rarely, and costs this share and one trial more than a plain run
    max_horizon, horizon: nominal steps, longest and of the next proposal. It grows by half when the whole of it or more
        was accepted, and halves when it was rejected, within [1, max_horizon]
    rejected_passes: forward passes of rejected trials
    price: what a predicted step has to lower the loss by, in nats, because earlier ones were found to raise it
    outcomes: (confidence, accepted) of every proposal, for the reliability table
    """

    budget: float
    max_horizon: int
    horizon: float
    rejected_passes: int = 0
    price: float = 0.0
    outcomes: list[tuple[float, bool]] = field(default_factory=list)

    def within_budget(self, gradient_steps: int) -> bool:
        """Whether rejected trials have cost no more than the budget so far."""
        return self.rejected_passes * FORWARD_COST <= self.budget * gradient_steps

    def record(self, result: GateResult, confidence: float, forward_passes: int) -> None:
        """Take note of how a trial ended, and adapt the horizon."""
        self.outcomes.append((confidence, result.accepted))
        if not result.accepted:
            self.charge(forward_passes)
            self.price *= FORGETTING
            self.halve_horizon()
        elif result.length >= 1:
            self.horizon = min(float(self.max_horizon), 1.5 * self.horizon)

    def charge(self, forward_passes: int) -> None:
        """Count the passes of a trial that led to nothing."""
        self.rejected_passes += forward_passes

    def learn_cost(self, cost: float) -> None:
        """Take note of what an accepted jump cost for certain, in nats per predicted step; below 0 where nothing.

        price <- max(price, cost)       and half the horizon, where it cost something
        price <- FORGETTING price       where it did not, and after each rejection
        """
        if cost > 0:
            self.price = max(self.price, cost)
            self.halve_horizon()
        else:
            self.price *= FORGETTING

    def halve_horizon(self) -> None:
        """Propose half as far next time."""
        self.horizon = max(1.0, 0.5 * self.horizon)

    def set_max_horizon(self, steps: int) -> None:
        """Change the longest horizon. The next one stays within it; one that was the longest stays the longest."""
        was_longest = self.horizon >= self.max_horizon
        self.max_horizon, self.horizon = steps, float(steps) if was_longest else min(self.horizon, float(steps))

    def reliability(self) -> list[dict[str, float]]:
        """Predicted confidence beside the share of proposals accepted, one row per bin that holds any."""
        return _binned(self.outcomes, "confidence")

    @property
    def acceptance_probability(self) -> float:
        """How likely the next proposal is to be accepted, from how the earlier ones of this run ended.

        p = (PRIOR_WEIGHT / 2 + sum_i w_i accepted_i) / (PRIOR_WEIGHT + sum_i w_i)      w_i = FORGETTING ** age_i
        """
        return _acceptance_probability([accepted for _, accepted in self.outcomes])

    def acceptance_reliability(self) -> list[dict[str, float]]:
        """The acceptance probability told before each proposal beside the share accepted, a row per bin in use.

        The first proposal is left out: nothing was known before it.
        """
        accepted = [outcome for _, outcome in self.outcomes]
        told = [(_acceptance_probability(accepted[:i]), accepted[i]) for i in range(1, len(accepted))]
        return _binned(told, "acceptance_probability")

    def state_dict(self) -> dict[str, Any]:
        """The horizon, the costs, the outcomes."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from where `state_dict` was taken."""
        vars(self).update(state | {"outcomes": [tuple(outcome) for outcome in state["outcomes"]]})


def _acceptance_probability(accepted: Sequence[bool]) -> float:
    weights = [FORGETTING**age for age in reversed(range(len(accepted)))]
    taken = sum(weight for weight, outcome in zip(weights, accepted, strict=True) if outcome)
    return (PRIOR_WEIGHT / 2 + taken) / (PRIOR_WEIGHT + sum(weights))


def _binned(outcomes: Sequence[tuple[float, bool]], name: str) -> list[dict[str, float]]:
    """Mean prediction, called `name`, beside the share accepted, for each bin of predictions that holds any."""
    bins: dict[int, list[tuple[float, bool]]] = {}
    for outcome in outcomes:
        bins.setdefault(min(int(outcome[0] * RELIABILITY_BINS), RELIABILITY_BINS - 1), []).append(outcome)
    return [_reliability(bins[i], name) for i in sorted(bins)]


def _reliability(outcomes: Sequence[tuple[float, bool]], name: str) -> dict[str, float]:
    count, (predicted, accepted) = len(outcomes), zip(*outcomes, strict=True)
    return {name: sum(predicted) / count, "accepted_share": sum(accepted) / count, "proposals": count}
