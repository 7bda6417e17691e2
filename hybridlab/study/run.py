"""One run, step by step: trained, timed, evaluated and recorded."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import Any

from torch import nn

from hybridlab.base.checkpoint import random_state, restore_random_state_, save_tensors
from hybridlab.base.device import find_device, host, wait_for
from hybridlab.base.errors import UserError
from hybridlab.base.files import replaced
from hybridlab.base.lock import locked
from hybridlab.base.rank_checkpoints import RankCheckpoints
from hybridlab.base.ranks import from_each, from_first, is_first, rank, running
from hybridlab.engine.phases import Phase
from hybridlab.engine.trainer import DivergenceError
from hybridlab.study.config import RunConfig
from hybridlab.study.out_of_memory import report_oom
from hybridlab.study.process_settings import ProcessSettings, gc_frozen, refreeze_gc
from hybridlab.study.ranks import RanksConfig
from hybridlab.study.record import DamagedRecordError, Run
from hybridlab.study.resume import (
    CHECKPOINT,
    RANK_CHECKPOINTS,
    WEIGHTS,
    FileCheckpoints,
    can_stand,
    earlier_run,
    has_checkpoints,
    identity,
    other_code,
    remove_checkpoints,
)
from hybridlab.study.step_log import RunMemory, SilentLog, StepLog, StepRecord, TrainingTimer
from hybridlab.study.training import Training
from hybridlab.study.watched_run import WatchedRun, progress

Watch = Callable[[WatchedRun, StepRecord], None]
"""Called between two steps, with the run and what its last step did."""

UNSETTLED_STEPS = 10
"""Steps at a run's start, in which all is compiled and allocated, that its median step time leaves out."""


def train(
    config: RunConfig,
    folder: Path | str,
    on_step: Callable[[], None] = lambda: None,
    *,
    resume: bool = False,
    watch: Watch | None = None,
    ranks: RanksConfig | None = None,
) -> Run:
    """Run `config` from start to end and leave its record in `folder`.

    on_step: called after every nominal step, for a progress bar; at once for those that are not taken again
    resume: go on with the run that lies in `folder`, from its last checkpoint, if it has one; a finished run is
        returned as it is. What other code has trained, finished or not, is trained afresh: no run mixes the figures of
        two programs. So is a run whose record is damaged and that has no checkpoint, with a warning. By default, what
        lies there is replaced
    watch: called after every step that is taken, with the run and what the step did
    ranks: how several processes train it together, each of which calls this, inside `RanksConfig.started`; the first
        one writes, on a disk that all of them see

    Raises DivergenceError, and leaves a record that says so, when the run diverges; UserError when `resume` meets a run
    of another configuration, or a checkpoint beside a damaged record, when another process trains in `folder`, and when
    memory runs out.
    """
    folder = Path(folder)
    with locked(folder) if is_first() else nullcontext():
        if not (earlier := from_first(partial(_standing, config, folder, resume))):
            with report_oom(config, folder):
                return TrainingRun(config, folder, ranks).run(on_step, watch)
    for _ in range(config.steps):
        on_step()
    if earlier.diverged:
        raise DivergenceError(f"{_name(config)} diverged: {earlier.diverged}")
    return earlier


def _standing(config: RunConfig, folder: Path, resume: bool) -> Run | None:
    """The finished run in `folder` that needs no training; a checkpoint that is not gone on from is deleted."""
    earlier = _readable_run(config, folder) if resume else None
    if not resume or other_code(folder) or (earlier and earlier.summary is not None):
        remove_checkpoints(folder)
    lacks_weights = config.keep_weights and not (folder / WEIGHTS).exists()
    return earlier if earlier and can_stand(earlier) and not lacks_weights else None


def _readable_run(config: RunConfig, folder: Path) -> Run | None:
    """The earlier run in `folder`; a damaged one is told, and trained afresh where it left no checkpoint."""
    try:
        return earlier_run(config, folder)
    except DamagedRecordError as error:
        if has_checkpoints(folder):
            raise
        warnings.warn(f"{error}; training {_name(config)}, afresh", stacklevel=4)
        return None


def _name(config: RunConfig) -> str:
    return f"{config.name!r}, seed {config.seed}"


