"""A ladder: settings that are added to a vanilla run one after the other, and the time that each takes to its loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hybridlab.base.settings import check_bounds
from hybridlab.study.comparison import base_of
from hybridlab.study.config import RunConfig
from hybridlab.study.statistics import Base, Interval
from hybridlab.study.step_value import SeedRuns, StepValue
from hybridlab.study.study import StudyResult

Train = Callable[[Sequence[RunConfig]], StudyResult]
"""Trains some runs in order, as `run_arms` does."""

LEARNING = ("optimizer", "schedule", "hybrid", "clock")
"""The settings of a run that change its losses by more than rounding."""

FACTOR = 1.5
"""Between two lengths that are tried."""

AVERAGED = "averaged_validation_loss"

SHORTEST, LONGEST = 12, 2
"""Steps of the shortest run that is tried, and how many times the vanilla run's length the longest may be."""


@dataclass(frozen=True)
class Rung:
    """A rung: a setting together with all that were added before it, and what it takes to the vanilla run's final loss.

    config: its settings, at the vanilla run's length
    result: all of its runs, in the order in which they were trained
    steps: nominal steps to that loss, each length with a schedule fitted to it; None where no length reached it
    time_ratio: the vanilla run's wall time over this rung's, compilation and evaluation not counted; its ends are those
        of the steps, at the ends of the interval of the step times' ratio over seeds
    step_seconds: wall time per step of its runs, their mean
    loss_change: validation loss over the vanilla run's after `timed_steps`, in nats, paired by seed, of a rung that
        learns as that does
    lengths: of the runs that the steps are computed from; tried: how many lengths were trained on the first seed
    seeds: per length
    averaged_steps: the same as `steps`, of the weights averaged over the tail of each run (`RunConfig.tail_average`)
    """

    config: RunConfig
    result: StudyResult
    steps: StepValue | None
    time_ratio: StepValue | None
    step_seconds: float
    loss_change: Interval | None = None
    lengths: tuple[int, ...] = ()
    tried: int = 0
    seeds: int = 1
    averaged_steps: StepValue | None = None

    @property
    def name(self) -> str:
        """Of the rung."""
        return self.config.name

    @property
    def compile_seconds(self) -> float | None:
        """For compilation, graphs and warm-up before the first step of its first run; None where nothing is compiled.

        What the rungs before compiled alike is kept.
        """
        first = next(iter(self.result.runs.values()))
        return float(first.closing_figures["warm_up_seconds"]) if self.config.compiled else None

    @property
    def base(self) -> Base:
        """What verdicts stand on, of the vanilla run."""
        return base_of(self.result, self.name)

    @property
    def seconds(self) -> float | None:
        """Wall time to the loss."""
        return self.steps.value * self.step_seconds if self.steps and self.steps.value else None


