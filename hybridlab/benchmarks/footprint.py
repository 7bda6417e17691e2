"""What training arms take of a GPU: predicted, measured, and paid for in time, in loss and by jumps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from statistics import median
from typing import Any

import pandas as pd

from hybridlab.base.errors import UserError
from hybridlab.engine.config import HybridTrainerConfig
from hybridlab.engine.phases import Phase
from hybridlab.memory import MemoryConfig, MixedPrecisionConfig, PredictAwareMemoryConfig
from hybridlab.memory.config import CLIP_NORM
from hybridlab.planner.gpu_specs import GPUS, step_time_ms
from hybridlab.planner.plan import Plan
from hybridlab.study.comparison import base_of
from hybridlab.study.config import RunConfig
from hybridlab.study.memory_log import gpu_busy_percent
from hybridlab.study.planning import plan_of
from hybridlab.study.record import Run
from hybridlab.study.statistics import Base, Interval
from hybridlab.study.study import StudyResult


@dataclass(frozen=True)
class Footprint:
    """One arm.

    predicted: its plan, made without a GPU
    measured_allocated_bytes: peak of live tensors in the measured run; None without a GPU
    peak_memory_bytes: the run's peak as the GPU counts it, or the process's without a GPU
    steps_ms: median gradient step of each seed; None where its run was too short for a stable step time
    validation_loss: mean over seeds, nats; change: to the control, paired by seed; None for the control itself
    base: how much training `change` rests on; None where there is none
    gpu_busy_percent: of the time of gradient steps; the rest the GPU waits for the host. None where nobody says it
    """

    arm: str
    predicted: Plan
    measured_allocated_bytes: int | None
    peak_memory_bytes: int
    steps_ms: tuple[float | None, ...]
    validation_loss: float
    change: Interval | None
    base: Base | None = None
    gpu_busy_percent: float | None = None

    @property
    def step_ms(self) -> float | None:
        """Median gradient step of the run whose memory was measured."""
        return self.steps_ms[0]

    def step_ratio(self, other: Footprint) -> Interval | None:
        """Its step over another arm's, paired by seed; None where neither of a pair has a stable step time."""
        pairs = zip(self.steps_ms, other.steps_ms, strict=False)
        ratios = [mine / theirs for mine, theirs in pairs if mine and theirs]
        return Interval.of_ratios(ratios) if ratios else None

    @property
    def error(self) -> float | None:
        """Predicted over measured peak, less one."""
        measured = self.measured_allocated_bytes
        return self.predicted.peak_allocated_bytes / measured - 1 if measured else None

    def row(self, model: str) -> dict[str, Any]:
        """As the table "memory" of a results file has it; of one seed there is no interval."""
        change = self.change
        low, high = (change.low, change.high) if change and change.seeds > 1 else (None, None)
        return {
            "arm": self.arm,
            "model": model,
            "predicted_allocated_bytes": self.predicted.peak_allocated_bytes,
            "measured_allocated_bytes": self.measured_allocated_bytes,
            "peak_memory_bytes": self.peak_memory_bytes,
            "step_ms": self.step_ms,
            "gpu_busy_percent": self.gpu_busy_percent,
            "estimated_5080_ms": step_time_ms(self.predicted, GPUS["rtx5080"]),
            "validation_loss": self.validation_loss,
            "loss_change": change.mean if change else None,
            "loss_change_low": low,
            "loss_change_high": high,
            "parts": dict(self.predicted.parts),
        }


