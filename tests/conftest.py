"""Shared pieces: a small problem, a short run, a full disk, one thread so that tests share a machine, and Ctrl-C."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, groupby, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hybridlab import HybridTrainer, HybridTrainerConfig
from hybridlab.base import pinned_memory as host_memory
from hybridlab.base.errors import UserError
from hybridlab.optim import Schedule
from hybridlab.study import RunConfig, TextTaskConfig
from hybridlab.study.tasks import Task, TaskConfig
from tests.notebook_maker import project

torch.set_num_threads(1)
os.environ.pop("JPY_SESSION_NAME", None)  # started from a notebook, tests still take the way without a panel
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:  # as whatever a shell or nohup starts in the background inherits it
        signal.signal(number, handler)


LONGEST = ("/10_", "/03_", "/02_", "/01_", "/07_", "test_ranks.py", "/00_", "/06_", "/05_", "/04_", "/08_", "/09_")
"""Slow tests, those that take longest first; a notebook's is named by how the notebook begins."""


def _batch_of(item: pytest.Item) -> tuple[int, str]:
    """What one worker runs whole, as its tests share what they train: a file; and how early."""
    name = item.nodeid.replace("repeats[", "/") if "repeats[" in item.nodeid else item.path.name
    return next((rank for rank, known in enumerate(LONGEST) if known in name), len(LONGEST)), name


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests run last, the longest first among them, dealt out so that no worker waits long at the end."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    slow = sorted((item for item in items if item.get_closest_marker("slow")), key=_batch_of)
    quick = [item for item in items if not item.get_closest_marker("slow")]
    batches = [list(batch) for _, batch in groupby(slow, _batch_of)]
    bounds = [len(quick) * worker // workers for worker in range(workers + 1)]
    items[:] = [
        item
        for worker, (first, last) in enumerate(pairwise(bounds))
        for item in chain(quick[first:last], *batches[worker::workers])
    ]


def jumping(warmup: int, full: int, predict: int, **settings: Any) -> HybridTrainerConfig:
    """Settings that jump at every occasion, unasked; given are the steps of the phases."""
    unasked = {"confidence_threshold": 0.0, "gate": False}
    steps = {"warmup_steps": warmup, "full_steps": full, "max_predict_steps": predict}
    return HybridTrainerConfig(**steps | unasked | settings)


EAGER = jumping(10, 8, 10, correction_interval=4, correct_steps=2)


class Problem:
    """A small model, its data, and a closure a step."""

    def __init__(self, seed: int = 0, noise: float = 0.1, dropout: float = 0.0) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 1))
        self._target = torch.randn(8, 1, generator=torch.Generator().manual_seed(7))
        self._noise = noise

    def closure(self, step: int) -> Callable[[], Tensor]:
        generator = torch.Generator().manual_seed(1000 + step)
        x = torch.randn(32, 8, generator=generator)
        y = x @ self._target + self._noise * torch.randn(32, 1, generator=generator)
        return lambda: (self.model(x) - y).square().mean()

    def trained(self, config: HybridTrainerConfig, steps: int, optimizer: Optimizer | None = None) -> HybridTrainer:
        """A trainer that has taken so many steps; with AdamW where no other optimizer is given."""
        trainer = HybridTrainer(self.model, optimizer or self.adamw(), config)
        for step in range(steps):
            trainer.step(self.closure(step))
        return trainer

    def adamw(self, lr: float = 1e-2) -> torch.optim.AdamW:
        return torch.optim.AdamW(self.model.parameters(), lr=lr)

    def weights(self) -> Tensor:
        return vector(self.model)


def vector(model: nn.Module) -> Tensor:
    """A copy of all weights."""
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def gradient_step(optimizer: Optimizer, loss: Tensor) -> float:
    """A step of plain torch; gives the loss."""
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return loss.item()


TINY_TEXT = {
    "model": "nano", "data": "markov", "vocab_size": 64, "block_size": 16, "batch_size": 4, "validation_batches": 2,
    "max_bytes": 40_000,
}  # fmt: skip
"""Settings of a text task that trains in a second."""


def tiny_run(name: str, steps: int, task: TaskConfig | None = None, **settings: Any) -> RunConfig:
    """A short run on the CPU; of a text task that trains in a second where no other is given."""
    schedule = Schedule(warmup_steps=5, total_steps=steps)
    run = RunConfig(name, task or TextTaskConfig(**TINY_TEXT), steps, schedule=schedule, device="cpu", cpu_threads=1)
    return replace(run, **settings)


def at_step(number: int, act: Callable[[], None]) -> Callable[[], None]:
    """Act once so many steps were told of, and at each that follows."""
    steps = iter(range(1, number))

    def on_step() -> None:
        if next(steps, None) is None:
            act()

    return on_step


class TaskWithin:
    """Does what the task within it does, but for what a subclass defines."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project's root, in which the test works."""
    monkeypatch.chdir(project(tmp_path))
    return tmp_path


def names(folder: Path) -> set[str]:
    """Of what lies in a folder."""
    return {path.name for path in folder.iterdir()}


def contents(folder: Path) -> dict[Path, bytes]:
    """Of all files in a folder and below."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def problem() -> Problem:
    return Problem()


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of their own begin as copies of this one, which takes no seconds of importing torch."""
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: fork)


@contextmanager
def full_disk(room_bytes: int) -> Iterator[None]:
    """No file may grow beyond this size: what a write meets on a full disk, with another number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class CountedArenas:
    """Host memory as it is asked for: the sizes that were taken, and how many more may be."""

    def __init__(self) -> None:
        self.taken_bytes: list[int] = []
        self.may_take: int | None = None


@pytest.fixture
def arenas(monkeypatch: pytest.MonkeyPatch) -> CountedArenas:
    """Counts the arenas, and refuses them where a test says so."""
    counted = CountedArenas()

    class Counted(host_memory.HostArena):
        def __init__(self, total_bytes: int, *, pinned: bool) -> None:
            if counted.may_take is not None and len(counted.taken_bytes) >= counted.may_take:
                raise UserError("host memory is short")
            super().__init__(total_bytes, pinned=pinned)
            counted.taken_bytes.append(total_bytes)

    monkeypatch.setattr(host_memory, "HostArena", Counted)
    return counted
