"""Files are written as a whole or not at all, whoever writes them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hybridlab.errors import UserError
from hybridlab.files import replaced
from hybridlab.notebook.executed import write_notebook
from hybridlab.notebook.progress import PROGRESS_FILE, Progress
from hybridlab.notebook.results import publish
from tests.conftest import full_disk
from tests.notebook_maker import project, tiny_notebook


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(project(tmp_path))
    return tmp_path


def notebook() -> Path:
    write_notebook(tiny_notebook("x = 1" * 1000), Path("runs/file"))
    return Path("runs/file")


def results() -> Path:
    return publish("a", claims=[], summary=["So."] * 1000, record={"parameters": {}}, folder="runs")


@pytest.mark.parametrize("write", [notebook, results], ids=lambda write: write.__name__)
def test_on_a_full_disk_the_file_that_was_there_stays(root: Path, write: Callable[[], Path]) -> None:
    path = write()
    before = path.read_bytes()
    with full_disk(room_bytes=100), pytest.raises(UserError, match=r"cannot write in the folder .*runs: File too"):
        write()
    assert path.read_bytes() == before
    assert not [other for other in path.parent.iterdir() if other.suffix == ".tmp"]


def test_a_block_that_fails_leaves_everything_as_it_was(root: Path) -> None:
    path = root / "file"
    path.write_text("old")

    def fail() -> None:
        with replaced(path) as beside:
            beside.write_text("new")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert path.read_text() == "old"
    assert sorted(other.name for other in root.iterdir()) == ["file", "pyproject.toml"]


def test_what_need_not_last_waits_for_no_disk(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress is written while a model trains: it must not wait."""

    def slow(descriptor: int) -> None:
        pytest.fail("waits for the disk")

    monkeypatch.setattr(os, "fsync", slow)
    monkeypatch.setenv(PROGRESS_FILE, str(root / "progress.json"))
    with Progress(2, "training") as progress:
        progress.advance()
    assert (root / "progress.json").exists()
