"""Notices when training goes wrong, and says how."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Verdict:
    """What is wrong: `reason` in words; `not_finite` when a number is NaN or infinite."""

    reason: str
    not_finite: bool = False


@dataclass
class DivergenceMonitor:
    """Holds each measured loss against the band in which the latest losses lie.

        mean[t]     = (1 - a) mean[t-1] + a loss[t]
        variance[t] = (1 - a) (variance[t-1] + a (loss[t] - mean[t-1])^2)
        diverged    = loss[t] is not finite, or loss[t] > mean[t-1] + threshold sqrt(variance[t-1])

    threshold: standard deviations; a: the smoothing of the exponential averages. The first `settle` losses
    only teach the band, and a loss that diverged does not. Source: West 1979 for the running variance.
    """

    threshold: float
    smoothing: float = 0.05
    settle: int = 20
    mean: float = 0.0
    variance: float = 0.0
    count: int = 0

    def judge(self, loss: float, gradient_norm: float | None = None) -> Verdict | None:
        """The verdict on one measurement; None where it is in order, and then the band learns from it."""
        if not math.isfinite(loss):
            return Verdict(f"the loss is {loss}", not_finite=True)
        if gradient_norm is not None and not math.isfinite(gradient_norm):
            return Verdict(f"the gradient norm is {gradient_norm}", not_finite=True)
        if self.count >= self.settle and loss > self.upper:
            return Verdict(f"the loss {loss:.4g} lies above its band, {self.upper:.4g}")
        self._learn(loss)
        return None

    @property
    def upper(self) -> float:
        """The loss above which the verdict is divergence, in nats."""
        return self.mean + self.threshold * self.deviation

    @property
    def deviation(self) -> float:
        """Standard deviation of the latest losses around their mean, in nats."""
        return math.sqrt(self.variance)

    def _learn(self, loss: float) -> None:
        if self.count == 0:
            self.mean = loss
        error = loss - self.mean
        self.mean += self.smoothing * error
        self.variance = (1 - self.smoothing) * (self.variance + self.smoothing * error * error)
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        """The band."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with a band."""
        vars(self).update(state)
