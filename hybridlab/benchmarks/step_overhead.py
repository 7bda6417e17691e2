"""What the trainer itself costs: its step over the bare loop's, measured in turns.

python -m hybridlab.benchmarks.step_overhead [--model small] [--batch 8x512] [--parts 1]
    [--path-device host] [--device auto] [--out FILE]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

from hybridlab.base.device import device_name, find_device
from hybridlab.base.errors import UserError
from hybridlab.benchmarks import one_line
from hybridlab.benchmarks.against_others import Count, configured
from hybridlab.benchmarks.interleaved import Ratio, seconds_in_turns
from hybridlab.engine.closures import Closure
from hybridlab.engine.config import HybridTrainerConfig
from hybridlab.engine.trainer import HybridTrainer
from hybridlab.memory.config import MemoryConfig
from hybridlab.memory.precision import autocast
from hybridlab.optim import build_optimizer
from hybridlab.study.config import RunConfig
from hybridlab.study.process_settings import ProcessSettings
from hybridlab.study.training import sped_up

Step = Callable[[Sequence[Closure]], object]


@dataclass(frozen=True)
class StepOverhead:
    """What a step of the trainer takes over the bare loop's.

    plain_over_bare: the trainer with max_predict_steps=0
    null_over_bare: with the null predictor: recording and asking included
    recording_over_bare: the share of a bare step that recording the path adds
    bare_step_ms: the bare loop's median
    """

    plain_over_bare: Ratio
    null_over_bare: Ratio
    recording_over_bare: Ratio
    bare_step_ms: float


def step_overhead(
    config: RunConfig,
    *,
    rounds: int = 20,
    turns: int = 6,
    steps: int = 10,
    parts: int = 1,
) -> StepOverhead:
    """Measure it, on one model and one optimizer.

    rounds: that count, beside the first two, which are thrown away
    turns: of each loop in a round, best a multiple of six: then each has each place equally often
    steps: nominal steps per turn
    parts: of a step's batch, each a batch of the config: what they add up to is one step

    Raises UserError for a config with memory features, which the bare loop has not.
    """
    if config.memory != MemoryConfig():
        raise UserError("the bare loop, beside which the trainer is timed, has no memory features: set memory to None")
    with ProcessSettings.of(config).applied():
        loops, closure = _loops(config)
        taken = {name: partial(_take, step, [closure] * parts, steps) for name, step in loops.items()}
        seconds = seconds_in_turns(taken, find_device(config.device), rounds, turns)
    bare, plain, null = (seconds[name] for name in ("bare", "plain", "null"))
    recording = [with_path - without for with_path, without in zip(null, plain, strict=True)]
    return StepOverhead(
        plain_over_bare=Ratio.of(plain, bare),
        null_over_bare=Ratio.of(null, bare),
        recording_over_bare=Ratio.of(recording, bare),
        bare_step_ms=1e3 * median(bare) / (turns * steps),
    )


def _loops(config: RunConfig) -> tuple[dict[str, Step], Closure]:
    """A step of each loop, and the loss of a new batch whenever it is called."""
    device = find_device(config.device)
    task = config.task.build(config.seed, device)
    model = sped_up(task.model, config)
    optimizer = build_optimizer(task.model, config.optimizer)
    hybrid = replace(config.hybrid, warmup_steps=0)
    numbers = count()

    def closure() -> Tensor:
        with autocast(config.precision, device):
            return task.loss(model, task.batch(next(numbers)))

    loops: dict[str, Step] = {
        "bare": _bare(task.model, optimizer, hybrid),
        "plain": HybridTrainer(task.model, optimizer, replace(hybrid, max_predict_steps=0)).step,
        "null": HybridTrainer(task.model, optimizer, replace(hybrid, max_predict_steps=50, predictor="null")).step,
    }
    return loops, closure


def _bare(model: nn.Module, optimizer: torch.optim.Optimizer, config: HybridTrainerConfig) -> Step:
    """The loop that anybody would write."""

    def step(closures: Sequence[Closure]) -> None:
        optimizer.zero_grad(set_to_none=True)
        for closure in closures:
            loss = closure() if len(closures) == 1 else closure() / len(closures)
            loss.backward()  # type: ignore[no-untyped-call]
        if config.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()

    return step


def _take(step: Step, closures: Sequence[Closure], steps: int) -> None:
    for _ in range(steps):
        step(closures)


def main(
    model: str = "small",
    batch: Annotated[str, typer.Option(help="Windows and tokens of a part of a step.")] = "8x512",
    parts: Annotated[int, typer.Option(min=1, help="Micro-batches per step.")] = 1,
    vocab_size: int = 50257,
    data: str = "python",
    device: str = "auto",
    path_device: Annotated[str, typer.Option(help="Where the path is recorded: same or host.")] = "same",
    rounds: Count = 8,
    turns: Count = 3,
    steps: Annotated[int, typer.Option(min=1, help="Per turn.")] = 4,
    out: Annotated[Path | None, typer.Option(help="Where the figures go, as JSON.")] = None,
) -> None:
    """Time the bare loop, the trainer, and the trainer with a recorded path, in turns: compiled, in bf16 on a GPU."""
    with one_line("step_overhead", out) as write:
        config = configured(model, batch, vocab_size, data, device)
        config = replace(config, hybrid=replace(config.hybrid, path_device=path_device))
        cost = step_overhead(config, rounds=rounds, turns=turns, steps=steps, parts=parts)
        where = {"device": device_name(find_device(device)), "torch": str(torch.__version__)}
        asked = {"model": model, "batch": batch, "parts": parts, "path_device": path_device}
        asked |= {"rounds": rounds, "steps_per_round": turns * steps}
        ratios = {"trainer": cost.plain_over_bare, "trainer with path": cost.null_over_bare}
        for name, ratio in ratios.items():
            print(f"{name} over the bare loop: {ratio.median:.4f} [{ratio.low:.4f}, {ratio.high:.4f}]")
        print(f"bare step: {cost.bare_step_ms:.1f} ms")
        measured = {name: ratio.record() | {"per_round": ratio.rounds} for name, ratio in ratios.items()}
        write({"bare_step_ms": cost.bare_step_ms, "over_the_bare_loop": measured, **where, "settings": asked})


if __name__ == "__main__":
    typer.run(main)
