"""Tokens per second, memory and the cost of prediction on 1, 2, 4 ... GPUs of one host.

python -m hybridlab.benchmarks.ranks --model small --counts 1,2,4 --out ranks.json
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from inspect import Signature, signature
from itertools import count
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from typer import Option

from hybridlab.base.device import device_name, find_device, refuse_more_than_gpus
from hybridlab.base.errors import UserError
from hybridlab.base.ranks import from_each, is_first, running
from hybridlab.benchmarks import one_line
from hybridlab.benchmarks.interleaved import Ratio, seconds_in_turns
from hybridlab.engine.config import HybridTrainerConfig
from hybridlab.engine.trainer import HybridTrainer
from hybridlab.memory.config import CheckpointingConfig, MemoryConfig
from hybridlab.models import GPT2Config
from hybridlab.models.huggingface import causal_config, read_config
from hybridlab.planner import plan_training
from hybridlab.study import RunConfig, TextTaskConfig
from hybridlab.study.planning import training_spec_of
from hybridlab.study.process_settings import ProcessSettings, gc_frozen, refreeze_gc
from hybridlab.study.ranks import RanksConfig
from hybridlab.study.tasks import HuggingFaceTaskConfig
from hybridlab.study.training import Training
from hybridlab.vram import MemoryMeter

MEMORY_STEPS = 4

JUMP = {"full_steps": 4, "max_predict_steps": 1, "correct_steps": 1, "confidence_threshold": 0.0, "gate": False}
"""The shortest way through all phases: a full path, a jump that is taken unseen, and its snapshot."""

JUMP_STEPS = 7


@dataclass(frozen=True)
class Question:
    """What is measured, alike for each number of ranks: options of this program.

    A path is recorded every fifth step, and a predictor asked every twentieth: 20 steps in a round have both.
    """

    model: Annotated[str, Option(help="A GPT-2 size, or a config of Hugging Face: its JSON text or its path.")] = (
        "small"
    )
    windows: Annotated[int, Option(min=1, help="Per rank and step.")] = 8
    tokens: Annotated[int, Option(min=1, help="Per window.")] = 1024
    precision: Annotated[str, Option(help="fp32, tf32 or bf16.")] = "bf16"
    compiled: bool = True
    wrap: Annotated[str, Option(help="fsdp or ddp.")] = "fsdp"
    gather: Annotated[
        str, Option(help="Format in which fsdp gathers weights, fp32 or bf16; else bf16 where it computes in it.")
    ] = ""
    path_device: Annotated[str, Option(help="Where the path is kept: same (beside the weights) or host.")] = "same"
    device: str = "auto"
    rounds: Annotated[int, Option(min=1, help="Timed rounds; six or more have an interval.")] = 12
    turns: Annotated[int, Option(min=1, help="Of each trainer in a round.")] = 4
    steps: Annotated[int, Option(min=1, help="Of a turn; with 20 in a round a predictor is asked in each.")] = 5
    checkpointing: Annotated[bool, Option(help="Compute blocks again in backward.")] = False
    path: Annotated[bool, Option(help="Measure what prediction costs, too.")] = True
    blocks_per_group: Annotated[int, Option(min=1, help="Whose weights fsdp gathers at once.")] = 1
    keep_gathered: Annotated[
        bool, Option("--keep-gathered", help="Keep gathered weights from forward to backward.")
    ] = False

    def __post_init__(self) -> None:
        gathers = "bf16" if (self.wrap, self.precision) == ("fsdp", "bf16") else "fp32"
        object.__setattr__(self, "gather", self.gather or gathers)

    @property
    def ranks(self) -> RanksConfig:
        """How the ranks train it."""
        return RanksConfig(
            self.wrap, self.gather, blocks_per_group=self.blocks_per_group, keep_gathered=self.keep_gathered
        )

    def config(self, ranks: int, **prediction: Any) -> RunConfig:
        """The run on so many ranks; its tokens are random, so that nothing is downloaded.

        prediction: settings of `HybridTrainerConfig`; without any nothing is predicted
        """
        memory = MemoryConfig(checkpointing=CheckpointingConfig()) if self.checkpointing else None
        settings = prediction or {"max_predict_steps": 0}
        return RunConfig(
            f"{ranks} ranks",
            self._task(self.windows * ranks),
            steps=100_000,
            hybrid=HybridTrainerConfig(
                warmup_steps=0, clip_norm=1.0, path_device=self.path_device, memory=memory, **settings
            ),
            precision=self.precision,
            compiled=self.compiled,
            device=self.device,
        )

    def _task(self, windows: int) -> TextTaskConfig | HuggingFaceTaskConfig:
        sizes = {"block_size": self.tokens, "batch_size": windows, "validation_batches": 1}
        if self.model.lstrip().startswith("{") or Path(self.model).exists():
            vocabulary = causal_config(read_config(self.model)).vocab_size
            return HuggingFaceTaskConfig(self.model, "uniform", vocabulary, **sizes)
        return TextTaskConfig(self.model, "uniform", GPT2Config.named(self.model).vocab_size, **sizes)


def measured(question: Question) -> dict[str, Any]:
    """One row: the figures of as many ranks as there are; each of them calls it, inside a group.

    parameters: of the model; sent_bytes_per_step: by each rank, as `RanksConfig.communication_bytes` counts it
    tokens_per_second: of all ranks, without prediction; step_ms: its median step
    recording_overhead: share of a step that recording the path and asking a predictor add, with its 95 % interval
    peak_bytes, allocated_bytes, context_bytes: by rank, without prediction, as `MemoryMeter.peak` has them
    peak_with_path_bytes, ...: the same of a run that predicts: with a full path, a jump and its rollback snapshot
    """
    device = find_device(question.device)
    with ProcessSettings.of(question.config(running())).applied():
        row = _without_prediction(question, device)
        return row | (_with_prediction(question, device) if question.path else {})


def _without_prediction(question: Question, device: torch.device) -> dict[str, Any]:
    training, peaks = _trained(question, question.config(running()), device, MEMORY_STEPS)
    parameters = sum(p.numel() for p in training.task.model.parameters())
    steps = question.turns * question.steps
    seconds = _seconds(question, training, device)
    step_ms = 1e3 * median(seconds["plain"]) / steps
    row = {
        "ranks": running(),
        "device": device_name(device),
        "parameters": parameters,
        "step_ms": step_ms,
        "tokens_per_second": 1e3 * question.windows * running() * question.tokens / step_ms,
        "sent_bytes_per_step": question.ranks.communication_bytes(parameters, running())["within"],
    }
    if question.path:
        recording = [more - plain for more, plain in zip(seconds["recording"], seconds["plain"], strict=True)]
        row["recording_overhead"] = Ratio.of(recording, seconds["plain"]).record()
    return row | {f"{name}_bytes": peak for name, peak in peaks.items()}


def _with_prediction(question: Question, device: torch.device) -> dict[str, Any]:
    training, peaks = _trained(question, question.config(running(), **JUMP), device, JUMP_STEPS)
    if not training.trainer.statistics().proposals_accepted:
        raise UserError("no jump was taken, so that its memory is not known: take --no-path, or another precision")
    return {f"{name}_with_path_bytes": peak for name, peak in peaks.items()}


def _trained(
    question: Question, config: RunConfig, device: torch.device, steps: int
) -> tuple[Training, dict[str, list[int | None]]]:
    """A training after a few steps, and what they took of each rank's memory once it had warmed up, as in a run."""
    meter = MemoryMeter(device)
    training = Training(config, device, question.ranks)
    training.warm_up_()
    training.make_state_()
    meter.reset_peak()
    for number in range(steps):
        training.step(number)
    found = meter.peak()
    names = {"peak": "peak_memory_bytes", "allocated": "peak_allocated_bytes", "context": "context_bytes"}
    return training, {name: from_each(found.get(figure)) for name, figure in names.items()}


