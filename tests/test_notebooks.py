"""The committed notebooks are what they say; and the checks that see to it see what is wrong."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_output

from hybridlab.notebook.views.answer import claims_table
from hybridlab.results.claims import Claim, Quantity
from hybridlab.results.parameters import HOW_IT_RUNS, parameters_sha256
from hybridlab.results.reading import load_results
from hybridlab.study.code_version import code_hashes
from tests.hygiene import (
    claim_differences,
    executed_problems,
    parameter_file_problems,
    results_problems,
    source_problems,
)
from tests.notebook_maker import save, tiny_notebook

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "notebooks").glob("*.ipynb"))
PARAMETERS = sorted((ROOT / "params").glob("*/*.yaml"))
EXECUTED = [p for p in sorted((ROOT / "executed").glob("*/*.ipynb")) if not p.name.endswith(".failed.ipynb")]
RESULTS = sorted((ROOT / "executed").glob("*/results.json"))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def commit_of(executed: Path) -> str:
    """The commit that an executed notebook ran at."""
    return json.loads(executed.read_text(encoding="utf-8"))["metadata"]["hybridlab"]["git_commit"]


def as_committed(commit: str, path: Path, folder: Path) -> Path | None:
    """A file of the project as it was at a commit, in `folder`; None where the history does not reach back to it."""
    shown = subprocess.run(["git", "-C", ROOT, "show", f"{commit}:{path}"], capture_output=True, check=False)
    if shown.returncode != 0:
        return None
    (folder / path.name).write_bytes(shown.stdout)
    return folder / path.name


# The layers over what is committed.


@pytest.mark.parametrize("source", SOURCES, ids=name)
def test_a_source_notebook_is_stripped_and_declares_its_parameters(source):
    assert source_problems(source) == []


@pytest.mark.parametrize("parameters", PARAMETERS, ids=name)
def test_a_parameter_file_is_accepted_and_leaves_it_to_the_command_line_how_it_runs(parameters):
    assert parameter_file_problems(ROOT / "notebooks" / f"{parameters.stem}.ipynb", parameters) == []
    assert not {*HOW_IT_RUNS} & {*yaml.safe_load(parameters.read_text(encoding="utf-8"))}


@pytest.mark.parametrize("executed", EXECUTED, ids=name)
def test_an_executed_notebook_was_run_whole_from_its_source_and_parameters(executed, tmp_path):
    """From those of today; what takes hours or a GPU, from those of the commit that it names."""
    given = ROOT / "notebooks" / executed.name, ROOT / "params" / executed.parent.name / f"{executed.stem}.yaml"
    problems = executed_problems(executed, *given)
    if problems and executed.parent.name not in ("cpu", "quick"):
        then = [as_committed(commit_of(executed), path.relative_to(ROOT), tmp_path) for path in given]
        if None in then:
            pytest.skip("the history before this checkout is not here")
        problems = executed_problems(executed, *then)
    assert problems == []


@pytest.mark.parametrize("executed", EXECUTED, ids=name)
def test_an_executed_notebook_shows_what_its_results_say(executed):
    assert results_problems(executed, load_results(executed.parent / "results.json")) == []


@pytest.mark.parametrize("profile", ["cpu", "quick"])
def test_every_notebook_that_needs_no_gpu_was_run(profile):
    wanted = {path.stem for path in PARAMETERS if path.parent.name == profile}
    assert wanted == {path.stem for path in EXECUTED if path.parent.name == profile}


def test_copies_on_a_cpu_are_of_today_s_code():
    """They take too long to be run again by a test: `make milestones PROFILE=cpu` does it."""
    results = load_results(ROOT / "executed" / "cpu" / "results.json")
    trained = {name: entry["code"]["trains"] for name, entry in results.items() if name != "09_report"}
    assert set(trained.values()) == {code_hashes()["trains"]}, trained


@pytest.mark.parametrize("results", RESULTS, ids=name)
def test_results_hold_no_entry_of_a_notebook_that_is_gone(results):
    assert set(load_results(results)) <= {path.stem for path in EXECUTED if path.parent == results.parent}


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
@pytest.mark.parametrize("profile", sorted({path.parent.name for path in PARAMETERS}))
def test_a_batch_runs_each_notebook_of_a_profile_once_and_the_report_last(profile):
    plan = subprocess.run(
        ["make", "--dry-run", "milestones", f"PROFILE={profile}"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    ran = re.findall(r"run notebooks/(\S+)\.ipynb", plan.stdout)
    wanted = {path.stem for path in PARAMETERS if path.parent.name == profile} | {"09_report"}
    assert (sorted(ran), ran[-1]) == (sorted(wanted), "09_report")


# The checks themselves, on a tiny project.

QUANTITIES = Quantity("loss", 2.25, unit="nats"), Quantity("steps", 40), Quantity("wall", 3.5, unit="s")
CLAIM = Claim("hybrid_wins", "The hybrid ends lower.", "fails", QUANTITIES)


class Tiny:
    """A source, its parameters, its executed copy and its results, all in order."""

    def __init__(self, folder: Path) -> None:
        self.source = save(tiny_notebook("table()"), folder / "notebooks" / "tiny.ipynb")
        self.parameters = folder / "tiny.yaml"
        self.parameters.write_text("lr: 0.5\n", encoding="utf-8")
        self.executed = save(self._run(), folder / "executed" / "tiny.ipynb")
        self.entry = {
            "claims": [CLAIM.record()],
            "parameters": self.final,
            "parameters_sha256": parameters_sha256(self.final),
        }

    @property
    def final(self) -> dict[str, object]:
        defaults = {"steps": 3, "start": "now", "fast": False, "widths": [1, 2], "limit": None}
        return {"lr": 0.5} | defaults

    def _run(self) -> NotebookNode:
        notebook = tiny_notebook("table()")
        tags = {"tags": ["injected-parameters"]}
        notebook.cells.insert(2, new_code_cell("# Parameters\nlr = 0.5\n", id="injected-parameters", metadata=tags))
        for count, cell in enumerate(notebook.cells[1:], start=1):
            cell.execution_count = count
        notebook.cells[-1].outputs = [new_output("stream", text=str(claims_table([CLAIM])))]
        notebook.metadata["hybridlab"] = {
            "parameters": self.final,
            "parameters_sha256": parameters_sha256(self.final),
        }
        return notebook

    def problems(self) -> list[str]:
        return executed_problems(self.executed, self.source, self.parameters)

    def results_problems(self) -> list[str]:
        return results_problems(self.executed, {"tiny": self.entry})

    def changed(self, change) -> None:
        """Change the executed notebook on disk."""
        notebook = nbformat.read(self.executed, as_version=4)
        change(notebook)
        save(notebook, self.executed)


@pytest.fixture
def tiny(tmp_path):
    return Tiny(tmp_path)


def test_what_is_in_order_passes(tiny):
    assert source_problems(tiny.source) == []
    assert parameter_file_problems(tiny.source, tiny.parameters) == []
    assert tiny.problems() == []
    assert tiny.results_problems() == []


def _set(path: str, value: object):
    def change(notebook: NotebookNode) -> None:
        target, _, last = path.rpartition(".")
        for key in filter(None, target.split(".")):
            notebook = notebook[int(key)] if isinstance(notebook, list) else notebook[key]
        notebook[last] = value

    return change


def _clear(notebook: NotebookNode) -> None:
    for cell in notebook.cells[1:]:
        cell.outputs, cell.execution_count = [], None


ERROR = new_output("error", ename="ValueError", evalue="bad", traceback=[])
VIEW = {"application/vnd.jupyter.widget-view+json": {"model_id": "ab"}}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (_clear, "its outputs were cleared"),
        (_set("cells.3.outputs", []), "its outputs were cleared"),
        (_set("cells.3.execution_count", 7), "not fully run: its code cells did not all run, in order"),
        (_set("cells.3.outputs", [ERROR]), "not fully run: ValueError: bad"),
        (_set("cells.3.source", "another()"), "cell 3 of the source has changed since"),
        (lambda notebook: notebook.cells.pop(0), "it has 2 cells, its source has 3"),
        (_set("cells.2.source", "lr = 0.25"), "its injected parameters are not those of tiny.yaml"),
        (_set("metadata.hybridlab.parameters", {"lr": 0.5}), "its recorded parameters are not the defaults"),
        (_set("metadata.hybridlab.parameters_sha256", "0"), "its recorded parameter hash is another"),
        (_set("metadata.widgets", {}), "it carries widget state"),
        (_set("cells.3.outputs", [new_output("display_data", VIEW)]), "it carries widget state"),
        (
            _set("cells.3.outputs", [new_output("stream", text="see /home/me/x")]),
            "machine path in an output: /home/me/x",
        ),
        (_set("cells.3.outputs", [new_output("stream", text="x" * 1_000_000)]), "keep it below 1000000"),
    ],
)
def test_what_is_wrong_with_an_executed_notebook_is_seen(tiny, change, problem):
    tiny.changed(change)
    assert any(problem in line for line in tiny.problems())


def test_a_parameter_file_that_moved_on_is_seen(tiny):
    tiny.parameters.write_text("lr: 0.25\n", encoding="utf-8")
    assert len(tiny.problems()) == 3
    tiny.parameters.unlink()
    assert "no such parameter file" in tiny.problems()[0]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (_set("cells.2.outputs", [new_output("stream", text="x")]), "cell 3 is not stripped"),
        (_set("cells.2.execution_count", 1), "cell 3 is not stripped"),
        (_set("cells.2.source", ""), "cell 3 is empty"),
        (_set("cells.1.source", "lr = 1.0"), "is not a one-line 'name: type = literal'"),
        (_set("cells.1.metadata", {}), "no cell is tagged 'parameters'"),
        (_set("cells.2.metadata.tags", ["injected-parameters"]), "cell 3 is an injected one"),
    ],
)
def test_what_is_wrong_with_a_source_notebook_is_seen(tiny, change, problem):
    notebook = nbformat.read(tiny.source, as_version=4)
    change(notebook)
    assert any(problem in line for line in source_problems(save(notebook, tiny.source)))


def test_a_claim_that_the_notebook_does_not_show_is_seen(tiny):
    for quantity, value in zip(tiny.entry["claims"][0]["quantities"], (2.251, 4, 9.0), strict=True):
        quantity["value"] = value
    numbers = "claim hybrid_wins: the notebook does not show: loss 2.251 nats; steps 4; wall 9.000 s"
    assert tiny.results_problems() == [numbers]
    tiny.entry["claims"][0]["text"] = "The hybrid ends higher."
    assert tiny.results_problems() == [
        "claim hybrid_wins: the notebook does not show: The hybrid ends higher.",
        numbers,
    ]


def test_a_claim_of_an_older_copy_is_looked_for_by_its_id_at_four_decimals(tiny):
    older = "FAILS  hybrid_wins: The hybrid ends lower.\n    loss  2.2500\n    steps  40"
    tiny.changed(lambda notebook: notebook.cells[-1].update(outputs=[new_output("stream", text=older)]))
    assert tiny.results_problems() == []
    tiny.entry["claims"][0]["quantities"][0]["value"] = 2.2501
    said = "claim hybrid_wins: loss is 2.2501 in results.json, which the notebook does not show"
    assert tiny.results_problems() == [said]


def test_results_of_other_parameters_are_seen(tiny):
    tiny.entry["parameters_sha256"] = "0"
    assert len(tiny.results_problems()) == 2
    assert results_problems(tiny.executed, {}) == ["results.json has no entry 'tiny': run it again"]


def test_claims_of_two_runs_are_compared_at_four_decimals_without_times(tiny):
    again = json.loads(json.dumps(tiny.entry))
    loss, _, wall = again["claims"][0]["quantities"]
    loss["value"], wall["value"] = 2.25004, 100.0
    assert claim_differences(tiny.entry, again) == []
    loss["value"] = 2.26
    again["claims"][0]["quantities"].append({"name": "more", "value": 1})
    again["claims"][0]["verdict"] = "holds"
    assert claim_differences(tiny.entry, again) == [
        "hybrid_wins.loss was 2.2500, is now 2.2600",
        "hybrid_wins.more was missing, is now 1",
        "hybrid_wins.verdict was fails, is now holds",
    ]


def test_a_verdict_that_a_time_decides_may_differ_between_two_runs_and_others_may_not(tiny):
    def slower(bounded: str) -> list[str]:
        entry = json.loads(json.dumps(tiny.entry))
        for quantity in entry["claims"][0]["quantities"]:
            quantity["bound"] = 1.0 if quantity["name"] == bounded else None
        again = json.loads(json.dumps(entry))
        again["claims"][0]["verdict"] = "open"
        return claim_differences(entry, again)

    loss, _, wall = (quantity["name"] for quantity in tiny.entry["claims"][0]["quantities"])
    assert slower(wall) == []
    assert slower(loss) == ["hybrid_wins.verdict was fails, is now open"]
