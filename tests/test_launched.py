"""A run on several processes that another one starts and watches, as a notebook does."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from hybridlab.base.errors import UserError
from hybridlab.study import RunConfig, TextTaskConfig, train
from hybridlab.study.launched import RankNews, train_on_ranks
from tests.conftest import TINY_TEXT

CONFIG = RunConfig("toy", TextTaskConfig(**TINY_TEXT), steps=12, device="cpu", cpu_threads=1, evaluate_every=6)


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


@pytest.mark.slow  # three processes start
def test_what_ranks_refuse_comes_back_as_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^a batch of 3 does not split into 2 equal parts"):
        train_on_ranks(replace(CONFIG, task=TextTaskConfig(**TINY_TEXT | {"batch_size": 3})), tmp_path, 2)
    assert multiprocessing.active_children() == []