def _seconds(question: Question, training: Training, device: torch.device) -> dict[str, list[float]]:
    """By round, of the training's own trainer, which predicts nothing, and of one that records a path and asks."""
    trainers, numbers = {"plain": training.trainer}, count()
    if question.path:
        asks = question.config(running(), predictor="null").hybrid
        trainers["recording"] = HybridTrainer(training.trainer.model, training.trainer.optimizer, asks)

    def turn(trainer: HybridTrainer) -> None:
        training.trainer = trainer
        for _ in range(question.steps):
            training.step(next(numbers))

    turns: dict[str, Callable[[], None]] = {name: partial(turn, trainer) for name, trainer in trainers.items()}
    with gc_frozen():
        refreeze_gc()
        return seconds_in_turns(turns, device, question.rounds, question.turns)


def planned(question: Question, ranks: int) -> dict[str, int]:
    """What each rank is expected to take at its peak, beside `peak_bytes` and `allocated_bytes` of the same run."""
    runs = {"": question.config(ranks)} | ({"_with_path": question.config(ranks, **JUMP)} if question.path else {})
    plans = {name: plan_training(training_spec_of(run, question.ranks, ranks)) for name, run in runs.items()}
    peaks = {f"planned{name}_bytes": made.peak_on_gpu_bytes for name, made in plans.items()}
    return peaks | {f"planned_allocated{name}_bytes": made.peak_allocated_bytes for name, made in plans.items()}


