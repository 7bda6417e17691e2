from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

import hybridlab
import hybridlab.notebook
import hybridlab.study
from hybridlab.base.files import project_root
from hybridlab.cli import main
from tests.notebook_maker import save, tiny_notebook


@pytest.fixture
def root(root):
    save(tiny_notebook("print(steps)", "1 / 0 if fast else None"), root / "tiny.ipynb")
    return root


def ended(arguments: str) -> int:
    """Run the command line; give its exit code."""
    return main(arguments.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("run none.ipynb -o out.ipynb", "none.ipynb: no such notebook"),
        ("run tiny.ipynb -o out.ipynb -f none.yaml", "none.yaml: no such parameter file"),
        (
            "run tiny.ipynb -o out.ipynb -f text.yaml",
            "lr: '1e-4' is text, a number is wanted: write 1.0e-4 in text.yaml",
        ),
        (
            "run tiny.ipynb -o out.ipynb -p step 3",
            "'step' after -p is no parameter of tiny.ipynb: did you mean 'steps'?",
        ),
        ("run tiny.ipynb -o out.ipynb -p steps x", "steps: 'x' is text, a whole number is wanted"),
        ("run tiny.ipynb -o out.ipynb -p steps=", "steps: '' is text, a whole number is wanted"),
        ("run tiny.ipynb -o out.ipynb -p limit=", "limit: '' is text, a whole number or nothing is wanted"),
        ("run tiny.ipynb -o out.ipynb -p limit #3", "limit: '#3' is text, a whole number or nothing is wanted"),
        ("run tiny.ipynb -o out.ipynb -p steps", "-p steps: a value is missing: write -p steps VALUE"),
        ("run .", ".: a folder, or nothing at all: name a file"),
        ("run tiny.ipynb -o out.ipynb -f .", ".: a folder, or nothing at all: name a file"),
        ("run tiny.ipynb -o tiny.ipynb", "the output would replace the source notebook"),
        ("run tiny.ipynb -o tiny.ipynb/out.ipynb", "cannot write into"),
        ("data nowhere", "nowhere"),
    ],
)
def test_a_mistake_gives_one_line_and_exit_code_2(root, capsys, arguments, message):
    Path("text.yaml").write_text("lr: 1e-4", encoding="utf-8")
    assert ended(arguments) == 2
    out, said = capsys.readouterr()
    assert out == ""
    assert said.startswith("hybridlab: ")
    assert message in said
    assert said.count("\n") == 1
    assert not Path("out.ipynb").exists()


@pytest.mark.parametrize("command", [["run"], ["data", "file:"]])
def test_whatever_the_system_refuses_is_one_line(root, capsys, command):
    command, kind = (*command, "")[:2]
    assert main([command, kind + 5000 * "x"]) == 1
    said = capsys.readouterr().err
    assert (said.count("\n"), "File name too long" in said) == (1, True)


def test_a_folder_is_no_file_of_steps_and_stands_in_no_notebook_s_way(root, capsys):
    assert ended("runs --csv /") == 2
    assert "is a directory" in capsys.readouterr().err
    Path("00_your_model").mkdir()
    assert ended("run 00_your_model -p nonsense 1") == 2
    assert "'nonsense' after -p is no parameter" in capsys.readouterr().err


def test_a_working_folder_that_is_gone_is_told(tmp_path, monkeypatch, capsys):
    (gone := tmp_path / "gone").mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert [ended(command) for command in ("runs", "report", "run 00_your_model")] == [2, 2, 2]
    assert capsys.readouterr().err == 3 * "hybridlab: the working folder is gone: go to another one\n"


