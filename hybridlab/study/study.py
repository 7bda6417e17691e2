"""A study: the baseline, the hybrids and their controls, over several seeds."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, Unpack

import pandas as pd

from hybridlab.base.device import check_processes
from hybridlab.base.lock import locked
from hybridlab.base.settings import check_bounds, check_choice, check_types
from hybridlab.depth import DepthSchedule
from hybridlab.engine.config import HybridTrainerConfig
from hybridlab.engine.trainer import DivergenceError
from hybridlab.study.cluster import train_as_jobs
from hybridlab.study.config import RunConfig
from hybridlab.study.isolated import train_side_by_side
from hybridlab.study.record import Run
from hybridlab.study.run import Watch, train
from hybridlab.study.task_checks import check_task

BASELINE = "baseline"
CONTROL = "control"
OnStep = Callable[[str, int], None]
"""Called after a nominal step with the run's label and the steps of all runs known so far."""

OnRun = Callable[[Run], None]
"""Called with each run that has finished, those that `resume` kept included."""


class How(TypedDict, total=False):
    """How several runs are trained.

    resume: keep the runs that have finished, and go on with the one that was interrupted from its last checkpoint, or
        from its start where there is none; what other code has trained is trained afresh, as is everything by default
    watch: called after every step that is taken, with the run and what the step did
    isolated: train each run in a process of its own, so that its memory is too; `watch` is then refused
    at_once: runs that train at the same time, each in a process of its own and on a GPU of its own; the records are
        those of one after the other. The controls of a study follow when all that they depend on has run
    cluster: each run is a job of a cluster, by submitit with these settings, as `train_as_jobs` takes them
    on_run: called with every run that has finished
    """

    resume: bool
    watch: Watch | None
    isolated: bool
    at_once: int
    cluster: Mapping[str, Any] | None
    on_run: OnRun


def ignore(*_: object) -> None:
    """Watch nothing."""


