"""A run in a process of its own: the same run, and the same answers when it goes wrong.

A fresh process takes as long as importing torch does, so most tests fork theirs.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest
import torch
from nbclient import NotebookClient

from hybridlab.base.errors import UserError
from hybridlab.engine.config import HybridTrainerConfig
from hybridlab.notebook import studies
from hybridlab.optim import OptimizerConfig
from hybridlab.study import RunConfig, TextTaskConfig, isolated, train
from hybridlab.study.isolated import _visible_gpus, train_side_by_side
from hybridlab.study.launched import train_on_ranks
from hybridlab.study.record import Run
from hybridlab.study.study import Study, run_arms
from hybridlab.study.tasks import Task
from tests.conftest import TINY_TEXT, at_step, tiny_run

CONFIG = tiny_run("alone", 12, checkpoint_every=5)
LONG = replace(CONFIG, steps=100_000, schedule=None)


def train_isolated(
    config: RunConfig, folder: Path, on_step: Callable[[], None] = lambda: None, *, resume: bool = False
) -> Run:
    with closing(train_side_by_side([(config, folder)], 1, lambda _: on_step(), resume=resume)) as runs:
        _, ended = next(runs)
        return ended()


def child() -> int:
    (process,) = multiprocessing.active_children()
    assert process.pid
    return process.pid


def test_a_run_cannot_be_watched_from_another_process(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="take isolated=False, or no watch"):
        run_arms([CONFIG], tmp_path, isolated=True, watch=lambda run, record: None)


@dataclass(frozen=True)
class BrokenTaskConfig(TextTaskConfig):
    def build(self, *given: object, **named: object) -> Task:
        raise ZeroDivisionError("no such model")


@pytest.mark.usefixtures("forked")
def test_a_bug_comes_back_with_the_traceback_of_where_it_was(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)^ZeroDivisionError: no such model\n.*Traceback .*in build"):
        train_isolated(replace(CONFIG, task=BrokenTaskConfig()), tmp_path)


@pytest.mark.usefixtures("forked")
def test_a_run_of_its_own_is_the_run_that_it_would_have_been_here(tmp_path: Path) -> None:
    told: list[tuple[str, int]] = []
    result = run_arms([CONFIG], tmp_path / "there", lambda *step: told.append(step), isolated=True)
    here, there = train(CONFIG, tmp_path / "here"), result.runs["alone", 0]
    assert there.steps["measured_loss"].tolist() == here.steps["measured_loss"].tolist()
    assert there.summary is not None
    assert there.config == here.config
    assert told == [("alone, seed 0", 12)] * 12
    assert multiprocessing.active_children() == []


@pytest.mark.usefixtures("forked")
def test_side_by_side_the_runs_of_a_study_are_those_of_one_after_the_other(tmp_path: Path) -> None:
    settings = {"warmup_steps": 2, "full_steps": 4, "max_predict_steps": 2, "gate": False, "confidence_threshold": 0.0}
    jumping = HybridTrainerConfig(predictor="linear", **settings)
    study = Study(CONFIG, {"jumping": jumping}, seeds=1, control_fractions=())
    here, told, known = study.run(tmp_path / "here"), Counter[str](), list[str]()
    there = study.run(
        tmp_path / "there",
        lambda label, total: told.update([label]),
        at_once=2,
        on_run=lambda run: known.append(run.config["name"]),
    )
    assert list(there.runs) == list(here.runs) == [("baseline", 0), ("jumping", 0), ("control of jumping", 0)]
    assert sorted(known) == ["baseline", "control of jumping", "jumping"]
    columns = ["nominal_step", "phase", "measured_loss", "predicted_loss", "validation_loss"]
    for key, run in here.runs.items():
        pd.testing.assert_frame_equal(there.runs[key].steps[columns], run.steps[columns])
        assert there.runs[key].folder.name == run.folder.name
    assert told["baseline, seed 0"] == told["jumping, seed 0"] == 12
    assert multiprocessing.active_children() == []


@pytest.mark.usefixtures("forked")
def test_rates_are_tried_side_by_side_from_a_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studies, "runs_folder", lambda notebook: tmp_path / notebook)
    study = Study(CONFIG, {}, seeds=1, control_fractions=())
    (one, trials), (other, again) = (studies.find_rates(study, str(n), most=3, at_once=n) for n in (1, 2))
    assert trials == again
    assert one == other
    assert multiprocessing.active_children() == []


@pytest.mark.usefixtures("forked")
def test_what_ends_one_of_several_ends_all_and_leaves_their_records(tmp_path: Path) -> None:
    broken = replace(CONFIG, name="broken", task=BrokenTaskConfig(**TINY_TEXT))
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        run_arms([LONG, broken], tmp_path, at_once=2)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("at_once", [0, -1, "2", 2.0, True, None])
def test_a_number_of_runs_at_once_that_is_none_is_refused_in_one_line(at_once: Any, tmp_path: Path) -> None:
    said = rf"^at_once is {at_once!r}: give a whole number, 1 or more$"
    with pytest.raises(UserError, match=said):
        Study(CONFIG, {}).run(tmp_path, at_once=at_once)
    with pytest.raises(UserError, match=said.replace("at_once", "nproc", 1)):
        train_on_ranks(CONFIG, tmp_path, at_once)


def test_each_of_several_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    runs = [(replace(CONFIG, device="auto"), tmp_path)]
    with pytest.raises(UserError, match=r"^at_once is 3, and torch sees 2 GPUs: each process takes one$"):
        next(train_side_by_side(runs, 3))
    with pytest.raises(UserError, match=r"^at_once is 0: give a whole number, 1 or more$"):
        next(train_side_by_side(runs, 0))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert _visible_gpus(2)[1] == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert _visible_gpus(2)[1] == "6"


def test_on_a_processor_runs_side_by_side_ask_for_no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Not even where GPUs are hidden, as by this variable."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    asked = list[int | None]()

    def started(*_: Any, gpu: int | None) -> Any:
        asked.append(gpu)
        raise KeyboardInterrupt

    monkeypatch.setattr(isolated, "IsolatedRun", started)
    with pytest.raises(KeyboardInterrupt):
        next(train_side_by_side([(CONFIG, tmp_path)] * 2, 2))
    assert asked == [None]


@pytest.mark.slow  # two jobs start, each in two processes
def test_as_jobs_the_runs_are_the_same(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    diverging = replace(CONFIG, name="diverging", optimizer=OptimizerConfig("sgd", lr=1000))
    here = train(CONFIG, tmp_path / "here")
    with pytest.warns(UserWarning, match="'diverging', seed 0 diverged"):
        there = run_arms([CONFIG, diverging], tmp_path / "there", cluster={"cluster": "local", "timeout_min": 5})
    assert there.runs["alone", 0].steps["measured_loss"].tolist() == here.steps["measured_loss"].tolist()
    assert there.runs["diverging", 0].diverged


def test_what_submitit_does_not_take_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    with pytest.raises(UserError, match=r"cluster: submitit does not take .*'hours': 3"):
        run_arms([CONFIG], tmp_path, cluster={"cluster": "local", "hours": 3})
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"^a cluster needs submitit: pip install 'hybridlab\[cluster\]'$"):
        run_arms([CONFIG], tmp_path, cluster={"cluster": "local"})


@pytest.mark.usefixtures("forked")
def test_a_user_s_error_comes_back_as_itself(tmp_path: Path) -> None:
    train(CONFIG, tmp_path)
    other = replace(CONFIG, seed=1)
    with pytest.raises(UserError) as here:
        train(other, tmp_path, resume=True)
    with pytest.raises(UserError) as there:
        train_isolated(other, tmp_path, resume=True)
    assert (type(there.value), str(there.value)) == (type(here.value), str(here.value))


@pytest.mark.usefixtures("forked")
def test_a_killed_process_is_named_with_its_signal_and_its_run_can_go_on(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        train_isolated(CONFIG, tmp_path, at_step(7, lambda: os.kill(child(), signal.SIGKILL)))
    assert str(caught.value) == (
        "the process of 'alone', seed 0, was killed by SIGKILL, as the system does when the host's memory runs out: "
        f"the record and the last checkpoint in {tmp_path} are intact, go on with resume"
    )
    assert train(CONFIG, tmp_path, resume=True).summary is not None


@pytest.mark.usefixtures("forked")
def test_a_process_that_is_killed_before_its_first_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf": no checkpoint was written to {tmp_path}: the run begins anew$"):
        train_isolated(CONFIG, tmp_path, at_step(2, lambda: os.kill(child(), signal.SIGKILL)))


@pytest.mark.usefixtures("forked")
def test_ctrl_c_stops_the_process_and_keeps_its_record(tmp_path: Path) -> None:
    def ctrl_c() -> None:
        """As a terminal sends it: to the whole group."""
        os.kill(child(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train_isolated(LONG, tmp_path, at_step(7, ctrl_c))
    assert multiprocessing.active_children() == []
    assert len(Run.load(tmp_path).steps) >= 6
    assert Run.load(tmp_path).summary is None
    assert (tmp_path / "checkpoint.pt").exists()


@pytest.mark.usefixtures("forked")
def test_whoever_leaves_before_an_ended_run_s_record_is_asked_for_leaves_no_process(tmp_path: Path) -> None:
    """As Ctrl-C at that moment does."""
    with closing(train_side_by_side([(CONFIG, tmp_path)], 1)) as runs:
        next(runs)
    assert multiprocessing.active_children() == []


def test_it_works_from_a_notebook(tmp_path: Path) -> None:
    source = f"""
import pickle
from pathlib import Path
from hybridlab.study.study import run_arms
config = pickle.loads({pickle.dumps(CONFIG)!r})
(run,) = run_arms([config], Path({str(tmp_path)!r}), isolated=True).runs.values()
print(run.summary["gradient_steps"])
"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert json.loads("".join(output["text"] for output in notebook.cells[0]["outputs"])) == 12
