"""One run on several GPUs of this host, which another process starts and watches."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from uuid import uuid4

from hybridlab.base.device import refuse_more_than_gpus
from hybridlab.base.errors import UserError
from hybridlab.base.ranks import is_first, is_of_lost_rank, rank
from hybridlab.study.config import RunConfig
from hybridlab.study.isolated import GO_ON, STEP, IsolatedRun, answer_the_parent_alone, stop
from hybridlab.study.ranks import RanksConfig
from hybridlab.study.record import Run
from hybridlab.study.resume import kept_in
from hybridlab.study.run import train
from hybridlab.study.step_log import StepRecord
from hybridlab.study.watched_run import WatchedRun
from hybridlab.vram import MemoryReading

NEWS_EVERY_SECONDS = 0.5
SENT_AT_ONCE = 3000
"""Bytes of text in a message of a rank: with the form in which it is sent less than 4,096, which Linux writes whole."""

LOST_SECONDS = 3.0
"""For which a rank that misses another one waits, so that the launcher sees that one first, and ends all."""


@dataclass(frozen=True)
class RankNews:
    """How a rank stands: its memory, the run's peak there so far, and a loss of the whole batch, in nats."""

    rank: int
    memory: MemoryReading
    peak_bytes: int
    loss: float | None


def train_on_ranks(
    config: RunConfig,
    folder: Path,
    count: int,
    ranks: RanksConfig | None = None,
    on_step: Callable[[], None] = lambda: None,
    on_news: Callable[[RankNews], None] = lambda news: None,
    *,
    resume: bool = False,
) -> Run:
    """Train as `torchrun --nproc-per-node COUNT -m hybridlab.train` does, from a process that only watches.

    ranks: how they share the model; on_step, resume: as in `train`, and `on_step` is called here
    on_news: called here with what each rank says of itself, about twice per second

    Raises UserError for more processes than GPUs, for what a rank refuses, and for a rank that dies: its name and its
    end; the last checkpoint is whole then. RuntimeError with a rank's traceback for all else.
    """
    refuse_more_than_gpus("nproc", count, config.device)
    ranks = ranks or RanksConfig()
    ranks.check(config, count)
    act = partial(_launch, config, folder, resume, ranks, count)
    run = IsolatedRun(config, folder, act, on_news)
    try:
        while run.has_stepped():
            on_step()
        return run.ended()
    finally:
        stop([run])


# --- in a process of its own, as torchrun has it -------------------------------------------------------------


def _launch(config: RunConfig, folder: Path, resume: bool, ranks: RanksConfig, count: int, pipe: Connection) -> None:
    """Start the ranks, and wait for all of them; one that fails ends the others."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    here = {"rdzv_backend": "c10d", "rdzv_endpoint": "127.0.0.1:0", "run_id": uuid4().hex}
    launch = LaunchConfig(1, 1, count, max_restarts=0, monitor_interval=0.2, **here)  # type: ignore[arg-type]
    try:
        elastic_launch(launch, _as_rank)(config, folder, resume, ranks, pipe)
    except ChildFailedError as error:
        number, failure = error.get_first_failure()
        how = f"was killed by {failure.signal_name()}" if failure.exitcode < 0 else f"ended with {failure.exitcode}"
        left = kept_in(folder, GO_ON)
        raise UserError(f"rank {number} of {config.name!r}, seed {config.seed}, {how}: {left}") from None


def _as_rank(config: RunConfig, folder: Path, resume: bool, ranks: RanksConfig, pipe: Connection) -> None:
    """Train with the other ranks; what ends the run is sent by one that knows why."""
    answer_the_parent_alone()
    try:
        with ranks.started(config):
            step = partial(pipe.send, STEP) if is_first() else lambda: None
            train(config, folder, step, resume=resume, watch=_Teller(pipe), ranks=ranks)
    except UserError as error:
        pipe.send(error)
        os._exit(1)  # threads that wait for a rank that is gone would not let it end
    except Exception as error:
        try:
            if is_of_lost_rank(error):
                time.sleep(LOST_SECONDS)
            else:
                pipe.send(RuntimeError(_fitting(f"{type(error).__name__}: {error}\n\n{traceback.format_exc()}")))
        finally:
            os._exit(1)


def _fitting(text: str) -> str:
    """Its start and its end, so short that the pipe takes it in one piece: ranks share it, and pieces would mix."""
    said, half = text.encode(), SENT_AT_ONCE // 2
    return text if len(said) <= SENT_AT_ONCE else (said[:half] + b"\n...\n" + said[-half:]).decode(errors="ignore")


class _Teller:
    """Sends a rank's news, not too often. The loss of the step before is read, which costs no wait."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe, self._told = pipe, 0.0
        self._before: StepRecord | None = None

    def __call__(self, run: WatchedRun, record: StepRecord) -> None:
        before, self._before = self._before, record
        if time.monotonic() - self._told < NEWS_EVERY_SECONDS:
            return
        self._told = time.monotonic()
        memory, peak_bytes = run.memory()
        loss = before.result.measured_loss if before else None
        self._pipe.send(RankNews(rank(), memory, peak_bytes, loss))
