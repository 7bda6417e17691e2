"""One run that a person drives from a notebook, with gauges in JupyterLab."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from inspect import GEN_CLOSED, GEN_SUSPENDED, getgeneratorstate
from itertools import islice
from pathlib import Path
from weakref import WeakValueDictionary, finalize

from torch import nn

from hybridlab.base.checkpoint import has_checkpoint, remove_checkpoint
from hybridlab.base.errors import UserError
from hybridlab.base.files import project_root
from hybridlab.base.lock import locked
from hybridlab.engine.result import StepResult
from hybridlab.panel.controls import Controls
from hybridlab.panel.frame import Frame
from hybridlab.panel.instruments import Instruments
from hybridlab.panel.live import Live, interrupts
from hybridlab.panel.progress import Progress, shows_panel
from hybridlab.study.code_version import code_version
from hybridlab.study.config import RunConfig
from hybridlab.study.record import Run
from hybridlab.study.resume import CHECKPOINT, earlier_run, other_code
from hybridlab.study.run import TrainingRun
from hybridlab.study.study import folder_name, label
from hybridlab.study.task_checks import check_task

warnings.filterwarnings("ignore", module=r"torch\.(_inductor|autograd|profiler)")
"""What torch's own code tells its authors; it would stand in an executed notebook, with paths of the machine."""


class Session:
    """One run that a person drives, some steps per cell.

        session = Session(config, "my_run")
        for result in session.run(200):
            ...

    config: of the run; folder: its record goes to `runs/<folder>/<arm>_<hash of the settings>_seed_<seed>`
    resume: go on from the last checkpoint in that folder; by default, what is there is replaced. The Stop button,
        `save` and `close` write one

    In JupyterLab each cell shows gauges, buttons and sliders; in batch the same cells report plain progress.

    An open session of the same run, as a cell that is run again has left it, is closed first.

    Raises UserError, and changes nothing, when another process trains in that folder, as `check_task` does, and when
    `resume` finds a finished run, one without a checkpoint, or one whose checkpoint was written by other code.
    """

    def __init__(self, config: RunConfig, folder: str, *, resume: bool = False) -> None:
        check_task(config.task)
        self.config, self.folder = config, runs_folder(folder) / folder_name(config)
        if before := _OPEN.get(self.folder):
            before.close()
        with ExitStack() as opened:
            opened.enter_context(locked(self.folder))
            self._start(resume)
            opened.callback(self._steps.close)
            self._end = opened.pop_all().close
        finalize(self, self._end)  # at the interpreter's exit too, while the record can still be written
        self._instruments = Instruments(self._run)
        _OPEN[self.folder] = self

    def _start(self, resume: bool) -> None:
        earlier = earlier_run(self.config, self.folder) if resume else None
        if earlier:
            self._refuse_resume(earlier)
        elif not resume:
            remove_checkpoint(self.folder / CHECKPOINT)
        self._run = TrainingRun(self.config, self.folder)
        self.steps_done = self._saved_at = self._run.start()
        self._steps = self._run.steps()

    def run(self, steps: int | None = None) -> Iterator[StepResult]:
        """Take so many nominal steps, or all that are left, and give each one's result.

        Ends early, with one line, when it is stopped by the button or by Ctrl-C; the next `run` goes on from there.

        Raises UserError when an error ended an earlier step.
        """
        if getgeneratorstate(self._steps) == GEN_CLOSED and self.steps_done < self.config.steps:
            raise UserError("this session has ended: Session(..., resume=True) goes on from its last checkpoint")
        wanted = self._wanted(steps)
        controls = Controls()
        with interrupts(controls), self._resting(), self._panel(controls, wanted) as panel:
            for record in islice(self._steps, wanted):
                self.steps_done = record.result.nominal_step
                self._instruments.note(record)
                yield record.result
                panel.step(self._label, wanted)
                panel.between_steps(self._run)
                if controls.stopping and self.steps_done < self.config.steps:
                    self.save()
                    print(f"stopped at step {self.steps_done} of {self.config.steps}: session.run() goes on from here")
                    return

    def change(self, **settings: float) -> None:
        """Change settings from the next step on, as `HybridTrainer.change` does; the record says so."""
        self._run.change(**settings)

    def save(self) -> None:
        """Write a checkpoint, from which `Session(..., resume=True)` goes on."""
        self._run.save()
        self._saved_at = self.steps_done

    def frame(self) -> Frame:
        """The gauges as they are now, to keep in the notebook."""
        self._instruments.read_losses()
        done = self.steps_done
        status = "finished" if done == self.config.steps else "stopped"
        return Frame(self._instruments.state(status, done=done, total=self.config.steps, seconds_left=None))

    @property
    def model(self) -> nn.Module:
        """What is trained, with its weights as they are now."""
        return self._run.model

    @property
    def record(self) -> Run:
        """Everything that was recorded so far."""
        return Run.load(self.folder)

    def close(self) -> None:
        """End the run, and keep its record; unless it has finished, a checkpoint keeps the steps that were taken.

        A run that an error ended within a step keeps the checkpoint that it had.
        """
        try:
            is_between_steps = getgeneratorstate(self._steps) == GEN_SUSPENDED
            if is_between_steps and self._saved_at < self.steps_done < self.config.steps:
                self.save()
        finally:
            self._end()

    def __repr__(self) -> str:
        return f"Session({self._label}: step {self.steps_done} of {self.config.steps}, {self._run.phase})"

    @property
    def _label(self) -> str:
        return label(self.config.name, self.config.seed)

    def _refuse_resume(self, earlier: Run) -> None:
        if earlier.summary is not None and not earlier.diverged:
            raise UserError(f"{self.folder} has finished: show final_frame of its run, or start afresh without resume")
        if len(earlier.steps) and not has_checkpoint(self.folder / CHECKPOINT):
            raise UserError(
                f"there is no checkpoint in {self.folder}: its {len(earlier.steps)} steps cannot be resumed; start "
                "afresh without resume, which replaces them, or choose another folder"
            )
        if code := other_code(self.folder):
            raise UserError(
                f"the checkpoint in {self.folder} is of other code ({code} then, {code_version()} now): go on with "
                "that code, or start afresh without resume, which replaces it"
            )

    def _wanted(self, steps: int | None) -> int:
        left = self.config.steps - self.steps_done
        if steps is not None and steps < 1:
            raise ValueError(f"steps is {steps}: it must be at least 1, or None for all that are left")
        return left if steps is None else min(steps, left)

    def _panel(self, controls: Controls, wanted: int) -> Live | Progress:
        """Gauges where a person looks, else plain progress."""
        if shows_panel():
            return Live(controls, wanted, self._instruments, self._run.settings)
        return Progress(max(1, wanted), self._label)

    @contextmanager
    def _resting(self) -> Iterator[None]:
        """After the block, stop the clock, or close the run's record after its last step."""
        try:
            yield
        finally:
            if self.steps_done == self.config.steps:
                next(self._steps, None)
                self._end()
            else:
                self._run.pause()


_OPEN: WeakValueDictionary[Path, Session] = WeakValueDictionary()
"""The sessions of this process, by the folder of their run."""


def runs_folder(notebook: str) -> Path:
    """Where a notebook's runs are recorded."""
    return project_root() / "runs" / notebook
