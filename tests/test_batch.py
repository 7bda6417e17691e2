from __future__ import annotations

import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_output

from hybridlab.base.errors import UserError
from hybridlab.base.front_end import PROGRESS_FILE
from hybridlab.batch.executed import clean_, joined_streams, unfinished, write_or_rescue
from hybridlab.batch.given import declared_parameters
from hybridlab.batch.run import GO_ON, prepared, run_notebook, summary_of
from hybridlab.batch.terminal import RunFailed
from hybridlab.notebook.views.answer import claims_table
from hybridlab.panel import progress
from hybridlab.panel.progress import Progress, watched
from hybridlab.results.claims import Claim, Quantity
from hybridlab.results.environment import environment, git_commit
from hybridlab.results.parameters import parameters_from, parameters_sha256
from hybridlab.results.publish import publish
from hybridlab.results.reading import load_results
from hybridlab.results.repeats import MOST
from tests.conftest import full_disk, names
from tests.notebook_maker import DECLARED, project, save, tiny_notebook


@pytest.fixture
def notebook(root):
    return save(tiny_notebook("print(lr)"), root / "notebooks" / "tiny.ipynb")


def refusal(notebook: Path, yaml: str | None = None, *settings: tuple[str, str], output: str = "out/tiny.ipynb") -> str:
    """Prepare a run that must be refused; return the message, and see that nothing was written."""
    files = []
    if yaml is not None:
        Path("params.yaml").write_text(yaml, encoding="utf-8")
        files = [Path("params.yaml")]
    with pytest.raises(UserError) as refused:
        prepared(notebook, Path(output), files, settings)
    assert not Path("out").exists()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_results_that_are_damaged_are_refused_before_the_run(notebook: Path) -> None:
    Path("kept").mkdir()
    Path("kept/results.json").write_text("{")
    with pytest.raises(UserError, match=r"kept/results\.json: not valid JSON"):
        prepared(notebook, Path("kept/tiny.ipynb"))


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("learning_rat: 1.0", "'learning_rat' in params.yaml is no parameter of tiny.ipynb: choose one of lr, steps"),
        ("widht: [1]", "did you mean 'widths'?"),
        ("lr: 1e-4", "lr: '1e-4' is text, a number is wanted: write 1.0e-4 in params.yaml"),
        ("lr: 2.55E1", "write 2.55e+1 in params.yaml"),
        ("lr: fast", "lr: 'fast' is text, a number is wanted: write for example 0.001 in params.yaml"),
        ("lr: true", "lr: True is true or false, a number is wanted"),
        ("lr:", "lr: None is empty, a number is wanted"),
        ("steps: 2.0", "steps: 2.0 is a number with a fraction, a whole number is wanted: write 2 in"),
        ("steps: 1e3", "write 1000 in params.yaml"),
        ("steps: 1e99", "a whole number is wanted: write for example 3 in params.yaml"),
        ("steps: true", "a whole number is wanted"),
        ("steps: 1:30", "steps: YAML reads 1:30 as 90, a whole number is wanted: write 90 in params.yaml"),
        ("start: 12:30", "start: YAML reads 12:30 as 750, text is wanted: write '12:30' in quotes in params.yaml"),
        ("start: yes", "start: YAML reads yes as True, text is wanted: write 'yes' in quotes"),
        ("start: 2024-01-02", "text is wanted: write '2024-01-02' in quotes"),
        ("fast: 1", "fast: 1 is a whole number, true or false is wanted: write for example false"),
        ("widths: 3", "widths: 3 is a whole number, a list (each item a whole number) is wanted"),
        ("widths: [1, 2.5]", "a list (each item a whole number) is wanted: write for example [1, 2]"),
        ("limit: often", "limit: 'often' is text, a whole number or nothing is wanted"),
        ("on: 3", "params.yaml: YAML reads the key on as True: write 'on' in quotes"),
        ("lr: 1.0\nlr: 2.0", "params.yaml: 'lr' is given twice: keep one line"),
        ("- lr", "params.yaml: not a mapping"),
        ("lr: [1", "params.yaml, line 1: not valid YAML"),
        ("lr: 1.0\n\tsteps: 2", "params.yaml, line 2: not valid YAML: a tab: write spaces in its place"),
        ("lr: 1.0\n---\nlr: 2.0", "not valid YAML"),
    ],
)
def test_a_bad_parameter_file_is_refused_with_the_fix(notebook, yaml, message):
    assert message in refusal(notebook, yaml)


