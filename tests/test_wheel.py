"""What the wheel holds, and that the command line works from it, outside of the repository."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow  # builds a wheel, and runs a notebook from it


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's files, as an installation has them."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site-packages")
    return folder / "site-packages"


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_wheel_holds_all_that_the_library_reads_and_nothing_else(installed: Path) -> None:
    held = {name for name in files_below(installed) if not name.startswith("hybridlab-")}
    library = {f"hybridlab/{name}" for name in files_below(ROOT / "hybridlab") if "__pycache__" not in name}
    shipped = [*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("params/*/*.yaml")]
    assert held == library | {f"hybridlab/shipped/{path.relative_to(ROOT).as_posix()}" for path in shipped}


COMMANDS = """\
run 01_mnist
run 01_mnist_cnn -f params/cpu/01_mnist_cnn.yaml -p steps 24 -p warmup_steps 4 -p evaluate_every 24 -p seeds 1 \
-p unguarded false -p cpu_threads 1 -o executed/cpu/01_mnist_cnn.ipynb
runs
report
plan --model nano
data digits"""
IN_TURN = """
import sys
from hybridlab.cli import main
for command in sys.argv[1].splitlines():
    print(f"ended with {main(command.split())}", flush=True)
"""


def test_every_command_works_in_a_stranger_s_project_and_writes_where_it_is_started(
    installed: Path, tmp_path: Path
) -> None:
    here = tmp_path / "deeper"
    here.mkdir()
    theirs = {"pyproject.toml": "[project]\nname = 'theirs'\n", "README.md": "Theirs.\n"}
    for name, text in theirs.items():
        (tmp_path / name).write_text(text)
    command, env = [sys.executable, "-c", IN_TURN, COMMANDS], os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run(command, cwd=here, env=env, stdout=-1, stderr=subprocess.STDOUT, text=True, check=False)
    refused, ran, runs, report, plan, data, end = re.split(r"ended with (?=\d)", done.stdout)
    assert "no such notebook: choose one of notebooks/00_your_model.ipynb" in refused
    assert "Open it:  jupyter lab executed/cpu/01_mnist_cnn.ipynb" in ran
    assert "baseline" in runs
    assert "written: docs/VALIDATION_RESULTS.md" in report
    assert "It fits a GPU of 16 GB" in plan
    assert '"sha256"' in data
    assert [part[0] for part in (ran, runs, report, plan, data, end)] == ["2", "0", "0", "0", "0", "0"]
    assert "| unknown |" in (here / "docs" / "VALIDATION_RESULTS.md").read_text()
    assert {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()} == theirs
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"deeper"}
