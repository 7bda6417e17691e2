"""Memory as it is read, sampled and kept, on a card that is played where there is none."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pynvml
import pytest
import torch

from hybridlab.base.errors import UserError
from hybridlab.study.exports import export_nvidia_smi
from hybridlab.study.memory_log import gpu_busy_percent, growth_bytes
from hybridlab.study.record import Run, RunRecorder
from hybridlab.study.step_log import RunMemory
from hybridlab.vram import MemoryMeter, MemoryReading, MemorySampler, exceeds, meter, sampler
from hybridlab.vram.meter import PhasePeaks

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DRIVER = ("nvmlDeviceGetMemoryInfo", "nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetUtilizationRates")


@dataclass
class PlayedCard:
    """A card of 1000 bytes with an allocator that counts its peaks as torch's does."""

    allocated: int = 0
    reserved: int = 0
    peak_allocated: int = 0
    peak_reserved: int = 0
    context: int = 0
    others: int = 0
    driver: int = 7
    processes: list[Any] = field(default_factory=list)

    def hold(self, allocated: int) -> None:
        """Allocate so much in all; torch reserves it and lets nothing go."""
        self.allocated, self.reserved = allocated, max(self.reserved, allocated)
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def reset_peaks(self, _: object = None) -> None:
        self.peak_allocated, self.peak_reserved = self.allocated, self.reserved

    def stats(self) -> dict[str, int]:
        """In torch's words."""
        return {
            "allocated_bytes.all.current": self.allocated,
            "reserved_bytes.all.current": self.reserved,
            "allocated_bytes.all.peak": self.peak_allocated,
            "reserved_bytes.all.peak": self.peak_reserved,
            "num_alloc_retries": 3,
        }

    def memory(self, _: object, version: int) -> Any:
        assert version == pynvml.nvmlMemory_v2, "the first version counts the driver's share as used"
        return SimpleNamespace(used=self.context + self.reserved + self.others, reserved=self.driver, total=1000)

    def tell_processes(self) -> None:
        """Let NVML name them, as it does outside containers."""
        self.processes = [
            SimpleNamespace(pid=os.getpid() + 1, usedGpuMemory=self.others),
            SimpleNamespace(pid=os.getpid(), usedGpuMemory=self.context + self.reserved),
        ]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> PlayedCard:
    played = PlayedCard()
    for name, value in {
        "current_device": lambda: 0,
        "get_device_properties": lambda _: SimpleNamespace(uuid="played", total_memory=1000),
        "reset_peak_memory_stats": played.reset_peaks,
        "reset_accumulated_memory_stats": lambda _: None,
        "empty_cache": lambda: None,
        "memory_stats": lambda _: played.stats(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for name, value in {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
        "nvmlDeviceGetMemoryInfo": played.memory,
        "nvmlDeviceGetComputeRunningProcesses": lambda _: played.processes,
        "nvmlDeviceGetUtilizationRates": lambda _: SimpleNamespace(gpu=42),
    }.items():
        monkeypatch.setattr(pynvml, name, value)
    return played


# --- reading -----------------------------------------------------------------------------------------------


def test_without_a_gpu_the_process_is_read_and_nothing_is_made_up() -> None:
    reading = MemoryMeter(CPU).read()
    assert reading == MemoryReading("process", reading.used_bytes)
    assert reading.used_bytes > 1e6
    assert set(MemoryMeter(CPU).peak()) == {"memory_source", "peak_memory_bytes"}
    assert MemoryMeter(CPU).other_processes_bytes() is None


def test_a_card_is_read_with_all_who_use_it(card: PlayedCard) -> None:
    card.context, card.others = 30, 200
    card.hold(100)
    card.tell_processes()
    assert MemoryMeter(CUDA).read() == MemoryReading(
        "nvml",
        used_bytes=100,
        allocated_bytes=100,
        device_used_bytes=330,
        process_used_bytes=130,
        other_bytes=230,
        context_bytes=30,
        device_total_bytes=1000,
        utilization_percent=42,
    )


def test_without_nvml_torch_alone_is_read(card: PlayedCard, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", missing)
    card.hold(100)
    meter = MemoryMeter(CUDA)
    assert meter.read() == MemoryReading("torch", 100, 100)
    assert meter.other_processes_bytes() is None
    assert meter.peak()["context_bytes"] is None


def test_a_single_figure_that_nvml_refuses_is_none(card: PlayedCard, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(_: object) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetUtilizationRates", unsupported)
    card.hold(100)
    reading = MemoryMeter(CUDA).read()
    assert (reading.utilization_percent, reading.process_used_bytes) == (None, None)
    assert reading.device_used_bytes == 100


def test_other_processes_are_told_from_this_one(card: PlayedCard) -> None:
    card.others = 200
    meter = MemoryMeter(CUDA)
    assert meter.other_processes_bytes() == 200, "torch has nothing yet: all is theirs, even if processes are hidden"
    card.context = 30
    card.hold(100)
    assert meter.other_processes_bytes() is None, "nobody can say whose it is"
    card.tell_processes()
    assert meter.other_processes_bytes() == 200


# --- peaks -------------------------------------------------------------------------------------------------


def test_each_phase_has_its_exact_peak_and_the_run_the_highest(card: PlayedCard) -> None:
    card.hold(500)
    card.hold(40)
    card.reserved = 40
    peaks = PhasePeaks(CUDA)
    peaks.reset()
    card.hold(50)
    for phase, heights in [("full", (90, 60)), ("full", (70, 20)), ("predict", (30, 10)), ("full", (80, 20))]:
        peaks.enter(phase)
        for height in heights:
            card.hold(height)
    assert peaks.by_phase() == {"full": 90, "predict": 30}
    assert (peaks.allocated_bytes(), peaks.reserved_bytes()) == (90, 90)


def test_a_peak_outside_of_any_phase_counts_for_the_run(card: PlayedCard) -> None:
    peaks = PhasePeaks(CUDA)
    peaks.reset()
    card.hold(90)
    card.hold(5)
    peaks.enter("full")
    assert peaks.allocated_bytes() == 90
    assert peaks.by_phase() == {"full": 5}
    peaks.reset()
    assert peaks.by_phase() == {}


def test_the_summary_s_peak_is_torch_s_reserve_and_what_the_process_has_beyond_it(card: PlayedCard) -> None:
    card.context, card.others = 30, 200
    meter = MemoryMeter(CUDA)
    meter.reset_peak()
    meter.enter("full")
    card.hold(100)
    meter.enter("predict")
    card.hold(60)
    card.tell_processes()
    assert meter.peak() == {
        "memory_source": "cuda",
        "peak_memory_bytes": 130,
        "peak_allocated_bytes": 100,
        "peak_reserved_bytes": 100,
        "context_bytes": 30,
        "allocator_retries": 3,
        "peak_allocated_bytes_in_full": 100,
        "peak_allocated_bytes_in_predict": 100,
    }


def test_where_processes_are_hidden_all_that_the_card_cannot_give_counts(card: PlayedCard) -> None:
    card.context, card.others = 30, 200
    card.hold(100)
    assert MemoryMeter(CUDA).peak()["context_bytes"] == 30 + 200 + card.driver


def test_a_smaller_card_is_a_share_of_this_one_context_included(
    card: PlayedCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    card.context = 30
    card.tell_processes()
    assert MemoryMeter(CUDA).share_of(400) == 0.37
    assert MemoryMeter(CUDA).share_of(950) == 1.0, "a card that is no larger is taken as it is"
    assert MemoryMeter(CUDA).share_of(20) == 0.0
    with pytest.raises(UserError, match="set card_gb to 0"):
        MemoryMeter(CPU).share_of(400)


# --- a run's books -----------------------------------------------------------------------------------------


def test_a_run_s_books_keep_the_peaks_of_its_earlier_part_and_of_predict(card: PlayedCard) -> None:
    earlier = RunMemory(CUDA)
    earlier.begin(dict)
    earlier.enter("full")
    card.hold(100)
    card.hold(20)
    earlier.note_predict()
    card.reserved = card.peak_reserved = 0
    so_far = earlier.peak()
    later = RunMemory(CUDA)
    later.go_on_from(so_far)
    later.begin(dict)
    later.enter("full")
    card.hold(50)
    card.hold(30)
    later.note_predict()
    peak = later.peak()
    assert (peak["peak_allocated_bytes"], peak["peak_allocated_bytes_in_full"]) == (100, 100)
    assert (peak["predict_allocated_bytes"], peak["predict_reserved_bytes"]) == (30, 100)
    assert later.summary() == {"other_bytes_at_start": 0, **peak}


def test_this_process_s_context_is_not_another_s_from_the_second_run_on(card: PlayedCard) -> None:
    """In a container, where NVML names no process."""
    card.others = 200
    first = RunMemory(CUDA)
    first.begin(dict)
    card.context = 30
    card.hold(100)
    assert first.summary()["other_bytes_at_start"] == 200
    card.allocated = card.reserved = 0  # the first run is gone, its context stays
    second = RunMemory(CUDA)
    second.begin(dict)
    assert second.summary()["other_bytes_at_start"] is None, "nobody can say whose it is"


def test_a_note_in_predict_asks_the_driver_nothing(card: PlayedCard, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = RunMemory(CUDA)
    memory.begin(dict)
    card.hold(100)
    with monkeypatch.context() as patched:
        for name in DRIVER:
            patched.delattr(pynvml, name)
        memory.note_predict()
    assert memory.peak()["predict_allocated_bytes"] == 100


def test_without_a_gpu_there_is_nothing_to_note_in_predict() -> None:
    memory = RunMemory(CPU)
    memory.begin(dict)
    memory.note_predict()
    assert "predict_allocated_bytes" not in memory.peak()


def test_a_panel_s_figures_are_the_last_sample_s_and_ask_the_driver_nothing(
    card: PlayedCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    card.context = 30
    memory = RunMemory(CUDA)
    memory.begin(dict)
    card.hold(100)
    assert memory.latest() == (MemoryMeter(CUDA).read(), 100 + 30 + card.driver), "before the first sample it is read"
    memory.sampler.start()
    memory.sampler.stop()
    for name in DRIVER:
        monkeypatch.delattr(pynvml, name)
    card.hold(140)
    reading, peak_bytes = memory.latest()
    assert reading.used_bytes == 100
    assert peak_bytes == 140 + 30 + card.driver


def test_a_panel_s_peak_counts_an_interrupted_run_s_earlier_part_in(card: PlayedCard) -> None:
    memory = RunMemory(CUDA)
    memory.go_on_from({"peak_memory_bytes": 900})
    memory.begin(dict)
    card.hold(100)
    assert memory.latest()[1] == 900


# --- sampling ----------------------------------------------------------------------------------------------


class CountingMeter(MemoryMeter):
    """Reads 1, 2, 3, ..."""

    def __init__(self) -> None:
        self.reads = 0

    def read(self) -> MemoryReading:
        self.reads += 1
        return MemoryReading("process", self.reads)


def wait_for(meter: CountingMeter, reads: int) -> None:
    deadline = time.monotonic() + 20
    while meter.reads < reads:
        assert time.monotonic() < deadline, "the sampler does not sample"
        time.sleep(1e-3)


def test_samples_come_by_themselves_and_are_taken_once() -> None:
    meter, step = CountingMeter(), 1
    with MemorySampler(meter, lambda: {"nominal_step": step}, every_ms=1) as sampler:
        wait_for(meter, 4)
        first = sampler.take()
        step = 2
        wait_for(meter, meter.reads + 2)
    rest = sampler.take()
    assert [row["used_bytes"] for row in first + rest] == list(range(1, meter.reads + 1))
    assert {row["nominal_step"] for row in rest} >= {2}
    assert [*first[0]] == ["unix_seconds", "nominal_step", *MemoryReading.__dataclass_fields__]
    assert sampler.take() == []


def test_the_shortest_block_has_its_start_and_its_end() -> None:
    sampler = MemorySampler(CountingMeter(), dict)
    with sampler:
        pass
    assert len(sampler.take()) == 2


def test_a_sampler_can_be_stopped_and_started_again() -> None:
    meter = CountingMeter()
    sampler = MemorySampler(meter, dict, every_ms=1)
    for _ in range(2):
        sampler.start()
        sampler.start()
        assert [thread.name for thread in threading.enumerate()].count("memory sampler") == 1
        wait_for(meter, meter.reads + 2)
        sampler.stop()
        reads = meter.reads
        sampler.stop()
        assert meter.reads == reads, "it has stopped"
    assert [row["used_bytes"] for row in sampler.take()] == list(range(1, reads + 1))


def test_an_error_in_the_block_ends_the_thread_and_keeps_the_samples() -> None:
    sampler = MemorySampler(CountingMeter(), dict)
    with pytest.raises(ZeroDivisionError), sampler:
        raise ZeroDivisionError
    assert len(sampler.take()) == 2
    assert "memory sampler" not in [thread.name for thread in threading.enumerate()]


def test_a_long_run_is_sampled_more_and_more_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    def wait(_: object, seconds: float) -> bool:
        pauses.append(seconds)
        return len(pauses) == 9

    monkeypatch.setattr(sampler, "ROWS_PER_PACE", 3)
    monkeypatch.setattr(threading, "Event", lambda: SimpleNamespace(wait=lambda s: wait(None, s), set=lambda: None))
    watch = MemorySampler(CountingMeter(), dict, every_ms=1000)
    watch._sample()
    watch._watch()
    assert pauses == [1, 1, 2, 2, 2, 4, 4, 4, 8]


def test_a_pace_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="every_ms is 0: it must be above 0"):
        MemorySampler(CountingMeter(), dict, every_ms=0)


# --- what the samples tell ---------------------------------------------------------------------------------


def recorded(folder: Path, rows: list[dict[str, Any]]) -> Run:
    with RunRecorder(folder, {"device": "NVIDIA H100"}) as recorder:
        recorder.extend("vram", rows)
    return Run.load(folder)


def test_growth_is_the_late_median_less_the_early_one(tmp_path: Path) -> None:
    used = {step: 100 if step < 10 else 500 + step for step in range(1, 101)}
    run = recorded(tmp_path, [{"nominal_step": step, "used_bytes": bytes_} for step, bytes_ in used.items()])
    assert growth_bytes(run, early=20, late=100) == round((581 + 600) / 2 - (520 + 539) / 2)
    steady = recorded(tmp_path, [{"nominal_step": step, "used_bytes": 7} for step in (25, 90)])
    assert growth_bytes(steady, early=20, late=100) == 0


@pytest.mark.parametrize("rows", [[], [{"nominal_step": 55, "used_bytes": 1}]])
def test_growth_of_a_run_that_is_too_short_is_refused(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    with pytest.raises(UserError, match="has no sample of memory in steps 951 to 1000"):
        growth_bytes(recorded(tmp_path, rows))


def test_a_card_is_as_busy_as_its_settled_gradient_steps_keep_it(tmp_path: Path) -> None:
    def sample(step: int, phase: str, percent: int | None) -> dict[str, Any]:
        return {"nominal_step": step, "phase": phase, "utilization_percent": percent}

    compiling, jump = sample(1, "warmup", 0), sample(30, "predict", 7)
    steps = [sample(20, "warmup", 50), sample(25, "full", 60), sample(31, "correct", 70), sample(40, "full", None)]
    assert gpu_busy_percent(recorded(tmp_path, [compiling, *steps, jump])) == 60
    assert gpu_busy_percent(recorded(tmp_path, [compiling, sample(40, "full", None)])) is None
    assert gpu_busy_percent(recorded(tmp_path, [])) is None


def test_samples_are_written_as_nvidia_smi_writes_them_in_local_time(tmp_path: Path) -> None:
    noon = datetime(2023, 11, 14, 12, 0, 0, 250_000)
    sample = {"nominal_step": 1, "device_total_bytes": 81559 * 2**20, "unix_seconds": noon.timestamp()}
    rows = [
        sample | {"device_used_bytes": 1024 * 2**20, "utilization_percent": 97},
        sample | {"device_used_bytes": None, "utilization_percent": None},
    ]
    path = tmp_path / "memory.csv"
    export_nvidia_smi(recorded(tmp_path, rows), path)
    assert path.read_text().splitlines() == [
        "timestamp, name, memory.total [MiB], memory.used [MiB], utilization.gpu [%]",
        "2023/11/14 12:00:00.250, NVIDIA H100, 81559, 1024, 97",
        "2023/11/14 12:00:00.250, NVIDIA H100, 81559, [N/A], [N/A]",
    ]
    assert len(pd.read_csv(path, skipinitialspace=True)) == 2


@pytest.mark.parametrize("rows", [[], [{"nominal_step": 1, "used_bytes": 5, "device_used_bytes": None}]])
def test_a_run_without_a_card_has_no_such_columns(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    with pytest.raises(UserError, match="has no figures of a GPU"):
        export_nvidia_smi(recorded(tmp_path, rows), tmp_path / "memory.csv")


def test_a_card_of_the_same_class_is_not_emulated(card: PlayedCard) -> None:
    assert not exceeds(CUDA, round(1000 / meter.SAME_GPU) + 1)
    assert exceeds(CUDA, 500)
