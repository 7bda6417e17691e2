"""The user's guide: its worked example runs as it stands there."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from hybridlab.predictors import PREDICTORS

GUIDE = Path(__file__).parents[1] / "docs" / "guide.md"


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def test_the_worked_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    Path("my_text.txt").write_bytes(GUIDE.read_bytes())
    names: dict[str, Any] = {}
    try:
        for block in blocks():
            exec(block, names)
    finally:
        PREDICTORS.pop("mean_path", None)
    said = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"[1-9]\d* of 120 steps predicted", said[0])
    assert re.fullmatch(r"hybrid \d\.\d{3}, plain run of as many gradient steps \d\.\d{3}", said[1])
    assert names["mean_path_counts"].predicted_steps
    assert names["control_loss"] < math.log(256)
    assert names["mean_path_loss"] < math.log(256)


def test_links_of_the_guide_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", GUIDE.read_text(encoding="utf-8"))
    assert [link for link in links if not (GUIDE.parent / link).exists()] == []


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
def test_milestones_go_where_they_are_told_to_and_go_on_if_asked() -> None:
    asked = ["make", "--dry-run", "milestones", "PROFILE=rtx5080", "OUT=runs/mine", "RESUME=--resume"]
    plan = subprocess.run(asked, cwd=GUIDE.parents[1], capture_output=True, text=True, check=True).stdout
    runs = re.findall(r"run notebooks/(\S+)\.ipynb -f \S+ -o runs/mine/(\S+)\.ipynb ?(\S*)", plan)
    assert len(runs) == plan.count(" run notebooks/")
    assert all(name == copy for name, copy, _ in runs)
    assert {resume for name, _, resume in runs if name != "09_report"} == {"--resume"}
