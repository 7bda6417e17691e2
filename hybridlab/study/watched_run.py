"""A run as whoever watches and steers it sees it, whoever drives its loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hybridlab.engine.config import HybridTrainerConfig
from hybridlab.engine.phases import Phase
from hybridlab.engine.trainer import HybridTrainer
from hybridlab.study.record import Run
from hybridlab.study.step_log import RunMemory, TrainingTimer
from hybridlab.vram import MemoryReading


class WatchedRun(ABC):
    """What may be looked at and changed between two steps.

    config: what it was asked to do: name, seed, steps and more; folder: of its record
    """

    config: Any
    folder: Path
    _trainer: HybridTrainer
    _memory: RunMemory
    _timer: TrainingTimer
    _changes: dict[str, float]

    @property
    def record(self) -> Run:
        """Everything that reached the disk so far."""
        return Run.load(self.folder)

    @property
    def settings(self) -> HybridTrainerConfig:
        """The trainer's settings as they are now."""
        return self._trainer.config

    @property
    def phase(self) -> Phase:
        """The phase of the next step."""
        return self._trainer.current_phase

    @property
    @abstractmethod
    def learning_rate(self) -> float:
        """Of the latest step."""

    def memory(self) -> tuple[MemoryReading, int]:
        """Memory at the last sample, and the run's peak so far, in bytes; stalls nothing."""
        return self._memory.latest()

    def change(self, **settings: float) -> None:
        """Change settings as `HybridTrainer.change` does; the next step's row says so, under "changed"."""
        self._trainer.change(**settings)
        self._changes |= settings

    @abstractmethod
    def pause(self) -> None:
        """Stop the clock until the next step, and bring what was measured to the disk."""

    @abstractmethod
    def save(self) -> None:
        """Write what a later start can go on from."""

    def _closing_figures(self) -> dict[str, Any]:
        """Name, seed, counts, time and memory, as a run's summary has them."""
        statistics = asdict(self._trainer.statistics())
        seconds_by_phase = statistics.pop("seconds_by_phase")
        return {
            "name": self.config.name,
            "seed": self.config.seed,
            **statistics,
            **{f"seconds_in_{phase}": seconds for phase, seconds in seconds_by_phase.items()},
            "seconds": self._timer.seconds,
            **self._memory.summary(),
        }


def progress(trainer: HybridTrainer, timer: TrainingTimer, steps: int) -> dict[str, Any]:
    """Where a run of so many nominal steps stands: the step under way, its phase, and the training time so far."""
    return {
        "nominal_step": min(trainer.statistics().nominal_steps + 1, steps),
        "phase": str(trainer.current_phase),
        "seconds": timer.seconds,
    }
