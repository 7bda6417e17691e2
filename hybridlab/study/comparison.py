"""Which arm is better than which, in numbers and in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from hybridlab.base.settings import check_choice
from hybridlab.study.statistics import Base, Interval, holm
from hybridlab.study.step_value import SeedRuns, StepValue
from hybridlab.study.study import BASELINE, StudyResult

SIGNIFICANCE = 0.05
"""The chance, over all arms of a study together, of seeing a difference where there is none."""


@dataclass(frozen=True)
class Comparison:
    """One hybrid arm beside its controls. Differences are hybrid minus control, paired by seed, in nats.

    gradient_steps, predicted_steps, forward_only_passes: means over its seeds
    accepted, rejected: proposals; rollbacks, divergences: all of them totals over its seeds
    validation_loss: final, in nats
    to_control: final validation loss against the plain run with as many gradient steps; it decides whether an arm pays
    to_baseline: final validation loss against the full-length plain run
    accuracy_to_baseline: the same of the accuracy, a part of 1; None of a language model
    p_value: of `to_control`, corrected for all arms of the study that predicted (Holm); tested: how many they are
    base: how much was trained, and whether the rates of the arm, its control and the baseline are bracketed, where they
        were tried; where it lacks anything, there is no verdict
    step_value: what a predicted step is worth in real ones, to read beside the verdict; None where nothing was
        predicted, or the control runs have one length only
    time_ratio: training time over the baseline's of the same seed, all that happens between two steps included
    cost: of its gradient steps, in steps with all blocks, by floating-point operations: a mean over its seeds
    grown: whether it was to predict depth
    compute_to_loss, time_to_loss: of an arm that predicted depth: how many times its own computation, or its own time,
        a plain run takes to its final loss; above 1, it pays. None of others. Their ends are open where the arm or a
        plain run beside it is unbracketed
    peak_vram_bytes: the greatest peak of its runs; None without a GPU
    averaged_loss: of the weights averaged over each run's tail; None where none are (`RunConfig.tail_average`)
    unbracketed: what is left to do about the rates of the arm and of all plain runs beside it; None where none were
        tried
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
    accuracy_to_baseline: Interval | None
    p_value: float
    tested: int
    base: Base
    step_value: StepValue | None
    time_ratio: Interval
    peak_vram_bytes: int | None = None
    cost: float = 0.0
    grown: bool = False
    compute_to_loss: StepValue | None = None
    time_to_loss: StepValue | None = None
    averaged_loss: Interval | None = None
    unbracketed: tuple[str, ...] | None = None

    @property
    def predicted(self) -> bool:
        """Whether it predicted weights, in time or in depth."""
        return self.grown or self.predicted_steps > 0

    @property
    def sentence(self) -> str:
        """What was found for this arm."""
        if self.validation_loss.mean == math.inf:
            return (
                f"{self.name}: diverged with {self.validation_loss.values.count(math.inf)} of {self.base.seeds} seeds."
            )
        if not math.isfinite(self.to_control.mean):
            return f"{self.name}: the plain run that it is compared with diverged."
        time = f"in {self.time_ratio.mean:.2f} times the baseline's time"
        if self.grown:
            computation = self.compute_to_loss.as_ratio if self.compute_to_loss else "open"
            return (
                f"{self.name}: grown to full depth {time}; final loss {self.to_baseline} nats against the baseline, "
                f"{self.to_control} nats against a plain run of as much computation: {self.answer}. Computation of a "
                f"plain run to the same loss, as a multiple of its own: {computation}."
            )
        if not self.predicted_steps:
            return f"{self.name}: predicted nothing ({self.why_idle}), {time}."
        return (
            f"{self.name}: {self.predicted_steps:.0f} of {self.predicted_steps + self.gradient_steps:.0f} steps were "
            f"predicted, {time}; final loss {self.to_control} nats against a plain run with as many gradient steps: "
            f"{self.answer}."
        )

    @property
    def order(self) -> tuple[bool, float]:
        """Sorts by the loss against the control, the lowest first; where a control diverged, none is known: last."""
        return math.isnan(self.to_control.mean), self.to_control.mean

    @property
    def sign(self) -> int:
        """-1 or 1 where the loss is below or above the control's, corrected for all arms of the study; 0 otherwise.

        1 of an arm that diverged.
        """
        if self.to_control.mean == math.inf:
            return 1
        decided = self.predicted and not self.base.lacks and self.p_value < SIGNIFICANCE
        return int(math.copysign(1, self.to_control.mean)) if decided else 0

    @property
    def pays(self) -> bool:
        """Whether predicting is better than simply training for fewer steps, beyond doubt."""
        return self.sign < 0

    @property
    def why_idle(self) -> str:
        """Why it predicted nothing: how many proposals the gate refused, or what may have kept any from being made."""
        if not self.rejected:
            return "confidence stayed below its threshold, or the run ended before the first proposal"
        return f"proposals tried and rejected: {self.rejected}"

    @property
    def answer(self) -> str:
        """The answer to: did predicting pay, against simply training for fewer steps?"""
        if self.validation_loss.mean == math.inf:
            return "diverged"
        if not self.predicted:
            return "predicted nothing"
        if self.base.lacks:
            return f"open ({', '.join(self.base.lacks)})"
        words = {-1: "better than stopping earlier", 0: "no difference shown", 1: "worse than stopping earlier"}
        arms = f"{self.tested} arms" if self.tested != 1 else "one arm"
        return f"{words[self.sign]} (p = {self.p_value:.2g}, corrected for {arms})"


