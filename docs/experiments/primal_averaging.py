"""Generalized Primal Averaging around AdamW, alone and on top of growth, each at its own bracketed rate.

python docs/experiments/primal_averaging.py 200 800 trains all arms of 200 and of 800 steps (an hour on a core), writes
the losses of every trial and run beside this file, and prints the tables of docs/experiments.md. 1000 in their place
trains GPT-2 Small on a GPU (ten minutes on an H100).
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from hybridlab import DepthSchedule, HybridTrainerConfig
from hybridlab.optim import OptimizerConfig, Schedule
from hybridlab.study import RunConfig, StudyResult, TextTaskConfig
from hybridlab.study.rates import RateTrials, bracket_rates
from hybridlab.study.statistics import Interval
from hybridlab.study.study import run_arms, with_rate

GROWN = {
    "hybrid": HybridTrainerConfig.plain(clip_norm=1.0, depth=DepthSchedule.shares(((0.0, 3), (0.7, 6)), rule="fresh"))
}


def optimizer(beta1: float, decay: float = 0.0, **more: Any) -> dict[str, Any]:
    """What an arm changes of AdamW."""
    return {"optimizer": {"betas": (beta1, 0.999), "average_decay": decay, **more}}


SHORT: dict[str, tuple[str, dict[str, Any]]] = {
    "AdamW": ("", {}),
    "AdamW, beta1 0.5": ("AdamW", optimizer(0.5)),
    "mean, beta1 0": ("AdamW, beta1 0.5", optimizer(0.0, 0.974)),
    "mean, beta1 0.5": ("AdamW, beta1 0.5", optimizer(0.5, 0.974)),
    "mean, beta1 0.9": ("AdamW", optimizer(0.9, 0.974)),
    "mean over 10 steps, beta1 0": ("AdamW, beta1 0.5", optimizer(0.0, 0.9)),
    "grown": ("AdamW", optimizer(0.9, lr=0.001) | GROWN),
    "grown, beta1 0.5": ("grown", optimizer(0.5, lr=0.001) | GROWN),
    "grown, mean, beta1 0": ("grown, beta1 0.5", optimizer(0.0, 0.974, lr=0.001) | GROWN),
}
"""Arm -> the arm that it is held against, and what it changes. Without another word, a mean remembers 38 steps."""

LONG = {name: SHORT[name] for name in ("AdamW", "AdamW, beta1 0.5", "mean, beta1 0")}
ARMS, SEEDS = {200: SHORT, 800: LONG, 1000: LONG}, (0, 1, 2)
"""By steps of a run; the rates are found on the first seed."""


MICRO = TextTaskConfig(
    "micro", vocab_size=2048, block_size=64, batch_size=8, validation_batches=16, max_bytes=4_000_000
)
SMALL = TextTaskConfig("small", vocab_size=50257, block_size=512, batch_size=8, validation_batches=48, max_bytes=0)
ON_CPU: dict[str, Any] = {"task": MICRO, "device": "cpu", "cpu_threads": 1}
ON_GPU: dict[str, Any] = {"task": SMALL, "device": "cuda", "precision": "bf16", "compiled": True}


def config(steps: int, name: str) -> RunConfig:
    """An arm, in the middle of the rates that are tried."""
    where, rate, warmup_steps = (ON_GPU, 0.0003, 100) if steps == 1000 else (ON_CPU, 0.002, 40)
    changes = {"hybrid": HybridTrainerConfig.plain(clip_norm=1.0)} | where | ARMS[steps][name][1]
    method = replace(OptimizerConfig.tuned(lr=rate), **changes.pop("optimizer", {}))
    schedule = Schedule("wsd", warmup_steps, steps)
    return RunConfig(name, steps=steps, optimizer=method, schedule=schedule, evaluate_every=steps, **changes)


def at_best(arm: RunConfig, trial: RateTrials) -> list[RunConfig]:
    """The arm at its best rate on every seed, the trial's own run among them."""
    best = replace(with_rate(arm, trial.best), name=f"{arm.name}, rate {trial.best:.3g}")
    return [replace(best, seed=seed) for seed in SEEDS]


def table(steps: int, trials: dict[str, RateTrials], losses: dict[str, list[float]]) -> str:
    """A row per arm."""
    lines = [f"{steps} steps", "", "| arm | losses of the first seed by rate | loss | against | change |"]
    lines.append("|---|---|---|---|---|")
    for name, (other, _) in ARMS[steps].items():
        rates = ", ".join(f"{rate:g}: {loss:.3f}" for rate, loss in sorted(trials[name].losses.items()))
        pairs = zip(losses[name], losses.get(other, []), strict=False)
        change = Interval.of([mine - theirs for mine, theirs in pairs]) if other else ""
        lines.append(f"| {name} | {rates} | {sum(losses[name]) / len(SEEDS):.3f} | {other} | {change} |")
    return "\n".join(lines)


def trained(steps: int) -> dict[str, Any]:
    """All arms at this length."""
    folder, arms = Path("runs/primal_averaging"), [config(steps, name) for name in ARMS[steps]]
    trials = bracket_rates(arms, folder, most=5, resume=True)
    best = {arm.name: at_best(arm, trials[arm.name]) for arm in arms}
    result: StudyResult = run_arms([run for runs in best.values() for run in runs], folder, resume=True)
    losses = {arm: [result.value("validation_loss", run.name, run.seed) for run in runs] for arm, runs in best.items()}
    print(table(steps, trials, losses), flush=True)
    return {"steps": steps, "trials": {name: trial.losses for name, trial in trials.items()}, "losses": losses}


if __name__ == "__main__":
    for steps in map(int, sys.argv[1:]):
        found = trained(steps)
        Path(__file__).with_name(f"primal_averaging_{steps}.json").write_text(json.dumps(found, indent=1) + "\n")
