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
        ramp = {"windows": self.windows, "tokens": self.tokens, "steps": round(self.until * self.steps)}
        stages = ((0.0, self.blocks), (self.until, BLOCKS))
        depth = DepthSchedule.shares(stages, rule="fresh") if self.blocks < BLOCKS else None
        return RunConfig(
            name,
            Ramp("micro", block_size=TOKENS, batch_size=WINDOWS, max_bytes=4_000_000, **ramp),
            self.steps,
            OptimizerConfig.tuned(lr=0.001 if depth else 0.002),
            Schedule("wsd", 40, STEPS).fitted_to(self.steps),
            HybridTrainerConfig.plain(clip_norm=1.0, depth=depth),
            evaluate_every=self.steps,
            device="cpu",
            cpu_threads=1,
        )


SMALL_BATCH = "4 windows for ever"
"""No ramp, and as much computation as most of them."""

ARMS = {
    "3 blocks until 70%": Arm(0.7, blocks=3),
    "16 tokens until 50%": Arm(0.5, tokens=16),
    "16 tokens until 70%": Arm(0.7, tokens=16),
    "32 windows of 16 tokens until 70%": Arm(0.7, windows=32, tokens=16),
    "2 windows until 50%": Arm(0.5, windows=2),
    "2 windows until 70%": Arm(0.7, windows=2),
    "4 windows until 70%": Arm(0.7, windows=4),
    SMALL_BATCH: Arm(1.0, windows=4),
    "3 blocks and 16 tokens until 70%": Arm(0.7, blocks=3, tokens=16),
    "3 blocks and 2 windows until 70%": Arm(0.7, blocks=3, windows=2),
    "3 blocks and 4 windows until 70%": Arm(0.7, blocks=3, windows=4),
}
PLAIN = {f"plain, {steps} steps": Arm(steps=steps) for steps in (96, 120, 150, 180, STEPS)}
"""What the arms are held against: each arm's cost lies beside one of these lengths."""


@lru_cache
def operations(blocks: int, windows: int, tokens: int) -> int:
    """Floating-point operations of forward and backward, attention in full."""
    model = GPT2(replace(Arm().config("").task.model_config, n_layer=blocks))
    batch = torch.zeros(windows, tokens, dtype=torch.long)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(batch, batch).backward()
    return int(counter.get_total_flops())


def at_best(arm: RunConfig, rate: float) -> RunConfig:
    """The arm at a rate, named as its trial is, so that the trial's own run is kept."""
    return replace(with_rate(arm, rate), name=f"{arm.name}, rate {rate:.3g}")


def trained() -> tuple[dict[str, RateTrials], dict[str, list[float]]]:
    """The trials of every arm on the first seed, and its losses at the best rate, by seed."""
    folder, arms = Path("runs/ramps"), [arm.config(name) for name, arm in (PLAIN | ARMS).items()]
    trials = bracket_rates(arms, folder, most=3, resume=True)
    best = [at_best(arm, trials[arm.name].best) for arm in arms]
    result: StudyResult = run_arms([replace(arm, seed=seed) for seed in SEEDS for arm in best], folder, resume=True)
    named = zip(arms, best, strict=True)
    return trials, {arm.name: [result.value("validation_loss", it.name, seed) for seed in SEEDS] for arm, it in named}


def figures(name: str, trials: RateTrials, losses: dict[str, list[float]]) -> dict[str, Any]:
    """What an arm came to: against a plain run of as much computation, between the lengths in ln n; and what a plain
    run takes to its loss, over its own cost.
    """
    cost, lengths = (PLAIN | ARMS)[name].cost, tuple(arm.steps for arm in PLAIN.values())
    plain = [tuple(losses[control][seed] for control in PLAIN) for seed in range(len(SEEDS))]
    at_cost = [float(np.interp(np.log(cost), np.log(lengths), of_seed)) for of_seed in plain]
    runs = [SeedRuns(loss, 0.0, cost, lengths, of) for loss, of in zip(losses[name], plain, strict=True)]
    return {
        "arm": name,
        "cost": cost,
        "trials": [{"rate": rate, "loss": loss} for rate, loss in sorted(trials.losses.items())],
        "rate": trials.best,
        "edge": trials.edge,
        "losses": losses[name],
        "loss": sum(losses[name]) / len(SEEDS),
        "against": str(Interval.of(np.subtract(losses[name], at_cost).tolist())),
        f"against {SMALL_BATCH}": str(Interval.of(np.subtract(losses[name], losses[SMALL_BATCH]).tolist())),
        "computation_to_loss": ratio.as_ratio if (ratio := StepValue.of(runs)) else "",
    }


def table(rows: list[dict[str, Any]]) -> str:
    """A row per arm, plain runs last."""
    heads = ("at first", "first seed by rate", "cost", "loss", "against as much computation", "computation to its loss")
    lines = [f"| {' | '.join(heads)} |", "|---" * 6 + "|"]
    for row in rows:
        rates = ", ".join(f"{it['rate']:g}: {it['loss']:.3f}" for it in row["trials"])
        held = ("", "") if row["arm"] in PLAIN else (row["against"], row["computation_to_loss"])
        cells = (row["arm"], rates, f"{row['cost']:.0f}", f"{row['loss']:.3f}", *held)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    trials, losses = trained()
    rows = [figures(name, trials[name], losses) for name in ARMS | PLAIN]
    Path(__file__).with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))
