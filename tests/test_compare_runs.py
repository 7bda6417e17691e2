"""Runs on disk beside each other: listed, sorted, filtered, drawn together, handed to TensorBoard."""

from __future__ import annotations

import json
import math
import platform
import re
import sys
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from hybridlab.base.errors import UserError
from hybridlab.base.front_end import PROGRESS_FILE
from hybridlab.base.lock import locked
from hybridlab.cli import main
from hybridlab.notebook.compare_runs import COLUMNS, find_runs, overlay, runs_table
from hybridlab.study.exports import export_tensorboard
from hybridlab.study.record import Run, RunRecorder
from tests.conftest import full_disk


def record(
    folder: Path,
    name: str,
    seed: int,
    end: float,
    *,
    finished: bool = True,
    evaluated: bool = True,
    card: bool = False,
) -> None:
    hybrid = {"predictor": "river", "max_predict_steps": 8 if name == "bold" else 0}
    with RunRecorder(folder, {"name": name, "seed": seed, "hybrid": hybrid, "device": "a card"}) as recorder:
        for step in range(1, 5):
            loss = end + 1 / step if evaluated else None
            row = {"nominal_step": step, "gradient_step": max(1, step - 1), "seconds": 0.5 * step}
            recorder.add("steps", row | {"measured_loss": end, "validation_loss": loss, "phase": "full"})
            memory = {"nominal_step": step, "seconds": 0.5 * step, "phase": "full"}
            on_card = {"unix_seconds": 0.0, "device_total_bytes": 1, "device_used_bytes": 1, "utilization_percent": 1}
            recorder.add("vram", memory | {"source": "process", "used_bytes": 10**9} | (on_card if card else {}))
        if finished:
            counts = {"nominal_steps": 4, "gradient_steps": 3, "predicted_steps": 1, "seconds": 2.0}
            recorder.finish(
                counts | {"validation_loss": end, "peak_memory_bytes": 2 * 10**9, "gradient_step_ms": 500.0}
            )


@pytest.fixture(autouse=True)
def _runs(root: Path) -> None:
    record(Path("runs/one/baseline_seed_0"), "baseline", 0, 3.0)
    record(Path("runs/one/baseline_seed_1"), "baseline", 1, 2.5)
    record(Path("runs/one/bold_seed_0"), "bold", 0, 3.5)
    record(Path("runs/two/bold_seed_0"), "bold", 0, 3.2, finished=False)


def found(**settings: object) -> list[str]:
    return [f"{run.folder.parent.name}/{run.folder.name}" for run in find_runs("runs", **settings)]  # type: ignore[arg-type]


def test_runs_are_sorted_and_what_is_missing_comes_last() -> None:
    assert found() == ["one/baseline_seed_0", "one/baseline_seed_1", "one/bold_seed_0", "two/bold_seed_0"]
    order = ["one/bold_seed_0", "two/bold_seed_0", "one/baseline_seed_0", "one/baseline_seed_1"]
    assert found(sort="-validation_loss") == order
    assert found(sort="-peak_gb")[-1] == "two/bold_seed_0"


def test_runs_are_filtered_by_every_condition() -> None:
    assert found(where=["name=b*", "seed=0", "state=finished"]) == ["one/baseline_seed_0", "one/bold_seed_0"]
    assert found(where=["run=two/*"]) == ["two/bold_seed_0"]


DAMAGED = [
    ("config.json", b""),
    ("config.json", b'{"name": '),
    ("config.json", b"[]"),
    ("config.json", b"\xff\xfe\x00"),
    ("summary.json", b""),
    ("summary.json", b"3"),
    ("steps.parquet", b""),
    ("steps.parquet", b"PAR1"),
    ("vram.parquet", b"x"),
]