@dataclass(frozen=True)
class Study:
    """What is compared with what.

    base: the baseline's run; every other arm is this run with one thing changed
    hybrids: name -> settings of each hybrid arm
    control_fractions: lengths, as fractions of the baseline's, of further plain runs for the control curve; above 1
        where an arm may end below the baseline
    rates: (arm, learning rate) of each arm whose rate is not the base's, controls by their names; `bracket_study`
        finds them. The baseline's own is the base's
    tried: (arm, what its trials leave to do, nothing where its best rate is bracketed) of each arm and control that
        rates were tried of
    seeds: each arm runs once with each of the seeds 0 ... seeds - 1: same data, same first weights
    """

    base: RunConfig
    hybrids: Mapping[str, HybridTrainerConfig]
    seeds: int = 3
    control_fractions: tuple[float, ...] = (0.5, 0.75)
    rates: tuple[tuple[str, float], ...] = ()
    tried: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        """Refuse what cannot be compared."""
        check_types(self)
        check_bounds(self, "seeds", least=1)
        check_bounds(self, "control_fractions", above=0, most=4)
        if 1 in self.control_fractions:
            raise ValueError("control_fractions has 1, which is the baseline's own length: leave it out")
        if short := [it for it in self.control_fractions if round(it * self.base.steps) < 1]:
            raise ValueError(f"control_fractions has {short[0]}, which is no step of {self.base.steps}: leave it out")
        if twice := [name for name, times in Counter(self.arms()).items() if times > 1]:
            setting, choose = ("hybrids", "name") if twice[0] in self.hybrids else ("control_fractions", "fraction")
            raise ValueError(f"{setting}: a plain arm is called {twice[0]!r} already: choose another {choose}")
        _check_arms("rates", self.rates, [name for name in self.arms() if name != BASELINE])
        _check_arms("tried", self.tried, self.arms())
        for _, rate in self.rates:
            with_rate(self.base, rate)  # refuses what is no rate

    def run(self, folder: Path | str, on_step: OnStep = ignore, **how: Unpack[How]) -> StudyResult:
        """Train every arm, then the controls that the hybrids turned out to need; one folder per run under `folder`.

        The control of an arm that predicts in time takes as many gradient steps; that of one that predicts depth takes
        as many full steps as its shallow and its full ones cost together. Where the study has the shallow model that it
        began as, that one is trained again for as much computation.

        on_step: called after every nominal step; how: as `How` has it

        A run under other settings lies in another folder, which is left alone.
        A run that diverges is told in a warning and recorded as that; the others go on.

        Raises UserError where another process trains the same study.
        """
        folder = Path(folder)
        trained = partial(run_arms, folder=folder, on_step=on_step, **how)
        planned = list(self.planned())
        with _locked(folder, "study", planned):
            result = trained(planned, steps_after=self._control_steps)
            controls = list(self._controls(result))
            return replace(result | trained(controls, steps_before=_steps(planned)), tried=dict(self.tried))

    def arms(self) -> list[str]:
        """Every arm that may run, each hybrid before its controls, which it needs if it predicts anything."""
        lengths = [length_name(fraction) for fraction in self.control_fractions]
        return [BASELINE, *lengths, *(arm for name in self.hybrids for arm in (name, *self._controls_of(name)))]

    def _controls_of(self, name: str) -> list[str]:
        """The arm's truncated control and, of one that grows, its shallow model for as much computation."""
        return [control_name(name), *([shallow_control_name(name)] if self.shallow_of(name) else [])]

    def shallow_of(self, name: str) -> str | None:
        """The arm that trains the first blocks of a growing one and never grows.

        None where the study has none, and for an arm with the stages of one before it, which takes as much computation.
        """
        depths = {arm: hybrid.depth for arm, hybrid in self.hybrids.items() if hybrid.depth}
        depth = depths.get(name)
        if depth is None or not depth.grows or name != _first(depths, "stages", depth.stages):
            return None
        return _first(depths, "depths", depth.depths[:1])

    def _control_steps(self, result: StudyResult) -> int:
        """Steps of the controls: a baseline's at most for each of a hybrid that has not run yet."""
        waiting = (
            self.base.steps * len(self._controls_of(name))
            for name, hybrid in self.hybrids.items()
            for seed in range(self.seeds)
            if hybrid.predicts and (name, seed) not in result.runs
        )
        return sum(waiting) + _steps(list(self._controls(result)))

    def planned(self) -> Iterator[RunConfig]:
        """What runs first: seed by seed, every second one in reverse, so that a drift of the machine is spread."""
        for seed in range(self.seeds):
            arms = [replace(self.base, name=BASELINE, seed=seed)]
            for fraction in self.control_fractions:
                arms.append(self.shortened(length_name(fraction), round(fraction * self.base.steps), seed))
            arms += [replace(self.hybrid_run(name), seed=seed) for name in self.hybrids]
            yield from reversed(arms) if seed % 2 else arms

    def hybrid_run(self, name: str) -> RunConfig:
        """A hybrid arm's run, at its own rate where it has one."""
        return self._at_its_rate(replace(self.base, name=name, hybrid=self.hybrids[name]))

    def _at_its_rate(self, run: RunConfig) -> RunConfig:
        return with_rate(run, dict(self.rates).get(run.name, run.optimizer.lr))

    def _controls(self, result: StudyResult) -> Iterator[RunConfig]:
        """Those of each arm that predicted weights, in time or in depth, and did not diverge."""
        for name in self.hybrids:
            for seed in range(self.seeds):
                ended = [arm for arm, s in result.runs if s == seed and not result.runs[arm, s].diverged]
                if name in ended and result.predicted(name, seed):
                    yield from self.controls_of(name, {arm: result.cost(arm, seed) for arm in ended}, seed)

    def controls_of(self, name: str, costs: Mapping[str, float], seed: int = 0) -> Iterator[RunConfig]:
        """Runs of as much computation as a hybrid took: a plain one and, of one that grew, the shallow model's.

        costs: arm -> what it took, in steps with all blocks
        """
        yield self.shortened(control_name(name), round(costs[name]), seed)
        shallow = self.shallow_of(name)
        if shallow and shallow in costs:
            steps = round(self.base.steps * costs[name] / costs[shallow])
            yield self.shortened(shallow_control_name(name), steps, seed, self.hybrid_run(shallow))

    def shortened(self, name: str, steps: int, seed: int = 0, like: RunConfig | None = None) -> RunConfig:
        """A run of another length, the schedule fitted to it; a plain one, or one like that of an arm."""
        fitted = self.base.lr_schedule.fitted_to(steps)
        return self._at_its_rate(replace(like or self.base, name=name, seed=seed, steps=steps, schedule=fitted))


