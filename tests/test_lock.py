"""A run's folder belongs to one process: the second start is refused, and touches nothing."""

from __future__ import annotations

import errno
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hybridlab.base import lock
from hybridlab.base.errors import UserError
from hybridlab.base.lock import LOCK, locked
from hybridlab.study import RunConfig, Study, TextTaskConfig, train
from hybridlab.study.study import folder_name, run_arms
from tests.conftest import TINY_TEXT, contents

CONFIG = RunConfig("baseline", TextTaskConfig(**TINY_TEXT), steps=3, evaluate_every=3, device="cpu")


@contextmanager
def in_use(folder: Path) -> Iterator[int]:
    """Another process holds the folder's lock; gives its number."""
    done, ready = os.pipe()
    child = os.fork()
    if child == 0:
        with locked(folder):
            os.write(ready, b"held")
            time.sleep(60)
        os._exit(0)
    os.read(done, 4)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_start_names_the_process_that_trains_there_and_touches_nothing(tmp_path: Path, resume: bool) -> None:
    train(CONFIG, tmp_path)
    with in_use(tmp_path) as pid:
        before = contents(tmp_path)
        with pytest.raises(UserError) as refused:
            train(CONFIG, tmp_path, resume=resume)
        assert str(refused.value) == (
            f"{tmp_path} is in use: process {pid} on {platform.node()} trains there; wait for it, or stop it; "
            "nothing was changed"
        )
        assert contents(tmp_path) == before
    assert train(CONFIG, tmp_path, resume=True).summary, "a process that was killed holds nothing"
    assert LOCK not in {path.name for path in tmp_path.iterdir()}


def test_a_second_start_of_a_study_leaves_its_finished_runs_alone(tmp_path: Path) -> None:
    """While the first one is busy with another arm of it."""
    study = Study(CONFIG, {}, seeds=1, control_fractions=(0.7,))
    refused = []

    def again(label: str, total: int) -> None:
        if label.startswith("control"):
            for start in (lambda: study.run(tmp_path), lambda: run_arms(list(study.planned()), tmp_path)):
                before = contents(tmp_path / folder_name(CONFIG))
                with pytest.raises(UserError, match="is in use: this process trains there already"):
                    start()
                refused.append(contents(tmp_path / folder_name(CONFIG)) == before)

    study.run(tmp_path, again)
    assert refused == [True] * 4
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_only_one_of_many_holds_it_at_any_time(tmp_path: Path) -> None:
    """Also at the moment in which one lets go, its file goes, and others have that file open."""
    inside = tmp_path / "inside"

    def visit() -> None:
        for _ in range(200):
            try:
                with locked(tmp_path):
                    inside.touch(exist_ok=False)
                    inside.unlink()
            except UserError:
                pass

    children = [in_a_fork(visit) for _ in range(4)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4


def in_a_fork(function: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            function()
            code = 0
        finally:
            os._exit(code)
    return child


def test_a_file_system_without_locks_trains_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    assert train(CONFIG, tmp_path).summary


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}'])
def test_a_holder_that_wrote_nothing_readable_is_another_process(tmp_path: Path, content: str) -> None:
    with in_use(tmp_path):
        (tmp_path / LOCK).write_text(content)
        with pytest.raises(UserError, match="is in use: another process trains there; wait for it"), locked(tmp_path):
            pass
