"""Notices when training goes wrong, says how, and how strongly to answer."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import pairwise
from typing import Any

from hybridlab.base.settings import check_bounds, check_types


class Answer(IntEnum):
    """What a verdict asks for, from mild to grave."""

    SHORTEN = 1
    LEAVE_PREDICT = 2
    ROLL_BACK = 3


@dataclass(frozen=True)
class Verdict:
    """What is wrong.

    kind: "not finite", "loss band", "gradient explosion", "gradient vanishing", "oscillation" or "prediction error"
    reason: in words, with the number and its threshold
    """

    kind: str
    reason: str
    answer: Answer

    def __str__(self) -> str:
        return f"{self.kind}: {self.reason}"


@dataclass(frozen=True)
class Thresholds:
    """When a measurement is out of order.

    band: standard deviations of the loss above its running mean
    explosion, vanishing: gradient norm over its running (geometric) mean
    alternation: share of the latest losses that change sides of their mean; swing: mean size of those departures,
        over the mean loss, from which on that is an oscillation
    prediction_mild, prediction_grave: standard deviations of the loss above its prediction
    """

    band: float = 6.0
    explosion: float = 20.0
    vanishing: float = 1e-3
    alternation: float = 0.9
    swing: float = 0.1
    prediction_mild: float = 1.0
    prediction_grave: float = 2.0

    def __post_init__(self) -> None:
        check_types(self)
        check_bounds(self, "band", "explosion", above=0)
        check_bounds(self, "vanishing", "swing", "prediction_mild", "prediction_grave", least=0)
        check_bounds(self, "alternation", least=0, most=1)


PERSISTENCE = 3
"""Real steps in a row that must be out of order before it is called divergence."""

WINDOW = 16
"""Losses in which an oscillation is looked for."""


@dataclass
class DivergenceMonitor:
    """Holds each measurement against what the latest ones were.

        mean[t]     = (1 - a) mean[t-1] + a loss[t]
        variance[t] = (1 - a) (variance[t-1] + a (loss[t] - mean[t-1])^2)

    and likewise the mean of the gradient norm's logarithm and of the loss's change a step (`slope`). The first `settle`
    measurements only teach; one that is out of order does not. A single batch may be odd, so a loss or a norm of a real
    step counts as divergence when it stays out of order for `PERSISTENCE` steps; inside a jump one is enough. Source:
    West 1979 for the running variance.
    """

    thresholds: Thresholds
    smoothing: float = 0.05
    settle: int = 20
    mean: float = 0.0
    variance: float = 0.0
    slope: float = 0.0
    log_norm: float = 0.0
    count: int = 0
    grave_in_a_row: int = 0
    departures: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))

    @property
    def deviation(self) -> float:
        """Standard deviation of the latest losses around their mean, in nats."""
        return math.sqrt(self.variance)

    def worth_steps(self, loss_change: float, most: float) -> float:
        """Gradient steps in which the loss would have changed as much at its present pace, in [0, most]."""
        if loss_change >= 0:
            return 0.0
        return most if self.slope >= 0 else min(most, loss_change / self.slope)

    def judge(
        self, loss: float, gradient_norm: float | None = None, predicted_loss: float | None = None
    ) -> Verdict | None:
        """The gravest verdict on one measurement; None where all is in order. Learns from what is not grave.

        loss: measured, in nats; gradient_norm: of a gradient step; predicted_loss: of a predicted step
        """
        if verdict := _not_finite(loss, gradient_norm):
            return verdict
        if self.count >= self.settle:
            verdict = self._judge_settled(loss, gradient_norm, predicted_loss)
        if verdict is None or verdict.answer is Answer.SHORTEN:
            self.grave_in_a_row = 0
            self._learn(loss, gradient_norm)
            return verdict
        self.grave_in_a_row += 1
        return verdict if predicted_loss is not None or self.grave_in_a_row >= PERSISTENCE else None

    def _judge_settled(self, loss: float, norm: float | None, predicted: float | None) -> Verdict | None:
        found = [self._loss_band(loss), self._norm(norm), self._prediction(loss, predicted), self._oscillation(loss)]
        return max((v for v in found if v), key=lambda v: v.answer, default=None)

    def _loss_band(self, loss: float) -> Verdict | None:
        upper = self.mean + self.thresholds.band * self.deviation
        reason = f"the loss {loss:.4g} lies above its band, {upper:.4g}"
        return Verdict("loss band", reason, Answer.ROLL_BACK) if loss > upper else None

    def _norm(self, norm: float | None) -> Verdict | None:
        if norm is None:
            return None
        usual, limits = math.exp(self.log_norm), self.thresholds
        if norm > limits.explosion * usual:
            reason = f"the gradient norm {norm:.4g} is over {limits.explosion:g} times its mean, {usual:.4g}"
            return Verdict("gradient explosion", reason, Answer.ROLL_BACK)
        if norm < limits.vanishing * usual:
            reason = f"the gradient norm {norm:.4g} is under {limits.vanishing:g} times its mean, {usual:.4g}"
            return Verdict("gradient vanishing", reason, Answer.LEAVE_PREDICT)
        return None

    def _prediction(self, loss: float, predicted: float | None) -> Verdict | None:
        if predicted is None:
            return None
        deviations = (loss - predicted) / max(self.deviation, 1e-12)
        if deviations <= self.thresholds.prediction_mild:
            return None
        reason = f"the loss {loss:.4g} lies {deviations:.1f} deviations above its prediction, {predicted:.4g}"
        grave = deviations > self.thresholds.prediction_grave
        return Verdict("prediction error", reason, Answer.LEAVE_PREDICT if grave else Answer.SHORTEN)

    def _oscillation(self, loss: float) -> Verdict | None:
        """Losses that jump from one side of their mean to the other, far, time after time."""
        departures = [*self.departures, loss - self.mean][-WINDOW:]
        if len(departures) < WINDOW:
            return None
        turns = sum(a * b < 0 for a, b in pairwise(departures)) / (WINDOW - 1)
        size = sum(map(abs, departures)) / WINDOW
        if turns < self.thresholds.alternation or size < self.thresholds.swing * abs(self.mean):
            return None
        reason = f"{turns:.0%} of the latest losses change sides of their mean, by {size:.3g} nats"
        return Verdict("oscillation", reason, Answer.SHORTEN)

    def _learn(self, loss: float, norm: float | None) -> None:
        if self.count == 0:
            self.mean = loss
            self.log_norm = math.log(max(norm or 1.0, 1e-30))
        error = loss - self.mean
        self.departures.append(error)
        self.mean += self.smoothing * error
        self.slope += self.smoothing * (self.smoothing * error - self.slope)
        self.variance = (1 - self.smoothing) * (self.variance + self.smoothing * error * error)
        if norm is not None:
            self.log_norm += self.smoothing * (math.log(max(norm, 1e-30)) - self.log_norm)
        self.count += 1

    def settle_anew(self) -> None:
        """What was usual is so no more: the next measurements only teach, as the first ones did."""
        self.count = self.grave_in_a_row = 0
        self.departures.clear()

    def state_dict(self) -> dict[str, Any]:
        """What was learned."""
        learned = ("mean", "variance", "slope", "log_norm", "count", "grave_in_a_row")
        return {name: getattr(self, name) for name in learned} | {"departures": list(self.departures)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what was learned."""
        vars(self).update(state | {"departures": deque(state["departures"], maxlen=WINDOW)})


def _not_finite(loss: float, norm: float | None) -> Verdict | None:
    if not math.isfinite(loss):
        return Verdict("not finite", f"the loss is {loss}", Answer.ROLL_BACK)
    if norm is not None and not math.isfinite(norm):
        return Verdict("not finite", f"the gradient norm is {norm}", Answer.ROLL_BACK)
    return None