@dataclass
class StudyResult:
    """Every run of a study, by arm and seed.

    tried: what the trials of each arm's rate leave to do, as in `Study`
    """

    runs: dict[tuple[str, int], Run] = field(default_factory=dict)
    tried: Mapping[str, str] = field(default_factory=dict)

    def __or__(self, other: StudyResult) -> StudyResult:
        """The runs of both."""
        return StudyResult(self.runs | other.runs, {**self.tried, **other.tried})

    @property
    def summaries(self) -> pd.DataFrame:
        """One row per run: name, seed, counts, final figures, time, memory."""
        return pd.DataFrame([run.closing_figures for run in self.runs.values()])

    @property
    def seeds(self) -> list[int]:
        """The seeds that the baseline ran with."""
        return [seed for name, seed in self.runs if name == BASELINE]

    def steps(self, name: str) -> list[pd.DataFrame]:
        """The step tables of one arm, one per seed that it ran with."""
        return [self.runs[key].steps for key in sorted(self.runs) if key[0] == name]

    def is_plain(self, name: str) -> bool:
        """Whether an arm predicts nothing, in time or in depth, whatever it is called."""
        return all(run.is_plain for (arm, _), run in self.runs.items() if arm == name)

    def has_diverged(self, name: str) -> bool:
        """Whether any run of an arm ended with a loss or weights that are not finite."""
        return any(run.diverged for (arm, _), run in self.runs.items() if arm == name)

    def value(self, column: str, name: str, seed: int) -> float:
        """One closing figure of one run."""
        return self.runs[name, seed].closing_figures[column]

    def gradient_steps(self, name: str, seed: int) -> int:
        """How many backward passes a run took."""
        return int(self.value("gradient_steps", name, seed))

    def predicted(self, name: str, seed: int) -> bool:
        """Whether a run predicted weights: in time, or those of blocks that joined."""
        return bool(self.value("predicted_steps", name, seed)) or self.grew(name, seed)

    def grew(self, name: str, seed: int) -> bool:
        """Whether blocks joined in a run."""
        return bool(self.runs[name, seed].closing_figures.get("growths"))

    def was_to_grow(self, name: str, seed: int) -> bool:
        """Whether blocks joined in a run, or would have, had it not diverged before."""
        run = self.runs[name, seed]
        stages = (run.config.get("hybrid", {}).get("depth") or {}).get("stages", ())
        return self.grew(name, seed) or bool(run.diverged and len(stages) > 1)

    def cost(self, name: str, seed: int) -> float:
        """What a run's gradient steps cost, in steps with all blocks, by floating-point operations."""
        figures = self.runs[name, seed].closing_figures
        return float(figures.get("cost_in_full_steps") or figures["gradient_steps"])

    def control_of(self, name: str, seed: int) -> str:
        """The plain run of as much computation as this arm took: the baseline, if it took as many full steps."""
        return control_name(name) if (control_name(name), seed) in self.runs else BASELINE

    def controls_beside(self, name: str, seed: int) -> list[str]:
        """The plain runs that value a hybrid's predicted steps: the study's own lengths, then its truncated control.

        Other hybrids' controls are left out, so that no value depends on which other hybrids a study has.
        """
        hybrid = self.runs[BASELINE, seed].config.get("hybrid")
        alike = [arm for (arm, s), run in self.runs.items() if s == seed and run.config.get("hybrid") == hybrid]
        fixed = [arm for arm in alike if not arm.startswith(control_name(""))]
        own = self.control_of(name, seed)
        fixed.sort(key=lambda arm: self.gradient_steps(arm, seed))
        return fixed if own in fixed else [*fixed, own]

    def unbracketed(self, arms: Iterable[str]) -> tuple[str, ...]:
        """What the trials of these arms' rates leave to do, each once."""
        return tuple(left for arm in dict.fromkeys(arms) if (left := self.tried.get(arm)))

    def controls(self, names: Iterable[str]) -> list[str]:
        """The controls of some hybrids that every seed has: truncated ones, and those of their shallow models."""
        known = [control for name in names for control in (control_name(name), shallow_control_name(name))]
        return [name for name in known if all((name, seed) in self.runs for seed in self.seeds)]