def test_a_file_that_is_no_text_is_refused(notebook):
    Path("params.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a text file"):
        prepared(notebook, Path("out/tiny.ipynb"), [Path("params.yaml")])


def test_a_missing_parameter_file_names_its_neighbour(notebook):
    Path("tiny_run.yaml").touch()
    with pytest.raises(UserError, match=r"no such parameter file: did you mean 'tiny_run\.yaml'\?"):
        prepared(notebook, Path("out/tiny.ipynb"), [Path("tinyrun.yaml")])


def test_settings_on_the_command_line_are_read_by_the_declared_type(notebook):
    settings = [("lr", "1e-4"), ("start", "12:30"), ("fast", "true"), ("widths", "[4]"), ("limit", "7")]
    job = prepared(notebook, Path("runs/out.ipynb"), [], settings)
    read = {"lr": 1e-4, "start": "12:30", "fast": True, "widths": [4], "limit": 7}
    assert job.overrides == read | {"results": "runs"}
    assert job.parameters == {"steps": 3} | read
    assert "steps: 'many' is text" in refusal(notebook, None, ("steps", "many"))
    assert "did you mean 'steps'?" in refusal(notebook, None, ("stepps", "1"))


def test_later_values_win_and_an_int_is_a_float(notebook):
    for name, text in (("a.yaml", "lr: 1\nsteps: 5"), ("b.yaml", "steps: 6"), ("empty.yaml", "# nothing\n")):
        Path(name).write_text(text, encoding="utf-8")
    files = [Path("a.yaml"), Path("b.yaml"), Path("empty.yaml")]
    job = prepared(notebook, Path("runs/out.ipynb"), files, [("lr", "2")])
    assert job.overrides == {"lr": 2, "steps": 6, "results": "runs"}


def test_results_go_where_the_copy_goes_unless_they_are_sent_elsewhere(notebook, root, tmp_path_factory, monkeypatch):
    Path("params.yaml").write_text("lr: 1.0\nresults: executed/cpu\nsteps: 2", encoding="utf-8")
    files, elsewhere = [Path("params.yaml")], tmp_path_factory.mktemp("elsewhere")
    for output, results in (("runs/a.ipynb", "runs"), ("a.ipynb", "."), (elsewhere / "a.ipynb", str(elsewhere))):
        assert prepared(notebook, Path(output), files).results == root / results / "results.json"
    sent = prepared(notebook, Path("runs/a.ipynb"), files, [("results", "kept")])
    assert sent.results == root / "kept" / "results.json"
    assert not Path("executed").exists()
    assert list(sent.overrides) == ["lr", "results", "steps"], "in the file's order, as an executed copy shows them"
    monkeypatch.chdir(root / "notebooks")
    assert prepared(notebook, Path("../runs/a.ipynb")).overrides["results"] == "runs"


def test_a_notebook_without_results_is_given_none(root):
    plain = save(tiny_notebook(declared="lr: float = 1.0"), root / "plain.ipynb")
    assert prepared(plain, Path("out.ipynb"), resume=True).overrides == {}


def test_resume_reaches_a_notebook_as_a_parameter_and_is_no_part_of_what_it_asks(root):
    """So that plain papermill can give it too, and a copy says the same however often it was started."""
    trains = save(tiny_notebook(declared=f"{DECLARED}resume: bool = False"), root / "trains.ipynb")
    first, again = (prepared(trains, Path("out.ipynb"), resume=resume) for resume in (False, True))
    assert (first.overrides, again.overrides) == ({"results": "."}, {"results": ".", "resume": True})
    assert first.parameters == again.parameters
    assert prepared(trains, Path("out.ipynb"), [], [("resume", "true")]).overrides == again.overrides


