"""The largest models of `recipes`, trained for some steps on one GPU, each in a process of its own, as JSON.

python -m hybridlab.benchmarks.largest executed/rtx5080/recipes.json --out executed/rtx5080/largest.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from hybridlab.base.errors import UserError
from hybridlab.base.settings import check_choice
from hybridlab.benchmarks import one_line
from hybridlab.benchmarks.recipes import BATCH, WAYS
from hybridlab.engine.config import HybridTrainerConfig
from hybridlab.optim import OptimizerConfig, Schedule
from hybridlab.study import RunConfig, TextTaskConfig
from hybridlab.study.code_version import code_hashes
from hybridlab.study.study import run_arms

LR, WARMUP = 1.5e-4, 50
"""XL's rate, and the steps in which it rises."""


def run_of(row: dict[str, Any], steps: int, device: str, card_gb: int) -> RunConfig:
    """The run of a planned row, on the Python sources of this machine. Raises UserError for a way that is not known."""
    if (way := row["way"]) not in WAYS:
        raise UserError(f"{way!r} is no way to train that recipes knows: plan them again")
    windows, tokens = BATCH
    task = TextTaskConfig(
        f"{row['n_layer']}x{row['n_head']}x{row['n_embd']}",
        vocab_size=50257,
        block_size=tokens,
        batch_size=windows,
        validation_batches=8,
        max_bytes=24_000_000,
    )
    return RunConfig(
        way,
        task,
        steps,
        optimizer=OptimizerConfig.tuned(lr=LR),
        schedule=Schedule("constant", warmup_steps=min(WARMUP, steps), total_steps=steps),
        hybrid=HybridTrainerConfig.plain(memory=WAYS[way]),
        evaluate_every=steps,
        device=device,
        card_gb=card_gb,
    )


def measured(run: RunConfig) -> dict[str, Any]:
    """What a run took: its peak in bytes, its median step in ms, its first training and last validation loss in nats.

    `stopped` says why it did not come to its end, where memory did not suffice or it diverged.
    """
    try:
        done = run_arms([run], Path("runs/largest"), isolated=True, resume=True).runs[run.name, run.seed]
    except UserError as error:
        return {"way": run.name, "stopped": str(error)}
    figures = done.closing_figures
    return {
        "way": run.name,
        "stopped": done.diverged,
        "steps": figures["gradient_steps"],
        "peak_memory_bytes": figures["peak_memory_bytes"],
        "allocator_retries": figures.get("allocator_retries"),
        "step_ms": figures["gradient_step_ms"],
        "first_loss": float(done.steps["measured_loss"].iloc[0]),
        "validation_loss": figures.get("validation_loss"),
    }


def main(
    planned: Annotated[Path, typer.Argument(help="What recipes has written.")],
    out: Annotated[Path, typer.Option(help="Where it goes, as JSON.")] = Path("largest.json"),
    way: Annotated[list[str] | None, typer.Option(help="A way to train; by default all of them, one by one.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Of each.")] = 200,
    device: str = "cuda",
    card_gb: Annotated[int, typer.Option(min=0, help="GB of the GPU that is emulated; 0: none.")] = 16,
) -> None:
    """Train each model for some steps, and write what it took after each."""
    with one_line("largest", out) as write:
        rows = _planned(planned)
        for name in way or ():
            check_choice("way", name, [row["way"] for row in rows])
        runs = [run_of(row, steps, device, card_gb) for row in rows if not way or row["way"] in way]
        found: dict[str, Any] = {"device": runs[0].describe_device(), "code": code_hashes(), "rows": []}
        for run in runs:
            found["rows"].append(measured(run))
            print(json.dumps(found["rows"][-1]), flush=True)
            write(found)


def _planned(path: Path) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["largest"]
        _ = rows[0]["way"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} has no table of the largest models ({error}): let recipes write it") from None
    return rows


if __name__ == "__main__":
    typer.run(main)
