"""Runs in processes of their own, so that their memory is their own too, one after the other or several at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections import deque
from collections.abc import Callable, Generator, Sequence
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from hybridlab.base.device import find_device, refuse_more_than_gpus
from hybridlab.base.errors import UserError
from hybridlab.study.config import RunConfig
from hybridlab.study.record import Run
from hybridlab.study.resume import kept_in
from hybridlab.study.run import train

GRACE_SECONDS = 45.0
"""For a run that is told to stop, to bring its record to the disk; longer than torch's launcher gives its ranks."""

KILLED = getattr(signal, "SIGKILL", signal.SIGTERM)
"""What a system sends where memory runs out; Windows has no such signal."""

GO_ON = ", go on with resume"
STEP, DONE = "step", "done"


def train_side_by_side(
    runs: Sequence[tuple[RunConfig, Path]],
    at_once: int,
    on_step: Callable[[RunConfig], None] = lambda config: None,
    *,
    resume: bool = False,
) -> Generator[tuple[RunConfig, Callable[[], Run]]]:
    """Train runs as `train` does, each in a fresh process: its peak, caches and CUDA context are that run's alone.

    runs: each with its folder, in the order in which they start; at_once: how many train at the same time, several each
        on a GPU of its own
    on_step: called here with the run after each of its steps; resume: as in `train`

    Gives each run that has ended, with what returns its record, or raises what the run raised, where that was a
    UserError; UserError that names the signal where the process was killed; RuntimeError with the other side's
    traceback for all else. However the iteration ends, Ctrl-C included, no process goes on, and records and last
    checkpoints are left.

    Raises UserError for more at once than there are GPUs, where these are what they train on.
    """
    for config, _ in runs:
        refuse_more_than_gpus("at_once", at_once, config.device)
    on_gpus = at_once > 1 and any(find_device(config.device).type == "cuda" for config, _ in runs)
    waiting, free, running = deque(runs), deque(range(at_once)), dict[Any, IsolatedRun]()
    try:
        while waiting or running:
            while waiting and free:
                (config, folder), place = waiting.popleft(), free.popleft()
                act = partial(_alone, config, folder, resume)
                run = IsolatedRun(config, folder, act, gpu=place if on_gpus else None)
                running[run.pipe] = run
            for pipe in wait(list(running)):
                if running[pipe].has_stepped():
                    on_step(running[pipe].config)
                    continue
                run = running[pipe]
                yield run.config, run.ended
                del running[pipe]
                free.append(run.gpu or 0)  # without GPUs any place is as good
    finally:
        stop(list(running.values()))


class IsolatedRun:
    """A run that trains in a process of its own.

    config, folder: as in `train`; act: trains it there, and sends STEP into the pipe that it is given after each step
    on_news: called with what else is sent
    gpu: which of those that this process sees it alone may use; None leaves it all
    pipe: can be read where there is news of it
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        act: Callable[[Connection], None],
        on_news: Callable[[Any], None] = lambda news: None,
        gpu: int | None = None,
    ) -> None:
        self.config, self.folder, self.gpu, self._on_news = config, folder, gpu, on_news
        spawn = multiprocessing.get_context("spawn")  # never fork: CUDA does not survive it
        self.pipe, theirs = spawn.Pipe(duplex=False)
        self.process = spawn.Process(target=_train, args=(theirs, act, gpu), name=f"train {config.name}")
        self.process.start()
        theirs.close()

    def has_stepped(self) -> bool:
        """Wait for the next news, and say whether it is a step; else the run has ended."""
        self._news = _next(self.pipe)
        while not isinstance(self._news, str | Exception | None):
            self._on_news(self._news)
            self._news = _next(self.pipe)
        return self._news == STEP

    def ended(self) -> Run:
        """The record of the run that has ended; raises what `train_side_by_side` says."""
        while _next(self.pipe) is not None:  # or a process that has more to say would wait for ever
            pass
        self.process.join()
        self.pipe.close()
        if isinstance(self._news, Exception):
            raise self._news
        if self._news != DONE:
            raise UserError(_death(self.process.exitcode or 0, self.config, self.folder))
        return Run.load(self.folder)


def _next(pipe: Connection) -> object:
    """The next message; None where the process ended without another."""
    try:
        return pipe.recv()
    except EOFError:
        return None


def stop(runs: Sequence[IsolatedRun]) -> None:
    """Ask, wait, insist; a second Ctrl-C cuts the waiting short."""
    try:
        for run in runs:
            run.process.terminate()
        for run in runs:
            run.process.join(GRACE_SECONDS)
    finally:
        for run in runs:
            run.process.kill()
            run.process.join()
            run.pipe.close()


def _death(exit_code: int, config: RunConfig, folder: Path) -> str:
    how = f"was killed by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"ended with exit code {exit_code}"
    why = ", as the system does when the host's memory runs out" if exit_code == -KILLED else ""
    return f"the process of {config.name!r}, seed {config.seed}, {how}{why}: {kept_in(folder, GO_ON)}"


# --- in the other process ----------------------------------------------------------------------------------


def _alone(config: RunConfig, folder: Path, resume: bool, pipe: Connection) -> None:
    train(config, folder, lambda: pipe.send(STEP), resume=resume)


def _train(pipe: Connection, act: Callable[[Connection], None], gpu: int | None) -> None:
    """Train, tell of each step, and send what went wrong instead of printing it."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = _visible_gpus(gpu + 1)[gpu]  # before CUDA starts
    answer_the_parent_alone()
    try:
        act(pipe)
        pipe.send(DONE)
    except (KeyboardInterrupt, BrokenPipeError):
        _die_of(signal.SIGTERM)
    except UserError as error:
        pipe.send(error)
    except Exception as error:
        pipe.send(RuntimeError(f"{type(error).__name__}: {error}\n\n{traceback.format_exc()}"))


def _visible_gpus(count: int) -> list[str]:
    """The names of those that this process may use, of `count` at least."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(number) for number in range(count)]


def answer_the_parent_alone() -> None:
    """Ctrl-C reaches the whole group, and the parent answers it: what it then sends is an interrupt here."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def _die_of(cause: signal.Signals) -> None:
    """End as a process does that never handled the signal, so that whoever waits learns the cause."""
    signal.signal(cause, signal.SIG_DFL)
    os.kill(os.getpid(), cause)
