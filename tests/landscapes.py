"""Landscapes of the loss on which a predictor may go wrong, and the table of what each predictor makes of each.

    python -m tests.landscapes                                    # all predictors, all landscapes, 8 seeds
    python -m tests.landscapes saddle drift -p snoo -p river      # some of them
    python -m tests.landscapes --preset aggressive --seeds 3

Each number is the loss of a run with jumps over that of a plain run of as many gradient steps, in per cent above it,
with its 95 % interval over the seeds. Both losses are means over a run's last steps, without the noise of batches.

The landscapes of a vector have 64 weights w, Adam with the learning rate that is named, and targets or noise from the
seed; t is the nominal step. `xi` is noise, fresh at each step, from the standard normal distribution.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from hybridlab import HybridTrainer, HybridTrainerConfig
from hybridlab.predictors import PREDICTORS
from hybridlab.study.statistics import Interval

SIZE = 64


@dataclass
class Landscape:
    """One training.

    loss: of a nominal step's batch; expected: the loss at a nominal step without the batch's noise
    lr: of Adam; steps: nominal; window: last steps over which the expected loss is averaged, at every `every`-th of
        them: where the landscape repeats itself, whole periods
    """

    model: nn.Module
    loss: Callable[[int], Tensor]
    expected: Callable[[int], Tensor]
    lr: float
    steps: int = 1000
    window: int = 300
    every: int = 1


class Vector(nn.Module):
    """Nothing but weights."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(start)


def _vector(
    seed: int, expected: Callable[[Tensor, int], Tensor], noise: float, start: float = 2.0, **more: float
) -> Landscape:
    """The expected loss with the gradient noise `noise` xi beside it."""
    more = {"lr": 0.01} | more
    generator = torch.Generator().manual_seed(1000 + seed)
    xi = noise * torch.randn(int(more.get("steps", 1000)), SIZE, generator=generator)
    model = Vector(torch.full((SIZE,), start))
    return Landscape(model, lambda t: expected(model.w, t) + xi[t] @ model.w, lambda t: expected(model.w, t), **more)  # type: ignore[arg-type]


def slope(seed: int) -> Landscape:
    """A slope without end within the run: mean(sqrt(1 + w^2)), w = 5 at first, gradient noise xi / 64, lr 0.001."""
    return _vector(seed, lambda w, t: (1 + w.square()).sqrt().mean(), 1 / SIZE, 5.0, lr=0.001, window=20)