def test_results_that_cannot_be_written_are_refused_before_the_start(notebook):
    assert "cannot write into" in refusal(notebook, None, ("results", "pyproject.toml/deeper"))
    Path("runs").touch()
    assert "runs/.results.lock: cannot write into" in refusal(notebook, None, ("results", "elsewhere"))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("notebooks/tiny.ipynb", "would replace the source notebook"),
        ("out/tiny.html", "give it a name that ends in .ipynb"),
        ("pyproject.toml/tiny.ipynb", "cannot write into"),
        ("/proc/none/tiny.ipynb", "cannot make its folder"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused(notebook, output, message):
    assert message in refusal(notebook, None, output=output)


def test_a_repaired_partial_copy_is_not_replaced_by_its_own_run(notebook):
    repaired = save(tiny_notebook(), Path("tiny.failed.ipynb"))
    assert "tiny.failed.ipynb: the output would replace the source" in refusal(repaired, None, output="tiny.ipynb")
    prepared(repaired, Path("again.ipynb"))


def test_what_is_no_runnable_notebook_is_refused(root):
    Path("text.ipynb").write_text("hello", encoding="utf-8")
    untagged = tiny_notebook()
    untagged.cells[1].metadata = {}
    save(untagged, Path("untagged.ipynb"))
    assert "no such notebook" in refusal(Path("missing.ipynb"))
    assert "not a Jupyter notebook" in refusal(Path("text.ipynb"))
    assert "no cell is tagged 'parameters'" in refusal(Path("untagged.ipynb"))


@pytest.mark.parametrize(
    "line", ["lr = 1.0", "lr: float", "lr: float = 2 * 3", "lr: int = 1.0", "lr: dict = {}", "x: str = '''a\nb'''"]
)
def test_a_parameters_cell_holds_only_one_line_annotated_literals(line):
    with pytest.raises(UserError, match="not a one-line 'name: type = literal'"):
        declared_parameters(tiny_notebook(declared=line), "tiny.ipynb")


def test_parameters_collected_in_the_notebook_are_those_the_runner_records(notebook):
    namespace: dict[str, object] = {}
    exec(DECLARED, namespace)
    namespace |= {"In": [""], "path": Path(), "_i1": "text"}
    namespace |= {"rows": [{}], "total": 3}  # a second run of all cells finds what later ones had bound
    assert parameters_from(namespace) == prepared(notebook, Path("runs/out.ipynb")).parameters


GOOD_CELLS = (
    "from hybridlab.results.parameters import parameters_from\nparameters = parameters_from(globals())",
    "from hybridlab.panel.progress import Progress\n"
    "with Progress(steps, 'counting') as progress:\n"
    "    for _ in range(steps):\n        progress.step('counting', steps)",
    "import pathlib\nprint('in', pathlib.Path.cwd())\nparameters['lr']",
    "from hybridlab.notebook import Claim, Quantity, publish\n"
    "publish('good', claims=[Claim('sum', 'it adds up', 'holds', (Quantity('lr', lr),))], summary=['It adds up.'],\n"
    "        record={'parameters': parameters}, folder=results).name",
)


GOOD_SETTINGS = [("lr", "1e-2"), ("start", 'a"b\\c\nd'), ("results", "runs")]


@pytest.fixture(scope="module")
def good_run(tmp_path_factory):
    """One whole run, shared by the tests that look at its copy."""
    folder = project(tmp_path_factory.mktemp("project with {braces}"))
    notebook = save(tiny_notebook(*GOOD_CELLS), folder / "notebooks" / "good.ipynb")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_notebook(prepared(notebook, folder / "executed" / "good.ipynb", [], GOOD_SETTINGS))
    return folder


def test_a_whole_run_leaves_a_clean_copy(good_run):
    notebook = nbformat.read(good_run / "executed" / "good.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert unfinished(notebook) is None
    assert [cell.id for cell in notebook.cells][:3] == ["title", "parameters", "injected-parameters"]
    assert set(notebook.metadata) == {"kernelspec", "language_info", "hybridlab"}
    assert all(set(cell.metadata) <= {"tags", "jupyter"} for cell in notebook.cells)
    assert notebook.cells[5].outputs[0].text == "in .\n"
    assert notebook.cells[5].outputs[1].data["text/plain"] == "0.01"
    assert str(good_run) not in (good_run / "executed" / "good.ipynb").read_text(encoding="utf-8")
    assert [path.name for path in (good_run / "executed").iterdir()] == ["good.ipynb"]


def test_the_copy_says_what_it_rests_on_as_its_results_do(good_run, monkeypatch):
    monkeypatch.chdir(good_run)
    facts = nbformat.read(good_run / "executed" / "good.ipynb", as_version=4).metadata["hybridlab"]
    entry = load_results(good_run / "runs" / "results.json")["good"]
    assert facts["parameters"] == entry["parameters"]
    assert facts["parameters"]["start"] == 'a"b\\c\nd'
    assert facts["parameters_sha256"] == entry["parameters_sha256"] == parameters_sha256(facts["parameters"])
    for name, value in environment().items():
        assert facts[name] == entry[name] == value
    job = prepared(Path("notebooks/good.ipynb"), Path("out/good.ipynb"), [], GOOD_SETTINGS)
    assert facts["parameters"] == job.parameters
    assert summary_of(job) == ["It adds up."]
    assert summary_of(replace(job, parameters=job.parameters | {"lr": 5.0})) == []
    assert summary_of(replace(job, notebook=Path("other.ipynb"))) == []


def test_two_equal_runs_leave_the_same_bytes(good_run, monkeypatch):
    monkeypatch.chdir(good_run)
    first = (good_run / "executed" / "good.ipynb").read_bytes()
    run_notebook(prepared(good_run / "notebooks" / "good.ipynb", good_run / "again" / "good.ipynb", [], GOOD_SETTINGS))
    assert (good_run / "again" / "good.ipynb").read_bytes() == first


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        ("raise ValueError('two\\nlines')", "code cell 3, `raise ValueError('two\\nlines')`: ValueError: two lines"),
        ("raise SystemExit(0)", "code cell 3, `raise SystemExit(0)`: the notebook ended early with SystemExit"),
        ("import os\nos.kill(os.getpid(), 9)", "code cell 3, `import os`: the kernel died: killed, or out of memory"),
    ],
)
def test_a_run_that_stops_keeps_a_partial_copy_and_the_old_output(root, cell, reason):
    notebook = save(tiny_notebook(cell, "print('later')"), root / "stops.ipynb")
    output = root / "out" / "stops.ipynb"
    output.parent.mkdir()
    output.write_text("old", encoding="utf-8")
    with pytest.raises(RunFailed) as failed:
        run_notebook(prepared(notebook, output))
    offer = "" if "ValueError" in reason else f"; {GO_ON}"  # what refuses once refuses again
    assert str(failed.value) == f"{reason} (partial copy: {output.with_suffix('.failed.ipynb')}){offer}"
    assert output.read_text(encoding="utf-8") == "old"
    partial = nbformat.read(output.with_suffix(".failed.ipynb"), as_version=4)
    assert partial.cells[-1].execution_count is None


