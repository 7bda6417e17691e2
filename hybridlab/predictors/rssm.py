"""The plan's dynamics model: forecasts the loss from the latest signals, and scales the path's newest stretch by it."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from jaxtyping import Float

from hybridlab.predictors.base import Proposal, Signals, along_newest, path_confidence
from hybridlab.weights.gram import Gram, PathNeeds

SMOOTHING = 0.1
REMEMBERED_STEPS = 256
EARLY_FIT_EVERY_STEPS, FIT_EVERY_STEPS = 8, 16
"""Observations from one fit to the next: while the memory fills, and once it is full."""
SAMPLES = 16
MAX_ROLLOUT_STEPS = 128
"""A forecast further ahead stays where this one ends."""
MAX_DEVIATIONS = 4.0
"""In standard deviations: signals are clipped to it on their way into the model, and out of it."""
MAX_CHANGE = 10.0
"""Of the log loss, over a forecast: enough for anything but an overflow."""
MIN_NOISE = 1e-3
"""Of the log loss: below a thousandth of the loss, members that differ do not disagree."""
SCORED_AHEAD_STEPS = 16
SCORES = 64


@dataclass(frozen=True)
class Forecast:
    """What the ensemble expects of the loss some steps ahead. All in logarithms, so differences are relative.

    log_loss: mean over members and samples; spread: standard deviation between the members' means
    level: the smoothed log loss now; noise: standard deviation of single log losses about it
    """

    log_loss: float
    spread: float
    level: float
    noise: float

    @property
    def loss_change(self) -> float:
        """Expected loss less the smoothed one, in nats."""
        return math.exp(self.level) * math.expm1(self.log_loss - self.level)

    @property
    def agreement(self) -> float:
        """How far the members agree, in [0, 1].

            1 / (1 + spread^2 / (noise^2 + (log_loss - level)^2))

        Members differ only as far as it shows: beside the loss's own noise, and beside the change that they forecast.
        """
        return 1 / (1 + self.spread**2 / (self.noise**2 + (self.log_loss - self.level) ** 2))

    @property
    def fall_probability(self) -> float:
        """Probability that the loss will be lower than now.

            Phi((level - log_loss) / sqrt(spread^2 + noise^2 a / (2 - a)))

        Phi: the normal distribution's; a: SMOOTHING; noise^2 a / (2 - a): the variance of a level smoothed with a
        """
        variance = self.spread**2 + self.noise**2 * SMOOTHING / (2 - SMOOTHING)
        return NormalDist().cdf((self.level - self.log_loss) / math.sqrt(variance))


Pending = tuple[int, list[float]]
"""A forecast that is not due yet: the count of observations at which it is, and three guesses of the log loss then: the
forecast's, and the two persistences, the last log loss and the smoothed one."""


