"""A study: the baseline, the hybrids and their controls, over several seeds."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import pandas as pd

from hybridlab.config import HybridTrainerConfig
from hybridlab.runs import Run
from hybridlab.study.train import RunConfig, train

BASELINE = "baseline"
CONTROL = "control"
Announce = Callable[[str], None]


@dataclass(frozen=True)
class Study:
    """What is compared with what.

    base: the baseline's run; every other arm is this run with one thing changed
    hybrids: name -> settings of each hybrid arm
    control_fractions: lengths, as fractions of the baseline's, of further plain runs for the control curve
    seeds: each arm runs once with each of the seeds 0 ... seeds - 1: same data, same first weights
    """

    base: RunConfig
    hybrids: Mapping[str, HybridTrainerConfig]
    seeds: int = 3
    control_fractions: tuple[float, ...] = (0.5,)

    def __post_init__(self) -> None:
        """Refuse what cannot be compared."""
        if self.seeds < 1:
            raise ValueError("seeds must be at least 1")
        if not all(0 < fraction < 1 for fraction in self.control_fractions):
            raise ValueError("control_fractions must lie between 0 and 1")

    @property
    def most_steps(self) -> int:
        """Nominal steps of all runs together, if every hybrid needs a control of its own at full length."""
        arms = 1 + sum(self.control_fractions) + 2 * len(self.hybrids)
        return round(arms * self.base.steps) * self.seeds

    def run(self, folder: Path, on_step: Announce = lambda arm: None) -> StudyResult:
        """Train every arm, one folder a run under `folder`.

        on_step: called after every nominal step with the arm's name
        """
        result = run_arms(self._planned(), folder, on_step)
        return result | run_arms(self._controls(result), folder, on_step)

    def _planned(self) -> Iterator[RunConfig]:
        for seed in range(self.seeds):
            yield replace(self.base, name=BASELINE, seed=seed)
            for fraction in self.control_fractions:
                yield self._shortened(round(fraction * self.base.steps), seed)
            for name, hybrid in self.hybrids.items():
                yield replace(self.base, name=name, seed=seed, hybrid=hybrid)

    def _controls(self, result: StudyResult) -> Iterator[RunConfig]:
        """A plain run for each number of gradient steps that a hybrid took and no plain run has taken."""
        for seed in range(self.seeds):
            taken = {result.gradient_steps(name, seed) for name in self.hybrids}
            for steps in sorted(taken - result.control_losses(seed).keys()):
                yield self._shortened(steps, seed)

    def _shortened(self, steps: int, seed: int) -> RunConfig:
        """The truncated control: fewer steps, the schedule fitted to them."""
        schedule = self.base.schedule.fitted_to(steps)
        return replace(self.base, name=control_name(steps), seed=seed, steps=steps, schedule=schedule)


@dataclass
class StudyResult:
    """Every run of a study, by arm and seed."""

    runs: dict[tuple[str, int], Run] = field(default_factory=dict)

    def __or__(self, other: StudyResult) -> StudyResult:
        """The runs of both."""
        return StudyResult(self.runs | other.runs)

    @property
    def summaries(self) -> pd.DataFrame:
        """One row a run: name, seed, counts, final figures, time, memory."""
        return pd.DataFrame([run.summary for run in self.runs.values()])

    @property
    def seeds(self) -> list[int]:
        """The seeds that the baseline ran with."""
        return [seed for name, seed in self.runs if name == BASELINE]

    def steps(self, name: str) -> list[pd.DataFrame]:
        """The step tables of one arm, one a seed."""
        return [self.runs[name, seed].steps for seed in self.seeds]

    def value(self, column: str, name: str, seed: int) -> float:
        """One closing figure of one run."""
        summary = self.runs[name, seed].summary
        assert summary is not None
        return summary[column]

    def gradient_steps(self, name: str, seed: int) -> int:
        """How many backward passes a run took."""
        return int(self.value("gradient_steps", name, seed))

    def control_losses(self, seed: int) -> dict[int, float]:
        """Final validation loss of every plain run of a seed, by its gradient steps."""
        plain = [name for name, s in self.runs if s == seed and name.startswith((BASELINE, CONTROL))]
        return {self.gradient_steps(n, seed): self.value("validation_loss", n, seed) for n in plain}

    def control_of(self, name: str, seed: int) -> str:
        """The plain run that took as many gradient steps as this hybrid; the baseline if it took them all."""
        steps = self.gradient_steps(name, seed)
        return BASELINE if steps == self.gradient_steps(BASELINE, seed) else control_name(steps)


def run_arms(configs: Iterable[RunConfig], folder: Path, on_step: Announce = lambda arm: None) -> StudyResult:
    """Train each configuration, one folder a run under `folder`."""
    result = StudyResult()
    for config in configs:
        label = f"{config.name}, seed {config.seed}"
        place = folder / re.sub(r"\W+", "_", label)
        result.runs[config.name, config.seed] = train(config, place, partial(on_step, label))
    return result


def control_name(steps: int) -> str:
    """The name of the truncated control of a given length."""
    return f"{CONTROL} {steps} steps"
