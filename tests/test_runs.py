"""A run's record: readable while it grows, whole whatever happens, and gone on with."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from hybridlab.base.errors import UserError
from hybridlab.study import record as runs
from hybridlab.study.record import GrowingTable, Run, RunRecorder, write_json
from tests.conftest import full_disk, names


def add(recorder: RunRecorder, steps: range, **more: Any) -> None:
    for step in steps:
        recorder.add("steps", {"nominal_step": step, "measured_loss": 1.0 / step, "event": None, **more})
        recorder.add("vram", {"nominal_step": step, "used_bytes": 10 * step})


def steps_of(folder: Path) -> list[int]:
    return Run.load(folder).steps["nominal_step"].tolist()


# --- while it grows ----------------------------------------------------------------------------------------


def test_a_record_is_readable_from_its_first_moment_to_its_last(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "run"
    with RunRecorder(folder, {"name": "baseline"}) as recorder:
        begun = Run.load(folder)
        assert begun.config == {"name": "baseline"}
        assert begun.steps.empty
        assert begun.summary is None
        add(recorder, range(1, 4))
        recorder.flush()
        assert steps_of(folder) == [1, 2, 3]
        assert Run.load(folder).summary is None
        add(recorder, range(4, 6))
        recorder.finish({"validation_loss": 0.5})
    finished = Run.load(folder)
    assert finished.summary == {"validation_loss": 0.5}
    assert finished.steps["measured_loss"].tolist() == [1 / step for step in range(1, 6)]
    assert finished.vram["used_bytes"].tolist() == [10, 20, 30, 40, 50]
    assert names(folder) == {"config.json", "steps.parquet", "vram.parquet", "summary.json"}


def test_rows_reach_the_disk_by_themselves_and_seldom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(runs.time, "monotonic", lambda: now)
    recorder = RunRecorder(tmp_path, {})
    seen = []
    for step in range(1, 31):
        now += 0.25
        recorder.add("steps", {"nominal_step": step})
        seen.append(len(Run.load(tmp_path).steps))
    assert seen[:8] == [0] * 8
    assert seen[8] == 9, "two seconds have passed"
    assert len(set(seen)) == 4


def test_writing_takes_its_share_of_the_time_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def slow(table: GrowingTable) -> None:
        nonlocal now
        now += 1.0 if table else 0.0

    monkeypatch.setattr(runs.time, "monotonic", lambda: now)
    monkeypatch.setattr(GrowingTable, "write", slow)
    recorder = RunRecorder(tmp_path, {})
    for step in range(1, 401):
        now += 1.0
        recorder.add("steps", {"nominal_step": step})
    writing = now - 400
    assert 1 <= writing <= 2 + runs.FLUSH_SHARE * 400


def test_a_record_of_the_same_name_is_replaced(tmp_path: Path) -> None:
    with RunRecorder(tmp_path, {"seed": 0}) as recorder:
        add(recorder, range(1, 4))
        recorder.finish({"done": True})
    with RunRecorder(tmp_path, {"seed": 1}):
        run = Run.load(tmp_path)
        assert run.config == {"seed": 1}
        assert run.steps.empty
        assert run.vram.empty
        assert run.summary is None


def test_closing_figures_are_those_of_a_finished_run(tmp_path: Path) -> None:
    with RunRecorder(tmp_path, {}) as recorder:
        with pytest.raises(UserError, match=f"the run in {tmp_path} has not finished: go on with it"):
            Run.load(tmp_path).closing_figures  # noqa: B018
        recorder.finish({"validation_loss": 0.5})
    assert Run.load(tmp_path).closing_figures == {"validation_loss": 0.5}


def test_a_run_that_is_not_there_is_not_loaded(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Run.load(tmp_path)


def test_rows_that_are_handed_over_wait_for_the_next_one_that_is_added(tmp_path: Path) -> None:
    """So that samples can be handed over where a full disk must not be met."""
    recorder = RunRecorder(tmp_path, {})
    recorder._flushed_at = float("-inf")
    recorder.extend("vram", [{"nominal_step": 1}, {"nominal_step": 1}])
    assert Run.load(tmp_path).vram.empty
    recorder.add("steps", {"nominal_step": 1})
    assert Run.load(tmp_path).vram["nominal_step"].tolist() == [1, 1]


# --- interrupted -------------------------------------------------------------------------------------------


def test_an_error_leaves_what_was_measured(tmp_path: Path) -> None:
    def interrupted() -> None:
        with RunRecorder(tmp_path, {}) as recorder:
            add(recorder, range(1, 6))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5]
    assert Run.load(tmp_path).summary is None


KILLED = """
import os, signal, sys
from pathlib import Path
from hybridlab.study.record import RunRecorder
recorder = RunRecorder(Path(sys.argv[1]), {"name": "killed"})
for step in range(1, 8):
    recorder.add("steps", {"nominal_step": step})
    if step == 5:
        recorder.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_leaves_what_had_reached_the_disk(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5]
    assert Run.load(tmp_path).summary is None


