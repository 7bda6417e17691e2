"""A recurrent state-space model of a few signals, trained while they come in: which `rssm` forecasts with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Float32
from torch import Tensor, nn

MEMBERS, HIDDEN, LATENT = 3, 16, 4
WINDOW_STEPS = 16
"""Steps through which a gradient runs back, and over which the state is filtered before a forecast."""
WINDOWS_PER_FIT = 16
LEARNING_RATE = 2e-2
MAX_GRADIENT_NORM = 1.0
MIN_DEVIATION = 0.1
"""Of a decoded signal, in its own standard deviations: a signal that never moves must not be worth endless nats."""

Gaussian = tuple[Tensor, Tensor]
"""Mean and standard deviation, alike in shape."""


class _Linear(nn.Module):
    """One affine map per member, all in one product: y[m] = x[m] W[m] + b[m]."""

    def __init__(self, inputs: int, outputs: int, generator: torch.Generator) -> None:
        super().__init__()
        weight = torch.randn(MEMBERS, inputs, outputs, generator=generator, dtype=torch.float32, device="cpu")
        self.weight = nn.Parameter(weight * inputs**-0.5)
        self.bias = nn.Parameter(torch.zeros(MEMBERS, 1, outputs, dtype=torch.float32, device="cpu"))

    def forward(self, x: Float[Tensor, "member row inputs"]) -> Float[Tensor, "member row outputs"]:
        return torch.baddbmm(self.bias, x, self.weight)


class StateSpace(nn.Module):
    """An ensemble of recurrent state-space models, all members side by side.

        h[t] = GRU(h[t-1], z[t-1])                            h[0] = 0, z[0] = 0
        prior      z[t] ~ p(z | h[t])       = N(mu_p, sigma_p^2)
        posterior  z[t] ~ q(z | h[t], x[t]) = N(mu_q, sigma_q^2)
        decoder    x[t] ~ p(x | h[t], z[t]) = N(mu_x, s^2)

    x: the signals, of about unit variance; h: the recurrent state, HIDDEN numbers
    z: the stochastic latent, LATENT numbers, sampled as mu + sigma times noise; s: learned, by member and signal

    All means and sigmas are affine in what they depend on, sigma under a sigmoid. A signal reaches h through z alone,
    so that the prior can continue without any.

    Source: Hafner et al. 2019 (arXiv 1811.04551).
    """

    def __init__(self, signals: int, generator: torch.Generator) -> None:
        super().__init__()
        self._gates = _Linear(LATENT + HIDDEN, 4 * HIDDEN, generator)
        self._prior = _Linear(HIDDEN, 2 * LATENT, generator)
        self._posterior = _Linear(HIDDEN + signals, 2 * LATENT, generator)
        self._decoder = _Linear(HIDDEN + LATENT, signals, generator)
        self._raw_s = nn.Parameter(torch.zeros(MEMBERS, 1, signals, dtype=torch.float32, device="cpu"))

    def loss(
        self, x: Float[Tensor, "time member row signal"], noise: Float[Tensor, "time member row latent"]
    ) -> Float[Tensor, ""]:
        """The negative evidence bound: mean over windows and steps of KL(q || p) - log p(x | h, z), less a constant."""
        h, z, (mean_q, sigma_q) = self.filter(x, noise)
        mean_p, sigma_p = _gaussian(_at_all_times(self._prior, h))
        ratio, distance = sigma_q / sigma_p, (mean_q - mean_p) / sigma_p
        divergence = 0.5 * (ratio.square() + distance.square() - 1) - ratio.log()
        s = F.softplus(self._raw_s) + MIN_DEVIATION
        error = (x - _at_all_times(self._decoder, torch.cat((h, z), dim=-1))) / s
        surprise = 0.5 * error.square() + s.log()
        return divergence.sum(-1).mean() + surprise.sum(-1).mean()

    def filter(
        self, x: Float[Tensor, "time member row signal"], noise: Float[Tensor, "time member row latent"]
    ) -> tuple[Tensor, Tensor, Gaussian]:
        """States h, latents z and the posteriors of z along observed signals, each [time, member, row, size]."""
        h, z = x.new_zeros(*x.shape[1:3], HIDDEN), x.new_zeros(*x.shape[1:3], LATENT)
        steps = []
        for observed, sampled in zip(x.unbind(), noise.unbind(), strict=True):
            h = self._recur(h, z)
            mean, sigma = _gaussian(self._posterior(torch.cat((h, observed), dim=-1)))
            z = torch.addcmul(mean, sigma, sampled)
            steps.append((h, z, mean, sigma))
        states, latents, means, sigmas = (torch.stack(column) for column in zip(*steps, strict=True))
        return states, latents, (means, sigmas)

    def rollout(
        self, h: Float[Tensor, "member row hidden"], z: Float[Tensor, "member row latent"], noise: Tensor
    ) -> Float[Tensor, "time member row signal"]:
        """Mean signals along sampled futures of the prior; noise: [time, member, row, latent]."""
        signals = []
        for sampled in noise.unbind():
            h = self._recur(h, z)
            z = torch.addcmul(*_gaussian(self._prior(h)), sampled)
            signals.append(self._decoder(torch.cat((h, z), dim=-1)))
        return torch.stack(signals)

    def _recur(self, h: Tensor, z: Tensor) -> Tensor:
        """The GRU, u h + (1 - u) tanh(a + r b): all four affine in (z, h), u and r under a sigmoid."""
        gates, a, b = self._gates(torch.cat((z, h), dim=-1)).split((2 * HIDDEN, HIDDEN, HIDDEN), dim=-1)
        update, reset = gates.sigmoid().chunk(2, dim=-1)
        return torch.lerp(torch.addcmul(a, reset, b).tanh(), h, update)


def _gaussian(numbers: Float[Tensor, "*batch two_latents"]) -> Gaussian:
    mean, raw_sigma = numbers.chunk(2, dim=-1)
    return mean, raw_sigma.sigmoid()


def _at_all_times(layer: nn.Module, x: Float[Tensor, "time member row size"]) -> Tensor:
    """A layer on every step at once."""
    folded = layer(rearrange(x, "time member row size -> member (time row) size"))
    return rearrange(folded, "member (time row) size -> time member row size", time=len(x))


class Dynamics:
    """A `StateSpace` with its Adam and its own source of randomness, in float32 on the CPU.

        weights <- Adam(weights, gradient of the mean loss over windows x[t], ..., x[t + WINDOW_STEPS - 1])

    This is backpropagation through time, truncated to a window: each starts from h = 0. Every member samples windows of
    its own. Nothing here reads or changes torch's global random state, gradient mode or default device.

    signals: how many there are; seed: of the first weights, the windows and the noise
    """

    first_fit_steps = 2 * WINDOW_STEPS

    def __init__(self, signals: int, seed: int = 0) -> None:
        self._seed = seed
        self._generator = torch.Generator("cpu").manual_seed(seed)
        self._model = StateSpace(signals, self._generator)
        self._optimizer = torch.optim.Adam(self._model.parameters(), lr=LEARNING_RATE, fused=True)

    def fit(self, signals: Float[np.ndarray, "time signal"]) -> float:
        """One Adam step on random windows of at least WINDOW_STEPS recorded signals; the loss before it, in nats."""
        parameters = list(self._model.parameters())
        with _own_modes(gradients=True):
            windows = self._windows(_tensor(signals))
            loss = self._model.loss(windows, _noise(windows.shape[:3], self._generator))
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter.grad = gradient
            nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
            self._optimizer.step()
            self._optimizer.zero_grad()
        return loss.item()

    def forecast(
        self, signals: Float[np.ndarray, "time signal"], steps: int, samples: int
    ) -> Float[np.ndarray, "step member sample signal"]:
        """Sampled futures after the recorded signals; the same arguments always give the same noise."""
        generator = torch.Generator("cpu").manual_seed(self._seed)
        with _own_modes(gradients=False):
            latest = _tensor(signals[-WINDOW_STEPS:])
            x = latest[:, None, None].expand(-1, MEMBERS, samples, -1)
            h, z, _ = self._model.filter(x, _noise(x.shape[:3], generator))
            futures = self._model.rollout(h[-1], z[-1], _noise((steps, MEMBERS, samples), generator))
        return futures.numpy()

    def _windows(self, signals: Float32[Tensor, "time signal"]) -> Float32[Tensor, "step member window signal"]:
        places, shape = len(signals) - WINDOW_STEPS + 1, (MEMBERS, WINDOWS_PER_FIT)
        starts = torch.randint(places, shape, generator=self._generator, device="cpu")
        return signals[starts + torch.arange(WINDOW_STEPS, device="cpu")[:, None, None]]

    def state_dict(self) -> dict[str, Any]:
        """Weights, Adam's state and the generator's, as copies."""
        state = {"model": dict(self._model.state_dict()), "optimizer": self._optimizer.state_dict()}
        return deepcopy(state) | {"generator": self._generator.get_state(), "seed": self._seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from where `state_dict` was taken."""
        self._model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(deepcopy(state["optimizer"]))
        self._generator.set_state(state["generator"])
        self._seed = state["seed"]


@contextmanager
def _own_modes(gradients: bool) -> Iterator[None]:
    """Gradients or none, in full precision, whatever mode the caller is in."""
    with torch.inference_mode(False), torch.set_grad_enabled(gradients), torch.autocast("cpu", enabled=False):
        yield


def _tensor(signals: Float[np.ndarray, "time signal"]) -> Float32[Tensor, "time signal"]:
    return torch.tensor(signals, dtype=torch.float32, device="cpu")


def _noise(shape: tuple[int, ...], generator: torch.Generator) -> Float32[Tensor, "*shape latent"]:
    return torch.randn(*shape, LATENT, generator=generator, dtype=torch.float32, device="cpu")
