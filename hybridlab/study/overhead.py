"""What the trainer itself costs: its step over the bare loop's, measured in turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor, nn

from hybridlab.config import HybridTrainerConfig
from hybridlab.memory.precision import autocast, set_matmul_precision
from hybridlab.optimizers import build_optimizer
from hybridlab.study.compilation import compiled
from hybridlab.study.run_config import RunConfig, find_device
from hybridlab.trainer import HybridTrainer

Step = Callable[[Callable[[], Tensor]], object]


def step_overhead(config: RunConfig, *, rounds: int = 20, steps: int = 20) -> dict[str, float]:
    """Step times over the bare loop's, on one model and one optimizer.

    rounds: how often each loop has its turn; steps: nominal steps a turn. The first two rounds are thrown away.

    Returns the medians over rounds of paired ratios: `plain_over_bare` (the trainer with max_predict_steps=0),
    `null_over_bare` (with the null predictor: recording and asking included), `recording_over_bare` (the share that
    recording the path adds), and the bare step's median in ms.
    """
    device = find_device(config.device)
    set_matmul_precision(config.precision)
    task = config.task.build(config.seed, device)
    model = task.model
    if config.compiled:
        task.model, model = compiled(task.model, config.memory)
    optimizer = build_optimizer(task.model, config.optimizer)
    hybrid = replace(config.hybrid, warmup_steps=0)
    loops: dict[str, Step] = {
        "bare": _bare(task.model, optimizer, hybrid),
        "plain": HybridTrainer(task.model, optimizer, replace(hybrid, max_predict_steps=0)).step,
        "null": HybridTrainer(task.model, optimizer, replace(hybrid, max_predict_steps=50, predictor="null")).step,
    }
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    batches = iter(range(10**9))

    def closure() -> Tensor:
        with autocast(config.precision, device):
            return task.loss(next(batches), model)

    for _ in range(rounds):
        for name, step in loops.items():
            seconds[name].append(_timed(step, closure, steps, device))
    return _ratios({name: times[2:] for name, times in seconds.items()}, steps)


def _bare(model: nn.Module, optimizer: torch.optim.Optimizer, config: HybridTrainerConfig) -> Step:
    """The loop that anybody would write."""

    def step(closure: Callable[[], Tensor]) -> None:
        optimizer.zero_grad(set_to_none=True)
        closure().backward()  # type: ignore[no-untyped-call]
        if config.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()

    return step


def _timed(step: Step, closure: Callable[[], Tensor], steps: int, device: torch.device) -> float:
    _wait_for(device)
    started = time.perf_counter()
    for _ in range(steps):
        step(closure)
    _wait_for(device)
    return time.perf_counter() - started


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _ratios(seconds: dict[str, list[float]], steps: int) -> dict[str, float]:
    def over_bare(times: list[float]) -> float:
        return median(t / bare for t, bare in zip(times, seconds["bare"], strict=True))

    recording = [null - plain for null, plain in zip(seconds["null"], seconds["plain"], strict=True)]
    return {
        "plain_over_bare": over_bare(seconds["plain"]),
        "null_over_bare": over_bare(seconds["null"]),
        "recording_over_bare": over_bare(recording),
        "bare_step_ms": 1e3 * median(seconds["bare"]) / steps,
    }
