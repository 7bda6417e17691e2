"""Tokens per second, memory and the cost of prediction on 1, 2, 4 ... GPUs of one host, for a GPT-2.

python -m hybridlab.benchmarks.ranks --model small --counts 1,2,4 --out ranks.json
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer

from hybridlab.base.device import device_name, find_device, refuse_more_than_gpus
from hybridlab.base.errors import UserError
from hybridlab.base.ranks import from_each, is_first, running
from hybridlab.benchmarks import one_line
from hybridlab.benchmarks.step_overhead import step_overhead
from hybridlab.engine.config import HybridTrainerConfig
from hybridlab.models import GPT2Config
from hybridlab.planner import plan_training
from hybridlab.study import RunConfig, TextTaskConfig
from hybridlab.study.planning import training_spec_of
from hybridlab.study.process_settings import ProcessSettings
from hybridlab.study.ranks import RanksConfig
from hybridlab.study.record import write_json
from hybridlab.study.training import Training
from hybridlab.vram import MemoryMeter

MEMORY_STEPS = 4


@dataclass(frozen=True)
class Question:
    """What is measured, alike for each number of ranks.

    model: a GPT-2 size; windows: per rank, of `tokens` tokens each: the global batch grows with the number of ranks
    precision, compiled: as `RunConfig` has them; path_device: as `HybridTrainerConfig` has it
    wrap, gather: as `RanksConfig` has them
    rounds, turns, steps: as `step_overhead` takes them
    """

    model: str = "small"
    windows: int = 8
    tokens: int = 1024
    precision: str = "bf16"
    compiled: bool = True
    wrap: str = "fsdp"
    gather: str = "bf16"
    path_device: str = "same"
    device: str = "auto"
    rounds: int = 6
    turns: int = 3
    steps: int = 4

    @property
    def ranks(self) -> RanksConfig:
        """How the ranks train it."""
        return RanksConfig(self.wrap, self.gather)

    def config(self, ranks: int) -> RunConfig:
        """The run on so many ranks; its tokens are random, so that nothing is downloaded."""
        size = GPT2Config.named(self.model)
        task = TextTaskConfig(
            self.model, "uniform", size.vocab_size, self.tokens, self.windows * ranks, validation_batches=1
        )
        return RunConfig(
            f"{self.model} on {ranks}",
            task,
            steps=1000,
            hybrid=HybridTrainerConfig(warmup_steps=0, clip_norm=1.0, path_device=self.path_device),
            precision=self.precision,
            compiled=self.compiled,
            cuda_graphs=False,
            device=self.device,
        )


def measured(question: Question) -> dict[str, Any]:
    """One row: the figures of as many ranks as there are; each of them calls it, inside a group.

    sent_bytes_per_step: by each rank, as `RanksConfig.communication_bytes` counts it
    tokens_per_second: of all ranks, by the trainer without prediction; step_ms: its median step
    recording_overhead: share of a step that recording the path and asking a predictor add, with its 95 % interval
    peak_bytes, peak_with_path_bytes: by rank, without prediction and with the path of a predictor
    """
    config = question.config(running())
    device = find_device(config.device)
    peak = _peak(config, question.ranks, device)
    meter = MemoryMeter(device)
    meter.reset_peak()
    cost = step_overhead(
        config, rounds=question.rounds, turns=question.turns, steps=question.steps, ranks=question.ranks
    )
    step_ms = cost.bare_step_ms * cost.plain_over_bare.median
    tokens, parameters = config.task.batch_size * question.tokens, GPT2Config.named(question.model).parameter_count
    return {
        "ranks": running(),
        "device": device_name(device),
        "step_ms": step_ms,
        "tokens_per_second": 1e3 * tokens / step_ms,
        "sent_bytes_per_step": question.ranks.communication_bytes(parameters, running())["within"],
        "plain_over_bare": cost.plain_over_bare.record(),
        "recording_overhead": cost.recording_over_bare.record(),
        "peak_bytes": from_each(peak),
        "peak_with_path_bytes": from_each(meter.peak()["peak_memory_bytes"]),
    }


def _peak(config: RunConfig, ranks: RanksConfig, device: torch.device) -> int:
    """Of a few plain steps on this rank."""
    meter = MemoryMeter(device)
    meter.reset_peak()
    plain = HybridTrainerConfig.plain(clip_norm=config.hybrid.clip_norm)
    with ProcessSettings.of(config).applied():
        training = Training(replace(config, hybrid=plain), device, ranks)
        for number in range(MEMORY_STEPS):
            training.step(number)
    peak: int = meter.peak()["peak_memory_bytes"]
    del training
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return peak


def planned(question: Question, ranks: int) -> dict[str, int]:
    """What each rank is expected to take at its peak, without prediction and with the path: beside `peak_bytes`."""
    config = question.config(ranks)
    plain = replace(config, hybrid=HybridTrainerConfig.plain(clip_norm=config.hybrid.clip_norm))
    runs = {"planned_bytes": plain, "planned_with_path_bytes": config}
    return {
        name: plan_training(training_spec_of(run, question.ranks, ranks)).peak_on_gpu_bytes
        for name, run in runs.items()
    }


def summary(question: Question, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The rows, each with its scaling efficiency.

    tokens per second on N ranks / (N / M times those on M ranks)        M: the fewest ranks that were measured
    """
    least = min(rows, key=lambda row: row["ranks"])
    per_rank = least["tokens_per_second"] / least["ranks"]
    scaled = [row | {"scaling_efficiency": row["tokens_per_second"] / row["ranks"] / per_rank} for row in rows]
    return {"question": asdict(question), "torch": str(torch.__version__), "rows": scaled}