@pytest.mark.parametrize(
    "texts",
    [("1\r2\r", "3\nend"), ("a\r\r\nb\r\n", "\rc"), ("\r", "\n", ""), ("", "x\n\n\ry\r"), ("10 %\r20 %\r",)],
)
def test_what_a_line_was_written_over_with_is_kept_as_a_terminal_shows_it(texts):
    outputs = [new_output("stream", name="stderr", text="warned")]
    outputs += [new_output("stream", name="stdout", text=text) for text in texts]
    out, err = joined_streams(outputs)
    assert out.text == re.sub(r".*\r(?=[^\n])", "", "".join(texts)), "as Jupyter's own tools do"
    assert (out.name, err.name, err.text) == ("stdout", "stderr", "warned")


def test_no_pattern_is_tried_at_every_place_of_a_long_line(root, monkeypatch):
    """nbclient's takes minutes for a line of a million characters."""
    monkeypatch.setattr("nbclient.client._RGX_CARRIAGERETURN", None)
    cell = "import sys\nprint('x' * 10**6, 'y' * 10**6, flush=True)\nsys.stderr.write('z\\rw')\nprint(1)"
    run_notebook(prepared(save(tiny_notebook(cell), root / "long.ipynb"), root / "out" / "long.ipynb"))
    copy = nbformat.read(root / "out" / "long.ipynb", as_version=4)
    assert [len(output.text) for output in copy.cells[-1].outputs] == [2 * 10**6 + 4, 1]