def test_a_stranger_s_project_gets_nothing_for_having_a_pyproject(root, capsys, monkeypatch):
    """Only a marked one is the root of the folders in it."""
    (root / "mine").mkdir()
    monkeypatch.chdir(root / "mine")
    assert project_root() == root
    (root / "pyproject.toml").write_text("[project]\nname = 'theirs'\n")
    assert project_root() == root / "mine"
    assert ended("runs") == 2
    assert f"no folder {root / 'mine' / 'runs'}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "likeliest"),
    [
        ("run tiny.ipynb -o out.ipynb -f 03_hybrid.yaml", "params/cpu/03_hybrid.yaml"),
        ("run 03_hybrid.ipynb -o out.ipynb", "notebooks/03_hybrid.ipynb"),
    ],
)
def test_a_wrong_file_name_suggests_one_of_the_project(root, capsys, arguments, likeliest):
    for name in ("params/cpu/03_hybrid.yaml", "params/cpu/04_memory.yaml", "notebooks/03_hybrid.ipynb"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    assert ended(arguments) == 2
    assert f"did you mean '{likeliest}'?" in capsys.readouterr().err


def test_a_whole_run_ends_with_0_and_says_where_the_notebook_is(root, capfd):
    assert ended("run tiny.ipynb -o out/tiny.ipynb -p steps 4 -p lr 1e-4") == 0
    said, errors = capfd.readouterr()
    assert said.splitlines() == ["Notebook: out/tiny.ipynb", "Open it:  jupyter lab out/tiny.ipynb"]
    assert errors == ""
    assert '"4\\n"' in Path("out/tiny.ipynb").read_text(encoding="utf-8")


def test_a_failing_cell_ends_with_1_and_one_line(root, capfd):
    assert ended("run tiny.ipynb -o out/tiny.ipynb -p fast true") == 1
    said, errors = capfd.readouterr()
    assert said == ""
    assert errors == (
        "hybridlab: code cell 4, `1 / 0 if fast else None`: ZeroDivisionError: division by zero "
        "(partial copy: out/tiny.failed.ipynb); the same command with --resume goes on with its training runs\n"
    )


def test_a_mistake_in_a_cell_ends_with_1_and_is_one_line_in_the_copy_too(root, capfd):
    cell = "from hybridlab.base.errors import UserError\nraise UserError('mend it so')"
    save(tiny_notebook(cell), root / "mistaken.ipynb")
    assert ended("run mistaken.ipynb -o out/mistaken.ipynb") == 1
    assert capfd.readouterr().err == "hybridlab: mend it so (partial copy: out/mistaken.failed.ipynb)\n"
    outputs = nbformat.read("out/mistaken.failed.ipynb", as_version=4).cells[-1].outputs
    assert [output.traceback for output in outputs] == [["mend it so"]]


def test_a_bug_keeps_its_traceback(root, monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise KeyError("bug")

    monkeypatch.setattr("hybridlab.batch.run.run_notebook", broken)
    with pytest.raises(KeyError):
        main(["run", "tiny.ipynb", "-o", "out.ipynb"])


@pytest.mark.parametrize(("arguments", "code"), [("--help", 0), ("run --help", 0), ("data --help", 0), ("runn", 2)])
def test_help_names_what_there_is(capsys, arguments, code):
    assert ended(arguments) == code
    out, said = capsys.readouterr()
    assert "hybridlab" in out + said


HEAVY = {"torch", "scipy", "sklearn", "matplotlib", "plotly", "tokenizers"}


def imported_by(code: str) -> set[str]:
    """What a fresh interpreter has imported of `HEAVY` after this code."""
    told = f"{code}; import sys; print(*{HEAVY} & set(sys.modules))"
    return set(subprocess.run([sys.executable, "-c", told], check=True, capture_output=True, text=True).stdout.split())


def test_commands_that_train_nothing_start_without_torch():
    """One process for all of them: what any of them imports would be seen."""
    assert imported_by("import hybridlab.cli, hybridlab.notebook.compare_runs, hybridlab.batch.run") == set()


def test_a_lazy_package_exports_what_it_says():
    for package in (hybridlab, hybridlab.study, hybridlab.notebook):
        assert all(hasattr(package, name) for name in dir(package))
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            _ = package.nothing


def test_the_library_runs_as_a_module_and_completes_in_the_shell():
    asked = {"_HYBRIDLAB_COMPLETE": "complete_bash", "COMP_WORDS": "hybridlab re", "COMP_CWORD": "1"}
    command = [sys.executable, "-m", "hybridlab"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | asked, check=False)
    assert done.stdout.split() == ["report"]


def test_the_version_is_said(capsys):
    assert ended("--version") == 0
    assert capsys.readouterr().out == f"hybridlab {hybridlab.__version__}\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("command", ["data python", "report"])
def test_a_signal_ends_any_command_with_one_line(root, monkeypatch, capsys, number, command):
    def interrupted(*_: object, **__: object) -> None:
        os.kill(os.getpid(), number)
        time.sleep(10)

    monkeypatch.setattr("hybridlab.data.load_text", interrupted)
    monkeypatch.setattr("hybridlab.base.files.project_root", interrupted)
    before = signal.getsignal(number)
    assert ended(command) == 130
    assert capsys.readouterr() == ("", "hybridlab: stopped\n")
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("command", ["--version", "--help", "data uniform --vocab-size 16"])
def test_an_output_that_is_full_or_closed_ends_with_1_and_one_line_at_most(root, monkeypatch, capsys, command):
    reader, writer = os.pipe()
    os.close(reader)
    for stream, said in (
        (open("/dev/full", "w"), "hybridlab: standard output: No space left on device\n"),  # noqa: SIM115
        (os.fdopen(writer, "w"), ""),
        (None, "hybridlab: standard output: Bad file descriptor\n"),
    ):
        monkeypatch.setattr(sys, "stdout", stream)
        assert ended(command) == 1
        assert capsys.readouterr().err == said
        if stream:
            stream.close()


def test_data_prints_the_record_of_a_source(capsys):
    assert ended("data uniform --vocab-size 16") == 0
    assert isinstance(json.loads(capsys.readouterr().out), dict)
