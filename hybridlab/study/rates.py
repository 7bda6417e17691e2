"""The learning rate of a run, bracketed by runs at other rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from hybridlab.base.errors import UserError
from hybridlab.study.config import RunConfig
from hybridlab.study.run import Watch
from hybridlab.study.study import (
    BASELINE,
    OnStep,
    Study,
    StudyResult,
    control_name,
    ignore,
    refuse_one_name,
    run_arms,
    with_rate,
)

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


def bracket_rates(
    configs: Sequence[RunConfig],
    folder: Path | str,
    on_step: OnStep = ignore,
    *,
    most: int = 7,
    resume: bool = False,
    watch: Watch | None = None,
    isolated: bool = False,
    at_once: int = 1,
    steps_before: int = 0,
) -> dict[str, RateTrials]:
    """Train each run at half, once and twice its rate, and further while the best of any is at an edge; by name.

    Each trial has the run's own length, schedule, batch and seed. All runs are tried at as many rates, relative to
    their own, so that none is tuned better than another; differences of a trial that are within the noise of a seed say
    nothing.

    most: trials of a run, at least 3; steps_before: as in `run_arms`; the rest as in `Study.run`

    Raises ValueError for fewer trials and for two runs of one name, and UserError where a run diverged at every rate:
    it has no best one.
    """
    if most < 3:
        raise ValueError(f"most is {most}: a bracket takes at least 3 trials")
    refuse_one_name(config.name for config in configs)
    trials = {config.name: RateTrials() for config in configs}
    powers, wanted, done = [-1, 0, 1], [-1, 0, 1], steps_before
    train = partial(
        run_arms, folder=folder, on_step=on_step, resume=resume, watch=watch, isolated=isolated, at_once=at_once
    )
    while wanted:
        tried = {(config.name, power): _at(config, FACTOR**power) for power in wanted for config in configs}
        result = train(list(tried.values()), steps_before=done)
        for (name, _), trial in tried.items():
            trials[name].note(trial, result)
        done += sum(trial.steps for trial in tried.values())
        edges = {trial.edge for trial in trials.values()}
        beyond = [min(powers) - 1] * ("lowest" in edges) + [max(powers) + 1] * ("highest" in edges)
        wanted = beyond[: max(0, most - len(powers))]
        powers += wanted
    if lost := [trial.unbracketed(name) for name, trial in trials.items() if not trial.trained]:
        raise UserError("; ".join((*lost, *(f"{name}: {trial}" for name, trial in trials.items() if trial.trained))))
    return trials


def bracket_study(study: Study, folder: Path | str, **how: Any) -> tuple[Study, dict[str, RateTrials]]:
    """The study with the best rate of each arm and of each plain control, all bracketed at their own lengths.

    A control's length is what its arm cost at the arm's best rate. What is compared with an arm or a control whose best
    rate is at an edge of those tried stays open. how: further settings of `bracket_rates`
    """
    planned = [run for run in study.planned() if not run.seed]
    trials = bracket_rates(planned, folder, **how)
    done = sum(len(trials[run.name].losses) * run.steps for run in planned)
    costs = {name: round(trials[name].costs[trials[name].best]) for name in study.hybrids}
    predicted = {name: cost for name, cost in costs.items() if study.hybrids[name].predicts and cost < study.base.steps}
    controls = [study.shortened(control_name(name), cost) for name, cost in predicted.items()]
    trials |= bracket_rates(controls, folder, steps_before=done, **how)
    rates = {name: trial.best for name, trial in trials.items()}
    base, tried = with_rate(study.base, rates.pop(BASELINE)), {name: t.unbracketed(name) for name, t in trials.items()}
    return replace(study, base=base, rates=tuple(rates.items()), tried=tuple(tried.items())), trials


def _at(config: RunConfig, factor: float) -> RunConfig:
    trial = with_rate(config, factor * config.optimizer.lr)
    return replace(trial, name=f"{config.name}, rate {trial.optimizer.lr:.3g}", evaluate_every=config.steps)
