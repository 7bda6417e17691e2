"""One run: a task, an optimizer and a trainer, step by step, recorded."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from hybridlab.base.checkpoint import (
    checkpoint_meta,
    load_checkpoint,
    random_state,
    refuse_differences,
    remove_checkpoint,
    restore_random_state_,
    save_checkpoint,
)
from hybridlab.base.device import cards, find_device
from hybridlab.engine.config import HybridTrainerConfig
from hybridlab.engine.passes import Closure
from hybridlab.engine.phases import Phase
from hybridlab.engine.result import Statistics, StepResult
from hybridlab.engine.trainer import HybridTrainer
from hybridlab.memory.apply import no_step, optimizer_for, prepare_model_
from hybridlab.memory.precision import autocast
from hybridlab.optim import set_lr_
from hybridlab.study.code_version import code_version
from hybridlab.study.compilation import compile_, let_go_of_compiled
from hybridlab.study.config import RunConfig
from hybridlab.study.garbage import collector_spared
from hybridlab.study.out_of_memory import shortage_told
from hybridlab.study.process_settings import ProcessSettings
from hybridlab.study.record import Run, RunRecorder
from hybridlab.study.run_memory import RunMemory
from hybridlab.study.stopwatch import Stopwatch
from hybridlab.study.tasks import Batch, Task, in_parts
from hybridlab.vram import MemoryReading

Watch = Callable[["TrainingRun", "StepRecord"], None]
"""Called between two steps, with the run and what its last step did."""

CHECKPOINT = "checkpoint.pt"
"""In a run's folder, while the run has not finished."""

WARM_UP_PASSES = 3

UNSETTLED_STEPS = 10
"""Steps at a run's start, in which all is compiled and taken, that its median step time leaves out."""


def train(
    config: RunConfig,
    folder: Path,
    on_step: Callable[[], None] = lambda: None,
    *,
    resume: bool = False,
    watch: Watch | None = None,
) -> Run:
    """Run `config` from start to end and leave its record in `folder`.

    on_step: called after every nominal step, for a progress bar; at once for those that are not taken again
    resume: go on with the run that lies in `folder`, from its last checkpoint, if it has one; a finished run is
        returned as it is. What other code has trained, finished or not, is trained afresh: no run mixes the figures of
        two programs. By default, what lies there is replaced
    watch: called after every step that is taken, with the run and what the step did

    Raises UserError when `resume` meets a run of another configuration, and when memory runs out.
    """
    earlier = earlier_run(config, folder) if resume else None
    if not earlier or earlier.summary is not None or foreign_code(folder):
        remove_checkpoint(folder / CHECKPOINT)
    if earlier and earlier.summary is not None and earlier.summary.get("code") == code_version():
        for _ in range(config.steps):
            on_step()
        return earlier
    with shortage_told(config, folder):
        return TrainingRun(config, folder).run(on_step, watch)


def earlier_run(config: RunConfig, folder: Path) -> Run | None:
    """The run of `config` that lies in `folder`, finished or not; None where there is none.

    Raises UserError when it is a run of another configuration.
    """
    if not (folder / "config.json").exists():
        return None
    earlier = Run.load(folder)
    refuse_differences(folder, earlier.config, config.record())
    return earlier


def foreign_code(folder: Path) -> str | None:
    """The code that wrote the checkpoint in `folder`, where it was other code than this; else None."""
    meta = checkpoint_meta(folder / CHECKPOINT)
    if meta is None or meta.get("code") == code_version():
        return None
    return meta.get("code") or "unknown"


@dataclass(frozen=True)
class StepRecord:
    """One nominal step as it happened.

    result: what the trainer did; its loss stays on the device until it is read, one step later without a wait
    statistics: the counts after it
    seconds: training time so far
    evaluation: validation figures, where it was time for them; else empty
    changes: settings that a person changed just before it; else empty
    """

    result: StepResult
    statistics: Statistics
    seconds: float
    evaluation: dict[str, float]
    changes: dict[str, float]


