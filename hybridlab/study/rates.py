"""The learning rate of a run, bracketed by runs at other rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from hybridlab.base.errors import UserError
from hybridlab.optim.build import LARGEST_LR
from hybridlab.study.config import RunConfig
from hybridlab.study.study import BASELINE, Study, StudyResult, refuse_one_name, run_arms, with_rate

FACTOR = 2.0
"""Between two rates that are tried."""


@dataclass
class RateTrials:
    """The rates that one arm was tried at.

    losses: rate -> validation loss in nats, infinite where the run diverged
    costs: rate -> what the run took, in steps with all blocks
    """

    losses: dict[float, float] = field(default_factory=dict)
    costs: dict[float, float] = field(default_factory=dict)

    def note(self, trial: RunConfig, result: StudyResult) -> None:
        """Take down how a trial ended."""
        loss = result.value("validation_loss", trial.name, trial.seed)
        self.losses[trial.optimizer.lr] = math.inf if loss is None or not math.isfinite(loss) else float(loss)
        self.costs[trial.optimizer.lr] = result.cost(trial.name, trial.seed)

    @property
    def trained(self) -> bool:
        """Whether it did not diverge at every rate."""
        return any(map(math.isfinite, self.losses.values()))

    @property
    def best(self) -> float:
        """The rate with the lowest loss, of equal ones the lowest rate: it says nothing where none trained."""
        return min(self.losses, key=lambda rate: (not math.isfinite(self.losses[rate]), self.losses[rate], rate))

    @property
    def edge(self) -> str:
        """Whether the best rate is the "lowest" or "highest" of all: a better one may lie beyond; else nothing."""
        if self.best == min(self.losses):
            return "lowest"
        return "highest" if self.best == max(self.losses) else ""

    def unbracketed(self, arm: str) -> str:
        """What to do where the best rate of this arm is at an edge, or none trained; nothing where it is bracketed."""
        if not self.trained:
            tried = f"{len(self.losses)} trials, from {min(self.losses):.3g} to {max(self.losses):.3g}"
            return f"{arm} diverged at every rate ({tried}): begin at a lower one, or mend the run first"
        return f"the best rate of {arm} is the {self.edge} tried, {self.best:.3g}: bracket it" if self.edge else ""

    def __str__(self) -> str:
        ends = {rate: f"{loss:.4f}" if math.isfinite(loss) else "diverged" for rate, loss in self.losses.items()}
        tried = ", ".join(f"{rate:.3g}: {ends[rate]}" for rate in sorted(ends))
        told = f"the {self.edge} that was tried: a better one may lie beyond" if self.edge else "bracketed"
        return f"best rate {self.best:.3g} ({told}); losses in nats at {tried}"


class Bracket:
    """Some runs, each tried at as many rates as the others, relative to its own rate, so that none is tuned better.

    trials: by the run's name; done: steps of all trials so far, and of what ran before
    how: further settings of `run_arms`
    """

    def __init__(self, configs: Sequence[RunConfig], folder: Path | str, *, steps_before: int = 0, **how: Any) -> None:
        refuse_one_name(config.name for config in configs)
        self._configs = configs
        self._train: Callable[..., StudyResult] = partial(run_arms, folder=folder, **how)
        self._powers: list[int] = []
        self.done = steps_before
        self.trials = {config.name: RateTrials() for config in configs}

    @property
    def count(self) -> int:
        """Trials of each run."""
        return len(self._powers)

    def widen(self, most: int, least: int = 3) -> Bracket:
        """Try further rates: until there are so many at least, and while the best of any run is at an edge.

        Raises ValueError for fewer than 3, and UserError where there is no room for a rate on both sides of a run's
        own.
        """
        if most < 3:
            raise ValueError(f"most is {most}: a bracket takes at least 3 trials")
        if not self._powers:
            if not all(map(self._can_be, (-1, 0, 1))):
                most_rate = LARGEST_LR / FACTOR
                raise UserError(f"rates on both sides are tried, up to {LARGEST_LR:g}: begin at {most_rate:g} or lower")
            self._try([-1, 0, 1])
        while powers := self._wanted(least)[: max(0, most - self.count)]:
            self._try(powers)
        return self

    def _wanted(self, least: int) -> list[int]:
        """The next rates, beyond those edges at which a best one is; where there is none, the next towards `least`."""
        edges = {trial.edge for trial in self.trials.values()}
        ends = min(self._powers) - 1, max(self._powers) + 1
        beyond = [ends[0]] * ("lowest" in edges) + [ends[1]] * ("highest" in edges)
        if not self.trials or not (beyond or self.count < least):
            return []
        return [power for power in beyond if self._can_be(power)] or [
            power for power in ends if self._can_be(power) and self.count < least
        ][:1]

    def _can_be(self, power: int) -> bool:
        return all(0 < config.optimizer.lr * FACTOR**power <= LARGEST_LR for config in self._configs)

    def _try(self, powers: list[int]) -> None:
        tried = {(config.name, power): _at(config, FACTOR**power) for power in powers for config in self._configs}
        result = self._train(list(tried.values()), steps_before=self.done)
        for (name, _), trial in tried.items():
            self.trials[name].note(trial, result)
        self.done += sum(trial.steps for trial in tried.values())
        self._powers += powers

    def trained(self) -> dict[str, RateTrials]:
        """The trials. Raises UserError where a run diverged at every rate: it has no best one."""
        trials = self.trials
        if lost := [trial.unbracketed(name) for name, trial in trials.items() if not trial.trained]:
            raise UserError(
                "; ".join((*lost, *(f"{name}: {trial}" for name, trial in trials.items() if trial.trained)))
            )
        return trials


def bracket_rates(
    configs: Sequence[RunConfig], folder: Path | str, *, most: int = 7, **how: Any
) -> dict[str, RateTrials]:
    """Train each run at half, once and twice its rate, and further while the best of any is at an edge; by name.

    Each trial has the run's own length, schedule, batch and seed. All runs are tried at as many rates, relative to
    their own, so that none is tuned better than another; differences of a trial that are within the noise of a seed say
    nothing.

    most: trials of a run, at least 3; how: as in `run_arms`, without the cluster

    Raises ValueError for fewer trials and for two runs of one name, and UserError where a run diverged at every rate,
    since it has no best one, and where there is no room for a rate on both sides of a run's own.
    """
    return Bracket(configs, folder, **how).widen(most).trained()


def bracket_study(
    study: Study, folder: Path | str, *, most: int = 7, **how: Any
) -> tuple[Study, dict[str, RateTrials]]:
    """The study with the best rate of each arm and of each control, all bracketed at their own lengths.

    A control's length is what its arm cost at the arm's best rate. Arms and controls are tried at as many rates: where
    one of them needs more, the others follow. What is compared with an arm or a control whose best rate is at an edge
    of those tried stays open. most, how: as in `bracket_rates`
    """
    arms = Bracket([run for run in study.planned() if not run.seed], folder, **how).widen(most)
    controls = _controls(study, arms.trained())
    bracket, least = Bracket(controls, folder, steps_before=arms.done, **how), arms.count
    while controls and bracket.widen(most, least).count > arms.count:
        arms.done = bracket.done
        least = arms.widen(most, bracket.count).count
        if (again := _controls(study, arms.trials)) != controls:  # an arm has another best rate now, at another cost
            controls, bracket = again, Bracket(again, folder, **how)
        bracket.done = arms.done
    trials = arms.trials | bracket.trained()
    rates = {name: trial.best for name, trial in trials.items()}
    base, tried = with_rate(study.base, rates.pop(BASELINE)), {name: t.unbracketed(name) for name, t in trials.items()}
    return replace(study, base=base, rates=tuple(rates.items()), tried=tuple(tried.items())), trials


def _controls(study: Study, trials: Mapping[str, RateTrials]) -> list[RunConfig]:
    """The controls of each hybrid that cost less than the baseline at its best rate."""
    costs = {name: trials[name].costs[trials[name].best] for name in study.hybrids}
    cheaper = [name for name, cost in costs.items() if study.hybrids[name].predicts and round(cost) < study.base.steps]
    return [control for name in cheaper for control in study.controls_of(name, costs)]


def _at(config: RunConfig, factor: float) -> RunConfig:
    trial = with_rate(config, factor * config.optimizer.lr)
    return replace(trial, name=f"{config.name}, rate {trial.optimizer.lr:.3g}", evaluate_every=config.steps)
