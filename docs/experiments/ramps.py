"""Short windows, or few of them, at the beginning of a run, alone and with growth, against as much computation.

python docs/experiments/ramps.py trains all arms, each at the best of three rates (a quarter of an hour on one core),
writes the losses and costs of every arm beside this file, and prints the table of docs/experiments.md.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hybridlab import DepthSchedule, HybridTrainerConfig
from hybridlab.data import TokenBatches
from hybridlab.memory import MemoryConfig
from hybridlab.models import GPT2
from hybridlab.optim import OptimizerConfig, Schedule
from hybridlab.study import RunConfig, StudyResult, TextTaskConfig
from hybridlab.study.rates import RateTrials, bracket_rates
from hybridlab.study.statistics import Interval
from hybridlab.study.step_value import SeedRuns, StepValue
from hybridlab.study.study import run_arms, with_rate
from hybridlab.study.tasks import Batch, TextTask

STEPS, BLOCKS, WINDOWS, TOKENS, SEEDS = 240, 6, 8, 64, (0, 1, 2)
"""Of a run, the model, a batch and a window at the end; the rates are found on the first seed."""


@dataclass(frozen=True)
class Ramp(TextTaskConfig):
    """A text whose first batches have so many windows of so many tokens; steps: how many batches that are."""

    windows: int = WINDOWS
    tokens: int = TOKENS
    steps: int = 0

    def build(self, seed: int, device: torch.device, memory: MemoryConfig | None = None) -> TextTask:
        """The model of all steps; held-out windows are whole ones."""
        return RampedText(super().build(seed, device, memory).model, self, seed, device)


class RampedText(TextTask):
    """Other batches at first."""

    def __init__(self, model: torch.nn.Module, config: Ramp, seed: int, device: torch.device) -> None:
        super().__init__(model, config, seed, device)
        size = {"batch_size": config.windows, "block_size": config.tokens}
        self._first = TokenBatches(config.load_text().train, **size, seed=seed, device=device)
        self._steps = config.steps

    def batch(self, step: int) -> Batch:
        """The step's windows, and the tokens that follow."""
        return self._first(step) if step < self._steps else super().batch(step)


TASK = Ramp("micro", block_size=TOKENS, batch_size=WINDOWS, max_bytes=4_000_000)


@dataclass(frozen=True)
class Arm:
    """What is trained first, and until which share of the steps; a plain run has another length."""

    until: float = 0.0
    blocks: int = BLOCKS
    windows: int = WINDOWS
    tokens: int = TOKENS
    steps: int = STEPS

    @property
    def cost(self) -> float:
        """Floating-point operations of the run, over those of a full step."""
        share = operations(self.blocks, self.windows, self.tokens) / operations(BLOCKS, WINDOWS, TOKENS)
        return self.steps * (1 - self.until * (1 - share))

    def config(self, name: str) -> RunConfig:
        """Its run, in the middle of the rates that are tried: those that notebook 10 bracketed."""
        stages = ((0.0, self.blocks), (self.until, BLOCKS))
        depth = DepthSchedule.shares(stages, rule="fresh") if self.blocks < BLOCKS else None
        return RunConfig(
            name,
            replace(TASK, windows=self.windows, tokens=self.tokens, steps=round(self.until * self.steps)),
            self.steps,
            OptimizerConfig.tuned(lr=0.001 if depth else 0.002),
            Schedule("wsd", 40, STEPS).fitted_to(self.steps),
            HybridTrainerConfig.plain(clip_norm=1.0, depth=depth),
            evaluate_every=self.steps,
            device="cpu",
            cpu_threads=1,
        )


ARMS = {
    "3 blocks until 70%": Arm(0.7, blocks=3),
    "16 tokens until 50%": Arm(0.5, tokens=16),
    "16 tokens until 70%": Arm(0.7, tokens=16),
    "32 windows of 16 tokens until 70%": Arm(0.7, windows=32, tokens=16),
    "2 windows until 50%": Arm(0.5, windows=2),
    "2 windows until 70%": Arm(0.7, windows=2),
    "4 windows until 70%": Arm(0.7, windows=4),
    "3 blocks and 16 tokens until 70%": Arm(0.7, blocks=3, tokens=16),
    "3 blocks and 2 windows until 70%": Arm(0.7, blocks=3, windows=2),
    "3 blocks and 4 windows until 70%": Arm(0.7, blocks=3, windows=4),
}
PLAIN = {f"plain, {steps} steps": Arm(steps=steps) for steps in (96, 120, 150, 180, STEPS)}
SMALL = {f"4 windows for ever, {steps} steps": Arm(1.0, windows=4, steps=steps) for steps in (192, STEPS, 312)}
"""What the arms are held against: plain runs, and such of half a batch all the time."""