@dataclass(frozen=True)
class Ladder:
    """A vanilla run, and the changes that lead from it to the fastest one.

    changes: rung -> settings of a run, as `RunConfig` has them; each rung has those of all before it
    timed_steps: length of the runs of a rung that changes rounding at most, which takes as many steps to the loss as
        the rung before it; the vanilla run is evaluated after as many
    seeds: of the vanilla run, and of each rung

    A rung that learns otherwise (another optimizer, schedule or trainer) is trained at three lengths around the one at
    which it ends at the vanilla run's final loss. They are found on the first seed, from the length of the rung before
    downward or upward by factors of 1.5. Its steps to the loss are those at which plain runs of those lengths meet it,
    as `StepValue` takes it, paired by seed.
    """

    vanilla: RunConfig
    changes: Mapping[str, Mapping[str, Any]]
    timed_steps: int
    seeds: int = 3

    def __post_init__(self) -> None:
        """Refuse what cannot be compared."""
        check_bounds(self, "seeds", "timed_steps", least=1)
        if self.timed_steps > self.vanilla.steps or self.timed_steps % self.vanilla.evaluate_every:
            raise ValueError(
                f"timed_steps is {self.timed_steps}: take a multiple of evaluate_every ({self.vanilla.evaluate_every}) "
                f"that is at most steps ({self.vanilla.steps})"
            )
        for name in self.changes:
            self.stacked(name)  # refuses what is no setting of a run

    def stacked(self, name: str) -> RunConfig:
        """The vanilla run with the changes of this rung and of all before it."""
        settings: dict[str, Any] = {}
        for rung, changes in self.changes.items():
            settings |= changes
            if rung == name:
                return replace(self.vanilla, name=name, **settings)
        return self.vanilla

    def alone(self, name: str) -> RunConfig | None:
        """The vanilla run with the changes of this rung only; None where they do nothing by themselves."""
        changes = self.changes.get(name, {})
        return None if set(changes) <= {"cuda_graphs"} else replace(self.vanilla, name=f"{name}, alone", **changes)

    def run(self, train: Train) -> list[Rung]:
        """Train every rung, from the vanilla run up."""
        plain = train([replace(self.vanilla, seed=seed) for seed in range(self.seeds)])
        rungs = [self._vanilla_rung(plain)]
        for name in self.changes:
            config = self.stacked(name)
            take = self._timed if learns_as(config, rungs[-1].config) else self._learned
            rungs.append(take(config, rungs[-1], plain, train))
        return rungs

    def _vanilla_rung(self, plain: StudyResult) -> Rung:
        steps, seconds = self.vanilla.steps, [_seconds(plain, self.vanilla.name, seed) for seed in range(self.seeds)]
        exact, one = (StepValue(q, q, q, self.seeds, (q,) * self.seeds) for q in (float(steps), 1.0))
        step_seconds = sum(seconds) / len(seconds) / steps
        return Rung(self.vanilla, plain, exact, one, step_seconds, lengths=(steps,), seeds=self.seeds)

    def _timed(self, config: RunConfig, before: Rung, plain: StudyResult, train: Train) -> Rung:
        """A rung that learns as the one before it: its steps are that one's, and its time per step is its own."""
        runs = [of_length(config, self.timed_steps, seed) for seed in range(self.seeds)]
        result, vanilla, change = train(runs), self.vanilla, None
        if learns_as(config, vanilla):
            losses = [plain.runs[vanilla.name, run.seed].validation_loss(run.steps) for run in runs]
            change = Interval.of(
                [_loss(result, run.name, run.seed) - loss for run, loss in zip(runs, losses, strict=True)]
            )
        return self._rung(config, result, plain, before.steps, [self.timed_steps], loss_change=change)

    def _learned(self, config: RunConfig, before: Rung, plain: StudyResult, train: Train) -> Rung:
        """A rung that learns otherwise: its steps are found, and paired with the vanilla run's by seed."""
        result = StudyResult()

        def loss_after(steps: int) -> float:
            run = of_length(config, steps)
            result.runs.update(train([run]).runs)
            return _loss(result, run.name)

        first = before.steps.value if before.steps and before.steps.value else self.vanilla.steps
        target, longest = _loss(plain, self.vanilla.name), LONGEST * self.vanilla.steps
        lengths = lengths_around(loss_after, target, round(first / FACTOR), longest)
        runs = [of_length(config, steps, seed) for seed in range(self.seeds) for steps in lengths]
        result |= train([run for run in runs if (run.name, run.seed) not in result.runs])
        steps = self._steps(plain, result, config, lengths)
        tried = len({run.config["steps"] for run in result.runs.values()})
        averaged = self._steps(plain, result, config, lengths, AVERAGED) if config.tail_average else None
        return self._rung(config, result, plain, steps, lengths, tried=tried, averaged_steps=averaged)

    def _rung(
        self,
        config: RunConfig,
        result: StudyResult,
        plain: StudyResult,
        steps: StepValue | None,
        lengths: Sequence[int],
        **found: Any,
    ) -> Rung:
        """With its time per step over runs of these lengths, beside the vanilla run's, paired by seed."""
        names, seeds = [of_length(config, length).name for length in lengths], range(self.seeds)
        spent = [sum(_seconds(result, name, seed) for name in names) / sum(lengths) for seed in seeds]
        faster = [_seconds(plain, self.vanilla.name, s) / self.vanilla.steps / mine for s, mine in enumerate(spent)]
        ratio = steps and _time_ratio(steps, self.vanilla.steps, faster)
        step_seconds = sum(spent) / len(spent)
        return Rung(config, result, steps, ratio, step_seconds, lengths=tuple(lengths), seeds=self.seeds, **found)

    def _steps(
        self,
        plain: StudyResult,
        result: StudyResult,
        config: RunConfig,
        lengths: Sequence[int],
        figure: str = "validation_loss",
    ) -> StepValue | None:
        """Where the rung's figure meets the vanilla run's loss among its own lengths, paired by seed."""
        names = [of_length(config, steps).name for steps in lengths]
        runs = [
            SeedRuns(
                _loss(plain, self.vanilla.name, seed),
                gradient_steps=0.0,
                predicted_steps=1.0,
                control_steps=tuple(lengths),
                control_losses=tuple(_loss(result, name, seed, figure) for name in names),
            )
            for seed in range(self.seeds)
        ]
        return StepValue.of(runs)


