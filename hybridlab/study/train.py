"""One run: a task, an optimizer and a trainer, step by step, recorded."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from hybridlab import __version__
from hybridlab.checkpoint import (
    load_checkpoint,
    random_state,
    refuse_differences,
    remove_checkpoint,
    restore_random_state_,
    save_checkpoint,
)
from hybridlab.config import HybridTrainerConfig
from hybridlab.memory.apply import held, optimizer_for, prepare_model_
from hybridlab.memory.precision import autocast, set_matmul_precision
from hybridlab.optimizers import set_lr_
from hybridlab.phases import Phase
from hybridlab.runs import Run, RunRecorder
from hybridlab.step_result import Statistics, StepResult
from hybridlab.study.compilation import compiled
from hybridlab.study.out_of_memory import shortage_told
from hybridlab.study.run_config import RunConfig, find_device
from hybridlab.study.stopwatch import Stopwatch
from hybridlab.study.tasks import Task
from hybridlab.trainer import HybridTrainer
from hybridlab.vram import MemoryMeter, MemoryReading, MemorySampler

Watch = Callable[["TrainingRun", "StepRecord"], None]
"""Called between two steps, with the run and what its last step did."""

CHECKPOINT = "checkpoint.pt"
"""In a run's folder, while the run has not finished."""

WARM_UP_PASSES = 3

