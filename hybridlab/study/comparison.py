"""Which arm is better than which, in numbers and in words."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hybridlab.study.statistics import ControlCurve, Interval, step_value
from hybridlab.study.study import BASELINE, StudyResult


@dataclass(frozen=True)
class Comparison:
    """One hybrid arm beside its controls. Differences are hybrid minus control, paired by seed, in nats.

    to_control: final validation loss against the plain run with as many gradient steps
    to_baseline: final validation loss against the full-length plain run
    step_value: worth of a predicted step in real ones, over the seeds that have one; None where nothing was predicted,
        or no control curve falls
    time_ratio: training seconds as a share of the baseline's
    peak_vram_bytes: the greatest peak of its runs; None without a GPU
    """

    name: str
    gradient_steps: float
    predicted_steps: float
    forward_only_passes: float
    accepted: int
    rejected: int
    rollbacks: int
    divergences: int
    validation_loss: Interval
    to_control: Interval
    to_baseline: Interval
    step_value: Interval | None
    time_ratio: float
    peak_vram_bytes: int | None = None

    @property
    def sentence(self) -> str:
        """What was found for this arm."""
        if not self.predicted_steps:
            return f"{self.name}: predicted nothing ({self.asked}); it is the baseline with the cost of asking."
        return (
            f"{self.name}: {self.predicted_steps:.0f} of {self.predicted_steps + self.gradient_steps:.0f} steps were "
            f"predicted; final loss {self.to_control} nats against a plain run with as many gradient steps: "
            f"{self.answer}."
        )

    @property
    def pays(self) -> bool:
        """Whether predicting is better than simply training for fewer steps, beyond doubt."""
        return self.predicted_steps > 0 and self.to_control.sign < 0

    @property
    def asked(self) -> str:
        """How often the gate said no."""
        if not self.rejected:
            return "confidence stayed below its threshold"
        return f"proposals tried and rejected: {self.rejected}"

    @property
    def answer(self) -> str:
        """The answer to: did predicting pay, against simply training for fewer steps?"""
        if not self.predicted_steps:
            return "nothing predicted"
        words = {-1: "better than stopping earlier", 0: "no difference shown", 1: "worse than stopping earlier"}
        return words[self.to_control.sign] if self.to_control.seeds > 1 else "one seed: no verdict"


def compare(result: StudyResult, name: str) -> Comparison:
    """Hold one hybrid arm against its truncated controls and the baseline."""
    seeds = result.seeds

    def over_seeds(column: str) -> list[float]:
        return [result.value(column, name, seed) for seed in seeds]

    def difference(control: list[str]) -> Interval:
        losses = zip(over_seeds("validation_loss"), control, seeds, strict=True)
        return Interval.of([mine - result.value("validation_loss", other, seed) for mine, other, seed in losses])

    def mean(column: str) -> float:
        return sum(over_seeds(column)) / len(seeds)

    def total(column: str) -> int:
        return int(sum(over_seeds(column)))

    return Comparison(
        name=name,
        gradient_steps=mean("gradient_steps"),
        predicted_steps=mean("predicted_steps"),
        forward_only_passes=mean("forward_only_passes"),
        accepted=total("proposals_accepted"),
        rejected=total("proposals_rejected"),
        rollbacks=total("rollbacks"),
        divergences=total("divergences"),
        validation_loss=Interval.of(over_seeds("validation_loss")),
        to_control=difference([result.control_of(name, seed) for seed in seeds]),
        to_baseline=difference([BASELINE] * len(seeds)),
        step_value=_step_value(result, name),
        time_ratio=sum(over_seeds("seconds")) / sum(result.value("seconds", BASELINE, seed) for seed in seeds),
        peak_vram_bytes=_peak_vram_bytes(result, name),
    )


def _peak_vram_bytes(result: StudyResult, name: str) -> int | None:
    summaries = [result.runs[name, seed].closing_figures for seed in result.seeds]
    on_card = all(summary["memory_source"] == "cuda" for summary in summaries)
    return max(int(summary["peak_memory_bytes"]) for summary in summaries) if on_card else None


def _step_value(result: StudyResult, name: str) -> Interval | None:
    """The step value over the seeds that have one."""
    values = [value for seed in result.seeds if (value := _step_value_of(result, name, seed)) is not None]
    return Interval.of(values) if values else None


def _step_value_of(result: StudyResult, name: str, seed: int) -> float | None:
    """None where nothing was predicted, or the control curve does not come down to the hybrid's loss."""
    predicted = int(result.value("predicted_steps", name, seed))
    if not predicted:
        return None
    curve = ControlCurve.fit(result.control_losses(seed))
    if not curve.falls:
        return None
    loss = result.value("validation_loss", name, seed)
    value = step_value(curve, loss, result.gradient_steps(name, seed), predicted)
    return value if math.isfinite(value) else None
