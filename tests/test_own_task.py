"""Any task: named as module:object, or a Hugging Face config on a text file; studied, planned, driven and recorded."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml

from hybridlab.base.errors import UserError
from hybridlab.batch.train_file import run_file
from hybridlab.cli import main
from hybridlab.data import load_text
from hybridlab.memory import MemoryConfig
from hybridlab.memory.config import GradientAccumulationConfig
from hybridlab.models.huggingface import causal_config, fresh_model
from hybridlab.notebook import Session, find_runs
from hybridlab.study import (
    HuggingFaceTaskConfig,
    OwnTaskConfig,
    RunConfig,
    Study,
    TextTaskConfig,
    compare,
    find_task,
    train,
)
from hybridlab.study.planning import plan_of
from tests import own_bytes
from tests.conftest import jumping

JUMPS = jumping(4, 8, 6)
LLAMA = {
    "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32,
    "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip
GPT2 = {
    "model_type": "gpt2", "n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 64, "bos_token_id": 50256,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def mine(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A project with the user's module in it."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("HYBRIDLAB_CACHE", str(root / "cache"))
    shutil.copy(own_bytes.__file__, root / "my_task.py")
    (root / "my_text.txt").write_bytes(own_bytes.TEXT * 8)
    yield root
    sys.modules.pop("my_task", None)


def run_of(task: OwnTaskConfig | HuggingFaceTaskConfig, **settings: object) -> RunConfig:
    return RunConfig("baseline", task, **{"steps": 40, "evaluate_every": 10, "device": "cpu"} | settings)  # type: ignore[arg-type]


def test_a_named_task_is_studied_with_controls_and_step_value(mine: Path) -> None:
    task = find_task("my_task:Bytes")
    study = Study(run_of(task), {"jumps": JUMPS}, seeds=2)
    comparison = compare(study.run(mine / "runs"), "jumps")
    assert comparison.predicted_steps
    assert comparison.step_value is not None
    assert comparison.base.tokens == 40 * 8 * 16
    (record,) = find_runs("runs", where=["name=jumps", "seed=0"])
    assert record.config["task"]["name"] == "my_task:Bytes"
    assert len(record.config["data"]["source_sha256"]) == 64


def test_a_session_drives_it_and_the_plan_counts_every_weight(mine: Path) -> None:
    config = run_of(find_task("my_task:Bytes"), hybrid=JUMPS)
    session = Session(config, "mine")
    assert [result.nominal_step for result in session.run(12)] == list(range(1, 13))
    session.close()
    weights = 4 * sum(p.numel() for p in own_bytes.Bytes(0, "cpu").model.parameters())  # type: ignore[arg-type]
    assert plan_of(config).parts["weights"] == pytest.approx(weights, rel=0.02)
    parts = replace(JUMPS, memory=MemoryConfig(gradient_accumulation=GradientAccumulationConfig(4)))
    assert plan_of(replace(config, hybrid=parts)).parts["logits"] < plan_of(config).parts["logits"] / 2


def test_an_edited_task_is_another_run(mine: Path) -> None:
    before = run_of(find_task("my_task:Bytes")).record()
    with (mine / "my_task.py").open("a") as file:
        file.write("\n# edited\n")
    assert run_of(find_task("my_task:Bytes")).record() != before


def test_a_task_may_be_named_by_its_file(mine: Path) -> None:
    assert find_task("my_task.py:Bytes").data_record() == find_task("my_task:Bytes").data_record()


def test_a_module_may_hold_settings_of_a_task(mine: Path) -> None:
    line = "from hybridlab.study import TextTaskConfig\ntask = TextTaskConfig(data='markov', vocab_size=64)\n"
    (mine / "settings_of.py").write_text(line)
    assert find_task("settings_of:task").data == "markov"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_task", "write module:object or file.py:object"),
        ("no_such_task:Bytes", "there is no module 'no_such_task'"),
        ("pieces.no_such_task:Bytes", "there is no module 'pieces.no_such_task': put pieces/no_such_task.py into"),
        ("none.py:Bytes", "none.py: no such file"),
        ("my_task:Byte", "my_task has no 'Byte': it has Bytes"),
        ("my_task:TEXT", "my_task:TEXT is not a task: give a class with batch_size"),
        ("broken:Bytes", r"broken cannot be imported: ZeroDivisionError: division by zero \(broken.py, line 2\)"),
        ("in_torch.py:Bytes", r"RuntimeError: shape .* is invalid for input of size 3 \(in_torch.py, line 2\)$"),
        ("open.py:Bytes", r"open.py cannot be imported: SyntaxError: '\(' was never closed \(open.py, line 2\)$"),
        ("imports_open:Bytes", r"imports_open cannot be imported: SyntaxError: .* \(open.py, line 2\)$"),
        ("ends.py:Bytes", r"ends.py cannot be imported: SystemExit: 0 \(ends.py, line 2\)$"),
        ("json.py:x", "another module is called 'json'"),
    ],
)
def test_a_name_that_leads_nowhere_is_one_line(name: str, message: str, mine: Path) -> None:
    (mine / "broken.py").write_text("\n1 / 0\n")
    (mine / "in_torch.py").write_text("import torch\ntorch.zeros(3).reshape(7)\n")
    (mine / "open.py").write_text("\nx = (\n")
    (mine / "imports_open.py").write_text("import open\n")
    (mine / "ends.py").write_text("import sys\nsys.exit(0)\n")
    (mine / "json.py").touch()
    (mine / "pieces").mkdir()
    with pytest.raises(UserError, match=message):
        find_task(name)


def test_what_a_task_lacks_is_named(mine: Path) -> None:
    with pytest.raises(UserError, match="lacks loss, evaluate"):
        train(run_of(find_task("my_task:WithoutLoss")), mine / "a")
    with pytest.raises(UserError, match='gave no "validation_loss", but'):
        train(run_of(find_task("my_task:WithoutValidation")), mine / "b")


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=lambda config: config["model_type"])
def test_a_hugging_face_config_learns_a_text_file(config: dict[str, object], mine: Path) -> None:
    pytest.importorskip("transformers")
    (mine / "config.json").write_text(json.dumps(config))
    given = {"data": "file:my_text.txt", "vocab_size": 300, "block_size": 16, "validation_batches": 2}
    task = HuggingFaceTaskConfig(".", **given)  # type: ignore[arg-type]
    assert task.model_config().to_dict() == HuggingFaceTaskConfig(json.dumps(config), **given).model_config().to_dict()  # type: ignore[arg-type]
    run = train(run_of(task, hybrid=JUMPS), mine / "run")
    losses = run.steps["validation_loss"].dropna()
    assert run.closing_figures["predicted_steps"]
    assert losses.iloc[-1] < losses.iloc[0]
    assert plan_of(run_of(task, hybrid=JUMPS)).parts["activations"]


def test_a_gpt2_of_transformers_gives_its_loss_without_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    modeling_utils = pytest.importorskip("transformers.modeling_utils")
    tiny = {"n_embd": 16, "n_head": 2, "n_layer": 1, "n_positions": 8, "vocab_size": 32}
    model = fresh_model(causal_config({"model_type": "gpt2"} | tiny))
    monkeypatch.setattr(modeling_utils.logger, "warning_once", pytest.fail)
    tokens = torch.zeros(1, 4, dtype=torch.long)
    assert model(input_ids=tokens, labels=tokens).loss.isfinite()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nowhere", "no such config"),
        ("{", "not readable JSON"),
        ("{}", 'has no "model_type"'),
        ('{"model_type": "gtp2"}', r"model_type='gtp2': did you mean 'gpt2'\? \((\w+[\w-]*, ){2,8}\.\.\.\)$"),
        (
            '{"model_type": "qwen2", "num_hidden_layers": 1e9}',
            "has num_hidden_layers=1000000000.0: a whole number up to",
        ),
        ('{"model_type": "gpt2", "n_layer": 1000000000}', "has n_layer=1000000000: a whole number up to 1,000"),
    ],
)
def test_a_config_that_is_none_is_one_line(model: str, message: str) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(UserError, match=message):
        HuggingFaceTaskConfig(model)


def test_a_text_file_is_split_and_what_is_none_is_refused(mine: Path) -> None:
    text = load_text("file:my_text.txt", vocab_size=300)
    assert len(text.train) == pytest.approx(9 * len(text.validation), rel=0.1)
    (mine / "binary").write_bytes(b"abc\xff" * 100)
    (mine / "short").write_text("a")
    for name, message in {"binary": "not UTF-8", "short": "too few", "absent": "cannot be read"}.items():
        with pytest.raises(UserError, match=message):
            load_text(f"file:{name}", vocab_size=300)


def test_windows_longer_than_the_config_takes_are_refused_before_training() -> None:
    pytest.importorskip("transformers")
    task = HuggingFaceTaskConfig(json.dumps(GPT2), data="markov", vocab_size=64, block_size=64, batch_size=2)
    assert plan_of(RunConfig("mine", task, 5, device="cpu")).peak_allocated_bytes
    longer = RunConfig("mine", replace(task, block_size=65), 5, device="cpu")
    for starts in (plan_of, *STARTS):
        with pytest.raises(UserError, match=r"block_size is 65, .* 64: lower the one or raise the other"):
            starts(longer)


def test_a_text_that_is_cut_is_held_to_utf_8_too(mine: Path) -> None:
    (mine / "latin.txt").write_bytes("naïve café, ".encode("latin-1") * 1000)
    task = TextTaskConfig("nano", "file:latin.txt", vocab_size=300, max_bytes=5000)
    for starts in STARTS:
        with pytest.raises(UserError, match=r"latin\.txt is not UTF-8 text \(byte 2\): convert it"):
            starts(RunConfig("mine", task, 5, device="cpu"))


def _by_file(config: RunConfig) -> None:
    kind = "huggingface" if isinstance(config.task, HuggingFaceTaskConfig) else "text"
    run = {"name": config.name, "steps": config.steps, "task": {"kind": kind} | asdict(config.task)}
    Path("run.yaml").write_text(yaml.safe_dump({"run": run}))
    run_file(Path("run.yaml"))


STARTS: list[Callable[[RunConfig], object]] = [
    lambda config: Session(config, "mine"),
    lambda config: Study(config, {}, seeds=1, control_fractions=()).run(Path("runs")),
    _by_file,
]
"""Ways in which a run starts."""


def test_the_command_plans_a_task(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--task", "my_task:Bytes", "--card", "16GB"]) == 0
    assert "It fits a GPU of 16 GB" in capsys.readouterr().out
    assert main(["plan", "--task", "my_task:Byte"]) == 2
    assert "my_task has no 'Byte'" in capsys.readouterr().err