def compare(result: StudyResult, name: str) -> Comparison:
    """Hold one hybrid arm against its truncated controls and the baseline. Raises ValueError for the name of no arm."""
    check_choice("arm", name, dict.fromkeys(arm for arm, _ in result.runs))
    seeds = result.seeds
    figures = pd.DataFrame([result.runs[name, seed].closing_figures for seed in seeds])
    averaged = figures.get("averaged_validation_loss")  # of a run that diverged it may be there, and be None
    on_gpu = (figures["memory_source"] == "cuda").all()
    p_values = _p_values(result)
    grown = any(result.was_to_grow(name, seed) for seed in seeds)
    return Comparison(
        name=name,
        gradient_steps=float(figures["gradient_steps"].mean()),
        predicted_steps=float(figures["predicted_steps"].mean()),
        forward_only_passes=float(figures["forward_only_passes"].mean()),
        accepted=int(figures["proposals_accepted"].sum()),
        rejected=int(figures["proposals_rejected"].sum()),
        rollbacks=int(figures["rollbacks"].sum()),
        divergences=int(figures["divergences"].sum()),
        validation_loss=Interval.of(figures["validation_loss"].tolist()),
        to_control=_to_control(result, name),
        to_baseline=difference(result, name, BASELINE),
        accuracy_to_baseline=difference(result, name, BASELINE, "accuracy") if "accuracy" in figures else None,
        p_value=p_values.get(name, 1.0),
        tested=len(p_values),
        base=base_of(result, compared=[name, BASELINE, *(result.control_of(name, seed) for seed in seeds)]),
        step_value=StepValue.of([_seed_runs(result, name, seed) for seed in seeds]),
        time_ratio=Interval.of_ratios(_time_over_baselines(result, name)),
        peak_vram_bytes=int(figures["peak_memory_bytes"].max()) if on_gpu else None,
        cost=sum(result.cost(name, seed) for seed in seeds) / len(seeds),
        grown=grown,
        compute_to_loss=_to_loss(result, name, [result.cost(name, seed) for seed in seeds]) if grown else None,
        time_to_loss=_to_loss(result, name, _full_steps_in_its_time(result, name)) if grown else None,
        averaged_loss=Interval.of(averaged.tolist()) if averaged is not None and averaged.notna().all() else None,
        unbracketed=_beside(result, name) if result.tried else None,
    )