def summary(question: Question, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The rows, each with its scaling efficiency.

    tokens per second on N ranks / (N / M times those on M ranks)        M: the fewest ranks that were measured
    """
    least = min(rows, key=lambda row: row["ranks"])
    per_rank = least["tokens_per_second"] / least["ranks"]
    scaled = [row | {"scaling_efficiency": row["tokens_per_second"] / row["ranks"] / per_rank} for row in rows]
    return {"question": asdict(question), "torch": str(torch.__version__), "rows": scaled}


def main(
    counts: Annotated[str, Option(help="Numbers of ranks, one after the other, on GPUs of this host.")] = "1,2,4",
    out: Annotated[Path, Option(help="Where the results go, as JSON.")] = Path("ranks.json"),
    **options: Any,  # fields of `Question`
) -> None:
    """Measure each number of ranks, in fresh processes that torchrun starts, and write the results."""
    with one_line("ranks", out) as write:
        question = Question(**options)
        if "RANK" in os.environ:
            with question.ranks.started(question.config(int(os.environ["WORLD_SIZE"]))):
                row = measured(question)
                gc.collect()  # models that were wrapped go before the group does
                if is_first():
                    write(row)
            return
        numbers, rows = _numbers(counts), []
        for ranks in numbers:
            refuse_more_than_gpus("--counts", ranks, question.device)
            question.ranks.check(question.config(ranks), ranks)  # refuses what cannot be measured before anything is
        for ranks in numbers:
            rows.append(_started(ranks) | planned(question, ranks))
            write(summary(question, rows))
    print(f"written: {out}")


_own, _options = (list(signature(of, eval_str=True).parameters.values()) for of in (main, Question))
main.__signature__ = Signature([*_own[:-1], *_options])  # type: ignore[attr-defined]  # of which typer makes options


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
        if done.returncode and not row.exists():  # else a rank failed after all was measured
            raise UserError(f"{ranks} ranks ended with exit code {done.returncode}: see what they said above")
        found: dict[str, Any] = json.loads(row.read_text())
    print(f"{ranks} ranks: {_in_words(found)}", flush=True)
    return found


def _in_words(row: dict[str, Any]) -> str:
    speed = f"{row['tokens_per_second']:,.0f} tokens per second, {row['step_ms']:.1f} ms per step"
    peaks = f"at most {max(row['peak_bytes']) / 1e9:.2f} GB"
    if "recording_overhead" not in row:
        return f"{speed}, {peaks}"
    recording = f"recording adds {row['recording_overhead']['median']:.2%}"
    return f"{speed}, {recording}, {peaks}, with prediction {max(row['peak_with_path_bytes']) / 1e9:.2f} GB"


if __name__ == "__main__":
    typer.run(main)