class Rssm:
    """Continues the path's newest stretch, as far as a learned model of the training signals expects the loss to fall.

        theta[t + H] = theta[t] + P (H / k) (theta[t] - theta[t - k])
        confidence   = A path_confidence
        d[t]         = log loss[t] - level[t-1],    level[t] = level[t-1] + a d[t]
        log loss[t + H] ~ level[t] + a (d[t+1] + ... + d[t+H-1]) + d[t+H]

    k: gradient steps that the newest displacement spans; H: the horizon in nominal steps; a: SMOOTHING
    d: together with the log of the gradient norm and the learning rate's share, what `rssm_model.StateSpace` learns and
        forecasts, each in standard deviations of the latest REMEMBERED_STEPS
    P, A: in [0, 1], the forecast's `fall_probability` and its members' `agreement`

    One Adam step every FIT_EVERY_STEPS observations; before the first, the confidence is 0 and P = 1/2. A signal that
    is not finite, or a loss or gradient norm not above 0, is skipped. `skill` measures the forecasts.

    Source: the dynamics model that the plan starts from, with the state space of Hafner et al. 2019 (arXiv 1811.04551).
    """

    def __init__(self, seed: int = 0) -> None:
        from hybridlab.predictors.rssm_model import Dynamics  # torch, which the list of predictors need not wait for

        self._dynamics = Dynamics(signals=3, seed=seed)
        self._signals: deque[list[float]] = deque(maxlen=REMEMBERED_STEPS)
        self._level: float | None = None
        self._count = 0
        self._fits = 0
        self._pending: Pending | None = None
        self._squared_errors: deque[list[float]] = deque(maxlen=SCORES)

    def needs(self, full_steps: int) -> PathNeeds:
        """Four displacements a Full block, as `linear`."""
        return PathNeeds(rows=4, every=math.ceil(full_steps / 4))

    def observe(self, signals: Signals) -> None:
        """Remember one step's signals, score the forecast that is due, and fit the model every so many steps."""
        if not _usable(signals):
            return
        log_loss = math.log(signals.loss)
        self._remember(log_loss, math.log(signals.gradient_norm), float(signals.lr_share))
        if self._pending is not None and self._pending[0] == self._count:
            self._squared_errors.append([(guess - log_loss) ** 2 for guess in self._pending[1]])
            self._pending = None
        every = FIT_EVERY_STEPS if len(self._signals) == REMEMBERED_STEPS else EARLY_FIT_EVERY_STEPS
        if self._count >= self._dynamics.first_fit_steps and self._count % every == 0:
            self._fit(log_loss)

    def _remember(self, log_loss: float, log_gradient_norm: float, lr_share: float) -> None:
        level = log_loss if self._level is None else self._level
        self._signals.append([log_loss - level, log_gradient_norm, lr_share])
        self._level = level + SMOOTHING * (log_loss - level)
        self._count += 1

    def _fit(self, log_loss: float) -> None:
        self._dynamics.fit(self._standardised())
        self._fits += 1
        forecast = self.forecast(SCORED_AHEAD_STEPS) if self._pending is None else None
        if forecast is not None:
            self._pending = (self._count + SCORED_AHEAD_STEPS, [forecast.log_loss, log_loss, forecast.level])

    def forecast(self, steps: float) -> Forecast | None:
        """The loss so many steps ahead, rounded up; None before the model was fitted."""
        if not self._fits or self._level is None or steps <= 0:
            return None
        mean, deviation = self._moments()
        rolled = self._dynamics.forecast(self._standardised(), min(math.ceil(steps), MAX_ROLLOUT_STEPS), SAMPLES)
        d = mean[0] + deviation[0] * np.clip(rolled[..., 0], -MAX_DEVIATIONS, MAX_DEVIATIONS)
        change = np.clip(SMOOTHING * d[:-1].sum(0) + d[-1], -MAX_CHANGE, MAX_CHANGE).mean(-1)
        return Forecast(self._level + float(change.mean()), float(change.std(ddof=1)), self._level, self._noise())

    def propose(self, gram: Gram, horizon: float) -> Proposal:
        """P H / k on the newest displacement, nothing on the others."""
        forecast = self.forecast(horizon)
        coefficients = along_newest(gram, horizon)
        if forecast is None:
            return Proposal(coefficients / 2, confidence=0.0, loss_change=0.0)
        confidence = path_confidence(gram, coefficients) * forecast.agreement
        return Proposal(coefficients * forecast.fall_probability, confidence, forecast.loss_change)

    def skill(self) -> float | None:
        """How much better than persistence the forecasts were, SCORED_AHEAD_STEPS gradient steps ahead.

            1 - MSE(forecast) / min(MSE(last log loss), MSE(smoothed log loss))

        1: perfect; 0: as good as the better of the two persistences; below 0: worse. Over the latest SCORES forecasts
        that came due; None before the first.
        """
        if not self._squared_errors:
            return None
        forecast, last, level = np.mean(self._squared_errors, axis=0)
        return float(1 - forecast / max(min(last, level), np.finfo(float).tiny))

    def _moments(self) -> tuple[Float[np.ndarray, " signal"], Float[np.ndarray, " signal"]]:
        """Mean and standard deviation of the remembered signals."""
        signals = np.array(self._signals)
        return signals.mean(0), np.maximum(signals.std(0), 1e-6)

    def _standardised(self) -> Float[np.ndarray, "time signal"]:
        mean, deviation = self._moments()
        return np.clip((np.array(self._signals) - mean) / deviation, -MAX_DEVIATIONS, MAX_DEVIATIONS)

    def _noise(self) -> float:
        """Standard deviation of d if it is normal, by its median absolute deviation: a sudden change counts little."""
        d = np.array(self._signals)[:, 0]
        return max(MIN_NOISE, 1.4826 * float(np.median(np.abs(d - np.median(d)))))

    def state_dict(self) -> dict[str, Any]:
        """The model with its optimizer, the remembered signals, and the forecasts that are pending or scored."""
        return {
            "dynamics": self._dynamics.state_dict(),
            "signals": [list(signals) for signals in self._signals],
            "level": self._level,
            "count": self._count,
            "fits": self._fits,
            "pending": self._pending,
            "squared_errors": [list(errors) for errors in self._squared_errors],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from where `state_dict` was taken."""
        self._dynamics.load_state_dict(state["dynamics"])
        self._signals = deque(map(list, state["signals"]), maxlen=REMEMBERED_STEPS)
        self._level, self._count, self._fits = state["level"], state["count"], state["fits"]
        self._pending = state["pending"]
        self._squared_errors = deque(map(list, state["squared_errors"]), maxlen=SCORES)


def _usable(signals: Signals) -> bool:
    positive = (signals.loss, signals.gradient_norm)
    return all(math.isfinite(number) and number > 0 for number in positive) and math.isfinite(signals.lr_share)
