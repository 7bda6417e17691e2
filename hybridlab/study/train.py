"""One run: a task, an optimizer and a trainer, step by step, recorded."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from hybridlab.config import HybridTrainerConfig
from hybridlab.errors import UserError
from hybridlab.memory.precision import autocast, check_precision, set_matmul_precision
from hybridlab.optimizers import OptimizerConfig, Schedule, build_optimizer, set_lr_
from hybridlab.phases import Phase
from hybridlab.runs import Run, RunRecorder
from hybridlab.step_result import StepResult
from hybridlab.study.tasks import Task, TaskConfig
from hybridlab.trainer import HybridTrainer
from hybridlab.vram import MemoryMeter

UNSETTLED_STEPS = 10
"""Steps at a run's start that its median step time leaves out."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that a run depends on.

    name: of the arm; two runs of one study differ in name or seed
    steps: nominal steps; evaluate_every: nominal steps between two evaluations
    precision: "fp32", "tf32" or "bf16" (autocast over float32 weights); compiled: through torch.compile
    device: "auto" (CUDA where there is one), "cuda" or "cpu"
    cpu_threads: that torch may use; 0 leaves the choice to it. Small models run best on one
    """

    name: str
    task: TaskConfig
    steps: int
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig.tuned)
    schedule: Schedule = field(default_factory=Schedule)
    hybrid: HybridTrainerConfig = field(default_factory=HybridTrainerConfig.plain)
    precision: str = "fp32"
    compiled: bool = False
    evaluate_every: int = 50
    seed: int = 0
    device: str = "auto"
    cpu_threads: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        check_precision(self.precision)
        if self.steps < 1 or self.evaluate_every < 1:
            raise ValueError("steps and evaluate_every must be at least 1")
        if self.cpu_threads < 0:
            raise ValueError("cpu_threads must be at least 0 (0 leaves the choice to torch)")

    def as_vanilla(self) -> RunConfig:
        """The plan's own setting for the same task and length: FP32, Adam at 6e-4, constant, no clipping."""
        return replace(
            self,
            name="vanilla",
            optimizer=OptimizerConfig.vanilla(),
            schedule=Schedule("constant", warmup_steps=0, total_steps=self.steps),
            hybrid=replace(self.hybrid, clip_norm=None),
            precision="fp32",
        )

    def record(self) -> dict[str, Any]:
        """JSON-ready: the settings and where the data come from."""
        return asdict(self) | {"data": self.task.data_record(), "device": describe_device(find_device(self.device))}


def find_device(name: str) -> torch.device:
    """The device that a parameter file names. Raises UserError for CUDA where there is none."""
    if name not in ("auto", "cuda", "cpu"):
        raise UserError(f"device {name!r} is unknown: choose auto, cuda or cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "device is 'cuda', but torch sees no CUDA device: set device to auto or cpu, or mend the driver"
        )
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def describe_device(device: torch.device) -> str:
    """The card's name, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def train(config: RunConfig, folder: Path, on_step: Callable[[], None] = lambda: None) -> Run:
    """Run `config` from start to end and leave its record in `folder`.

    on_step: called after every nominal step, for a progress bar
    """
    return TrainingRun(config, folder).run(on_step)


def compiled(model: nn.Module) -> nn.Module:
    """The model through torch.compile; it shares its parameters with the model itself."""
    wrapped: nn.Module = torch.compile(model)  # type: ignore[assignment]
    return wrapped


class TrainingRun:
    """The moving parts of one run."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self._config, self._folder = config, folder
        self._device = find_device(config.device)
        set_matmul_precision(config.precision)
        if config.cpu_threads:
            torch.set_num_threads(config.cpu_threads)
        self._task: Task = config.task.build(config.seed, self._device)
        self._model = compiled(self._task.model) if config.compiled else self._task.model
        self._optimizer = build_optimizer(self._task.model, config.optimizer)
        self._trainer = HybridTrainer(self._task.model, self._optimizer, config.hybrid)
        self._meter = MemoryMeter(self._device)
        self._stopwatch = Stopwatch(self._device)
        self._step_ms: list[float] = []
        self._evaluation: dict[str, float] = {}

    def run(self, on_step: Callable[[], None]) -> Run:
        """Warm up, take every step, evaluate on the way, write the summary."""
        self._warm_up()
        self._meter.reset_peak()
        with RunRecorder(self._folder, self._config.record()) as recorder:
            previous: dict[str, Any] | None = None
            for step in range(self._config.steps):
                row = self._step(step)
                if previous:
                    self._record(recorder, previous)  # one step late, so that reading a loss stalls nothing
                previous = row
                on_step()
            assert previous is not None
            self._record(recorder, previous)
            recorder.finish(self._summary())
        return Run.load(self._folder)

    def _step(self, step: int) -> dict[str, Any]:
        """One nominal step, timed, and evaluated when it is time."""
        set_lr_(self._optimizer, self._config.schedule(step))
        self._stopwatch.start()
        result = self._trainer.step(lambda: self._loss(step))
        elapsed = self._stopwatch.lap()
        if result.phase is not Phase.PREDICT and step >= UNSETTLED_STEPS:
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
        """Compile forward, backward and the forward without gradients before the clock runs."""
        with torch.random.fork_rng():
            self._loss(0).backward()  # type: ignore[no-untyped-call]
            with torch.no_grad():
                self._loss(0)
            self._evaluate()
        self._task.model.zero_grad(set_to_none=True)

    def _record(self, recorder: RunRecorder, row: dict[str, Any]) -> None:
        result: StepResult = row.pop("result")
        recorder.add("steps", _columns(result) | row)
        memory = {"nominal_step": result.nominal_step, "seconds": row["seconds"], "phase": str(result.phase)}
        recorder.add("vram", memory | asdict(self._meter.read()))

    def _summary(self) -> dict[str, Any]:
        """What a comparison of runs needs, in one flat record."""
        statistics = asdict(self._trainer.statistics())
        seconds_by_phase = statistics.pop("seconds_by_phase")
        return {
            "name": self._config.name,
            "seed": self._config.seed,
            **statistics,
            **self._evaluation,
            **{f"seconds_in_{phase}": seconds for phase, seconds in seconds_by_phase.items()},
            "seconds": self._stopwatch.seconds,
            "gradient_step_ms": median(self._step_ms) if self._step_ms else None,
            **self._meter.peak(),
        }


class Stopwatch:
    """Seconds of training alone: paused during evaluation, and the device is waited for at each pause."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = 0.0
        self._since: float | None = None

    def start(self) -> None:
        """Run, if it does not yet."""
        if self._since is None:
            self._since = self._lap = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap or start."""
        now = time.perf_counter()
        elapsed, self._lap = now - self._lap, now
        return elapsed

    def pause(self) -> None:
        """Wait for the device, and stop."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        if self._since is not None:
            self._seconds += time.perf_counter() - self._since
            self._since = None

    @property
    def seconds(self) -> float:
        """Training time so far."""
        return self._seconds + (time.perf_counter() - self._since if self._since is not None else 0.0)


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
