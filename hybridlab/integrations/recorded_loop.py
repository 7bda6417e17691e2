"""What every outer loop that is not ours shares: hybrid steps, a record and a panel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import asdict
from functools import partial, wraps
from types import MethodType, SimpleNamespace
from typing import Any, Self

from torch import nn
from torch.optim import Optimizer

from hybridlab.base.device import device_name
from hybridlab.base.swapped import swapped
from hybridlab.engine.config import HybridTrainerConfig
from hybridlab.engine.result import StepResult
from hybridlab.engine.trainer import HybridTrainer
from hybridlab.notebook.session import runs_folder
from hybridlab.panel.controls import Controls
from hybridlab.panel.instruments import Instruments
from hybridlab.panel.live import Live
from hybridlab.panel.progress import shows_panel
from hybridlab.study.code_version import code_version
from hybridlab.study.record import Run
from hybridlab.study.step_log import RunMemory, StepLog, StepRecord, TrainingTimer
from hybridlab.study.watched_run import WatchedRun, progress


class RecordedLoop(WatchedRun):
    """Follows a `HybridTrainer` that any loop drives: a record in `runs/<folder>`, gauges and buttons in JupyterLab.

        loop = RecordedLoop(trainer, "my_run", steps=1000)
        for batch in batches:
            loop.note(trainer.step(lambda: loss_of(model, batch)))
        loop.finish({"validation_loss": ...})

    The buttons pause and take single steps; `stopping` says that Stop was pressed, and the loop should end then. A
    `with` block closes it where the loop ends without `finish`; the panel says so, and whether that was by an error.

    trainer: whose steps are noted; folder: below `runs`; a record that lies there is replaced
    steps: nominal steps that the loop takes; seed, more: kept in the record
    """

    def __init__(
        self, trainer: HybridTrainer, folder: str, steps: int, seed: int = 0, more: Mapping[str, Any] | None = None
    ) -> None:
        self.config = SimpleNamespace(name=folder, steps=steps, seed=seed, task=SimpleNamespace())
        self.config.emulates_card = lambda: False
        self.folder = runs_folder(folder)
        self._trainer, device = trainer, next(trainer.model.parameters()).device
        self._memory, self._timer = RunMemory(device), TrainingTimer(device)
        self._memory.begin(partial(progress, trainer, self._timer, steps))
        facts = {"name": folder, "seed": seed, "steps": steps, "task": {}, "hybrid": asdict(trainer.config)}
        facts |= {"device": device_name(device), **(more or {})}
        self._log = StepLog(self.folder, facts, self._memory, keep_steps=0)
        self._open = ExitStack()
        self._open.enter_context(self._log.open())
        self._evaluation: dict[str, float] = {}
        self._changes: dict[str, float] = {}
        self._live = Live(Controls(), steps, Instruments(self), trainer.config) if shows_panel() else None
        if self._live:
            self._live.__enter__()
        self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self.close(error)

    def note(self, result: StepResult, evaluation: Mapping[str, float] | None = None) -> None:
        """Record a step, and what was evaluated after it; do what the buttons ask."""
        changes, self._changes = self._changes, {}
        self._evaluation |= evaluation or {}
        record = StepRecord(result, self._trainer.statistics(), self._timer.seconds, dict(evaluation or {}), changes)
        self._log.add(record)
        if self._live:
            self._live.step(self.config.name, self.config.steps)
            self._live.watch(self, record)
        self._start()

    def finish(self, evaluation: Mapping[str, float] | None = None) -> Run:
        """Close the record with the last figures; the run counts as finished."""
        self._timer.pause()
        self._log.catch_up()
        self._log.finish({**self._closing_figures(), "code": code_version(), **self._evaluation, **(evaluation or {})})
        self.close()
        return self.record

    def close(self, error: type[BaseException] | None = None) -> None:
        """Keep what was recorded, without calling the run finished; does nothing where that is done.

        error: that ended the loop; the panel then says "failed", and else "stopped" before the last step
        """
        live, self._live = self._live, None
        with self._open:
            if error is None:  # else the losses of the last step may not be read
                self._log.catch_up()
            if live:
                live.__exit__(error)

    @property
    def stopping(self) -> bool:
        """Whether a person asked to stop."""
        return bool(self._live and self._live.controls.stopping)

    # --- what the panel asks of a run --------------------------------------------------------------------

    @property
    def learning_rate(self) -> float:
        """Of the optimizer's first group."""
        return float(self._trainer.optimizer.param_groups[0]["lr"])

    def pause(self) -> None:
        """Stop the clock and the sampling until the next step, and bring what was recorded to the disk."""
        self._timer.pause()
        self._memory.sampler.stop()
        self._log.flush()

    def save(self) -> None:
        """Bring the record to the disk; checkpoints are the loop's own."""
        self._log.flush()

    def _start(self) -> None:
        self._timer.start()
        self._memory.sampler.start()
        self._memory.enter(str(self._trainer.current_phase))