def learns_as(config: RunConfig, other: RunConfig) -> bool:
    """Whether two runs differ in rounding and time at most."""
    return all(getattr(config, name) == getattr(other, name) for name in LEARNING)


def of_length(config: RunConfig, steps: int, seed: int = 0) -> RunConfig:
    """The run at another length, its schedule fitted to it, evaluated at its end."""
    schedule = config.lr_schedule.fitted_to(steps)
    name = f"{config.name}, {steps} steps"
    return replace(config, name=name, steps=steps, schedule=schedule, evaluate_every=steps, seed=seed)


def lengths_around(loss_after: Callable[[int], float], target: float, first: int, longest: int) -> list[int]:
    """Three lengths of a geometric series around the one whose final loss is the target, least first.

    loss_after: trains a run of so many steps; first: the length to begin with; longest: that may be tried

    The two between which the target lies, and the next one on the side that it lies nearer to. Where none passes it,
    all that were tried.
    """
    losses: dict[int, float] = {}
    steps = max(first, SHORTEST)
    while SHORTEST <= steps <= longest:
        losses[steps] = loss_after(steps)
        reached = [loss <= target for loss in losses.values()]
        if len(set(reached)) == 2:
            return _three(losses, target)
        steps = round(steps / FACTOR) if reached[0] else round(steps * FACTOR)
    return sorted(losses)


def _three(losses: Mapping[int, float], target: float) -> list[int]:
    short, long = sorted(list(losses)[-2:])
    nearer_to_short = losses[short] - target < target - losses[long]
    return sorted((short, long, round(short / FACTOR) if nearer_to_short else round(long * FACTOR)))


def _loss(result: StudyResult, name: str, seed: int = 0, figure: str = "validation_loss") -> float:
    loss = result.runs[name, seed].closing_figures.get(figure)
    return math.inf if loss is None else loss


def _seconds(result: StudyResult, name: str, seed: int = 0) -> float:
    return result.value("seconds", name, seed)


def times(value: StepValue, factor: float) -> StepValue:
    """The value and its interval, scaled."""
    known, *per_seed = (None if q is None else q * factor for q in (value.value, *value.per_seed))
    return StepValue(known, value.low * factor, value.high * factor, value.seeds, tuple(per_seed))


def _time_ratio(steps: StepValue, vanilla_steps: int, faster: Sequence[float]) -> StepValue:
    """The vanilla run's time over a rung's; faster: its time per step over the rung's, by seed."""
    over_seeds = Interval.of_ratios(faster)
    value = vanilla_steps * over_seeds.mean / steps.value if steps.value else None
    low = vanilla_steps * over_seeds.low / steps.high
    high = vanilla_steps * over_seeds.high / steps.low if steps.low > 0 else math.inf
    pairs = zip(steps.per_seed, faster, strict=False)
    per_seed = tuple(vanilla_steps * ratio / mine if mine else None for mine, ratio in pairs)
    return StepValue(value, low or -math.inf, high, steps.seeds, per_seed)