# --- gone on with ------------------------------------------------------------------------------------------


@pytest.fixture(params=[runs.GROUP_ROWS, 3], ids=["one row group", "groups of 3"])
def group_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "GROUP_ROWS", request.param)


@pytest.mark.usefixtures("group_rows")
def test_rows_up_to_the_step_are_kept_and_later_ones_dropped(tmp_path: Path) -> None:
    with RunRecorder(tmp_path, {}) as recorder:
        add(recorder, range(1, 8))
    recorder = RunRecorder(tmp_path, {}, keep_steps=4)
    assert steps_of(tmp_path) == [1, 2, 3, 4], "at once, so that a second kill finds them too"
    add(recorder, range(5, 7))
    recorder.finish({})
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert Run.load(tmp_path).vram["nominal_step"].tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.usefixtures("group_rows")
def test_a_broken_record_equals_an_unbroken_one_columns_types_and_gaps_included(tmp_path: Path) -> None:
    def rows(first: int, last: int) -> list[dict[str, Any]]:
        evaluated = {step: {"validation_loss": step / 3} for step in (4, 8)}
        jumped = {6: {"event": "accepted", "predicted_loss": 0.1}}
        empty = {"event": None, "predicted_loss": None, "never": None}
        return [
            {"nominal_step": s} | empty | jumped.get(s, {}) | evaluated.get(s, {}) | {"seconds": s / 7}
            for s in range(first, last + 1)
        ]

    def record(folder: Path, rows: list[dict[str, Any]], keep_steps: int = 0) -> pd.DataFrame:
        with RunRecorder(folder, {}, keep_steps=keep_steps) as recorder:
            for row in rows:
                recorder.add("steps", row)
                recorder.add("vram", {"nominal_step": row["nominal_step"]})
        return Run.load(folder).steps

    unbroken = record(tmp_path / "unbroken", rows(1, 9))
    for stop in (1, 3, 4, 6, 8):
        folder = tmp_path / f"broken_{stop}"
        record(folder, rows(1, 8))
        pd.testing.assert_frame_equal(record(folder, rows(stop + 1, 9), keep_steps=stop), unbroken, check_exact=True)


def test_a_long_run_s_rows_do_not_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "GROUP_ROWS", 500)

    def held_bytes(steps: range, keep_steps: int) -> int:
        tracemalloc.start()
        recorder = RunRecorder(tmp_path, {}, keep_steps=keep_steps)
        add(recorder, steps)
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        recorder.flush()
        return held

    assert held_bytes(range(1, 5500), 0) < 300_000
    assert held_bytes(range(5200, 5300), 5199) < 300_000, "nor after a resume"
    assert steps_of(tmp_path) == list(range(1, 5300))


@pytest.mark.parametrize("lost", ["some rows", "the table"])
def test_rows_that_are_not_there_cannot_be_kept(tmp_path: Path, lost: str) -> None:
    with RunRecorder(tmp_path, {}) as recorder:
        add(recorder, range(1, 4))
    if lost == "the table":
        (tmp_path / "steps.parquet").unlink()
    with pytest.raises(UserError, match=r"steps\.parquet does not reach step"):
        RunRecorder(tmp_path, {}, keep_steps=5 if lost == "some rows" else 3)
    assert Run.load(tmp_path).vram["nominal_step"].tolist() == [1, 2, 3], "what is there stays"


# --- on a full disk ----------------------------------------------------------------------------------------


def test_a_full_disk_is_told_in_one_line_and_what_was_written_stays(tmp_path: Path) -> None:
    recorder = RunRecorder(tmp_path, {"name": "baseline"})
    add(recorder, range(1, 4))
    recorder.flush()
    add(recorder, range(4, 1000), note="x" * 50)
    with full_disk(1000), pytest.raises(UserError) as caught:
        recorder.flush()
    assert str(caught.value) == (
        f"cannot write in the folder {tmp_path}: File too large; make room there or choose another folder"
    )
    assert steps_of(tmp_path) == [1, 2, 3]
    assert names(tmp_path) == {"config.json", "steps.parquet", "vram.parquet"}
    recorder.flush()
    assert len(steps_of(tmp_path)) == 999, "once there is room, nothing is missing"


def test_a_full_disk_does_not_hide_why_a_run_stopped(tmp_path: Path) -> None:
    def stopped() -> None:
        with full_disk(1000), RunRecorder(tmp_path, {}) as recorder:
            add(recorder, range(1, 1000))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        stopped()


def test_a_folder_that_cannot_be_made_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write in the folder"):
        RunRecorder(tmp_path / "file" / "run", {})


# --- JSON --------------------------------------------------------------------------------------------------


def test_json_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"b": 1, "a": Path("p")})
    assert list(json.loads(path.read_text()).items()) == [("b", 1), ("a", "p")]
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"loss": float("nan")})
    assert json.loads(path.read_text()) == {"b": 1, "a": "p"}
    assert names(tmp_path) == {"x.json"}