def footprint(result: StudyResult, config: RunConfig, control: str, *, at_step: int | None = None) -> Footprint:
    """The footprint of the arm that `config` is of, beside the control arm's loss; memory is of its seed 0.

    at_step: the nominal step whose validation losses are compared; None compares those at the end
    """
    run = result.runs[config.name, 0]
    summary = run.closing_figures
    seeds = sorted(seed for name, seed in result.runs if name == config.name)
    losses = [result.runs[config.name, seed].validation_loss(at_step) for seed in seeds]
    shared = [(seed, loss) for seed, loss in zip(seeds, losses, strict=True) if (control, seed) in result.runs]
    change = [loss - result.runs[control, seed].validation_loss(at_step) for seed, loss in shared]
    judged = config.name != control and bool(change)
    return Footprint(
        arm=config.name,
        predicted=plan_of(config),
        measured_allocated_bytes=summary.get("peak_allocated_bytes"),
        peak_memory_bytes=summary["peak_memory_bytes"],
        steps_ms=tuple(result.runs[config.name, seed].closing_figures["gradient_step_ms"] for seed in seeds),
        validation_loss=sum(losses) / len(losses),
        change=Interval.of(change) if judged else None,
        base=replace(base_of(result, control, at_step), seeds=len(change)) if judged else None,
        gpu_busy_percent=gpu_busy_percent(run),
    )


@dataclass(frozen=True)
class PredictPhase:
    """What the Predict phases of a run left on the GPU, and how long they took.

    allocated_bytes: live tensors between what leaves and what returns; None without a GPU
    reserved_bytes: what torch then holds of the GPU, forward passes included; None without a GPU
    occupied_bytes: what the GPU counts then: reserved, and CUDA's context; None without a GPU
    jumps: the times of each; the first takes memory from the host that later ones find taken
    gradient_step_ms: median step of Full
    """

    allocated_bytes: int | None
    reserved_bytes: int | None
    occupied_bytes: int | None
    jumps: tuple[JumpTimes, ...]
    gradient_step_ms: float

    def typical_ms(self, part: str = "whole") -> float:
        """Median over the jumps but the first; of one alone, its own. `part`: a field of `JumpTimes`."""
        return median(getattr(jump, part) for jump in self.jumps[1:] or self.jumps)

    def beyond_ms(self, other: PredictPhase) -> list[float]:
        """How much longer each jump took than the one of the same number in another run; of the first, nothing."""
        return [mine.whole - theirs.whole for mine, theirs in zip(self.jumps[1:], other.jumps[1:], strict=False)]


def predict_phase(run: Run) -> PredictPhase:
    """Look at a run's whole jumps. Raises UserError where there is none."""
    jumps = tuple(jump_times(run.steps))
    if not jumps and run.diverged:
        raise UserError(
            f"{run.folder} diverged before a jump was over: lower the learning rate, or warm up for longer; its record "
            "is kept"
        )
    if not jumps:
        raise UserError(
            f"{run.folder} has no whole jump: set confidence_threshold to 0 and gate to False, correct_steps to 1 or "
            "more, and steps to well beyond the first proposal"
        )
    summary = run.closing_figures
    allocated, reserved = summary.get("predict_allocated_bytes"), summary.get("predict_reserved_bytes")
    on_gpu = None if reserved is None else reserved + (summary["context_bytes"] or 0)
    return PredictPhase(allocated, reserved, on_gpu, jumps, gradient_step_ms(run.steps))


def footprints(result: StudyResult, configs: Sequence[RunConfig], control: str) -> list[Footprint]:
    """One footprint per configuration; runs of its further seeds are taken in."""
    return [footprint(result, config, control) for config in configs]


@dataclass(frozen=True)
class JumpTimes:
    """One jump and the steps of Correct after it, in ms of wall time.

    Parts count beyond ordinary steps: the run's median step of Full, and its median predicted step that neither moves
    the weights nor measures the loss.

    proposing: the gradient step before: Gram matrix of the path, and a copy to go back to
    offloading: the first predicted step: the weights move, and what is offloaded goes
    moving: the first steps of its further chunks: the weights move again, and are restored with the last
    restoring: what follows in Predict and Correct: what else was offloaded comes back, and the path begins anew
    whole: all of the time from the end of an ordinary step to the end of Correct: what proposing takes, the predicted
        steps, and the steps of Correct with their forward passes
    steps: predicted ones

    The trainer waits for the device before Predict, after Correct, and in every predicted step, so that the host's
    clock is right there. Offloading and restoring in a step go beside its motion. Before `proposing` one step may be
    under way.
    """

    proposing: float
    offloading: float
    moving: float
    restoring: float
    whole: float
    steps: int