class TrainingRun:
    """The moving parts of one run. It goes on from the checkpoint in `folder`, if there is one.

    Whoever drives it, through `steps`, may between two of them `pause` it, `save` a checkpoint and `change` settings.
    What it wants of the process (number format, threads, a smaller card) it holds while it computes, and at no other
    time.
    """

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self._config, self._folder = config, folder
        self._device = find_device(config.device)
        if not config.compiled:
            let_go_of_compiled()
        self._memory = RunMemory(self._device)
        self._process = ProcessSettings.of(config)
        self._stopwatch = Stopwatch(self._device)
        self._step_ms: list[float] = []
        self._evaluation: dict[str, float] = {}
        self._unrecorded: dict[str, Any] | None = None
        self._changes: dict[str, float] = {}
        with self._process.held():
            self._build()

    def _build(self) -> None:
        """Task, model, optimizer and trainer, before the first step."""
        config = self._config
        self._task: Task = config.task.build(config.seed, self._device, config.memory)
        prepare_model_(self._task.model, config.memory)
        self._model = compile_(self._task, config.memory) if config.compiled else self._task.model
        self._optimizer = optimizer_for(self._task.model, config.optimizer, config.memory)
        self._trainer = HybridTrainer(self._task.model, self._optimizer, config.hybrid)

    def run(self, on_step: Callable[[], None] = lambda: None, watch: Watch | None = None) -> Run:
        """Take every step that is left."""
        for _ in range(self.start()):
            on_step()
        with closing(self.steps()) as steps:
            for record in steps:
                on_step()
                if watch:
                    watch(self, record)
        return Run.load(self._folder)

    def start(self) -> int:
        """Warm up, go on where a checkpoint was left, and return the nominal steps that were done by then."""
        with self._process.held():
            self._warm_up()
            self._steps_before = self._restore()
        self._memory.begin(partial(_moment, self._trainer, self._stopwatch, self._config.steps))
        self._recorder = RunRecorder(self._folder, self._config.record(), keep_steps=self._steps_before)
        return self._steps_before

    def steps(self) -> Generator[StepRecord]:
        """Take a nominal step whenever one is asked for, evaluate on the way, write the summary after the last.

        Call `start` first. Closing the iterator keeps what was measured; the run then counts as interrupted.
        """
        first = self._steps_before
        settles_at = first + UNSETTLED_STEPS
        with self._recorder, self._sampled(), collector_spared() as spare_what_stays:
            for step in range(first, self._config.steps):
                if step == settles_at:
                    self._stopwatch.pause()
                    spare_what_stays()
                with self._process.held():
                    record = self._step(step, settled=step >= settles_at)
                self._record()  # the row before: one step late, so that reading a loss stalls nothing
                self._unrecorded = self._row(record)
                if self._wants_checkpoint(step + 1):
                    self.save()
                try:
                    yield record
                except GeneratorExit:
                    self._record()
                    raise
            self._record()
            self._recorder.finish(self._summary())
        remove_checkpoint(self._folder / CHECKPOINT)

    # --- between two steps -------------------------------------------------------------------------------

    @property
    def config(self) -> RunConfig:
        """What the run was asked to do."""
        return self._config

    @property
    def record(self) -> Run:
        """Everything that reached the disk so far."""
        return Run.load(self._folder)

    @property
    def settings(self) -> HybridTrainerConfig:
        """The trainer's settings as they are now."""
        return self._trainer.config

    @property
    def phase(self) -> Phase:
        """The phase of the next step."""
        return self._trainer.current_phase

    def memory(self) -> tuple[MemoryReading, int]:
        """Memory at the last sample, and the run's peak so far, in bytes; stalls nothing."""
        return self._memory.latest()

    def change(self, **settings: float) -> None:
        """Change settings as `HybridTrainer.change` does; the next step's row says so, under "changed"."""
        self._trainer.change(**settings)
        self._changes |= settings

    def pause(self) -> None:
        """Stop the clock and the sampling until the next step, and bring what was measured to the disk."""
        self._stopwatch.pause()
        self._memory.rest()
        self._flush()

    def _step(self, step: int, *, settled: bool) -> StepRecord:
        """One nominal step, timed, and evaluated when it is time."""
        set_lr_(self._optimizer, self._config.lr_schedule(self._trainer.steps_by(self._config.clock)))
        self._memory.watch()
        self._stopwatch.start()
        self._memory.enter(str(self._trainer.current_phase))
        result = self._trainer.step(self._parts_of(step))
        elapsed = self._stopwatch.lap()
        if self._trainer.is_offloaded:
            self._memory.note_predict()
        if result.phase is not Phase.PREDICT and settled:
            self._step_ms.append(1e3 * elapsed)
        evaluation = {}
        if (step + 1) % self._config.evaluate_every == 0 or step + 1 == self._config.steps:
            self._stopwatch.pause()
            evaluation = self._evaluate()
        changes, self._changes = self._changes, {}
        return StepRecord(result, self._trainer.statistics(), self._stopwatch.seconds, evaluation, changes)

    def _row(self, record: StepRecord) -> dict[str, Any]:
        """What the record on disk will say of a step, its losses still unread."""
        row = {"result": record.result, "gradient_step": record.statistics.gradient_steps, **record.evaluation}
        if record.changes:
            row["changed"] = ", ".join(f"{name}={value:g}" for name, value in record.changes.items())
        return row | {"seconds": record.seconds}

    def _parts_of(self, step: int) -> list[Closure]:
        """The losses of a step's batch, part by part; the batch is made once, when one of them is asked for."""
        count = self._config.memory.micro_batches
        parts = cache(lambda: in_parts(self._task.batch(step), count))
        return [partial(self._loss, parts, number) for number in range(count)]

    def _loss(self, parts: Callable[[], list[Batch]], number: int) -> Tensor:
        with autocast(self._config.precision, self._device):
            return self._task.loss(self._model, parts()[number])

    def _evaluate(self) -> dict[str, float]:
        self._memory.enter("evaluation")
        self._trainer.materialize_()
        with autocast(self._config.training_precision, self._device):
            self._evaluation = self._task.evaluate(self._model)
        return self._evaluation

    def _warm_up(self) -> None:
        """Compile forward, backward and the forward without gradients, and settle caches, before the clock runs."""
        loss = self._parts_of(0)[0]
        numbers = autocast(self._config.training_precision, self._device)
        with torch.random.fork_rng(cards(self._device)), no_step(self._optimizer), numbers:
            for _ in range(WARM_UP_PASSES):
                loss().backward()  # type: ignore[no-untyped-call]
            with torch.no_grad():
                loss()
            self._evaluate()
        self._task.model.zero_grad(set_to_none=True)

    def _record(self) -> None:
        """Write down the latest step, unless that is done, and how memory stood by then."""
        self._recorder.extend("vram", self._memory.take())
        if not (row := self._unrecorded):
            return
        self._unrecorded = None
        result: StepResult = row.pop("result")
        self._recorder.add("steps", _columns(result) | row)

    def _flush(self) -> None:
        """Bring what was measured to the disk."""
        self._record()
        self._recorder.flush()

    @contextmanager
    def _sampled(self) -> Iterator[None]:
        """However the block ends, sampling ends too, and every sample reaches the record."""
        try:
            yield
        finally:
            self._memory.rest()
            self._recorder.extend("vram", self._memory.take())

    # --- checkpoints -------------------------------------------------------------------------------------

    def _wants_checkpoint(self, steps_done: int) -> bool:
        every = self._config.checkpoint_every
        return every > 0 and steps_done % every == 0 and steps_done < self._config.steps

    def save(self) -> None:
        """Write a checkpoint while the clock stands; the record that it counts on reaches the disk first."""
        self._stopwatch.pause()
        self._flush()
        with self._process.held():
            self._trainer.materialize_()
            save_checkpoint(self._folder / CHECKPOINT, self._state(), meta=self._identity)

    def _state(self) -> dict[str, Any]:
        """All that the rest of the run depends on."""
        return {name: component.state_dict() for name, component in self._components.items()} | {
            "steps_done": self._trainer.statistics().nominal_steps,
            "random": random_state(),
            "seconds": self._stopwatch.seconds,
            "step_ms": self._step_ms,
            "evaluation": self._evaluation,
            "peak": self._memory.peak(),
        }

    def _restore(self) -> int:
        """Take up the last checkpoint, if there is one, and return the nominal steps that were done."""
        state = load_checkpoint(self._folder / CHECKPOINT, expect=self._identity)
        if state is None:
            return 0
        for name, component in self._components.items():
            component.load_state_dict(state[name])
        self._stopwatch = Stopwatch(self._device, state["seconds"])
        self._step_ms, self._evaluation = state["step_ms"], state["evaluation"]
        self._memory.go_on_from(state["peak"])
        restore_random_state_(state["random"])
        return state["steps_done"]

    @property
    def _components(self) -> dict[str, Any]:
        """What has a state of its own, in the order in which it is taken up."""
        return {"model": self._task.model, "optimizer": self._optimizer, "trainer": self._trainer}

    @cached_property
    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must fit to be gone on from, bit for bit."""
        return self._config.record() | {"code": code_version()}

    # --- closing -----------------------------------------------------------------------------------------

    def _summary(self) -> dict[str, Any]:
        """What a comparison of runs needs, in one flat record."""
        statistics = asdict(self._trainer.statistics())
        seconds_by_phase = statistics.pop("seconds_by_phase")
        return {
            "name": self._config.name,
            "seed": self._config.seed,
            "code": code_version(),
            **statistics,
            "reliability": self._trainer.reliability(),
            "forecast_skill": self._trainer.forecast_skill(),
            **self._evaluation,
            **{f"seconds_in_{phase}": seconds for phase, seconds in seconds_by_phase.items()},
            "seconds": self._stopwatch.seconds,
            "gradient_step_ms": median(self._step_ms) if self._step_ms else None,
            **self._memory.summary(),
        }


def _columns(result: StepResult) -> dict[str, Any]:
    return {
        "nominal_step": result.nominal_step,
        "phase": str(result.phase),
        "measured_loss": result.measured_loss,
        "predicted_loss": result.predicted_loss,
        "gradient_norm": result.gradient_norm,
        "confidence": result.confidence,
        "event": result.event,
    }


def _moment(trainer: HybridTrainer, stopwatch: Stopwatch, steps: int) -> dict[str, Any]:
    """Where a run of so many nominal steps stands: the step under way, its phase, and the training time so far."""
    return {
        "nominal_step": min(trainer.statistics().nominal_steps + 1, steps),
        "phase": str(trainer.current_phase),
        "seconds": stopwatch.seconds,
    }
