"""AdamW's beta1, each value at its own bracketed rate, with few and with many tokens per step.

python docs/experiments/beta1.py trains all runs on a CPU (twenty minutes on a core), writes every loss beside this
file, and prints the tables of docs/experiments.md. The argument gpu: GPT-2 Small for 1,000 steps, on a GPU.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from hybridlab import HybridTrainerConfig
from hybridlab.optim import OptimizerConfig, Schedule
from hybridlab.study import RunConfig, TextTaskConfig
from hybridlab.study.rates import bracket_rates
from hybridlab.study.statistics import Interval
from hybridlab.study.study import run_arms, with_rate

VALUES, USUAL, SEEDS = (0.5, 0.7, 0.8, 0.9, 0.95), 0.9, (0, 1, 2)

NANO: dict[str, Any] = {"model": "nano", "vocab_size": 512, "block_size": 64, "max_bytes": 4_000_000}
ON_CPU: dict[str, Any] = {"steps": 500, "device": "cpu", "cpu_threads": 1, "schedule": Schedule("wsd", 50, 500)}
SMALL = TextTaskConfig("small", vocab_size=50257, block_size=512, batch_size=8, validation_batches=32, max_bytes=0)
ON_GPU: dict[str, Any] = {"steps": 1000, "precision": "bf16", "compiled": True, "schedule": Schedule("wsd", 100, 1000)}

CASES: dict[str, dict[str, tuple[TextTaskConfig, float, dict[str, Any]]]] = {
    "cpu": {
        "nano, 512 tokens per step": (TextTaskConfig(batch_size=8, validation_batches=64, **NANO), 0.002, ON_CPU),
        "nano, 4096 tokens per step": (TextTaskConfig(batch_size=64, validation_batches=8, **NANO), 0.004, ON_CPU),
    },
    "gpu": {"small, 4096 tokens per step": (SMALL, 0.0003, ON_GPU)},
}
"""Case -> the task, the rate to begin with, and the run."""


def losses(case: str, task: TextTaskConfig, rate: float, settings: dict[str, Any]) -> dict[str, Any]:
    """For each beta1: the losses of the first seed by rate, and those of every seed at the best, in nats."""
    folder, plain = Path("runs/beta1") / case, HybridTrainerConfig.plain(clip_norm=1.0)
    arms = {
        value: RunConfig(
            f"beta1 {value:g}",
            task,
            optimizer=OptimizerConfig.tuned(lr=rate, betas=(value, 0.999)),
            hybrid=plain,
            evaluate_every=settings["steps"],
            **settings,
        )
        for value in VALUES
    }
    trials = bracket_rates(list(arms.values()), folder, most=5, resume=True)
    best = {value: with_rate(arm, trials[arm.name].best) for value, arm in arms.items()}
    runs = {value: [replace(arm, name=f"{arm.name}, best rate", seed=s) for s in SEEDS] for value, arm in best.items()}
    result = run_arms([run for several in runs.values() for run in several], folder, resume=True)
    return {
        f"{value:g}": {
            "trials": trials[arms[value].name].losses,
            "losses": [result.value("validation_loss", run.name, run.seed) for run in several],
        }
        for value, several in runs.items()
    }


def table(found: dict[str, Any]) -> str:
    """A row per beta1."""
    lines = ["| beta1 | losses of the first seed by rate | loss | against 0.9 |", "|---|---|---|---|"]
    for value, it in found.items():
        rates = ", ".join(f"{rate:g}: {loss:.3f}" for rate, loss in sorted(it["trials"].items()))
        usual = found[f"{USUAL:g}"]["losses"]
        change = Interval.of([mine - theirs for mine, theirs in zip(it["losses"], usual, strict=True)])
        mean = sum(it["losses"]) / len(SEEDS)
        lines.append(f"| {value} | {rates} | {mean:.3f} | {'' if value == f'{USUAL:g}' else change} |")
    return "\n".join(lines)


if __name__ == "__main__":
    where = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    found = {case: losses(case, *settings) for case, settings in CASES[where].items()}
    tables = {case: table(values) for case, values in found.items()}
    for case, rows in tables.items():
        print(f"{case}:\n\n{rows}\n", flush=True)
    content = {"losses": found, "tables": tables}
    Path(__file__).with_name(f"beta1_{where}.json").write_text(json.dumps(content, indent=1) + "\n")