def jump_times(steps: pd.DataFrame) -> list[JumpTimes]:
    """Every jump that was followed by Correct, whole, and by another step.

    steps: a run's, as its steps.parquet has them
    """
    timed = pd.DataFrame({"phase": steps["phase"].map(str), "ms": 1e3 * steps["seconds"].diff()})
    predicted, measured = timed["phase"] == Phase.PREDICT, steps["measured_loss"].notna()
    timed["moves"] = predicted & ~(predicted & ~measured).shift(fill_value=False)
    resting = timed["ms"][predicted & ~timed["moves"] & ~measured]
    ordinary = {True: resting.median() if len(resting) else 0.0, False: gradient_step_ms(steps)}
    timed["beyond"] = timed["ms"] - predicted.map(ordinary)
    return [_times(timed, *jump) for jump in _whole_jumps(timed["phase"].tolist())]


def gradient_step_ms(steps: pd.DataFrame) -> float:
    """The median step of Full, in ms of wall time."""
    return float(1e3 * steps["seconds"].diff()[steps["phase"].map(str) == Phase.FULL].median())


def _whole_jumps(phases: list[str]) -> Iterator[tuple[int, int, int]]:
    """Where Predict begins, where Correct begins after it, and where that has ended."""
    stretches = [(phase, len(list(stretch))) for phase, stretch in groupby(phases)]
    begins = [0, *accumulate(length for _, length in stretches)]
    for i in range(1, len(stretches) - 2):
        if [phase for phase, _ in stretches[i : i + 2]] == [Phase.PREDICT, Phase.CORRECT]:
            yield begins[i], begins[i + 1], begins[i + 2]


def _times(timed: pd.DataFrame, predict: int, correct: int, end: int) -> JumpTimes:
    """Of one jump, in ms; a step that moves the weights begins a chunk."""
    beyond = timed["beyond"]
    moves = [i for i in range(predict, correct) if timed["moves"][i]]
    return JumpTimes(
        proposing=float(beyond[predict - 1]),
        offloading=float(beyond[predict]),
        moving=float(beyond[moves[1:]].sum()),
        restoring=float(beyond[moves[-1] + 1 : end].sum()),
        whole=float(beyond[predict - 1] + timed["ms"][predict:end].sum()),
        steps=correct - predict,
    )


def plain_with(memory: MemoryConfig) -> HybridTrainerConfig:
    """Plain training with these memory features; inside backward they clip themselves (`clip_in_backward`)."""
    return HybridTrainerConfig.plain(clip_norm=_clip_norm(memory), memory=memory)


def jumping_with(memory: MemoryConfig, *, full_steps: int, **changes: Any) -> HybridTrainerConfig:
    """Jumps on every occasion, so that there is a Predict phase to look at; the path lies on the host, in bf16.

    full_steps: gradient steps between two jumps; changes: further settings of `HybridTrainerConfig`
    """
    settings: dict[str, Any] = {
        "warmup_steps": 2,
        "max_predict_steps": 20,
        "correction_interval": 10,
        "correct_steps": 1,
        "confidence_threshold": 0.0,
        "gate": False,
        "predictor": "ema_nesterov",
        "path_device": "host",
        "path_dtype": "bf16",
    }
    return HybridTrainerConfig(full_steps=full_steps, clip_norm=_clip_norm(memory), memory=memory, **settings | changes)


def ways_to_predict() -> dict[str, MemoryConfig]:
    """`fit_16gb` for jumps: all offloaded in Predict, the same restored after the jump, and nothing offloaded."""
    preset = MemoryConfig.fit_16gb(predict_aware=PredictAwareMemoryConfig("pinned"))
    late = PredictAwareMemoryConfig("pinned", lookahead=0)
    return {
        "all away": preset,
        "all away, no lookahead": replace(preset, predict_aware=late),
        "nothing away": replace(preset, predict_aware=None, mixed_precision=MixedPrecisionConfig.conservative()),
    }


def _clip_norm(memory: MemoryConfig) -> float | None:
    return None if memory.step_in_backward else CLIP_NORM
