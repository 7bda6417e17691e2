"""README and guide: every block of Python runs as it stands there, and every command exists with its options."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from IPython.core.formatters import DisplayFormatter
from torch import nn

from hybridlab.batch.given import declared_parameters
from hybridlab.batch.train_file import run_file
from hybridlab.benchmarks import architectures, ranks
from hybridlab.cli import _joined, app
from hybridlab.predictors import PREDICTORS

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "guide.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [block for name, block in found if name == language]


@pytest.fixture
def names(root: Path) -> Any:
    """What a page's blocks share: their names, in a project of their own."""
    yield {}
    PREDICTORS.pop("mean_path", None)


def run_blocks(page: Path, names: dict[str, Any]) -> None:
    """Run them as cells: what the last line gives is shown."""
    for block in blocks(page, "python"):
        *body, last = ast.parse(block).body
        if "# needs a GPU" in block and not torch.cuda.is_available():
            continue
        if not isinstance(last, ast.Expr):
            exec(block, names)
            continue
        exec(compile(ast.Module(body, []), page.name, "exec"), names)
        DisplayFormatter().format(eval(compile(ast.Expression(last.value), page.name, "eval"), names))


@pytest.mark.slow  # two of its blocks train a small GPT-2 by transformers, three seeds of hybrid and control
def test_the_blocks_of_the_guide_run_in_order(names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("transformers", "accelerate", "pytorch_lightning"):
        pytest.importorskip(package)
    Path("my_text.txt").write_bytes(GUIDE.read_bytes())
    run_blocks(GUIDE, names)
    said = capsys.readouterr().out
    assert len(re.findall(r"^seed \d: [1-9]\d* of 80 steps predicted$", said, re.MULTILINE)) == 3
    interval = r"hybrid minus control, in nats, with its 95 % interval: [+-]\d\.\d{3} \[[+-]\d\.\d{3}, [+-]\d\.\d{3}\]"
    assert re.search(interval, said)
    assert names["mean_path_counts"].predicted_steps
    assert names["session"].steps_done == 100
    assert {path.parent.name for path in Path("runs").glob("*/summary.json")} == {"my_trainer", "my_module"}


def test_the_blocks_of_the_readme_run(names: dict[str, Any]) -> None:
    """Model, optimizer, batches and loss are the reader's own."""
    model = nn.Linear(4, 1)
    names |= {"model": model, "optimizer": torch.optim.AdamW(model.parameters()), "batches": torch.randn(140, 8, 4)}
    names["loss_of"] = lambda model, batch: model(batch).square().mean()
    run_blocks(ROOT / "README.md", names)
    assert names["trainer"].statistics().predicted_steps


def test_the_recipes_of_the_gpu_guide_are_runs_that_keep_their_weights() -> None:
    recipes = blocks(ROOT / "docs" / "RTX_5080_GUIDE.md", "python")
    for block in recipes:
        names: dict[str, Any] = {}
        exec(block.partition("session =")[0], names)
        assert names["config"].keep_weights
        assert names["config"].hybrid.clip_norm or names["config"].memory.clip_in_backward
    assert recipes


def test_a_block_of_python_is_marked_as_one() -> None:
    assert [page.name for page in PAGES if blocks(page, "py")] == []


def commands(page: Path) -> list[list[str]]:
    """What a page says to type: in blocks of shell, and in the middle of a sentence."""
    text = page.read_text(encoding="utf-8")
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    inline = re.findall(r"`((?:\.venv/bin/)?(?:hybridlab|python -m hybridlab|make) [^`]+)`", text.replace("\n", " "))
    split = [shlex.split(line, comments=True) for line in [*lines, *inline]]
    return [[words[0].removeprefix(".venv/bin/"), *words[1:]] for words in split if words]


def parse(command: Any, words: list[str]) -> None:
    """Refuse what the command would refuse."""
    context = command.make_context(command.name, list(words))
    if rest := [*getattr(context, "_protected_args", []), *context.args]:
        _, inner, rest = command.resolve_command(context, rest)
        parse(inner, rest)


def test_a_command_that_does_not_exist_is_seen() -> None:
    for wrong in ("runs --nope", "runs show", "plan --modle x", "bogus"):
        with pytest.raises(Exception, match=r"No such|Missing"):
            parse(typer.main.get_command(app), wrong.split())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_that_a_page_names_exists_with_its_options(page: Path) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for words in commands(page):
        match words:
            case ["hybridlab", *rest] | ["python", "-m", "hybridlab", *rest]:
                parse(typer.main.get_command(app), _joined(rest))
            case ["python", "-m", "hybridlab.benchmarks.architectures", *rest]:
                program = typer.Typer()
                program.command()(architectures.main)
                parse(typer.main.get_command(program), rest)
            case ["torchrun", _, _, "-m", "hybridlab.train" as name, *rest] | [
                "python",
                "-m",
                "hybridlab.train" | "hybridlab.benchmarks.ranks" as name,
                *rest,
            ]:
                program = typer.Typer()
                program.command()(run_file if name == "hybridlab.train" else ranks.main)
                parse(typer.main.get_command(program), rest)
            case ["make", *rest]:
                assert {word for word in rest if "=" not in word} <= {*targets}, words
        given = {words[at + 1] for at, word in enumerate(words) if word == "-p"}
        for word in words:
            assert not word.startswith(("notebooks/", "params/")) or (ROOT / word).exists(), words
            if word.startswith("notebooks/"):
                assert given <= {*declared_parameters(json.loads((ROOT / word).read_text()), word)}, words


def anchors(page: Path) -> set[str]:
    """The names by which GitHub links to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_are_there(page: Path) -> None:
    for file, anchor in re.findall(r"\]\(([^)\s#:]*)#?([^)\s:]*)\)", page.read_text(encoding="utf-8")):
        target = page.parent / file if file else page
        assert target.exists(), file
        assert not anchor or anchor in anchors(target), f"{file}#{anchor}"


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
def test_milestones_go_where_they_are_told_to_and_go_on_if_asked() -> None:
    asked = ["make", "--dry-run", "milestones", "PROFILE=rtx5080", "OUT=runs/mine", "RESUME=--resume", "AT_ONCE=4"]
    plan = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    runs = re.findall(r"run notebooks/(\S+)\.ipynb -f \S+ -o runs/mine/(\S+)\.ipynb ?([^|&]*)", plan)
    assert len(runs) == plan.count(" run notebooks/")
    assert all(name == copy for name, copy, _ in runs)
    assert {how.strip() for name, _, how in runs if name != "09_report"} == {"--resume -p at_once 4"}


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
def test_milestones_go_on_after_a_notebook_that_fails_and_say_how_long_each_took(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "params" / "toy").mkdir(parents=True)
    for notebook in ("01_fails", "02_runs"):
        (tmp_path / "params" / "toy" / f"{notebook}.yaml").touch()
    program = tmp_path / "hybridlab"
    program.write_text('#!/bin/sh\necho "$@"\ncase "$2" in *fails*) exit $CODE;; esac\n')
    program.chmod(0o755)

    def milestones(code: str) -> tuple[int, list[str]]:
        command = ["make", "-s", "-o", ".venv/run", "milestones", "PROFILE=toy", "HYBRIDLAB=./hybridlab"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"CODE": code})
        return done.returncode, done.stdout.splitlines()

    code, lines = milestones("1")
    assert code == 2, "make's own for a recipe that failed"
    assert [line.split()[1] for line in lines if line.startswith("run")] == [
        f"notebooks/{name}.ipynb" for name in ("01_fails", "02_runs", "09_report")
    ]
    assert [line.split()[1:] for line in lines[-3:-1]] == [["s", "01_fails"], ["s", "02_runs"]]
    assert lines[-1] == "failed: 01_fails; the same command with RESUME=--resume goes on"
    assert milestones("0")[0] == 0
    assert len(milestones("130")[1]) == 1, "who stops one stops all"
