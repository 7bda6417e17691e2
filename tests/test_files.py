"""Files are written as a whole or not at all, whoever writes them."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hybridlab.base import files
from hybridlab.base.errors import UserError
from hybridlab.base.files import replaced
from hybridlab.base.front_end import PROGRESS_FILE
from hybridlab.batch.executed import write_notebook
from hybridlab.panel.progress import Progress
from hybridlab.results.publish import publish
from tests.conftest import full_disk
from tests.notebook_maker import tiny_notebook


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
        progress.step("training", 2)
    assert (root / "progress.json").exists()


def test_a_progress_file_that_cannot_be_written_ends_no_training(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk, or on Windows a reader that has it open."""
    path = root / "progress.json"
    monkeypatch.setenv(PROGRESS_FILE, str(path))
    with Progress(2, "training") as progress, full_disk(room_bytes=0):
        progress.show("running")
        assert json.loads(path.read_text())["done"] == 0
        progress.step("training", 2)
    assert json.loads(path.read_text())["done"] == 1, "it is written again as soon as there is room"


def test_no_folder_is_opened_on_windows(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "ON_WINDOWS", True)
    monkeypatch.setattr(os, "open", lambda *_: pytest.fail("opens a folder"))
    with replaced(root / "file") as beside:
        beside.write_text("new")
    assert (root / "file").read_text() == "new"


def test_a_file_reaches_the_disk_through_a_descriptor_that_may_write(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows refuses any other."""
    modes: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda number: modes.append(fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE))
    with replaced(root / "file") as beside:
        beside.write_text("new")
    assert modes == [os.O_RDWR, os.O_RDONLY], "the file, then its folder"