def test_a_notebook_that_cannot_go_on_is_not_told_to(root):
    notebook = save(tiny_notebook("1 / 0", declared="steps: int = 3"), root / "stops.ipynb")
    with pytest.raises(RunFailed, match="ZeroDivisionError") as failed:
        run_notebook(prepared(notebook, root / "out" / "stops.ipynb"))
    assert "--resume" not in str(failed.value)


def kept_as(message: str) -> Path:
    found = re.search(r"the copy is kept as (\S+\.ipynb)", message)
    assert found, message
    return Path(found[1])


@pytest.fixture
def temporary(root, monkeypatch):
    folder = root / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_finished_copy_without_a_place_is_kept_elsewhere_whole_and_clean(root, temporary):
    """The place is taken away by the run itself, after all checks."""
    source = "import os, pathlib\nos.rmdir('out')\npathlib.Path('out').touch()"
    notebook = save(tiny_notebook(source), root / "tiny.ipynb")
    with pytest.raises(RunFailed, match=r"^every cell has run, but cannot write in the folder out: ") as failed:
        run_notebook(prepared(notebook, Path("out/tiny.ipynb")))
    kept = kept_as(str(failed.value))
    assert "\n" not in str(failed.value)
    copy = nbformat.read(kept, as_version=4)
    assert unfinished(copy) is None
    assert copy.metadata["hybridlab"]["parameters"]["steps"] == 3
    assert [path.name for path in temporary.rglob("*")] == [kept.parent.name, "tiny.ipynb"]


def test_a_partial_copy_without_a_place_is_kept_elsewhere(root, temporary):
    source = "import os, pathlib\nos.rmdir('out')\npathlib.Path('out').touch()\n1 / 0"
    notebook = save(tiny_notebook(source), root / "tiny.ipynb")
    with pytest.raises(RunFailed) as failed:
        run_notebook(prepared(notebook, Path("out/tiny.ipynb")))
    said = str(failed.value)
    assert said.startswith("code cell 3, `import os, pathlib`: ZeroDivisionError: division by zero (cannot write in")
    assert said.endswith(GO_ON)
    assert kept_as(said).name == "tiny.failed.ipynb"


def test_on_a_full_disk_the_copy_as_it_ran_is_moved_and_nothing_half_written_stays(root, temporary):
    whole = tiny_notebook("print('all')")
    work = save(whole, temporary / "hybridlab-x" / "work.ipynb")
    with full_disk(100), pytest.raises(UserError) as refused:
        write_or_rescue(whole, root / "out" / "tiny.ipynb", work)
    kept = kept_as(str(refused.value))
    assert nbformat.read(kept, as_version=4) == whole
    assert [path.name for path in (root / "out").iterdir()] == []
    assert [path.name for path in kept.parent.iterdir()] == ["tiny.ipynb"]


def test_a_full_temporary_folder_stops_a_run_with_one_line(root, temporary):
    notebook = save(tiny_notebook("print('all')"), root / "tiny.ipynb")
    with full_disk(100), pytest.raises(RunFailed) as failed:
        run_notebook(prepared(notebook, Path("out/tiny.ipynb")))
    said = str(failed.value)
    assert "work.ipynb: File too large; make room there, or name another folder in TMPDIR" in said
    assert said.endswith(f"no copy could be kept); {GO_ON}")
    assert "\n" not in said
    assert list(temporary.iterdir()) == list((root / "out").iterdir()) == []


def test_an_early_exit_in_the_last_cell_is_not_a_whole_run(root):
    notebook = tiny_notebook("import sys; sys.exit()")
    for number, cell in enumerate(notebook.cells[1:], start=1):
        cell.execution_count = number
    assert unfinished(notebook) is None
    notebook.cells[-1].outputs = [new_output("error", ename="SystemExit", evalue="", traceback=[])]
    assert unfinished(notebook) == "the notebook ended early with SystemExit"