ALL = PLAIN | SMALL | ARMS


@lru_cache
def operations(blocks: int, windows: int, tokens: int) -> int:
    """Floating-point operations of forward and backward, attention in full."""
    model = GPT2(replace(TASK.model_config, n_layer=blocks))
    batch = torch.zeros(windows, tokens, dtype=torch.long)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(batch, batch).backward()
    return int(counter.get_total_flops())


def at_best(arm: RunConfig, rate: float) -> RunConfig:
    """The arm at a rate, named as its trial is, so that the trial's own run is kept."""
    return replace(with_rate(arm, rate), name=f"{arm.name}, rate {rate:.3g}")


def trained() -> tuple[dict[str, RateTrials], dict[str, list[float]]]:
    """The trials of every arm on the first seed, and its losses at the best rate, by seed."""
    folder, arms = Path("runs/ramps"), [arm.config(name) for name, arm in ALL.items()]
    trials = bracket_rates(arms, folder, most=4, resume=True)
    best = [at_best(arm, trials[arm.name].best) for arm in arms]
    result: StudyResult = run_arms([replace(arm, seed=seed) for seed in SEEDS for arm in best], folder, resume=True)
    named = zip(arms, best, strict=True)
    return trials, {arm.name: [result.value("validation_loss", it.name, seed) for seed in SEEDS] for arm, it in named}


def of_as_much(controls: dict[str, Arm], cost: float, losses: dict[str, list[float]]) -> list[float]:
    """The losses of runs that cost as much, between those of two lengths in ln n; NaN beyond them."""
    costs, of_seeds = [arm.cost for arm in controls.values()], np.array([losses[name] for name in controls]).T
    return [float(np.interp(np.log(cost), np.log(costs), them, np.nan, np.nan)) for them in of_seeds]


def figures(name: str, trials: RateTrials, losses: dict[str, list[float]]) -> dict[str, Any]:
    """What an arm came to, against others of as much computation; and what a plain run takes to its loss, over its
    own cost.
    """
    cost, mine = ALL[name].cost, losses[name]
    plain = np.array([losses[control] for control in PLAIN]).T.tolist()
    lengths = tuple(arm.steps for arm in PLAIN.values())
    ratio = StepValue.of([SeedRuns(loss, 0.0, cost, lengths, them) for loss, them in zip(mine, plain, strict=True)])
    beside = {"plain": PLAIN, "half a batch": SMALL}
    differences = {
        f"against {what}": np.subtract(mine, of_as_much(controls, cost, losses)).tolist()
        for what, controls in beside.items()
        if name not in controls
    }
    return {
        "arm": name,
        "cost": cost,
        "trials": [{"rate": rate, "loss": loss} for rate, loss in sorted(trials.losses.items())],
        "rate": trials.best,
        "edge": trials.edge,
        "losses": mine,
        "loss": sum(mine) / len(SEEDS),
        "computation to its loss": ratio.as_ratio if ratio and name not in PLAIN else "",
        **{what: str(Interval.of(of)) for what, of in differences.items() if np.isfinite(of).all()},
    }


def table(rows: list[dict[str, Any]]) -> str:
    """A row per arm, plain runs last."""
    held = ("against plain", "against half a batch", "computation to its loss")
    lines = [f"| {' | '.join(('at first', 'cost', 'rate', 'loss', *held))} |", "|---" * 7 + "|"]
    for row in rows:
        rate = f"{row['rate']:g}{', ' * bool(row['edge'])}{row['edge']}"
        compared = (row.get(column, "") for column in held)
        cells = (row["arm"], f"{row['cost']:.0f}", rate, f"{row['loss']:.3f}", *compared)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    trials, losses = trained()
    rows = [figures(name, trials[name], losses) for name in ARMS | SMALL | PLAIN]
    Path(__file__).with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))
