"""One run in a process of its own, so that its memory is its own too."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NoReturn

from hybridlab.base.errors import UserError
from hybridlab.study.config import RunConfig
from hybridlab.study.record import Run
from hybridlab.study.run import train

GRACE_SECONDS = 30.0
"""For a run that is told to stop, to bring its record to the disk."""

KILLED = getattr(signal, "SIGKILL", signal.SIGTERM)
"""What a system sends where memory runs out; Windows has no such signal."""

STEP, DONE = "step", "done"


def train_isolated(
    config: RunConfig, folder: Path, on_step: Callable[[], None] = lambda: None, *, resume: bool = False
) -> Run:
    """Train as `train` does, but in a fresh process: its peak, caches and CUDA context are this run's alone.

    on_step, resume: as in `train`; `on_step` is called here

    Whatever ends this call, Ctrl-C included, ends the process, and leaves the record and the last checkpoint.

    Raises what the run raised, where that was a UserError; UserError that names the signal where the process was
    killed; RuntimeError with the other side's traceback for all else.
    """
    spawn = multiprocessing.get_context("spawn")  # never fork: CUDA does not survive it
    ours, theirs = spawn.Pipe(duplex=False)
    child = spawn.Process(target=_train, args=(theirs, config, folder, resume), name=f"train {config.name}")
    child.start()
    theirs.close()
    try:
        while (message := _next(ours)) == STEP:
            on_step()
        child.join()
    finally:
        _stop(child)
        ours.close()
    if isinstance(message, Exception):
        raise message
    if message != DONE:
        raise UserError(_death(child.exitcode or 0, config, folder))
    return Run.load(folder)


def _next(pipe: Connection) -> object:
    """The next message; None where the process ended without another."""
    try:
        return pipe.recv()
    except EOFError:
        return None


def _stop(child: BaseProcess) -> None:
    """Ask, wait, insist; a second Ctrl-C cuts the waiting short."""
    try:
        child.terminate()
        child.join(GRACE_SECONDS)
    finally:
        child.kill()
        child.join()


def _death(exit_code: int, config: RunConfig, folder: Path) -> str:
    how = f"was killed by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"ended with exit code {exit_code}"
    why = ", as the system does when the host's memory runs out" if exit_code == -KILLED else ""
    return (
        f"the process of {config.name!r}, seed {config.seed}, {how}{why}: the record and the last checkpoint in "
        f"{folder} are intact, go on with resume"
    )


# --- in the other process ----------------------------------------------------------------------------------


def _train(pipe: Connection, config: RunConfig, folder: Path, resume: bool) -> None:
    """Train, tell of each step, and send what went wrong instead of printing it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent alone answers it
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        train(config, folder, lambda: pipe.send(STEP), resume=resume)
        pipe.send(DONE)
    except (KeyboardInterrupt, BrokenPipeError):
        _die_of(signal.SIGTERM)
    except UserError as error:
        pipe.send(error)
    except Exception as error:
        pipe.send(RuntimeError(f"{type(error).__name__}: {error}\n\n{traceback.format_exc()}"))


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _die_of(cause: signal.Signals) -> None:
    """End as a process does that never handled the signal, so that whoever waits learns the cause."""
    signal.signal(cause, signal.SIG_DFL)
    os.kill(os.getpid(), cause)
