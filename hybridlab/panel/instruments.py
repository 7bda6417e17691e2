"""Reads a run between two steps, and keeps what the gauges show."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping
from statistics import mean
from typing import Any

import psutil

from hybridlab.panel.html import Memory, State
from hybridlab.panel.timeline import timeline_of
from hybridlab.study.step_log import StepRecord
from hybridlab.study.study import label
from hybridlab.study.watched_run import WatchedRun
from hybridlab.vram import MemoryReading

RATE_READINGS = 20
"""The rate, and how busy the GPU is, are means over so many readings."""


class Instruments:
    """Follows one run. A step's loss is read one step late, when it costs no wait."""

    def __init__(self, run: WatchedRun) -> None:
        self.run, config = run, run.config
        self.timeline = timeline_of(run.record, config.steps)  # with the earlier steps of a resumed run
        self.latest: StepRecord | None = None
        self._unread: StepRecord | None = None
        self._work, self._unit = work_of(vars(config.task))
        self._emulated_bytes = config.gpu_bytes if config.emulates_card() else 0
        self._gpu: deque[MemoryReading] = deque(maxlen=RATE_READINGS)
        self._memory = self._read_memory()
        self._shown: dict[str, Any] = {}  # fields of State that stay until they are known anew
        self._first: StepRecord | None = None
        self._steps_in: Counter[str] = Counter()
        self._readings: deque[tuple[float, int]] = deque(maxlen=RATE_READINGS)

    def note(self, record: StepRecord) -> None:
        """Take in a step; reads the losses of the one before it. Steps in between count as like it."""
        self.read_losses()
        if self.latest is None:
            self._first = record
            self._readings.append((record.seconds, record.statistics.gradient_steps))
        else:
            self._steps_in[record.result.phase] += record.result.nominal_step - self.latest.result.nominal_step
        self.latest = self._unread = record
        if record.changes or record.result.event:
            changed = [f"changed {name} to {value:g}" for name, value in record.changes.items()]
            self.remark("; ".join([*changed, *([record.result.event] if record.result.event else [])]))
        decision = decision_of(vars(record.result), self._threshold) or None
        validation = record.evaluation.get("validation_loss")
        self._show(decision=decision, confidence=record.result.confidence, validation=validation)
        if validation is not None:
            self.timeline.validate(record.result.nominal_step, validation)

    def remark(self, text: str) -> None:
        """Say what happened at the latest step."""
        step = self.latest.result.nominal_step if self.latest else 0
        self._show(note=f"step {step:,}: {text}")

    def _show(self, **known: Any) -> None:
        self._shown |= {name: value for name, value in known.items() if value is not None}

    def read_losses(self) -> None:
        """Read the losses of the latest step, once; that waits for the device unless another step has followed."""
        if self._unread is None:
            return
        result, self._unread = self._unread.result, None
        measured, predicted = result.measured_loss, result.predicted_loss
        self.timeline.add(result.nominal_step, result.phase, self._memory.used_bytes, measured, predicted)
        self._show(measured=measured, predicted=predicted, gradient_norm=result.gradient_norm)

    def state(self, status: str, *, done: int, total: int, seconds_left: float | None) -> State:
        """What the gauges show now; reads the memory. At least one step must have been noted."""
        assert self.latest is not None
        self._memory = self._read_memory()
        result, config, counts = self.latest.result, self.run.config, self.latest.statistics
        return State(
            title=label(config.name, config.seed),
            status=status,
            phase=result.phase,
            step=result.nominal_step,
            steps=config.steps,
            memory=self._memory,
            timeline=self.timeline,
            statistics=counts,
            done=done,
            total=total,
            seconds_left=seconds_left,
            rate=self._rate(self.latest),
            unit=self._unit,
            work=self._work * counts.gradient_steps,
            seconds=self.latest.seconds,
            step_ms=self._step_ms(self.latest),
            learning_rate=self.run.learning_rate,
            depth=getattr(result, "depth", None),
            threshold=self._threshold if self.run.settings.max_predict_steps else None,
            **self._shown,
            **self._of_gpu(),
        )

    @property
    def _threshold(self) -> float:
        return self.run.settings.confidence_threshold

    def _of_gpu(self) -> dict[str, Any]:
        """How busy and how hot the GPU is, as means over the last readings."""
        read: dict[str, list[float | None]] = {
            "gpu_busy_percent": [reading.utilization_percent for reading in self._gpu],
            "power_watts": [reading.power_watts for reading in self._gpu],
            "temperature_celsius": [reading.temperature_celsius for reading in self._gpu],
        }
        return {name: mean(known) for name, all_ in read.items() if (known := [v for v in all_ if v is not None])}

    def _rate(self, record: StepRecord) -> float | None:
        """Work of gradient steps per second of training, over the last readings."""
        self._readings.append((record.seconds, record.statistics.gradient_steps))
        (seconds, steps), (last_seconds, last_steps) = self._readings[0], self._readings[-1]
        return self._work * (last_steps - steps) / (last_seconds - seconds) if last_seconds > seconds else None

    def _step_ms(self, record: StepRecord) -> dict[str, float]:
        """Mean time of a step by phase, since the first that was noted."""
        assert self._first is not None
        before, now = self._first.statistics.seconds_by_phase, record.statistics.seconds_by_phase
        return {phase: 1e3 * (now[phase] - before[phase]) / count for phase, count in self._steps_in.items()}

    def _read_memory(self) -> Memory:
        reading, peak = self.run.memory()
        self._gpu.append(reading)
        return memory_of(vars(reading), peak, self._emulated_bytes)


def decision_of(result: Mapping[str, Any], threshold: float) -> str:
    """What a step decided about a proposal, in words; empty where it decided nothing.

    result: of a `StepResult`, or a row of a run's record: `nominal_step`, `confidence`, `event`
    """
    step, confidence, event = f"step {result['nominal_step']:,}: ", result["confidence"], result["event"]
    if event == "rejected":
        return f"{step}rejected by the gate: no tried length lowers the loss beyond its noise"
    if isinstance(event, str) and event.startswith(("accepted", "rejected")):
        return step + event
    if event == "proposed":
        return f"{step}proposed; the gate tries it on the next batches"
    if confidence is not None and confidence < threshold:
        return f"{step}no proposal: the confidence is below its threshold"
    return ""


def memory_of(reading: Mapping[str, Any], peak_bytes: int, emulated_bytes: int = 0) -> Memory:
    """What the gauge shows of a `MemoryReading`, on a GPU that may be emulated."""
    used = int(reading["used_bytes"])
    if reading["source"] == "process":
        return Memory(False, psutil.virtual_memory().total, used, max(peak_bytes, used))
    allocated, other, size = (_known(reading[f"{name}_bytes"]) for name in ("allocated", "other", "device_total"))
    total = min((known for known in (size, emulated_bytes) if known), default=peak_bytes)
    return Memory(True, total, used + (other or 0), peak_bytes, allocated, used, other)


def _known(value: float | None) -> int | None:
    return None if value is None or math.isnan(value) else int(value)


def work_of(task: Mapping[str, Any]) -> tuple[int, str]:
    """What a gradient step of a task trains on, and its unit: tokens, samples, or steps where it does not say."""
    batch, block = task.get("batch_size"), task.get("block_size")
    if batch is None:
        return 1, "steps"
    return (batch * block, "tokens") if block else (batch, "samples")
