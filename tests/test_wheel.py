"""What the wheel holds, and that the command line works from it, outside of the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow  # builds a wheel, starts Python six times and a kernel once


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


def test_every_command_works_in_a_stranger_s_project_and_writes_where_it_is_started(
    installed: Path, tmp_path: Path
) -> None:
    here = tmp_path / "deeper"
    here.mkdir()
    theirs = {"pyproject.toml": "[project]\nname = 'theirs'\n", "README.md": "Theirs.\n"}
    for name, text in theirs.items():
        (tmp_path / name).write_text(text)

    def hybridlab(arguments: str, code: int = 0) -> str:
        command = [sys.executable, "-m", "hybridlab", *arguments.split()]
        env = os.environ | {"PYTHONPATH": str(installed)}
        done = subprocess.run(command, cwd=here, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    assert "no such notebook: choose one of notebooks/01_mnist_cnn.ipynb" in hybridlab("run 01_mnist", code=2)
    short = "-p steps 24 -p warmup_steps 4 -p evaluate_every 8 -p seeds 1 -p unguarded false"
    said = hybridlab(f"run 01_mnist_cnn -f params/cpu/01_mnist_cnn.yaml {short} -o executed/cpu/01_mnist_cnn.ipynb")
    assert "Open it:  jupyter lab executed/cpu/01_mnist_cnn.ipynb" in said
    assert "01_mnist_cnn/baseline" in hybridlab("runs").replace("\\", "/")
    assert "written: docs/VALIDATION_RESULTS.md" in hybridlab("report")
    assert "GB" in hybridlab("plan --model nano")
    assert '"sha256"' in hybridlab("data digits")
    assert "commit unknown" in (here / "docs" / "VALIDATION_RESULTS.md").read_text()
    assert {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()} == theirs
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"deeper"}