def run_arms(
    configs: Sequence[RunConfig],
    folder: Path | str,
    on_step: OnStep = ignore,
    *,
    steps_before: int = 0,
    steps_after: Callable[[StudyResult], int] = lambda result: 0,
    resume: bool = False,
    watch: Watch | None = None,
    isolated: bool = False,
    at_once: int = 1,
    cluster: Mapping[str, Any] | None = None,
    on_run: OnRun = ignore,
) -> StudyResult:
    """Train each configuration, one folder per run under `folder`.

    on_step: called after every nominal step; resume, watch, isolated, at_once, cluster, on_run: as `How` has them
    steps_before: were done before and count in the total
    steps_after: of runs that may follow, by what has run so far; they count in the total too

    Raises UserError where another process trains the same, for an `at_once` that is no whole number, and as
    `check_task` does; ValueError for two runs of one name and seed, and for `watch` with `isolated`: a run cannot be
    watched from another process.
    """
    check_processes("at_once", at_once)
    if watch and (isolated or cluster is not None or at_once > 1):
        raise ValueError("a run in a process of its own cannot be watched: take isolated=False, or no watch")
    refuse_one_name(label(config.name, config.seed) for config in configs)
    for config in configs:
        check_task(config.task)
    folder, result = Path(folder), StudyResult()
    places = [(config, folder / folder_name(config)) for config in configs]
    total = steps_before + _steps(configs) + steps_after(result)

    def step(config: RunConfig) -> None:
        on_step(label(config.name, config.seed), total)

    ending: Generator[tuple[RunConfig, Callable[[], Run]]] = (
        (run, partial(train, run, place, partial(step, run), resume=resume, watch=watch)) for run, place in places
    )
    if isolated or at_once > 1:
        ending = train_side_by_side(places, at_once, step, resume=resume)
    if cluster is not None:
        ending = train_as_jobs(places, cluster, step, resume=resume)
    with _locked(folder, "runs", configs), closing(ending):
        for config, train_it in ending:
            run = _trained_or_diverged(train_it, folder / folder_name(config))
            result.runs[config.name, config.seed] = run
            total = steps_before + _steps(configs) + steps_after(result)
            on_run(run)
    return StudyResult({key: result.runs[key] for config in configs if (key := (config.name, config.seed))})


def _trained_or_diverged(train: Callable[[], Run], folder: Path) -> Run:
    """A run, also where it diverged: what is left of its study goes on."""
    try:
        return train()
    except DivergenceError as error:
        warnings.warn(f"{error}; the other runs go on", stacklevel=3)
        return Run.load(folder)


def _locked(folder: Path, what: str, configs: Sequence[RunConfig]) -> AbstractContextManager[None]:
    """Refuse a second start of the same runs: it would replace those that have finished."""
    names = " ".join(folder_name(config) for config in configs)
    return locked(folder, f".{what}_{hashlib.sha256(names.encode()).hexdigest()[:6]}.lock")


def with_rate(config: RunConfig, rate: float) -> RunConfig:
    """The same run at another rate of its matrices; the others keep their multiples of it."""
    return replace(config, optimizer=replace(config.optimizer, lr=rate))


def label(name: str, seed: int) -> str:
    """A run's name among others: its arm and its seed."""
    return f"{name}, seed {seed}"


def folder_name(config: RunConfig) -> str:
    """Where a run's record lies among others, as `baseline_3fa9c1_seed_0`.

    Its middle is a hash of the record, the seed aside: a run finds its own record again, and leaves alone those of the
    same arm under other settings.
    """
    settings = config.record() | {"seed": None}
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:6]
    return re.sub(r"\W+", "_", f"{config.name} {key} seed {config.seed}")


def length_name(fraction: float) -> str:
    """The name of a plain run of a fraction of the baseline's length."""
    return f"{CONTROL}, {fraction:.0%} of the steps"


def control_name(hybrid: str) -> str:
    """The name of a hybrid's truncated control."""
    return f"{CONTROL} of {hybrid}"


def shallow_control_name(hybrid: str) -> str:
    """The name of the run of a growing arm's shallow model that takes as much computation as that arm."""
    return f"{control_name(hybrid)}, shallow"


def refuse_one_name(names: Iterable[str]) -> None:
    """Raise ValueError where two runs are called alike: one of them would take the other's place."""
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise ValueError(f"two runs are called {twice[0]!r}: give each a name of its own")


def _check_arms(setting: str, given: Iterable[tuple[str, object]], known: Sequence[str]) -> None:
    """Raise ValueError for the name of no arm, and for one that is given twice."""
    for name, times in Counter(name for name, _ in given).items():
        check_choice(f"{setting}: arm", name, known)
        if times > 1:
            raise ValueError(f"{setting} has the arm {name!r} twice: leave one of them out")


def _first(depths: Mapping[str, DepthSchedule], field: str, value: Any) -> str | None:
    return next((arm for arm, depth in depths.items() if getattr(depth, field) == value), None)


def _steps(configs: Sequence[RunConfig]) -> int:
    return sum(config.steps for config in configs)