UNSETTLED_STEPS = 10
"""Steps at a run's start that its median step time leaves out."""


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
        returned as it is. By default, what lies there is replaced
    watch: called after every step that is taken, with the run and what the step did

    Raises UserError when `resume` meets a run of another configuration, and when memory runs out.
    """
    earlier = earlier_run(config, folder) if resume else None
    if not earlier or earlier.summary is not None:
        remove_checkpoint(folder / CHECKPOINT)
    if earlier and earlier.summary is not None:
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

    Whoever drives it, through `steps`, may between two of them `pause` the clock, `save` a checkpoint and `change`
    settings.
    """

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self._config, self._folder = config, folder
        self._device = find_device(config.device)
        set_matmul_precision(config.training_precision)
        if config.cpu_threads:
            torch.set_num_threads(config.cpu_threads)
        self._meter = MemoryMeter(self._device)
        self._sampler = MemorySampler(self._meter, self._moment)
        self._others_at_start_bytes = self._meter.other_processes_bytes()
        if config.card_gb:
            self._meter.cap(config.card_bytes)
        self._task: Task = config.task.build(config.seed, self._device, config.memory)
        prepare_model_(self._task.model, config.memory)
        self._model = self._task.model
        if config.compiled:
            self._task.model, self._model = compiled(self._task.model, config.memory)
        self._optimizer = optimizer_for(self._task.model, config.optimizer, config.memory)
        self._trainer = HybridTrainer(self._task.model, self._optimizer, config.hybrid)
        self._stopwatch = Stopwatch(self._device)
        self._step_ms: list[float] = []
        self._evaluation: dict[str, float] = {}
        self._earlier_peak: dict[str, Any] = {}
        self._in_predict: dict[str, int] = {}
        self._unrecorded: dict[str, Any] | None = None
        self._steps_before = 0
        self._changes: dict[str, float] = {}

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
        self._warm_up()
        self._steps_before = self._restore()
        self._meter.reset_peak()
        self._recorder = RunRecorder(self._folder, self._config.record(), keep_steps=self._steps_before)
        return self._steps_before

    def steps(self) -> Generator[StepRecord]:
        """Take a nominal step whenever one is asked for, evaluate on the way, write the summary after the last.

        Call `start` first. Closing the iterator keeps what was measured; the run then counts as interrupted.
        """
        first = self._steps_before
        with self._recorder, self._sampled():
            for step in range(first, self._config.steps):
                record = self._step(step, settled=step >= first + UNSETTLED_STEPS)
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
    def settings(self) -> HybridTrainerConfig:
        """The trainer's settings as they are now."""
        return self._trainer.config

    @property
    def phase(self) -> Phase:
        """The phase of the next step."""
        return self._trainer.current_phase

    def memory(self) -> tuple[MemoryReading, int]:
        """Memory at this moment, and the run's peak so far, in bytes; never waits for the device."""
        return self._meter.read(), self._peak()["peak_memory_bytes"]

    def change(self, **settings: float) -> None:
        """Change settings as `HybridTrainer.change` does; the next step's row says so, under "changed"."""
        self._trainer.change(**settings)
        self._changes |= settings

    def pause(self) -> None:
        """Stop the clock until the next step, and bring what was measured to the disk."""
        self._stopwatch.pause()
        self._record()
        self._recorder.flush()

    def _step(self, step: int, *, settled: bool) -> StepRecord:
        """One nominal step, timed, and evaluated when it is time."""
        set_lr_(self._optimizer, self._config.schedule(self._trainer.steps_by(self._config.clock)))
        self._stopwatch.start()
        self._meter.enter(str(self._trainer.current_phase))
        result = self._trainer.step(self._parts_of(step))
        elapsed = self._stopwatch.lap()
        if self._trainer.card_is_clear:
            self._note_predict()
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

    def _parts_of(self, step: int) -> list[Callable[[], Tensor]]:
        """The losses of a step's batch, part by part."""
        return [partial(self._loss, step, part) for part in range(self._config.memory.micro_batches)]

    def _loss(self, step: int, part: int = 0) -> Tensor:
        with autocast(self._config.precision, self._device):
            return self._task.loss(step, self._model, part, self._config.memory.micro_batches)

    def _evaluate(self) -> dict[str, float]:
        self._meter.enter("evaluation")
        self._trainer.make_whole_()
        with autocast(self._config.training_precision, self._device):
            self._evaluation = self._task.evaluate(self._model)
        return self._evaluation

    def _warm_up(self) -> None:
        """Compile forward, backward and the forward without gradients, and settle caches, before the clock runs."""
        with torch.random.fork_rng(), held(self._optimizer), autocast(self._config.training_precision, self._device):
            for _ in range(WARM_UP_PASSES):
                self._loss(0).backward()  # type: ignore[no-untyped-call]
            with torch.no_grad():
                self._loss(0)
            self._evaluate()
        self._task.model.zero_grad(set_to_none=True)

    def _record(self) -> None:
        """Write down the latest step, unless that is done, and how memory stood by then."""
        self._recorder.extend("vram", self._sampler.take())
        if not (row := self._unrecorded):
            return
        self._unrecorded = None
        result: StepResult = row.pop("result")
        self._recorder.add("steps", _columns(result) | row)

    # --- memory ------------------------------------------------------------------------------------------

    @contextmanager
    def _sampled(self) -> Iterator[None]:
        """Sample memory while the block runs; however it ends, every sample reaches the record."""
        try:
            with self._sampler:
                yield
        finally:
            self._recorder.extend("vram", self._sampler.take())

    def _note_predict(self) -> None:
        """Keep the most that is on the card while it holds nothing but what Predict needs."""
        now = self._meter.read()
        if now.allocated_bytes is None:
            return
        here = {"predict_allocated_bytes": now.allocated_bytes, "predict_reserved_bytes": now.used_bytes}
        self._in_predict = {name: max(value, self._in_predict.get(name, 0)) for name, value in here.items()}

    def _moment(self) -> dict[str, Any]:
        """Where the run stands: the step under way, its phase, and the training time so far."""
        steps_done = self._trainer.statistics().nominal_steps
        return {
            "nominal_step": min(steps_done + 1, self._config.steps),
            "phase": str(self._trainer.current_phase),
            "seconds": self._stopwatch.seconds,
        }

    # --- checkpoints -------------------------------------------------------------------------------------

    def _wants_checkpoint(self, steps_done: int) -> bool:
        every = self._config.checkpoint_every
        return every > 0 and steps_done % every == 0 and steps_done < self._config.steps

    def save(self) -> None:
        """Write a checkpoint while the clock stands; the record that it counts on reaches the disk first."""
        self.pause()
        self._trainer.make_whole_()
        state = {name: part.state_dict() for name, part in self._parts.items()} | {
            "steps_done": self._trainer.statistics().nominal_steps,
            "random": random_state(),
            "seconds": self._stopwatch.seconds,
            "step_ms": self._step_ms,
            "evaluation": self._evaluation,
            "peak": self._peak(),
        }
        save_checkpoint(self._folder / CHECKPOINT, state, meta=self._identity)

    def _restore(self) -> int:
        """Take up the last checkpoint, if there is one, and return the nominal steps that were done."""
        state = load_checkpoint(self._folder / CHECKPOINT, expect=self._identity)
        if state is None:
            return 0
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
        self._stopwatch = Stopwatch(self._device, state["seconds"])
        self._step_ms, self._evaluation, self._earlier_peak = state["step_ms"], state["evaluation"], state["peak"]
        restore_random_state_(state["random"])
        return state["steps_done"]

    @property
    def _parts(self) -> dict[str, Any]:
        """What has a state of its own, in the order in which it is taken up."""
        return {"model": self._task.model, "optimizer": self._optimizer, "trainer": self._trainer}

    @cached_property
    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must fit to be gone on from, bit for bit."""
        return self._config.record() | {"hybridlab": __version__, "torch": str(torch.__version__)}

    # --- closing -----------------------------------------------------------------------------------------

    def _peak(self) -> dict[str, Any]:
        """Peak memory, an interrupted run's earlier part included."""
        earlier = self._earlier_peak
        return earlier | {
            name: max(value, earlier.get(name) or 0) if isinstance(value, int) else value
            for name, value in (self._meter.peak() | self._in_predict).items()
        }

    def _summary(self) -> dict[str, Any]:
        """What a comparison of runs needs, in one flat record."""
        statistics = asdict(self._trainer.statistics())
        seconds_by_phase = statistics.pop("seconds_by_phase")
        return {
            "name": self._config.name,
            "seed": self._config.seed,
            **statistics,
            "reliability": self._trainer.reliability(),
            **self._evaluation,
            **{f"seconds_in_{phase}": seconds for phase, seconds in seconds_by_phase.items()},
            "seconds": self._stopwatch.seconds,
            "gradient_step_ms": median(self._step_ms) if self._step_ms else None,
            "other_bytes_at_start": self._others_at_start_bytes,
            **self._peak(),
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