def test_an_interrupted_run_says_where_ends_with_130_and_leaves_no_temporary_files(root, tmp_path_factory):
    temporary = tmp_path_factory.mktemp("temporary")
    source = (
        "import pathlib, tempfile, time\nkept = tempfile.TemporaryDirectory()\n"
        "pathlib.Path('started').touch()\ntime.sleep(60)"
    )
    save(tiny_notebook(source), root / "slow.ipynb")
    command = [sys.executable, "-c", "import sys; from hybridlab.cli import main; sys.exit(main())"]
    command += ["run", "slow.ipynb", "-o", "out/slow.ipynb"]
    environment = os.environ | {"TMPDIR": str(temporary)}
    run = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    while not (root / "started").exists() and run.poll() is None:
        time.sleep(0.05)
    run.send_signal(signal.SIGHUP)  # a closed terminal; Ctrl-C goes the same way
    _, said = run.communicate(timeout=60)
    assert run.returncode == 130
    assert said.splitlines() == [
        "hybridlab: code cell 3, `import pathlib, tempfile, time`: stopped (Ctrl-C or a signal) "
        f"(partial copy: out/slow.failed.ipynb); {GO_ON}"
    ]
    assert not (root / "out" / "slow.ipynb").exists()
    assert (root / "out" / "slow.failed.ipynb").exists()
    assert list(temporary.iterdir()) == []


def test_a_run_without_standard_streams_leaves_its_copy(root):
    """As a service may start it. What could not be printed makes the exit code 1."""
    save(tiny_notebook("print('all')"), root / "tiny.ipynb")
    command = f"exec '{sys.executable}' -m hybridlab run tiny.ipynb -o out/tiny.ipynb <&- >&- 2>&-"
    assert subprocess.run(command, shell=True, check=False).returncode == 1
    assert names(root / "out") >= {"tiny.ipynb"}


def test_cleaning_takes_out_timings_widgets_and_paths(root):
    notebook = tiny_notebook()
    cell = new_code_cell("show()", metadata={"papermill": {"duration": 1.0}, "execution": {}, "tags": []})
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": "ab"}}
    beside = view | {"text/plain": "Bar()"}
    path = f"saved {root}/runs/a, not {root}-b"
    picture = {"image/png": str(root), "application/json": {"where": [str(root)]}}
    cell.outputs = [new_output("display_data", data) for data in (dict(view), beside, picture)]
    cell.outputs.append(new_output("stream", text=path))
    notebook.cells.append(cell)
    notebook.metadata |= {"widgets": {}, "papermill": {"duration": 1.0}}
    clean_(notebook, root)
    assert set(notebook.metadata) == {"kernelspec"}
    assert cell.metadata == {}
    assert [output.get("data") for output in cell.outputs[:2]] == [
        {"text/plain": "Bar()"},
        {"image/png": str(root), "application/json": {"where": ["."]}},
    ]
    assert cell.outputs[2].text == f"saved ./runs/a, not {root}-b"


def published(root: Path) -> dict:
    return json.loads((root / "runs" / "results.json").read_text(encoding="utf-8"))


def test_results_are_merged_rounded_and_sorted(root):
    record = {"parameters": {"lr": 0.1234567890123}, "table": [{"loss": 1 / 3}]}
    publish("b", claims=[], summary=[], record=record, folder="runs")
    gain = Quantity("gain", 2 / 3, 0.5, 0.8, "nats", (0.6, 11 / 15))
    claim = Claim("gain", "hybrid: it gains", "open", (gain, Quantity("steps", 1234567)), "hybrid")
    publish("a", claims=[claim], summary=["So."], record={"parameters": {}, "device": "a card"}, folder="runs")
    results = published(root)
    assert list(results) == ["a", "b"]
    assert results["b"]["table"] == [{"loss": 0.333333}]
    assert results["b"]["parameters"] == {"lr": 0.1234567890123}
    assert results["b"]["parameters_sha256"] == parameters_sha256({"lr": 0.1234567890123})
    (kept,) = results["a"]["claims"]
    assert kept["quantities"] == [
        {"name": "gain", "value": 0.666667, "low": 0.5, "high": 0.8, "unit": "nats", "per_seed": [0.6, 0.733333]},
        {"name": "steps", "value": 1234567, "unit": "count"},
    ]
    assert (kept["id"], kept["kind"], kept["arm"], kept["verdict"]) == ("hybrid-gain", "gain", "hybrid", "open")
    assert Claim.from_record(claim.record()) == claim
    assert results["a"]["device"] == "a card"


