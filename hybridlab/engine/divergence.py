"""Detects when training goes wrong, and says how and which action that calls for."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import pairwise
from typing import Any


class Action(IntEnum):
    """What is done about a divergence, by severity; STOP: not finite, and no jump to roll back."""

    CONTINUE = 0
    SHORTEN = 1
    END = 2
    ROLL_BACK = 3
    STOP = 4


@dataclass(frozen=True)
class Divergence:
    """What is wrong.

    kind: "not finite", "loss band", "gradient explosion", "gradient vanishing", "oscillation" or "prediction error"
    reason: in words, with the number and its threshold
    action: SHORTEN, END or ROLL_BACK: what it calls for while a jump is under way
    """

    kind: str
    reason: str
    action: Action

    def __str__(self) -> str:
        return f"{self.kind}: {self.reason}"


EXPLOSION, VANISHING = 20.0, 1e-3
"""Gradient norm over its running (geometric) mean, above and below which it is out of order."""

ALTERNATION, SWING = 0.9, 0.1
"""Share of the latest losses that change sides of their mean, and their mean distance from it over the mean loss, from
which on that is an oscillation."""

SHORTEN_ABOVE, END_ABOVE = 1.0, 2.0
"""Standard deviations of the loss above its prediction that shorten a jump, or end it."""

PATIENCE = 3
"""Gradient steps in a row that must be out of order before that counts as divergence."""

WINDOW = 16
"""Losses in which an oscillation is looked for."""


@dataclass
class DivergenceMonitor:
    """Compares each measurement with running averages of the earlier ones.

        mean[t]     = (1 - a) mean[t-1] + a loss[t]
        variance[t] = (1 - a) (variance[t-1] + a (loss[t] - mean[t-1])^2)

    and likewise the mean of the gradient norm's logarithm (`log_norm`) and of the loss's change per step (`slope`). A
    single batch may be odd, so a loss or a norm of a gradient step counts as divergence when it stays out of order for
    `PATIENCE` steps; inside a jump one is enough. What is out of order enters no average, and a norm of 0 (a batch of
    padding) not that of the norm.

    band: standard deviations of the loss above its running mean from which on it is out of order
    smoothing: a; warmup: first measurements, which only enter the averages; count: measurements so far
    alarms: measurements in a row that called for more than SHORTEN
    offsets: the latest WINDOW losses less their mean then, in nats

    Source: West 1979 for the running variance.
    """

    band: float
    smoothing: float = 0.05
    warmup: int = 20
    mean: float = 0.0
    variance: float = 0.0
    slope: float = 0.0
    log_norm: float = 0.0
    count: int = 0
    alarms: int = 0
    offsets: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))

    @property
    def deviation(self) -> float:
        """Standard deviation of the latest losses around their mean, in nats."""
        return math.sqrt(self.variance)

    def equivalent_gradient_steps(self, loss_change: float, most: float) -> float:
        """Gradient steps in which the loss, at its present slope, would have changed as much (nats); in [0, most]."""
        if loss_change >= 0:
            return 0.0
        return most if self.slope >= 0 else min(most, loss_change / self.slope)

    def check(
        self, loss: float, gradient_norm: float | None = None, predicted_loss: float | None = None
    ) -> Divergence | None:
        """The most severe divergence in one measurement; None where all is in order.

        loss: measured, in nats; gradient_norm: of a gradient step; predicted_loss: of a predicted step
        """
        if found := not_finite(loss, gradient_norm):
            return found
        if self.count >= self.warmup:
            found = max(self._divergences(loss, gradient_norm, predicted_loss), key=lambda d: d.action, default=None)
        if found is None or found.action is Action.SHORTEN:
            self.alarms = 0
            self._average(loss, gradient_norm)
            return found
        self.alarms += 1
        return found if predicted_loss is not None or self.alarms >= PATIENCE else None

    def _divergences(self, loss: float, norm: float | None, predicted: float | None) -> Iterator[Divergence]:
        upper = self.mean + self.band * self.deviation
        if loss > upper:
            yield Divergence("loss band", f"the loss {loss:.4g} lies above its band, {upper:.4g}", Action.ROLL_BACK)
        if norm is not None:
            yield from self._of_norm(norm)
        if predicted is not None:
            yield from self._of_prediction(loss, predicted)
        yield from self._oscillation(loss)

    def _of_norm(self, norm: float) -> Iterator[Divergence]:
        usual = math.exp(self.log_norm)
        if norm > EXPLOSION * usual:
            reason = f"the gradient norm {norm:.4g} is over {EXPLOSION:g} times its mean, {usual:.4g}"
            yield Divergence("gradient explosion", reason, Action.ROLL_BACK)
        if norm < VANISHING * usual:
            reason = f"the gradient norm {norm:.4g} is under {VANISHING:g} times its mean, {usual:.4g}"
            yield Divergence("gradient vanishing", reason, Action.END)

    def _of_prediction(self, loss: float, predicted: float) -> Iterator[Divergence]:
        deviations = (loss - predicted) / max(self.deviation, 1e-12)
        if deviations > SHORTEN_ABOVE:
            reason = f"the loss {loss:.4g} lies {deviations:.1f} deviations above its prediction, {predicted:.4g}"
            yield Divergence("prediction error", reason, Action.END if deviations > END_ABOVE else Action.SHORTEN)

    def _oscillation(self, loss: float) -> Iterator[Divergence]:
        """Losses that change sides of their mean at almost every step, by a large distance."""
        offsets = [*self.offsets, loss - self.mean][-WINDOW:]
        turns = sum(a * b < 0 for a, b in pairwise(offsets)) / (WINDOW - 1)
        size = sum(map(abs, offsets)) / WINDOW
        if len(offsets) == WINDOW and turns >= ALTERNATION and size >= SWING * abs(self.mean):
            reason = f"{turns:.0%} of the latest losses change sides of their mean, by {size:.3g} nats"
            yield Divergence("oscillation", reason, Action.SHORTEN)

    def _average(self, loss: float, norm: float | None) -> None:
        if self.count == 0:
            self.mean = loss
            self.log_norm = math.log(norm or 1.0)
        error = loss - self.mean
        self.offsets.append(error)
        self.mean += self.smoothing * error
        self.slope += self.smoothing * (self.smoothing * error - self.slope)
        self.variance = (1 - self.smoothing) * (self.variance + self.smoothing * error * error)
        if norm:
            self.log_norm += self.smoothing * (math.log(norm) - self.log_norm)
        self.count += 1

    def restart_warmup(self) -> None:
        """The next measurements only enter the averages, as the first ones did: the level has changed for good."""
        self.count = self.alarms = 0
        self.offsets.clear()

    def state_dict(self) -> dict[str, Any]:
        """All fields."""
        return vars(self) | {"offsets": list(self.offsets)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with these averages."""
        vars(self).update(state | {"offsets": deque(state["offsets"], maxlen=WINDOW)})


def not_finite(loss: float, norm: float | None) -> Divergence | None:
    """What is wrong with a loss or a gradient norm that is NaN or infinite; None where neither is."""
    if not math.isfinite(loss):
        return Divergence("not finite", f"the loss is {loss}", Action.ROLL_BACK)
    if norm is not None and not math.isfinite(norm):
        cause = ", as gradients or their squares are too large for their number format" if norm == math.inf else ""
        return Divergence("not finite", f"the gradient norm is {norm}{cause}", Action.ROLL_BACK)
    return None