def listed(sort: str, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """What `hybridlab runs` prints, and what it says beside it."""
    assert main(["runs", "--sort", sort]) == 0
    out, said = capsys.readouterr()
    return out, said


@pytest.mark.parametrize(("name", "content"), DAMAGED)
def test_one_damaged_file_is_named_in_one_line_and_hides_no_other_run(
    name: str, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (Path("runs/one/bold_seed_0") / name).write_bytes(content)
    out, said = listed("name", capsys)
    assert "3 runs in runs" in out
    assert said.count("\n") == 1
    assert said.startswith("hybridlab: ")
    assert f"one/bold_seed_0/{name} is damaged, or no run's record" in said


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", '{"model_type": "gpt2"}'),
        ("config.json", '{"name": 3, "seed": 0}'),
        ("config.json", '{"name": "a", "hybrid": []}'),
        ("config.json", '{"name": "a", "hybrid": {"max_predict_steps": 1, "predictor": {}}}'),
        ("summary.json", '{"validation_loss": "low"}'),
        ("summary.json", '{"peak_memory_bytes": [1]}'),
    ],
)
def test_what_is_no_record_of_ours_is_left_out_and_said(
    name: str, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a Hugging Face model that was saved below `runs`."""
    (Path("runs/one/bold_seed_0") / name).write_text(content)
    out, said = listed("-validation_loss", capsys)
    assert "3 runs in runs" in out
    assert said.endswith("runs/one/bold_seed_0 holds no record of ours: it is left out\n")
    assert said.count("\n") == 1


def test_a_name_cannot_steer_the_terminal() -> None:
    record(Path("runs/one/evil"), "\x1b[31mred\nline", 0, 3.0)
    assert r"\x1b[31mred\nline" in str(runs_table("runs").table)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sort": "los"}, "there is no column 'los'"),
        ({"where": ["nam=x"]}, "did you mean 'name'"),
        ({"where": ["name"]}, "write COLUMN=PATTERN"),
    ],
)
def test_a_mistake_is_one_clear_line(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        found(**settings)


def test_an_unfinished_run_shows_how_far_it_came() -> None:
    shown = runs_table("runs", where=["state=unfinished"])
    assert shown.table is not None
    (row,) = shown.table.rows
    assert tuple(row) == COLUMNS
    assert (row["nominal_steps"], row["gradient_steps"], row["predicted_steps"]) == (4, 3, 1)
    assert row["validation_loss"] == pytest.approx(3.45)
    assert row["peak_gb"] is None


def test_the_text_fits_a_terminal_and_shows_loss_and_settings() -> None:
    folder = Path("runs/03_a_notebook_with_a_long_name") / "control_of_aggressive_unguarded_3fa9c1_seed_0"
    record(folder, "control of aggressive, unguarded", 0, 3.25)
    settings = {"task": {"model": "small", "data": "hf:a_long_name/of_a_data_set"}, "optimizer": {"lr": 3e-4}}
    config = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(config))
    summary = json.loads((folder / "summary.json").read_text())
    (Path("runs/two/bold_seed_0") / "summary.json").write_text(json.dumps(summary | {"validation_loss": math.nan}))
    lines = str(runs_table("runs")).splitlines()
    assert max(map(len, lines)) <= 120
    shown = next(line for line in lines if "3fa9c1_seed_0" in line)
    for part in ("small", "0.0003", "finished", "3+1", "3.2500", f"{datetime.now():%m-}"):
        assert part in shown
    assert "nan" not in "\n".join(lines).lower()
    assert json.dumps([row["validation_loss"] for row in runs_table("runs").table.rows]).count("null") == 1  # type: ignore[union-attr]


def test_a_run_that_a_process_trains_is_running() -> None:
    with locked(Path("runs/two/bold_seed_0")):
        assert found(where=["state=running"]) == ["two/bold_seed_0"]
    assert found(where=["state=running"]) == []
    gone = {"pid": 2**22 + 1, "host": platform.node()}  # above any process's number
    (Path("runs/two/bold_seed_0") / ".lock").write_text(json.dumps(gone))
    assert found(where=["state=unfinished"]) == ["two/bold_seed_0"], "a lock that a killed process left"


def test_the_table_is_plain_in_batch_and_live_in_jupyterlab(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    assert "<script" not in runs_table("runs")._repr_mimebundle_()["text/html"]
    monkeypatch.setenv("JPY_SESSION_NAME", "x.ipynb")
    assert "<script" not in runs_table("runs")._repr_mimebundle_()["text/html"], "a script that a notebook started"
    monkeypatch.setattr("IPython.get_ipython", lambda: SimpleNamespace(kernel=True))
    monkeypatch.delenv(PROGRESS_FILE, raising=False)
    live = runs_table("runs")._repr_mimebundle_()
    assert "<script" in live["text/html"]
    assert "https://www.unpkg.com" not in live["text/html"]
    monkeypatch.setenv(PROGRESS_FILE, "p.json")
    assert "<script" not in runs_table("runs")._repr_mimebundle_()["text/html"]


def test_runs_are_overlaid_with_controls_told_apart_and_names_that_differ() -> None:
    runs = find_runs("runs")
    chart = overlay([*runs, runs[-1]])  # one that is named twice is drawn once
    names = [series.name for series in chart.series]
    assert names[:2] == ["baseline, seed 0", "baseline, seed 1"]
    assert names[2:] == ["bold, seed 0 (one/bold_seed_0)", "bold, seed 0 (two/bold_seed_0)"]
    assert [series.control for series in chart.series] == [True, True, False, False]


def test_a_run_without_the_value_is_named() -> None:
    record(Path("runs/three/young"), "young", 0, 3.0, finished=False, evaluated=False)
    with pytest.raises(UserError, match="young has no validation_loss yet"):
        overlay(find_runs("runs"))


def test_the_command_lists_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "--where", "name=bold", "--sort", "-validation_loss"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("2 runs in runs")
    assert said.index("one/bold_seed_0") < said.index("two/bold_seed_0")
    assert main(["runs", "--where", "run=one*", "--where", "name=bold"]) == 0
    assert capsys.readouterr().out.startswith("1 run in runs")
    assert main(["runs", "--where", "name=none"]) == 2
    assert "no run in runs fits" in capsys.readouterr().err
    assert main(["runs", "--folder", "elsewhere"]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_runs_tell_which_predictor_they_asked() -> None:
    shown = runs_table("runs", sort="predictor")
    assert shown.table is not None
    assert [row["predictor"] for row in shown.table.rows] == ["river", "river", None, None]
    assert found(where=["predictor=river", "state=finished"]) == ["one/bold_seed_0"]


@pytest.mark.parametrize("option", ["--tensorboard", "--csv", "--memory-csv"])
def test_a_place_that_cannot_be_written_is_one_line(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard")
    record(Path("runs/card/x"), "x", 0, 3.0, card=True)
    assert main(["runs", "--where", "name=x", option, "pyproject.toml/there"]) == 2
    said = capsys.readouterr().err
    assert "cannot write in the folder" in said
    assert said.count("\n") == 1


def said_by(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command that succeeds prints."""
    assert main(arguments) == 0
    return capsys.readouterr().out


def test_one_run_is_shown_and_two_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    shown = said_by(["runs", "show", "one/bold"], capsys)
    assert re.search(r"hybrid\.predictor +river", shown)
    assert re.search(r"validation_loss +3\.5", shown)
    record = json.loads(said_by(["runs", "show", "one/bold", "--json"], capsys))
    assert record["settings"]["seed"] == 0
    assert record["summary"]["predicted_steps"] == 1
    rows = json.loads(said_by(["runs", "diff", "one/bold", "baseline_seed_1", "--json"], capsys))
    assert {row["key"]: (row["first"], row["second"]) for row in rows} == {
        "settings.name": ("bold", "baseline"),
        "settings.seed": (0, 1),
        "settings.hybrid.max_predict_steps": (8, 0),
        "summary.validation_loss": (3.5, 2.5),
    }
    assert "settings.seed" in said_by(["runs", "diff", "one/bold", "baseline_seed_1"], capsys)


def test_a_name_is_found_as_the_list_shortens_it(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("o…/bold_seed_0", "on…/bo…_0", "one/bo…"):
        assert "seed" in said_by(["runs", "show", name], capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "bold"], "'bold' is part of 2 names: write more of one"),
        (["show", "bald"], "there is no run 'bald' in runs"),
        (["diff", "one/bold", "none"], "there is no run 'none'"),
    ],
)
def test_a_name_that_fits_no_run_or_several_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["runs", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_tags_are_given_found_and_taken_away(capsys: pytest.CaptureFixture[str]) -> None:
    assert said_by(["runs", "tag", "one/bold", "good", "paper"], capsys) == "good, paper\n"
    assert found(where=["tags=*paper*"]) == ["one/bold_seed_0"]
    assert said_by(["runs", "tag", "one/bold", "good", "--remove"], capsys) == "paper\n"
    for tag in (" ", "a\nb"):
        assert main(["runs", "tag", "one/bold", tag]) == 2
        assert "a tag is empty, or cannot be printed" in capsys.readouterr().err
    assert "tags: paper" in said_by(["runs", "show", "one/bold"], capsys)


def test_rows_and_steps_reach_other_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = Path("runs/broken/config.json")
    broken.parent.mkdir()
    broken.write_text("{")
    assert main(["runs", "--where", "name=bold", "--json", "--csv", "out/steps.csv"]) == 0
    out, said = capsys.readouterr()
    assert said.count("runs/broken/config.json is damaged") == 1, "each record is read once"
    rows = json.loads(out)
    assert [row["validation_loss"] for row in rows] == [3.5, pytest.approx(3.45)]
    steps = pd.read_csv("out/steps.csv")
    assert list(steps.columns[:3]) == ["run", "seed", "nominal_step"]
    assert steps.groupby("run").size().to_dict() == {"one/bold_seed_0": 4, "two/bold_seed_0": 4}


def test_a_full_disk_ends_an_export_with_one_line(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with full_disk(50), pytest.raises(UserError, match="cannot write in the folder"):
        export_tensorboard(find_runs("runs")[0], tmp_path / "events")


def test_scalars_reach_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = find_runs("runs")[0]
    export_tensorboard(run, tmp_path / "events")
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["steps/measured_loss", "steps/validation_loss", "vram/used_bytes"]
    last = events.Scalars("steps/validation_loss")[-1]
    assert (last.step, last.value, last.wall_time) == (4, pytest.approx(3.25), 2.0)


def test_without_tensorboard_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[tensorboard\]'"):
        export_tensorboard(find_runs("runs")[0], tmp_path)


def test_runs_on_different_data_are_not_drawn_together(tmp_path: Path) -> None:
    empty = pd.DataFrame()
    one, other = (Run(tmp_path / name, {"data": {"sha256": name}}, empty, empty, None) for name in "ab")
    with pytest.raises(UserError, match="b was trained on other data than a"):
        overlay([one, other])
