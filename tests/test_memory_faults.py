"""Faults of memory: one line that helps, and nothing lost."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hybridlab.base.errors import UserError
from hybridlab.planner import nearest_fit
from hybridlab.study import RunConfig, TextTaskConfig, out_of_memory, train
from hybridlab.study import config as run_config
from hybridlab.study.out_of_memory import SNAPSHOT, report_oom
from hybridlab.study.planning import training_spec_of
from hybridlab.study.record import Run
from hybridlab.study.tasks import Batch, Task
from hybridlab.vram import MemoryReading
from tests.conftest import TINY_TEXT, TaskWithin, tiny_run

CARD_IS_FULL = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15.47 GiB of which 1.10 GiB is free."
)
HOST_IS_FULL = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8000 bytes."


# --- a run that runs out of memory -------------------------------------------------------------------------


@dataclass(frozen=True)
class HungryTaskConfig(TextTaskConfig):
    """A GPT-2 whose forward meets a full card as soon as `Hungry.fails` says so."""

    def build(self, *given: Any, **named: Any) -> Task:
        return Hungry(super().build(*given, **named))


class Hungry(TaskWithin):
    error: RuntimeError | None = None
    held: weakref.ref[Tensor] | None = None

    def batch(self, step: int) -> Batch:
        self._step = step
        return self.task.batch(step)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        activations = torch.ones(5)
        if self._step >= 12 and Hungry.error:
            Hungry.held = weakref.ref(activations)
            raise Hungry.error
        return self.task.loss(model, batch)


CONFIG = tiny_run("hungry", 16, HungryTaskConfig(**TINY_TEXT), checkpoint_every=5)


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Callable[[RuntimeError | None], None]:
    return lambda error: monkeypatch.setattr(Hungry, "error", error)


def test_a_full_card_is_told_in_one_line_and_the_run_goes_on_from_its_checkpoint(
    tmp_path: Path, full: Callable[[RuntimeError | None], None]
) -> None:
    full(torch.OutOfMemoryError(CARD_IS_FULL))
    with pytest.raises(UserError) as caught:
        train(CONFIG, tmp_path)
    assert str(caught.value) == (
        f"out of memory: 2.00 GiB more were asked for: {CONFIG.describe_device()}; "
        f"take a smaller batch; the record and the last checkpoint in {tmp_path} are intact"
    )
    stopped = Run.load(tmp_path)
    assert stopped.steps["nominal_step"].tolist() == list(range(1, 12)), "all but the last, whose loss was not yet read"
    assert (stopped.summary, len(stopped.vram) >= 2) == (None, True)
    assert not (tmp_path / SNAPSHOT).exists(), "there is no card to take one of"
    full(None)
    assert train(CONFIG, tmp_path, resume=True).steps["nominal_step"].tolist() == list(range(1, 17))


def test_what_the_failed_step_held_is_let_go(tmp_path: Path, full: Callable[[RuntimeError | None], None]) -> None:
    full(torch.OutOfMemoryError(CARD_IS_FULL))
    with pytest.raises(UserError) as kept_as_a_notebook_does:
        train(CONFIG, tmp_path)
    gc.collect()
    assert Hungry.held is not None
    assert Hungry.held() is None
    assert kept_as_a_notebook_does.value.__cause__ is Hungry.error


def test_a_full_host_is_told_too_and_other_errors_pass(
    tmp_path: Path, full: Callable[[RuntimeError | None], None]
) -> None:
    full(RuntimeError(HOST_IS_FULL))
    with pytest.raises(
        UserError, match=r"^out of host memory: 8000 bytes more were asked for, the host has .* intact$"
    ):
        train(CONFIG, tmp_path)
    full(RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        train(CONFIG, tmp_path)


# --- what is told of a card, played where there is none ----------------------------------------------------


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    played = SimpleNamespace(others=None)

    class PlayedMeter:
        def __init__(self, device: torch.device) -> None:
            pass

        def read(self) -> MemoryReading:
            return MemoryReading("nvml", 14_900_000_000)

        def other_processes_bytes(self) -> int | None:
            return played.others

    monkeypatch.setattr(out_of_memory, "MemoryMeter", PlayedMeter)
    monkeypatch.setattr(run_config, "exceeds", lambda device, gpu_bytes: gpu_bytes < 80e9)
    monkeypatch.setattr(RunConfig, "describe_device", lambda _: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * 10**9))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).write_bytes(b"blocks"))
    monkeypatch.setattr(out_of_memory, "nearest_fit", lambda _, size: f"switch on what {size} bytes want")
    return played


def told(folder: Path, config: RunConfig = CONFIG) -> str:
    with pytest.raises(UserError) as caught, report_oom(replace(config, device="cuda"), folder):
        raise torch.OutOfMemoryError(CARD_IS_FULL)
    return str(caught.value)


def test_the_line_says_what_the_card_has_and_where_the_snapshot_lies(tmp_path: Path, card: SimpleNamespace) -> None:
    assert told(tmp_path) == (
        "out of memory: 2.00 GiB more were asked for: NVIDIA H100 has 80.0 GB, torch holds 14.9 GB; "
        f"what the GPU held is in {tmp_path / SNAPSHOT}; switch on what 80000000000 bytes want; "
        f"no checkpoint was written to {tmp_path}: the run begins anew"
    )
    assert (tmp_path / SNAPSHOT).read_bytes() == b"blocks"
    with report_oom(CONFIG, tmp_path):
        assert not (tmp_path / SNAPSHOT).exists(), "it was the last attempt's"


def test_a_run_that_does_not_fit_is_told_what_would() -> None:
    large = replace(CONFIG, task=TextTaskConfig(model="nano", vocab_size=50257, block_size=64, batch_size=32))
    advice = nearest_fit(training_spec_of(large), 1_400_000_000)
    assert advice.startswith("nearest fitting setting: bf16")
    assert "of 1.4 on the GPU" in advice


def test_an_emulated_card_is_as_large_as_it_is_said_to_be(tmp_path: Path, card: SimpleNamespace) -> None:
    assert "has 16.0 GB, torch" in told(tmp_path, replace(CONFIG, card_gb=16))


@pytest.mark.parametrize(("others", "named"), [(3_000_000_000, True), (200_000_000, False), (None, False)])
def test_other_programs_are_named_where_they_matter(
    tmp_path: Path, card: SimpleNamespace, others: int | None, named: bool
) -> None:
    card.others = others
    assert ("torch holds 14.9 GB, other programs use 3.0 GB;" in told(tmp_path)) is named


def test_a_full_disk_hides_no_full_card(tmp_path: Path, card: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", full)
    assert told(tmp_path).startswith("out of memory: 2.00 GiB more were asked for")