def test_results_of_notebooks_that_publish_at_once_are_all_kept(root):
    def entry(name: str) -> None:
        publish(name, claims=[], summary=[], record={"parameters": {}}, folder="runs")

    threads = [threading.Thread(target=entry, args=(f"n{number}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(published(root)) == 8


def test_figures_that_were_measured_elsewhere_before_are_kept_in_a_bounded_number(root, monkeypatch):
    def measured(value: float, commit: str, parameters: dict[str, int] | None = None) -> list[dict]:
        monkeypatch.setattr("hybridlab.results.environment.git_commit", lambda: commit)
        figures = (Quantity("ratio", value, value - 0.1, value + 0.1, "time ratio"), Quantity("loss", 3.0, unit="nats"))
        record = {"parameters": parameters or {"steps": 100}}
        publish("a", claims=[Claim("fast", "it is", "open", figures)], summary=[], record=record, folder="runs")
        return load_results(root / "runs" / "results.json")["a"].get("repeats", [])

    assert measured(1.33, "one") == []
    assert measured(1.34, "one") == [], "of the same commit on the same machine the later one stays"
    (first,) = measured(1.85, "two", {"steps": 100, "new": 1})
    assert (first["git_commit"], first["torch"]) == ("one", environment()["versions"]["torch"])
    assert first["figures"] == {"fast.ratio": {"value": 1.34, "low": 1.24, "high": 1.44}}, "an equal loss is no repeat"
    assert [repeat["git_commit"] for repeat in measured(1.5, "three")] == ["one", "two"]
    assert [repeat["git_commit"] for repeat in measured(1.6, "one")] == ["two", "three"]
    again = measured(1.6, "four")[-1]
    assert again["figures"] == {"fast.ratio": {"value": 1.6, "low": 1.5, "high": 1.7}}, "a time that is equal counts"
    for number in range(MOST + 2):
        last = measured(2.0 + number, str(number))
    assert len(last) == MOST
    assert measured(1.0, "another", {"steps": 200}) == [], "another question"


def test_a_number_that_is_not_finite_becomes_null_with_a_note(root):
    claims = [Claim("loss", "it ends", "fails", (Quantity("loss", math.nan),))]
    publish("a", claims=claims, summary=[], record={"parameters": {}, "gap": [math.inf]}, folder="runs")
    entry = published(root)["a"]
    assert entry["claims"][0]["quantities"] == [{"name": "loss", "value": None, "unit": "count"}]
    assert entry["gap"] == [None]
    assert sorted(entry["not_finite"]) == ["claims[0].quantities[0].value was nan", "gap[0] was inf"]
    assert "loss not finite" in str(claims_table(claims))


def test_results_refuse_nonsense(root):
    claim = Claim("a", "A.", "holds")
    with pytest.raises(ValueError, match="several claims have the id"):
        publish("a", claims=[claim, claim], summary=[], record={"parameters": {}}, folder="runs")
    with pytest.raises(ValueError, match="record has no 'parameters'"):
        publish("a", claims=[claim], summary=[], record={}, folder="runs")
    with pytest.raises(TypeError, match="model is a object"):
        publish("a", claims=[], summary=[], record={"parameters": {}, "model": object()}, folder="runs")
    with pytest.raises(ValueError, match="take one of holds, fails, open, predicted nothing"):
        Claim("a", "A.", "maybe")
    with pytest.raises(ValueError, match="without spaces"):
        Claim("a b", "A.", "open")
    with pytest.raises(ValueError, match="unit is 'GB': take one of count"):
        Quantity("peak", 1.0, unit="GB")
    assert not (root / "runs" / "results.json").exists()
    (root / "runs").mkdir(exist_ok=True)
    (root / "runs" / "results.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="not valid JSON"):
        publish("a", claims=[], summary=[], record={"parameters": {}}, folder="runs")


def test_the_claims_table_shows_every_number_times_and_bytes_included():
    loss, steps = Quantity("loss", 2.0, 1.0, 3.0, "nats"), Quantity("steps", 7)
    volatile = Quantity("wall", 3.0, 2.0, 4.0, "s"), Quantity("peak_vram", 9, unit="bytes")
    shown = claims_table([Claim("hybrid_wins", "The hybrid ends lower.", "fails", (loss, steps, *volatile))])
    numbers = "loss +2.000 [+1.000, +3.000] nats; steps 7; wall +3.000 [+2.000, +4.000] s; peak vram 0.00 GB"
    assert shown.rows == ({"verdict": "fails", "claim": "The hybrid ends lower.", "numbers": numbers},)
    assert "color" in shown.html()


def test_the_commit_is_dirty_when_sources_changed_but_not_when_results_did(root):
    def git(*arguments: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *who, *arguments], check=True, capture_output=True)

    git("init")
    assert git_commit() == "unknown"
    (root / "COMMIT").write_text("abc1234\n")
    assert git_commit() == "abc1234", "sources without their history"
    (root / "COMMIT").unlink()
    git("add", ".")
    git("commit", "-m", "first")
    clean = git_commit()
    assert "+dirty" not in clean
    (root / "executed").mkdir()
    (root / "executed" / "a.ipynb").touch()
    assert git_commit() == clean
    (root / "code.py").touch()
    assert git_commit() == f"{clean}+dirty"


def test_progress_reports_to_the_file_it_is_given(tmp_path, monkeypatch, capfd):
    path = tmp_path / "progress.json"
    monkeypatch.setenv(PROGRESS_FILE, str(path))
    with Progress(4, "training") as bar:
        assert json.loads(path.read_text())["seconds_left"] is None
        bar.step("baseline", 4)
        bar.step("baseline", 4)
    state = json.loads(path.read_text())
    assert (state["done"], state["total"], state["label"]) == (2, 4, "baseline")
    assert state["seconds_left"] == pytest.approx(state["seconds"])
    assert capfd.readouterr() == ("", "")


def test_progress_is_silent_where_nobody_watches(monkeypatch, capfd):
    monkeypatch.delenv(PROGRESS_FILE, raising=False)
    with Progress(2, "training") as bar:
        bar.step("training", 2)
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Progress(2, "training") as bar:
        bar.step("training", 2)
    assert "training" in capfd.readouterr().err
    with pytest.raises(ValueError, match="at least 1 step"):
        Progress(0, "nothing")


def test_in_a_terminal_progress_is_a_bar_with_the_time_left_that_goes_away(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "SHOW_EVERY_SECONDS", 0.01)
    path, shown = tmp_path / "progress.json", io.StringIO()
    shown.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", shown)
    with watched(path):
        path.write_text(json.dumps({"done": 1, "total": 4, "label": "b[0]", "seconds": 60.0, "seconds_left": 180.0}))
        while "3 min" not in shown.getvalue():
            time.sleep(0.01)
    frames = shown.getvalue().split("\r")
    assert any(frame.startswith("starting the kernel") for frame in frames)
    assert re.search(r"b\[0\]:  25%\|.+\| 1/4, 3 min 00 s left", shown.getvalue())
    assert not "".join(frames[-2:]).strip()


def test_without_a_terminal_progress_is_logged_with_the_time_left(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "LOG_EVERY_SECONDS", 0.01)
    path = tmp_path / "progress.json"
    path.write_text(json.dumps({"done": 1, "total": 3, "label": "b[0]", "seconds": 60.0, "seconds_left": 120.0}))
    seen = ""
    with watched(path):
        while not seen:
            seen = capsys.readouterr().out
    assert seen.splitlines()[0] == "b[0]: 1 of 3, 2 min 00 s left"
