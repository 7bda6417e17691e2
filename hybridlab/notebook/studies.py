"""Trains whole studies, and single runs beside them, from a notebook; records go below the project's `runs` folder."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

from hybridlab.base.errors import UserError
from hybridlab.base.front_end import in_jupyterlab
from hybridlab.notebook.session import runs_folder
from hybridlab.panel.controls import Controls
from hybridlab.panel.live import Live, LiveBar, interrupts
from hybridlab.panel.progress import Progress, shows_panel
from hybridlab.study.config import RunConfig
from hybridlab.study.launched import train_on_ranks
from hybridlab.study.ranks import RanksConfig
from hybridlab.study.rates import RateTrials, bracket_study
from hybridlab.study.record import Run
from hybridlab.study.step_log import StepRecord
from hybridlab.study.study import Study, StudyResult, folder_name, label, run_arms
from hybridlab.study.watched_run import WatchedRun

Arms = Sequence[tuple[str, int]]
"""Arm and seed of each run."""


class Stopped(UserError):
    """A person stopped the cell."""


_STOPPED: dict[str, object] = {}
"""What a person stopped, by notebook: running the same again goes on with it."""


def run_study(study: Study, notebook: str, *, resume: bool = False, at_once: int = 1) -> StudyResult:
    """Train every arm of a study and its controls; records go to `runs/<notebook>`.

    resume: as in `Study.run`: go on with the runs that an earlier start left
    at_once: as in `Study.run`: runs that train at the same time, on GPUs of their own; a bar alone shows their progress
    """
    arms = [(name, seed) for name in study.arms() for seed in range(study.seeds)]
    with _followed(study.base.steps, study, arms, notebook, resume, at_once=at_once) as how:
        return study.run(runs_folder(notebook), **how)


def find_rates(
    study: Study, notebook: str, *, most: int = 7, resume: bool = False, at_once: int = 1
) -> tuple[Study, dict[str, RateTrials]]:
    """Bracket the rate of every arm and control of a study, as `bracket_study` does; records go to `runs/<notebook>`.

    resume, at_once: as in `run_study`

    Returns the study at the best rates, and what was tried.
    """
    arms = [(name, 0) for name in study.arms()]
    with _followed(study.base.steps, (study, most), arms, notebook, resume, at_once=at_once) as how:
        del how["on_run"]  # a trial is no run of the study
        return bracket_study(study, runs_folder(notebook), most=most, **how)


def run_configs(
    configs: Sequence[RunConfig],
    notebook: str,
    *,
    control: str = "",
    isolated: bool = False,
    resume: bool = False,
    at_once: int = 1,
) -> StudyResult:
    """Train some runs in order; records go to `runs/<notebook>`.

    control: the arm that the others are compared with; "" for none
    isolated: each in a process of its own, so that its memory is measured by itself; a bar alone
        shows its progress, without gauges or buttons: interrupt the kernel to stop. Running the same again then keeps
        the runs that have finished, and goes on with the one under way from its last checkpoint, if it writes any
    resume, at_once: as in `run_study`

    Raises UserError, once all have run, where the control diverged.
    """
    total, arms = sum(config.steps for config in configs), [(config.name, config.seed) for config in configs]
    if not configs:
        return StudyResult()
    with _followed(total, tuple(configs), arms, notebook, resume, isolated, at_once) as how:
        result = run_arms(configs, runs_folder(notebook), **how)
    if control and result.has_diverged(control):
        raise UserError(
            f"{control} diverged, and nothing can be compared without it: lower the learning rate, or warm up for "
            f"longer; the records of all runs are kept in runs/{notebook}"
        )
    return result


def run_on_ranks(
    config: RunConfig, notebook: str, nproc: int, *, ranks: RanksConfig | None = None, resume: bool = False
) -> Run:
    """Train one run in several processes, each on a GPU of its own, as torchrun does; its record is as any other's.

    nproc: how many, on this host; ranks: how they share the model; resume: as in `run_study`

    The bar shows one loss and a gauge for each GPU. Ctrl-C, or an interrupt of the kernel, stops all of them; running
    the same again goes on from the last checkpoint. Raises what `train_on_ranks` does.
    """
    folder, which = runs_folder(notebook) / folder_name(config), label(config.name, config.seed)
    with _in_processes(config.steps, config, [(config.name, config.seed)], notebook) as (bar, stopped):

        def step() -> None:
            bar.step(which + bar.of_ranks, config.steps)

        return train_on_ranks(config, folder, nproc, ranks, step, bar.note_rank, resume=resume or stopped)


@contextmanager
def _followed(
    total: int, what: object, arms: Arms, notebook: str, resume: bool, isolated: bool = False, at_once: int = 1
) -> Generator[dict[str, Any]]:
    """What `run_arms` is told, so that gauges or a bar follow the runs, and what was stopped before is gone on with.

    isolated, at_once: as in `run_arms`; a bar alone follows runs in processes of their own
    """
    if isolated or at_once != 1:
        with _in_processes(total, what, arms, notebook) as (bar, stopped):
            apart = {"isolated": isolated, "at_once": at_once}
            yield apart | {"on_step": bar.step, "on_run": bar.note_run, "resume": resume or stopped}
        return
    if not shows_panel():
        with Progress(total, "training") as progress:
            yield {"on_step": progress.step, "resume": resume, "on_run": progress.note_run}
        return
    resume = _was_stopped(what, notebook) or resume
    live = Live(Controls(), total, arms=arms)

    def watch(run: WatchedRun, record: StepRecord) -> None:
        live.watch(run, record)
        if live.controls.stopping:
            run.save()
            _STOPPED[notebook] = what
            step, which = record.result.nominal_step, label(run.config.name, run.config.seed)
            raise Stopped(f"stopped at step {step} of {which}: run this cell again to go on from here")

    with interrupts(live.controls), live:
        yield {"on_step": live.step, "watch": watch, "on_run": live.note_run, "resume": resume}


@contextmanager
def _in_processes(total: int, what: object, arms: Arms, notebook: str) -> Generator[tuple[Progress, bool]]:
    """A bar for runs in processes of their own, and whether the same was stopped before and is to be resumed.

    An interrupt of the block is remembered for the next time.
    """
    progress = LiveBar(total, "training", arms) if shows_panel() else Progress(total, "training")
    try:
        with progress as bar:
            yield bar, _was_stopped(what, notebook)
    except KeyboardInterrupt:
        _STOPPED[notebook] = what
        if in_jupyterlab():
            raise Stopped("stopped: run this cell again to go on with the runs that are left") from None
        raise


def _was_stopped(what: object, notebook: str) -> bool:
    """Whether a person stopped the same in this kernel; told once."""
    return _STOPPED.pop(notebook, None) == what
