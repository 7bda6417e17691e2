"""`python -m hybridlab.train`: one run from a settings file, in one process or in all that torchrun has started."""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from hybridlab.base.errors import UserError, first_line, nearest, printable, told
from hybridlab.base.files import project_root
from hybridlab.base.one_line import in_one_line
from hybridlab.base.ranks import is_first, is_first_to_tell, is_of_lost_rank, rank, running
from hybridlab.base.settings import check_types, settings_from
from hybridlab.batch.terminal import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_REFUSED,
    SIGNALS,
    RunInterrupted,
    signals_as_interrupts,
)
from hybridlab.batch.yaml_files import settings_in_file
from hybridlab.engine.trainer import DivergenceError
from hybridlab.study import HuggingFaceTaskConfig, ImageTaskConfig, RunConfig, TextTaskConfig, find_task, train
from hybridlab.study.ranks import RanksConfig
from hybridlab.study.resume import has_checkpoints, kept_in
from hybridlab.study.step_log import StepRecord
from hybridlab.study.task_checks import check_task
from hybridlab.study.watched_run import WatchedRun

TASKS = {"text": TextTaskConfig, "images": ImageTaskConfig, "huggingface": HuggingFaceTaskConfig}

AFRESH = "start afresh without resume"
"""What `train` offers, which replaces the run that lies there."""

GO_ON = "see what it said; --resume goes on"


@dataclass(frozen=True)
class TrainConfig:
    """What a settings file says.

    run: the run's settings, as `RunConfig` has them; its task is a mapping of the task's settings, with a `kind` of
        text (the default), images or huggingface, or names one of your own, as "my_task.py:MyTask"
    folder: of the run's record, in the project's folder; by default runs/train/NAME
    ranks: how several processes train it, as `RanksConfig` has it
    resume: go on with the run that lies in the folder
    """

    run: RunConfig
    folder: str = ""
    ranks: RanksConfig = field(default_factory=RanksConfig)
    resume: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        if not self.folder and (self.run.name in ("", "..") or Path(self.run.name).name != self.run.name):
            raise ValueError(f"the run's name, {self.run.name!r}, is no name of a folder: name one as folder")

    @property
    def path(self) -> Path:
        """Of the run's folder."""
        return project_root() / (self.folder or f"runs/train/{self.run.name}")


def read_settings(path: Path) -> TrainConfig:
    """The settings that a file holds. Raises UserError, in one line, for what cannot be meant."""
    values = settings_in_file(path)
    if isinstance(run := values.get("run"), dict) and "task" in run:
        values["run"] = run | {"task": _task(run["task"], f"{path}: run: task")}
    return settings_from(TrainConfig, values, str(path))


def _task(given: Any, place: str) -> Any:
    if isinstance(given, str):
        return find_task(given)
    if not isinstance(given, dict):
        raise UserError(f"{place} is {given!r}: write the task's settings, or module:object")
    kind = given.get("kind", "text")
    if not isinstance(kind, str) or kind not in TASKS:
        raise UserError(f"{place}: kind {kind!r} is unknown: {nearest(str(kind), TASKS)}")
    return settings_from(TASKS[kind], {name: value for name, value in given.items() if name != "kind"}, place)


def run_file(
    path: Annotated[Path, typer.Option("--file", "-f", metavar="FILE", dir_okay=False, help="The settings, in YAML.")],
    *,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that lies in the folder.")] = False,
) -> None:
    """Train what a settings file says, and print how it goes.

    Raises UserError where a run lies in its folder already, unless it is gone on with.
    """
    config = read_settings(path)
    resume = resume or config.resume
    lies_there = any((config.path / name).exists() for name in ("config.json", "steps.parquet"))
    if lies_there and not resume:  # no rank writes there before all have come to this
        said = f"a run lies in {config.path} already"
        raise UserError(f"{said}: go on with it by --resume, delete it, or name another folder")
    check_task(config.run.task)
    begins_anew = lies_there and not has_checkpoints(config.path) and not (config.path / "summary.json").exists()
    with config.ranks.started(config.run), _end_is_told(config.path):
        if begins_anew:
            _say(kept_in(config.path))
        done = train(config.run, config.path, resume=resume, watch=_say_progress, ranks=config.ranks).closing_figures
        _say(f"done: validation loss {done['validation_loss']:.4f} nats; {config.path}")


@contextmanager
def _end_is_told(folder: Path) -> Iterator[None]:
    """Where training is stopped, say what it leaves; where it refuses to go on, what begins anew here.

    torchrun sends a signal to all ranks where one has ended, which they may not know yet.
    """
    try:
        yield
    except KeyboardInterrupt:
        left = kept_in(folder, "; --resume goes on")
        if running() > 1:
            left = f"as every rank is where one has ended: {GO_ON}"
        raise RunInterrupted(f"stopped, {left}") from None
    except UserError as error:
        if AFRESH not in str(error):
            raise
        raise UserError(str(error).replace(AFRESH, f"delete {folder} to start afresh")) from error


def _say_progress(run: WatchedRun, record: StepRecord) -> None:
    """The first rank says at each evaluation how it stands."""
    if record.evaluation:
        loss, step = record.evaluation["validation_loss"], record.statistics.nominal_steps
        length = getattr(run.config.task, "block_size", None)
        seen = step * run.config.task.batch_size * (length or 1)
        rate = f"{seen / record.seconds:,.0f} {'tokens' if length else 'samples'} per second"
        _say(f"step {step} of {run.config.steps}: validation loss {loss:.4f} nats, {rate}")


def _say(sentence: str) -> None:
    if is_first():
        print(printable(sentence), flush=True)


app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
app.command(help="Train one run; torchrun starts it on several GPUs.")(run_file)


def main(arguments: list[str] | None = None) -> int:
    """Run the program; what ends it is told in one line, by one rank. Exit codes are those of `hybridlab`."""
    with signals_as_interrupts():
        try:
            app(arguments, prog_name="python -m hybridlab.train")
        except SystemExit as end:
            return _told("stopped", EXIT_INTERRUPTED) if end.code == EXIT_INTERRUPTED else int(end.code or 0)
        except KeyboardInterrupt:
            return _told("stopped", EXIT_INTERRUPTED)
        except RunInterrupted as error:
            return _told(error, EXIT_INTERRUPTED)
        except UserError as error:
            failed = isinstance(error, DivergenceError) or isinstance(error.__cause__, OSError)  # such as a full disk
            return _told(error, EXIT_FAILED if failed else EXIT_REFUSED)
        except Exception as error:
            if is_of_lost_rank(error):
                return _told(f"another rank has ended, and the run with it: {GO_ON}", EXIT_FAILED)
            if isinstance(error, OSError):
                return _told(told(error), EXIT_FAILED)
            traceback.print_exc()
            return _told(f"{type(error).__name__}: {first_line(error)}", EXIT_FAILED)
    return 0


def _told(message: object, code: int) -> int:
    """Say why the run ends; a signal that comes now leaves it at that."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if is_first_to_tell():
        place = f" rank {rank()}:" if running() > 1 else ""
        print(f"hybridlab.train:{place} {in_one_line(message)}", file=sys.stderr, flush=True)
    return code


def warn(message: Warning | str, *_: object, **__: object) -> None:
    """In one line, by the first rank: what is worth a warning is so on all."""
    if is_first():
        print(f"hybridlab.train: {in_one_line(message)}", file=sys.stderr, flush=True)