def base_of(result: StudyResult, arm: str = BASELINE, at_step: int | None = None, compared: Iterable[str] = ()) -> Base:
    """What a study's verdicts stand on: the runs of its baseline, or of another arm that takes its place.

    at_step: the nominal step whose losses are compared; None is the last
    compared: the arms whose rates must be bracketed, where they were tried
    """
    runs = [run for (name, _), run in result.runs.items() if name == arm]
    task, steps = runs[0].config["task"], at_step or int(runs[0].closing_figures["gradient_steps"])
    falls = [float(run.steps["measured_loss"].iloc[0]) - run.validation_loss(at_step) for run in runs]
    tokens = steps * task["batch_size"] * task.get("block_size", 1)
    return Base(steps, len(runs), tokens, min(falls), result.unbracketed(compared))


def difference(
    result: StudyResult, name: str, controls: str | Sequence[str], column: str = "validation_loss"
) -> Interval:
    """An arm's closing figure less another arm's, paired by seed.

    controls: the other arm, or one for each seed
    """
    beside = [controls] * len(result.seeds) if isinstance(controls, str) else controls
    pairs = zip(beside, result.seeds, strict=True)
    return Interval.of([result.value(column, name, s) - result.value(column, control, s) for control, s in pairs])


def _to_control(result: StudyResult, name: str) -> Interval:
    return difference(result, name, [result.control_of(name, seed) for seed in result.seeds])


def _p_values(result: StudyResult) -> dict[str, float]:
    """Of every arm that predicted anything, corrected for all of them."""
    arms = dict.fromkeys(name for name, _ in result.runs if not result.is_plain(name))
    predicted = [name for name in arms if any(result.predicted(name, seed) for seed in result.seeds)]
    return holm({name: _to_control(result, name).p_value for name in predicted})


def _to_loss(result: StudyResult, name: str, costs: Sequence[float]) -> StepValue | None:
    """Full steps that a plain run takes to an arm's loss, over the arm's own cost in full steps, seed by seed."""
    runs = [_seed_runs(result, name, seed, (0.0, cost)) for seed, cost in zip(result.seeds, costs, strict=True)]
    ratio = StepValue.of(runs)
    return replace(ratio, low=-math.inf, high=math.inf) if ratio and _beside(result, name) else ratio


def _beside(result: StudyResult, name: str) -> tuple[str, ...]:
    """What is left to do about the rates of an arm and of the plain runs that value it."""
    return result.unbracketed([name, *(arm for seed in result.seeds for arm in result.controls_beside(name, seed))])


def _full_steps_in_its_time(result: StudyResult, name: str) -> list[float]:
    """How many of the baseline's steps take the time of an arm, seed by seed."""
    ratios = zip(_time_over_baselines(result, name), result.seeds, strict=True)
    return [ratio * result.cost(BASELINE, seed) for ratio, seed in ratios]


def _time_over_baselines(result: StudyResult, name: str) -> list[float]:
    """An arm's time over the baseline's, seed by seed; NaN where that took none."""
    times = ((result.value("seconds", arm, seed) for arm in (name, BASELINE)) for seed in result.seeds)
    return [mine / (plain or math.nan) for mine, plain in times]


def _seed_runs(result: StudyResult, name: str, seed: int, steps: tuple[float, float] | None = None) -> SeedRuns:
    """steps: gradient and predicted ones; None takes those of the run."""
    controls = result.controls_beside(name, seed)
    own = (result.gradient_steps(name, seed), result.value("predicted_steps", name, seed))
    gradient_steps, predicted_steps = steps or own
    return SeedRuns(
        loss=result.value("validation_loss", name, seed),
        gradient_steps=gradient_steps,
        predicted_steps=predicted_steps,
        control_steps=tuple(result.gradient_steps(control, seed) for control in controls),
        control_losses=tuple(result.value("validation_loss", control, seed) for control in controls),
    )