def valley(seed: int) -> Landscape:
    """A river: mean(c w^2) / 2, half of c 1 and half 0.003; gradient noise 0.3 xi / 64, lr 0.002."""
    c = torch.tensor([1.0, 0.003]).repeat(SIZE // 2)
    return _vector(seed, lambda w, t: (c * (w - 4).square()).mean() / 2, 0.3 / SIZE, 0.0, lr=0.002, window=20)


def stationary(seed: int) -> Landscape:
    """Noise about a minimum: mean(w^2) / 2 + 1/2, gradient noise xi / 64, lr 0.01: what a batch of targets xi gives."""
    return _vector(seed, lambda w, t: w.square().mean() / 2 + 0.5, 1 / SIZE)


def ill_conditioned(seed: int) -> Landscape:
    """A quadratic with curvatures c from 1 down to 0.0001: mean(c w^2) / 2, gradient noise 0.01 xi / 64, lr 0.003."""
    c = torch.logspace(0, -4, SIZE)
    return _vector(seed, lambda w, t: (c * w.square()).mean() / 2, 0.01 / SIZE, lr=0.003, window=20)


def saddle(seed: int, turn: int = 1000, noise: float = 0.3, lr: float = 0.01) -> Landscape:
    """A rotating saddle: mean(x^2 - y^2 + (x^2 + y^2)^2 / 2) + 1 over 32 planes, noise 0.3 xi / 64, lr 0.01.

    x, y: a plane's weights a, b in axes that turn once in `turn` steps, each plane's from an angle of its own: so
    x^2 - y^2 = (a^2 - b^2) cos(2 angle) + 2 a b sin(2 angle)
    """
    first = torch.rand(SIZE // 2, generator=torch.Generator().manual_seed(seed))
    angles = 2 * math.pi * (first + torch.arange(1000)[:, None] / turn)
    cos, sin = (2 * angles).cos(), (2 * angles).sin()

    def expected(w: Tensor, t: int) -> Tensor:
        a, b = w.view(2, -1)
        radius = a.square() + b.square()
        return ((a.square() - b.square()) * cos[t] + 2 * a * b * sin[t] + radius.square() / 2).mean() + 1

    return _vector(seed, expected, noise / SIZE, 1.0, lr=lr, window=400)


def fast_saddle(seed: int) -> Landscape:
    """The rotating saddle, turning once in 400 steps; noise 0.1 xi / 64, lr 0.03."""
    return saddle(seed, turn=400, noise=0.1, lr=0.03)


def drift(seed: int) -> Landscape:
    """A minimum that moves by 0.005 per step and turns back every 200 steps; noise xi / 64, lr 0.01.

    mean((w - m[t])^2) / 2 + 1/2        m[t] = 0.005 |(t + 25 seed) mod 400 - 200|
    """
    return _vector(
        seed, lambda w, t: (w - 0.005 * abs((t + 25 * seed) % 400 - 200)).square().mean() / 2 + 0.5, 1 / SIZE
    )


def change(seed: int) -> Landscape:
    """A minimum that changes sides every 150 steps; noise 0.3 xi / 64, lr 0.02.

    mean((w - m[t])^2) / 2 + 1/2        m[t] = (-1)^floor((t + 19 seed) / 150)
    """
    return _vector(
        seed, lambda w, t: (w - (-1) ** ((t + 19 * seed) // 150)).square().mean() / 2 + 0.5, 0.3 / SIZE, lr=0.02
    )


def heavy_tails(seed: int) -> Landscape:
    """Noise of Student's t with 1.5 degrees of freedom, tau / 64: mean(w^2) / 2 + 1/2, w = 2 at first, lr 0.01."""
    tau = np.random.default_rng(seed).standard_t(1.5, (1000, SIZE)) / SIZE
    tail = torch.tensor(tau, dtype=torch.float32)
    model = Vector(torch.full((SIZE,), 2.0))

    def expected(t: int) -> Tensor:
        return model.w.square().mean() / 2 + 0.5

    return Landscape(model, lambda t: expected(t) + tail[t] @ model.w, expected, lr=0.01)


class Recurrent(nn.Module):
    """An LSTM of 24 units over tokens of 16 kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm, self.head = nn.Embedding(16, 16), nn.LSTM(16, 24, batch_first=True), nn.Linear(24, 16)

    def forward(self, tokens: Tensor) -> Tensor:
        logits = self.head(self.lstm(self.embed(tokens[:, :-1]))[0])
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def _walk(rows: int, length: int, generator: torch.Generator) -> Tensor:
    """Tokens: each the sum modulo 16 of the one and of the third before it, one in ten replaced by chance."""
    tokens = torch.randint(16, (rows, length), generator=generator)
    for i in range(3, length):
        kept = torch.rand(rows, generator=generator) > 0.1
        tokens[:, i] = torch.where(kept, (tokens[:, i - 1] + tokens[:, i - 3]) % 16, tokens[:, i])
    return tokens


def lstm(seed: int) -> Landscape:
    """A small LSTM on sums modulo 16 (`_walk`), 16 rows of 12 tokens a batch, lr 0.01; the loss of 256 other rows."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model, text, held_out = Recurrent(), _walk(800 * 16, 12, generator).view(800, 16, 12), _walk(256, 12, generator)
    return Landscape(model, lambda t: model(text[t]), lambda t: model(held_out), 0.01, 800, window=30, every=10)


@cache
def _digits() -> tuple[Tensor, Tensor]:
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    return torch.tensor(pixels[order], dtype=torch.float32) / 16, torch.tensor(labels[order])


def batchnorm(seed: int) -> Landscape:
    """A 64-32-32-10 net with BatchNorm on 1,000 of scikit-learn's digits, 32 a batch, lr 0.002; the loss of all."""
    torch.manual_seed(seed)
    layers = [nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(32, 10))
    pixels, labels = (part[:1000] for part in _digits())
    picks = torch.randint(1000, (600, 32), generator=torch.Generator().manual_seed(seed))

    def expected(t: int) -> Tensor:
        model.eval()
        loss = F.cross_entropy(model(pixels), labels)
        model.train()
        return loss

    return Landscape(
        model, lambda t: F.cross_entropy(model(pixels[picks[t]]), labels[picks[t]]), expected, 0.002, 600, 30, 10
    )


GAINING = (slope, valley, ill_conditioned, heavy_tails)
"""A steady path: here predictions pay."""

MOVING = (saddle, fast_saddle, drift, change)
"""What was right at the last step is wrong some steps later."""

LANDSCAPES: dict[str, Callable[[int], Landscape]] = {
    build.__name__: build for build in (*GAINING, stationary, *MOVING, lstm, batchnorm)
}


# --- runs ------------------------------------------------------------------------------------------------


def train(name: str, seed: int, config: HybridTrainerConfig) -> tuple[HybridTrainer, list[float]]:
    """One run, and the expected loss after each of its steps; NaN where it was not looked at."""
    landscape = LANDSCAPES[name](seed)
    optimizer = torch.optim.Adam(landscape.model.parameters(), lr=landscape.lr, fused=True)
    trainer, losses = HybridTrainer(landscape.model, optimizer, config), []
    first = 0 if config.max_predict_steps == 0 else landscape.steps - landscape.window
    for step in range(landscape.steps):
        trainer.step(lambda step=step: landscape.loss(step))  # type: ignore[misc]
        with torch.no_grad():
            looks = step >= first and step % landscape.every == 0
            losses.append(float(landscape.expected(step)) if looks else math.nan)
    return trainer, losses


@cache
def _plain(name: str, seed: int) -> list[float]:
    return train(name, seed, HybridTrainerConfig.plain())[1]


def excess(name: str, seed: int, config: HybridTrainerConfig) -> tuple[float, int, int]:
    """How much higher a run ends than a plain one of as many gradient steps, as a share; its predicted steps; jumps."""
    window = LANDSCAPES[name](seed).window
    trainer, losses = train(name, seed, config)
    counts = trainer.statistics()
    control = _plain(name, seed)[: counts.gradient_steps]
    ratio = float(np.nanmean(losses[-window:]) / np.nanmean(control[-window:]))
    return ratio - 1, counts.predicted_steps, counts.proposals_accepted


def _row(task: tuple[str, int, tuple[HybridTrainerConfig, ...]]) -> list[tuple[float, int, int]]:
    torch.set_num_threads(1)
    name, seed, configs = task
    return [excess(name, seed, config) for config in configs]


def table(names: Sequence[str], configs: Sequence[HybridTrainerConfig], seeds: int, workers: int = 2) -> Iterator[str]:
    """One line for each landscape and predictor."""
    with ProcessPoolExecutor(workers) as pool:
        tasks = [(name, seed, tuple(configs)) for name in names for seed in range(seeds)]
        found = pool.map(_row, tasks)
        for name in names:
            rows = [next(found) for _ in range(seeds)]
            for i, config in enumerate(configs):
                interval = Interval.of([100 * row[i][0] for row in rows])
                predicted, jumps = (sum(row[i][k] for row in rows) / seeds for k in (1, 2))
                mark = "  <-- above 2 %" if interval.mean > 2 else ""
                yield (
                    f"{name:16}{config.predictor:14}{interval.mean:+8.2f} % [{interval.low:+7.2f}, "
                    f"{interval.high:+7.2f}]{predicted:8.0f} predicted{jumps:6.1f} jumps{mark}"
                )


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description="What predictors under default guards cost or gain on each landscape.")
    parser.add_argument(
        "landscapes", nargs="*", default=list(LANDSCAPES), metavar="landscape", help=", ".join(LANDSCAPES)
    )
    parser.add_argument("-p", "--predictor", action="append", choices=list(PREDICTORS))
    parser.add_argument("--preset", default="conservative", choices=["conservative", "aggressive"])
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    preset = getattr(HybridTrainerConfig, args.preset)
    configs = [preset(predictor=name) for name in args.predictor or list(PREDICTORS)]
    for line in table(args.landscapes, configs, args.seeds, args.workers):
        print(line, flush=True)


if __name__ == "__main__":
    main()
