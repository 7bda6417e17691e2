"""What a run sets for the whole process: in force while it computes, and at no other time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hybridlab.base.errors import UserError
from hybridlab.memory.precision import matmul_precision
from hybridlab.study import RunConfig, TextTaskConfig, process_settings, train
from hybridlab.study.process_settings import ProcessSettings
from hybridlab.study.run import TrainingRun
from hybridlab.study.tasks import Batch, Task
from hybridlab.vram import MemoryMeter
from tests.conftest import TINY_TEXT, TaskWithin

TF32_ON_TWO = ("high", True, 2)
"""What the runs here ask for; nothing of it is this process's own."""


def in_force() -> tuple[str, bool, int]:
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.get_num_threads()


@pytest.fixture(autouse=True)
def own() -> Iterator[tuple[str, bool, int]]:
    """The process's own settings; each test must leave them as they are."""
    before = in_force()
    yield before
    assert in_force() == before


# --- settings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_settings_hold_inside_and_are_put_back_however_the_block_ends(
    error: type[BaseException], own: tuple[str, bool, int]
) -> None:
    def broken_off() -> None:
        with ProcessSettings("tf32", cpu_threads=2).applied():
            assert in_force() == TF32_ON_TWO
            with ProcessSettings("fp32").applied():
                assert in_force() == ("highest", False, 2)
            assert in_force() == TF32_ON_TWO
            raise error

    with pytest.raises(error):
        broken_off()
    assert in_force() == own


def test_a_smaller_card_is_put_back_too(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = [1.0]
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda: shares[-1])
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    with ProcessSettings("fp32", gpu_share=0.25).applied(), ProcessSettings("fp32").applied():
        assert shares == [1.0, 0.25], "a share of 1 asks for nothing"
    assert shares == [1.0, 0.25, 1.0]


def test_a_run_asks_for_the_share_that_its_card_is_of_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Meter(MemoryMeter):
        def __init__(self, device: torch.device) -> None:
            pass

        def share_of(self, gpu_bytes: int) -> float:
            return gpu_bytes / 80e9

    monkeypatch.setattr(process_settings, "MemoryMeter", Meter)
    assert ProcessSettings.of(replace(CONFIG, card_gb=16)) == ProcessSettings("tf32", 2, 0.2)
    assert ProcessSettings.of(CONFIG).gpu_share == 1.0


def test_settings_that_could_not_be_put_back_are_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    def mixed() -> str:
        raise RuntimeError("you have used mix of the legacy and new APIs")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "get_float32_matmul_precision", mixed)
        with pytest.raises(UserError, match="leave them alone"), matmul_precision("tf32"):
            pass


# --- runs --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CuriousTaskConfig(TextTaskConfig):
    def build(self, *given: Any, **named: Any) -> Task:
        Curious.seen = [in_force()]
        return Curious(super().build(*given, **named))


class Curious(TaskWithin):
    """Notes what is in force whenever the run computes."""

    seen: list[tuple[str, bool, int]]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        self.seen.append(in_force())
        return self.task.loss(model, batch)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        self.seen.append(in_force())
        return self.task.evaluate(model)


CONFIG = RunConfig(
    name="tf32",
    task=CuriousTaskConfig(**TINY_TEXT),
    steps=6,
    precision="tf32",
    device="cpu",
    cpu_threads=2,
)


def test_a_run_computes_with_its_settings_and_leaves_the_process_its_own(
    tmp_path: Path, own: tuple[str, bool, int]
) -> None:
    between: list[tuple[str, bool, int]] = []
    train(CONFIG, tmp_path, lambda: between.append(in_force()))
    assert {*Curious.seen} == {TF32_ON_TWO}
    assert len(Curious.seen) > CONFIG.steps
    assert between == [own] * CONFIG.steps


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_run_that_breaks_off_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def fail(*_: object) -> Tensor:
        raise error

    run = TrainingRun(CONFIG, tmp_path)
    run.start()
    steps = run.steps()
    next(steps)
    monkeypatch.setattr(Curious, "loss", fail)
    with pytest.raises(error):
        next(steps)


def test_a_run_that_cannot_be_built_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TextTaskConfig, "build", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(CONFIG, tmp_path)


def test_runs_that_take_turns_do_not_mix_their_settings(tmp_path: Path) -> None:
    """As two sessions in one notebook do; the first to end is the first that began."""
    runs = [TrainingRun(replace(CONFIG, precision=name), tmp_path / name) for name in ("tf32", "fp32")]
    both = [run.steps() for run in runs if run.start() == 0]
    for _ in range(3):
        Curious.seen = []
        for steps in both:
            next(steps)
        assert Curious.seen == [TF32_ON_TWO, ("highest", False, 2)]
    for steps in both:
        steps.close()
