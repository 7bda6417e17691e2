"""The committed quick copies say the same when they run again."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from hybridlab.batch.run import prepared, run_notebook
from hybridlab.results.environment import environment
from hybridlab.results.reading import load_results
from tests.hygiene import claim_differences
from tests.notebook_maker import project, save, tiny_notebook

ROOT = Path(__file__).parents[1]
EXECUTED = [*sorted((ROOT / "executed" / "quick").glob("*.ipynb")), ROOT / "executed" / "cpu" / "09_report.ipynb"]


def nbval(*notebooks: Path) -> subprocess.CompletedProcess[str]:
    """Run notebooks of a folder again and compare their outputs, by a pytest that knows nothing of this one."""
    command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", "-p", "no:cacheprovider", "-q"]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(
        [*command, *(notebook.name for notebook in notebooks)],
        cwd=notebooks[0].parent,
        env=inherited,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("executed", EXECUTED, ids=lambda path: path.stem)
def test_a_committed_notebook_repeats(executed, tmp_path, monkeypatch):
    """Where Python, torch and processor are those of the committed run, every number repeats.

    Elsewhere the `python` source holds other files: there the notebook must run whole and make the
    same claims.
    """
    profile = executed.parent.name
    copy = project(tmp_path) / "executed" / profile / executed.name
    committed = load_results(executed.parent / "results.json")[executed.stem]
    if committed["environment_fingerprint"] == environment()["environment_fingerprint"]:
        copy.parent.mkdir(parents=True)
        shutil.copy(executed, copy)
        done = nbval(copy)
        assert done.returncode == 0, done.stdout
        assert claim_differences(committed, load_results(copy.parent / "results.json")[executed.stem]) == []
    else:
        monkeypatch.chdir(tmp_path)
        run_notebook(
            prepared(ROOT / "notebooks" / executed.name, copy, [ROOT / "params" / profile / f"{executed.stem}.yaml"])
        )
        again = load_results(copy.parent / "results.json")[executed.stem]
        assert [claim["id"] for claim in again["claims"]] == [claim["id"] for claim in committed["claims"]]


def test_a_changed_number_is_seen_and_an_unchanged_notebook_passes(root):
    code = "print(f'loss {sum(range(3)) / 3:.4f}')"
    source = save(
        tiny_notebook(code, "from hybridlab.panel.progress import Progress\nProgress(3, 'quiet').step('quiet', 3)"),
        root / "tiny.ipynb",
    )
    executed = root / "executed" / "cpu" / "tiny.ipynb"
    run_notebook(prepared(source, executed, [], [("steps", "4")]))
    notebook = nbformat.read(executed, as_version=4)
    output = notebook.cells[3].outputs[0]
    output.text = output.text.replace("1.0000", "1.0001")
    done = nbval(executed, save(notebook, root / "executed" / "cpu" / "changed.ipynb"))
    assert done.returncode == 1
    assert "Cell outputs differ" in done.stdout
    assert "1.0001" in done.stdout
    (failed,) = re.findall(r"^FAILED (\S+)", done.stdout, re.MULTILINE)
    assert failed.startswith("changed.ipynb::")