class HybridLoop:
    """Mixin of another library's trainer or module that takes hybrid steps.

    hybrid: the settings; None is plain training. A depth schedule in shares is fitted to the run's length
    record: folder below `runs` for a record, and gauges in JupyterLab; None keeps none

    hybrid_trainer: the `HybridTrainer`, once training has begun
    """

    def __init__(
        self, *args: Any, hybrid: HybridTrainerConfig | None = None, record: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.hybrid_config = hybrid or HybridTrainerConfig.plain()
        self.hybrid_trainer: HybridTrainer | None = None
        self._record = record
        self._loop: RecordedLoop | None = None
        self._restored: dict[str, Any] | None = None
        self._release: Callable[[], None] = lambda: None

    def _begin(
        self, model: nn.Module, optimizer: Optimizer, config: HybridTrainerConfig, steps: int, seed: int = 0
    ) -> HybridTrainer:
        """Make the hybrid trainer of a run of so many steps, go on from a restored state, and begin the record."""
        self.hybrid_trainer = trainer = HybridTrainer(model, optimizer, config.fitted_to(steps))
        self._stepping, self._release = hold_(optimizer)
        state, self._restored = self._restored, None
        if state:
            trainer.load_state_dict(state)
        if self._record:
            self._loop = RecordedLoop(trainer, self._record, steps, seed)
        return trainer

    def _end(self, figures: Callable[[], dict[str, float]]) -> None:
        """Leave the exact weights, the optimizer as it was, and a record that has finished."""
        if self.hybrid_trainer:
            self.hybrid_trainer.materialize_()
            self.hybrid_trainer.check_finite()
        self._release()
        if self._loop:
            self._loop.finish(figures())
            self._loop = None

    def _close(self, error: BaseException) -> None:
        """Leave the exact weights, the optimizer as it was, and the record of a run that an error ended."""
        with suppress(Exception):  # after a failed CUDA call, say, which is what is told
            self._materialize()
        self._release()
        self._restored = None
        if self._loop:
            self._loop.close(type(error))
            self._loop = None

    def _materialize(self) -> None:
        if self.hybrid_trainer:
            self.hybrid_trainer.materialize_()


def hold_(optimizer: Optimizer) -> tuple[Callable[[], AbstractContextManager[None]], Callable[[], None]]:
    """Let `optimizer.step()` do nothing, but within the first of what is returned; the second undoes this."""
    own, take = vars(optimizer).get("step"), optimizer.step
    held = wraps(take)(lambda self, closure=None: None)  # with the mark by which a scheduler knows its own wrapper
    optimizer.step = MethodType(held, optimizer)  # type: ignore[method-assign]

    def release() -> None:
        vars(optimizer).pop("step", None)
        if own:
            optimizer.step = own  # type: ignore[method-assign]

    return partial(swapped, optimizer, step=take), release