class TrainingRun(WatchedRun):
    """One run, driven step by step. It goes on from the checkpoint in `folder`, if there is one.

    Whoever drives it, through `steps`, may between two of them `pause` it, `save` a checkpoint and `change` settings.
    What it wants of the process (number format, threads, a smaller GPU) is in force while it computes, and at no other
    time.

    config: what it was asked to do
    ranks: how several processes train it together; None trains it in this one
    """

    def __init__(self, config: RunConfig, folder: Path, ranks: RanksConfig | None = None) -> None:
        self.config, self.folder, self._ranks = config, folder, ranks
        self._checkpoints = (
            RankCheckpoints(folder / RANK_CHECKPOINTS, asynchronous=ranks.async_save)
            if ranks
            else FileCheckpoints(folder / CHECKPOINT)
        )
        self._device = find_device(config.device)
        self._memory = RunMemory(self._device)
        self._process = ProcessSettings.of(config)
        self._timer = TrainingTimer(self._device)
        self._step_ms: list[float] = []
        self._hosts = [host()]
        self._changes: dict[str, float] = {}
        with self._process.applied():
            self._training = Training(config, self._device, ranks)
        self._trainer = self._training.trainer

    def run(self, on_step: Callable[[], None] = lambda: None, watch: Watch | None = None) -> Run:
        """Take every step that is left."""
        for _ in range(self.start()):
            on_step()
        with closing(self.steps()) as steps:
            for record in steps:
                on_step()
                if watch:
                    watch(self, record)
        return from_first(lambda: self.record)

    def start(self) -> int:
        """Warm up, go on where a checkpoint was left, and return the nominal steps that were done by then."""
        with self._process.applied():
            started = time.perf_counter()
            self._training.warm_up_()
            wait_for(self._device)
            self._warm_up_seconds = time.perf_counter() - started
            self._first = self._restore()
            if not self._first:
                self._training.make_state_()
        self._memory.begin(partial(progress, self._trainer, self._timer, self.config.steps))
        self._log: StepLog | SilentLog = SilentLog(self._memory)
        if is_first():
            self._log = StepLog(self.folder, self.config.record(), self._memory, keep_steps=self._first)
        return self._first

    def steps(self) -> Generator[StepRecord]:
        """Take a nominal step whenever one is asked for, evaluate on the way, write the summary after the last.

        Call `start` first. Closing the iterator keeps what was measured; the run then counts as interrupted.
        """
        settled_from = self._first + UNSETTLED_STEPS
        with self._log.open(), gc_frozen(), self._divergence_recorded():
            for step in range(self._first, self.config.steps):
                if step == settled_from:
                    self._timer.pause()
                    refreeze_gc()
                with self._process.applied():
                    record = self._step(step, settled=step >= settled_from)
                self._log.add(record)
                if self._wants_checkpoint(step + 1):
                    self._save_or_warn()
                try:
                    yield record
                except GeneratorExit:
                    self._log.catch_up()
                    raise
            self._log.catch_up()
            self._check_finite()
            if self.config.keep_weights:
                self._keep_weights()
            self._log.finish(self._summary())
        self._checkpoints.remove()

    def _keep_weights(self) -> None:
        with self._process.applied(), self._training.weights() as weights:
            if is_first():
                with replaced(self.folder / WEIGHTS) as beside:
                    save_tensors(weights, beside)

    # --- between two steps -------------------------------------------------------------------------------

    @property
    def learning_rate(self) -> float:
        """The base learning rate of the latest step."""
        steps = max(self._trainer.steps_by(self.config.clock) - 1, 0)
        return self.config.optimizer.lr * self.config.lr_schedule(steps)

    @property
    def model(self) -> nn.Module:
        """What is trained, with all of its weights in place."""
        self._trainer.materialize_()
        return self._training.task.model

    def pause(self) -> None:
        """Stop the clock and the sampling until the next step, and bring what was measured to the disk."""
        self._timer.pause()
        self._memory.sampler.stop()
        self._log.flush()

    def save(self) -> None:
        """Write a checkpoint while the clock stands; the record that it counts on reaches the disk first."""
        self._timer.pause()
        from_first(self._log.flush)  # where it fails, it fails on every rank
        with self._process.applied():
            self._checkpoints.save(self._trainer.statistics().nominal_steps, self._state(), meta=self._identity)

    def _save_or_warn(self) -> None:
        """Training does not end for a checkpoint that finds no room."""
        try:
            self.save()
        except UserError as error:
            if not isinstance(error.__cause__, OSError):
                raise
            step = self._trainer.statistics().nominal_steps
            warnings.warn(
                f"{_name(self.config)}: no checkpoint at step {step}, the one before stays: {error}", stacklevel=2
            )

    # --- where it diverges ---------------------------------------------------------------------------------

    @contextmanager
    def _divergence_recorded(self) -> Iterator[None]:
        """A run that diverges has ended: its record says why, its figures are none, and the error names it."""
        try:
            yield
        except DivergenceError as error:
            self._log.catch_up()
            ended = {"diverged": str(error), "divergences": self._trainer.statistics().divergences + 1}
            self._log.finish(self._summary() | dict.fromkeys(self._training.evaluation) | ended)
            raise DivergenceError(f"{_name(self.config)} diverged: {error}") from None

    def _check_finite(self) -> None:
        self._trainer.check_finite()
        if not math.isfinite(loss := self._training.evaluation["validation_loss"]):
            raise DivergenceError(f"the validation loss is {loss} after the last step: lower the learning rate")

    # --- within a step -----------------------------------------------------------------------------------

    def _step(self, step: int, *, settled: bool) -> StepRecord:
        """One nominal step, timed, and evaluated when it is time."""
        self._memory.sampler.start()
        self._timer.start()
        self._memory.enter(str(self._trainer.current_phase))
        result = self._training.step(step)
        elapsed = self._timer.lap()
        if self._trainer.is_offloaded:
            self._memory.note_predict()
        if result.phase is not Phase.PREDICT and settled:
            self._step_ms.append(1e3 * elapsed)
        evaluation = {}
        if (step + 1) % self.config.evaluate_every == 0 or step + 1 == self.config.steps:
            self._timer.pause()
            self._memory.enter("evaluation")
            evaluation = self._training.evaluate()
        changes, self._changes = self._changes, {}
        return StepRecord(result, self._trainer.statistics(), self._timer.seconds, evaluation, changes)

    def _wants_checkpoint(self, steps_done: int) -> bool:
        every = self.config.checkpoint_every
        return every > 0 and steps_done % every == 0 and steps_done < self.config.steps

    # --- what outlives the process -----------------------------------------------------------------------

    @cached_property
    def _identity(self) -> dict[str, Any]:
        return identity(self.config) | ({"ranks": self._ranks.record()} if self._ranks else {})

    def _state(self) -> dict[str, Any]:
        """All that the rest of the run depends on."""
        return self._training.state_dict() | {
            "steps_done": self._trainer.statistics().nominal_steps,
            "random": from_each(random_state()),
            "seconds": self._timer.seconds,
            "step_ms": self._step_ms,
            "hosts": self._hosts,
            "peak": self._memory.peak(),
        }

    def _restore(self) -> int:
        """Take up the last checkpoint, if there is one, and return the nominal steps that were done."""
        state = self._checkpoints.load(self._training.task.model, expect=self._identity)
        if state is None:
            return 0
        self._training.load_state_dict(state)
        self._timer = TrainingTimer(self._device, state["seconds"])
        self._step_ms = state["step_ms"]
        self._hosts = list(dict.fromkeys([*state["hosts"], *self._hosts]))
        self._memory.go_on_from(state["peak"])
        self._restore_random(state["random"])
        return state["steps_done"]

    def _restore_random(self, streams: list[dict[str, Any]]) -> None:
        """Random streams go on on as many ranks; on another number they begin anew, and only noise depends on them."""
        if len(streams) == running():
            restore_random_state_(streams[rank()])
        elif is_first():
            said = f"{len(streams)} ranks wrote the checkpoint and {running()} go on"
            warnings.warn(f"{said}: random streams, such as dropout's, begin anew", stacklevel=2)

    def _summary(self) -> dict[str, Any]:
        """What a comparison of runs needs, in one flat record."""
        return {
            **self._closing_figures(),
            "code": self._identity["code"],
            "hosts": self._hosts,
            "reliability": self._trainer.reliability(),
            "acceptance_reliability": self._trainer.acceptance_reliability(),
            "forecast_skill": self._trainer.forecast_skill(),
            **self._training.evaluation,
            **self._by_rank(),
            "warm_up_seconds": self._warm_up_seconds,
            "cuda_graphs": self._training.cuda_graphs,
            "gradient_step_ms": median(self._step_ms) if self._step_ms else None,
        }

    def _by_rank(self) -> dict[str, Any]:
        """How the ranks trained it, and the peak of each."""
        if self._ranks is None:
            return {}
        peaks = from_each(self._memory.peak().get("peak_memory_bytes"))
        return {"ranks": running(), **self._ranks.record(), "peak_memory_bytes_by_rank": peaks}
