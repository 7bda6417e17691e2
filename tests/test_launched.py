"""A run on several processes that another one starts and watches, as a notebook does."""

from __future__ import annotations

import multiprocessing
import select
from collections import Counter
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import ipywidgets as widgets
import pandas as pd
import psutil
import pytest
import torch

from hybridlab.base.errors import UserError
from hybridlab.cli import main
from hybridlab.panel.live import LiveBar
from hybridlab.study import OwnTaskConfig, RunConfig, TextTaskConfig, train
from hybridlab.study.launched import RankNews, _fitting, train_on_ranks
from hybridlab.study.record import Run
from hybridlab.vram import MemoryReading
from tests.conftest import TINY_TEXT
from tests.own_bytes import Bytes

CONFIG = RunConfig("toy", TextTaskConfig(**TINY_TEXT), steps=12, device="cpu", cpu_threads=1, evaluate_every=6)


class Failing(Bytes):
    """A task that ends with more to say than a pipe holds."""

    def loss(self, *_: object) -> torch.Tensor:
        raise RuntimeError("too long" + 200_000 * ".")


@pytest.mark.slow  # three processes start
def test_two_processes_train_as_one_does_and_each_says_how_it_stands(tmp_path: Path) -> None:
    told, news = Counter[str](), list[RankNews]()
    there = train_on_ranks(CONFIG, tmp_path / "there", 2, None, lambda: told.update(["step"]), news.append)
    here = train(CONFIG, tmp_path / "here")
    columns = ["nominal_step", "measured_loss", "validation_loss"]
    pd.testing.assert_frame_equal(there.steps[columns], here.steps[columns], atol=1e-6, rtol=0)
    assert there.closing_figures["ranks"] == 2
    assert told["step"] == 12
    assert {piece.rank for piece in news} == {0, 1}
    assert all(piece.memory.used_bytes > 0 for piece in news)
    assert multiprocessing.active_children() == []


@pytest.mark.usefixtures("forked")
def test_what_ranks_refuse_comes_back_as_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^a batch of 3 does not split into 2 equal parts"):
        train_on_ranks(replace(CONFIG, task=TextTaskConfig(**TINY_TEXT | {"batch_size": 3})), tmp_path, 2)
    assert multiprocessing.active_children() == []


@pytest.mark.slow  # three processes start
def test_ranks_that_end_with_long_errors_do_not_wait_for_each_other(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="too long"):
        train_on_ranks(replace(CONFIG, task=OwnTaskConfig("tests.test_launched:Failing")), tmp_path, 2)
    assert multiprocessing.active_children() == []


def test_a_long_message_of_a_rank_keeps_its_ends_and_fits_into_one_piece() -> None:
    said = _fitting("what: " + "é" * 10_000 + " where")
    assert said.startswith("what: é")
    assert said.endswith("é where")
    assert len(ForkingPickler.dumps(RuntimeError(said))) < select.PIPE_BUF
    assert _fitting("short") == "short"


@pytest.mark.usefixtures("forked")
def test_a_rank_that_is_killed_is_named_and_no_process_goes_on(tmp_path: Path) -> None:
    killed = list[psutil.Process]()

    def kill_one() -> None:
        if not killed:
            (launcher,) = multiprocessing.active_children()
            *_, last = sorted(psutil.Process(launcher.pid).children(), key=lambda process: process.pid)
            last.kill()
            killed.append(last)

    long = replace(CONFIG, steps=100_000)
    with pytest.raises(UserError, match=r"^rank 1 of 'toy', seed 0, was killed by SIGKILL: no checkpoint .* anew$"):
        train_on_ranks(long, tmp_path, 2, on_step=kill_one)
    assert multiprocessing.active_children() == []
    assert Run.load(tmp_path).summary is None


def fake_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["11_several_gpus", "--nproc", "3"], "nproc is 3, and torch sees 2 GPUs: each process takes one"),
        (["11_several_gpus", "--nproc", "0"], "nproc: 0 after --nproc: it must be at least 1"),
        (["06_gpt2_xl", "-p", "at_once", "3"], "at_once is 3, and torch sees 2 GPUs: each process takes one"),
        (["08_speed_ladder", "--nproc", "2"], "--nproc: 08_speed_ladder.ipynb starts no run of several processes"),
    ],
)
def test_what_the_command_refuses_is_one_line_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[str],
    said: str,
) -> None:
    fake_gpus(monkeypatch, 2)
    assert main(["run", *arguments, "-o", str(tmp_path / "out.ipynb")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_more_processes_than_gpus_are_refused_by_the_library_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_gpus(monkeypatch, 2)
    with pytest.raises(UserError, match=r"^nproc is 3, and torch sees 2 GPUs: each process takes one$"):
        train_on_ranks(replace(CONFIG, device="auto"), tmp_path, 3)
    with pytest.raises(UserError, match=r"^nproc is 0: give a whole number, 1 or more$"):
        train_on_ranks(CONFIG, tmp_path, 0)


def test_the_bar_shows_one_loss_and_a_gauge_for_each_gpu() -> None:
    sizes = {"allocated_bytes": 2 * 10**9, "other_bytes": 0, "device_total_bytes": 80 * 10**9}
    readings = [MemoryReading("nvml", used_bytes, **sizes) for used_bytes in (3 * 10**9, 4 * 10**9)]
    bar = LiveBar(10, "toy")
    bar._bar = widgets.HTML()
    for number, reading in enumerate(readings):
        bar.note_rank(RankNews(number, reading, 5 * 10**9, 2.5))
    bar.step(f"toy{bar.of_ranks}", 10)
    bar.show("running")
    assert "toy, loss 2.5000, GPU 0 3.00 GB, GPU 1 4.00 GB" in bar._bar.value
    assert "GPU 1: 4.00 of 80.0 GB, peak 5.00" in bar._bar.value