def main(
    model: Annotated[str, typer.Option(help="A GPT-2 size.")] = "small",
    counts: Annotated[str, typer.Option(help="Numbers of ranks, one after the other, on GPUs of this host.")] = "1,2,4",
    out: Annotated[Path, typer.Option(help="Where the results go, as JSON.")] = Path("ranks.json"),
    windows: Annotated[int, typer.Option(min=1, help="Per rank and step.")] = 8,
    tokens: Annotated[int, typer.Option(min=1, help="Per window.")] = 1024,
    precision: Annotated[str, typer.Option(help="fp32, tf32 or bf16.")] = "bf16",
    compiled: bool = True,
    wrap: Annotated[str, typer.Option(help="fsdp or ddp.")] = "fsdp",
    gather: Annotated[str, typer.Option(help="Format in which fsdp gathers weights: fp32 or bf16.")] = "bf16",
    path_device: Annotated[
        str, typer.Option(help="Where the path is kept: same (beside the weights) or host.")
    ] = "same",
    device: str = "auto",
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds; six or more have an interval.")] = 6,
    turns: Annotated[int, typer.Option(min=1, help="Of each loop in a round.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Of a turn.")] = 4,
) -> None:
    """Measure each number of ranks, in fresh processes that torchrun starts, and write the results."""
    gather = gather if wrap == "fsdp" else "fp32"
    with one_line("ranks", out):
        question = Question(
            model, windows, tokens, precision, compiled, wrap, gather, path_device, device, rounds, turns, steps
        )
        if "RANK" in os.environ:
            with question.ranks.started(question.config(int(os.environ["WORLD_SIZE"]))):
                row = measured(question)
                if is_first():
                    write_json(out, row)
            return
        numbers, rows = _numbers(counts), []
        for ranks in numbers:
            refuse_more_than_gpus("--counts", ranks, device)
            question.ranks.check(question.config(ranks), ranks)  # refuses what cannot be measured before anything is
        for ranks in numbers:
            rows.append(_started(ranks) | planned(question, ranks))
            write_json(out, summary(question, rows))
    print(f"written: {out}")


def _numbers(counts: str) -> list[int]:
    try:
        return [int(count) for count in counts.split(",")]
    except ValueError:
        raise UserError(f"--counts is {counts!r}: write whole numbers, as 1,2") from None


def _started(ranks: int) -> dict[str, Any]:
    """The row of so many ranks, which take this program's own arguments."""
    with TemporaryDirectory() as folder:
        row = Path(folder) / "row.json"
        start = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone", "-m", __spec__.name]
        done = subprocess.run([sys.executable, *start, *sys.argv[1:], "--out", str(row)], check=False)
        if done.returncode:
            raise UserError(f"{ranks} ranks ended with exit code {done.returncode}: see what they said above")
        found: dict[str, Any] = json.loads(row.read_text())
    print(
        f"{ranks} ranks: {found['tokens_per_second']:,.0f} tokens per second, {found['step_ms']:.1f} ms per step, "
        f"recording adds {found['recording_overhead']['median']:.2%}, at most {max(found['peak_bytes']) / 1e9:.2f} GB, "
        f"with a path {max(found['peak_with_path_bytes']) / 1e9:.2f} GB",
        flush=True,
    )
    return found


if __name__ == "__main__":
    typer.run(main)
