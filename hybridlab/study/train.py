"""One run: a task, an optimizer and a trainer, step by step, recorded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
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
from hybridlab.memory.precision import autocast, set_matmul_precision
from hybridlab.optimizers import build_optimizer, set_lr_
from hybridlab.phases import Phase
from hybridlab.runs import Run, RunRecorder
from hybridlab.step_result import StepResult
from hybridlab.study.compilation import compiled
from hybridlab.study.run_config import RunConfig, find_device
from hybridlab.study.stopwatch import Stopwatch
from hybridlab.study.tasks import Task
from hybridlab.trainer import HybridTrainer
from hybridlab.vram import MemoryMeter

CHECKPOINT = "checkpoint.pt"
"""In a run's folder, while the run has not finished."""

WARM_UP_PASSES = 3

UNSETTLED_STEPS = 10
"""Steps at a run's start that its median step time leaves out."""


def train(config: RunConfig, folder: Path, on_step: Callable[[], None] = lambda: None, *, resume: bool = False) -> Run:
    """Run `config` from start to end and leave its record in `folder`.

    on_step: called after every nominal step, for a progress bar; at once for those that are not taken again
    resume: go on with the run that lies in `folder`, from its last checkpoint, if it has one; a finished run is
        returned as it is. By default, what lies there is replaced

    Raises UserError when `resume` meets a run of another configuration.
    """
    if not resume or not (folder / "config.json").exists():
        remove_checkpoint(folder / CHECKPOINT)
        return TrainingRun(config, folder).run(on_step)
    earlier = Run.load(folder)
    refuse_differences(folder, earlier.config, config.record())
    if earlier.summary is None:
        return TrainingRun(config, folder).run(on_step)
    remove_checkpoint(folder / CHECKPOINT)
    for _ in range(config.steps):
        on_step()
    return earlier


class TrainingRun:
    """The moving parts of one run. It goes on from the checkpoint in `folder`, if there is one."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self._config, self._folder = config, folder
        self._device = find_device(config.device)
        set_matmul_precision(config.precision)
        if config.cpu_threads:
            torch.set_num_threads(config.cpu_threads)
        self._meter = MemoryMeter(self._device)
        if config.card_gb:
            self._meter.cap(config.card_bytes)
        self._task: Task = config.task.build(config.seed, self._device)
        self._model = self._task.model
        if config.compiled:
            self._task.model, self._model = compiled(self._task.model)
        self._optimizer = build_optimizer(self._task.model, config.optimizer)
        self._trainer = HybridTrainer(self._task.model, self._optimizer, config.hybrid)
        self._stopwatch = Stopwatch(self._device)
        self._step_ms: list[float] = []
        self._evaluation: dict[str, float] = {}
        self._earlier_peak: dict[str, Any] = {}
        self._unrecorded: dict[str, Any] | None = None

    def run(self, on_step: Callable[[], None]) -> Run:
        """Warm up, go on where a checkpoint was left, take every step, evaluate on the way, write the summary."""
        self._warm_up()
        steps_done = self._restore()
        self._meter.reset_peak()
        for _ in range(steps_done):
            on_step()
        with RunRecorder(self._folder, self._config.record(), keep_steps=steps_done) as recorder:
            for step in range(steps_done, self._config.steps):
                row = self._step(step, settled=step >= steps_done + UNSETTLED_STEPS)
                self._record(recorder)  # the row before: one step late, so that reading a loss stalls nothing
                self._unrecorded = row
                if self._wants_checkpoint(step + 1):
                    self._save(recorder, step + 1)
                on_step()
            self._record(recorder)
            recorder.finish(self._summary())
        remove_checkpoint(self._folder / CHECKPOINT)
        return Run.load(self._folder)

    def _step(self, step: int, *, settled: bool) -> dict[str, Any]:
        """One nominal step, timed, and evaluated when it is time."""
        set_lr_(self._optimizer, self._config.schedule(self._trainer.steps_by(self._config.clock)))
        self._stopwatch.start()
        result = self._trainer.step(lambda: self._loss(step))
        elapsed = self._stopwatch.lap()
        if result.phase is not Phase.PREDICT and settled:
            self._step_ms.append(1e3 * elapsed)
        row = {"result": result, "gradient_step": self._trainer.statistics().gradient_steps}
        if (step + 1) % self._config.evaluate_every == 0 or step + 1 == self._config.steps:
            self._stopwatch.pause()
            row |= self._evaluate()
        return row | {"seconds": self._stopwatch.seconds}

    def _loss(self, step: int) -> Tensor:
        with autocast(self._config.precision, self._device):
            return self._task.loss(step, self._model)

    def _evaluate(self) -> dict[str, float]:
        with autocast(self._config.precision, self._device):
            self._evaluation = self._task.evaluate(self._model)
        return self._evaluation

    def _warm_up(self) -> None:
        """Compile forward, backward and the forward without gradients, and settle caches, before the clock runs."""
        with torch.random.fork_rng():
            for _ in range(WARM_UP_PASSES):
                self._loss(0).backward()  # type: ignore[no-untyped-call]
            with torch.no_grad():
                self._loss(0)
            self._evaluate()
        self._task.model.zero_grad(set_to_none=True)

    def _record(self, recorder: RunRecorder) -> None:
        """Write down the latest step, unless that is done."""
        if not (row := self._unrecorded):
            return
        self._unrecorded = None
        result: StepResult = row.pop("result")
        recorder.add("steps", _columns(result) | row)
        memory = {"nominal_step": result.nominal_step, "seconds": row["seconds"], "phase": str(result.phase)}
        recorder.add("vram", memory | asdict(self._meter.read()))

    # --- checkpoints -------------------------------------------------------------------------------------

    def _wants_checkpoint(self, steps_done: int) -> bool:
        every = self._config.checkpoint_every
        return every > 0 and steps_done % every == 0 and steps_done < self._config.steps

    def _save(self, recorder: RunRecorder, steps_done: int) -> None:
        """Write a checkpoint while the clock stands; the record that it counts on reaches the disk first."""
        self._stopwatch.pause()
        self._record(recorder)
        recorder.flush()
        state = {name: part.state_dict() for name, part in self._parts.items()} | {
            "steps_done": steps_done,
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
        return {
            name: max(value, earlier.get(name) or 0) if isinstance(value, int) else value
            for name, value in self._meter.peak().items()
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
