"""`python -m hybridlab.train`: one run from a settings file, alone or on several ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml

from hybridlab.batch.train_file import main
from hybridlab.study.record import Run
from hybridlab.study.step_log import StepRecord
from hybridlab.train import main as program
from tests.conftest import contents, full_disk

ROOT = Path(__file__).parents[1]
JUMPING = {"warmup_steps": 4, "full_steps": 8, "max_predict_steps": 4, "correct_steps": 1, "gate": False}
TASK = {"model": "nano", "data": "markov", "vocab_size": 64, "block_size": 16, "batch_size": 12}
RUN = {
    "name": "toy",
    "steps": 36,
    "evaluate_every": 12,
    "checkpoint_every": 10,
    "keep_weights": True,
    "device": "cpu",
    "task": TASK,
    "hybrid": JUMPING | {"confidence_threshold": 0.0},
}
DYING = """
import os, signal
from hybridlab.study import TextTaskConfig

class Task:
    batch_size, block_size = 12, 16

    def __init__(self, seed, device):
        self.task = TextTaskConfig("nano", "markov", vocab_size=64, block_size=16, batch_size=12).build(seed, device)
        self.model, self.evaluate, self.task.loss = self.task.model, self.task.evaluate, self.loss

    def loss(self, model, batch):
        assert len(batch[0]) == self.batch_size // int(os.environ.get("WORLD_SIZE", 1))  # when it judges, too
        return model(*batch)

    def batch(self, step):
        if step == 22 and (os.environ.get("RANK"), os.environ.get("WORLD_SIZE")) == ("1", "2"):
            os.kill(os.getpid(), signal.SIGKILL)
        return self.task.batch(step)
"""


UNEQUAL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last, self.aside = nn.Embedding(16, 8), nn.Linear(8, 16), nn.Linear(2, 2)

    def forward(self, tokens):
        return self.last(self.first(tokens))

class Task:
    batch_size, block_size = 4, 8

    def __init__(self, seed, device):
        self.model = Net()

    def batch(self, step):
        tokens = torch.arange(36).reshape(4, 9) % 16
        return tokens[:, :-1], tokens[:, 1:].index_fill(0, torch.tensor([0]), -100)

    def loss(self, model, batch):
        return nn.functional.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    def evaluate(self, model):
        return {"validation_loss": self.loss(model, self.batch(0))}
"""
"""Its first window counts nothing, and one module takes no part."""

EARLY = {"stages": [[0.0, 1], [0.001, 2]], "in_shares": True}


def written(folder: Path, run: Any = RUN, **others: Any) -> str:
    file = folder / "settings.yaml"
    file.write_text(yaml.safe_dump({"folder": str(folder / "run"), "run": run, **others}))
    return str(file)


def losses(folder: Path) -> pd.DataFrame:
    return Run.load(folder / "run").steps[["nominal_step", "measured_loss", "validation_loss"]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in one process that is a group of its own."""
    folder = tmp_path_factory.mktemp("alone")
    assert main(["-f", written(folder)]) == 0
    return folder


def test_alone_it_leaves_a_record_and_finished_it_stands(alone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run.load(alone / "run")
    assert run.closing_figures["ranks"] == 1
    assert run.closing_figures["predicted_steps"] == 8
    assert main(["-f", str(alone / "settings.yaml"), "--resume"]) == 0
    assert capsys.readouterr().out.startswith("done: validation loss")


@pytest.mark.parametrize("settings", [{}, {"steps": 2}])
def test_a_run_that_lies_there_is_not_replaced_by_the_same_or_by_another(
    alone: Path, settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(alone / "run")
    file = Path(written(tmp_path, RUN | settings))
    file.write_text(file.read_text().replace(str(tmp_path), str(alone)))
    assert main(["-f", str(file)]) == 2
    assert "a run lies in" in (said := capsys.readouterr().err)
    assert "delete it, or name another folder" in said  # to start afresh, as a damaged record asks for
    assert said.count("\n") == 1
    assert contents(alone / "run") == before


def test_a_run_of_other_settings_is_not_gone_on_with_and_what_works_is_told(
    alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = Path(written(tmp_path, RUN | {"seed": 5}))
    file.write_text(file.read_text().replace(str(tmp_path), str(alone)))
    assert main(["-f", str(file), "--resume"]) == 2
    said = capsys.readouterr().err
    assert "is of another run: seed" in said
    assert f"choose another folder, or delete {alone / 'run'} to start afresh\n" in said


def test_nor_is_a_run_whose_damaged_settings_were_deleted(tmp_path: Path) -> None:
    file = written(tmp_path, RUN)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "steps.parquet").touch()
    assert main(["-f", file]) == 2


def test_replicated_it_trains_the_same(alone: Path, tmp_path: Path) -> None:
    assert main(["-f", written(tmp_path, RUN | {"tail_average": 0.3}, ranks={"wrap": "ddp"})]) == 0
    pd.testing.assert_frame_equal(losses(alone), losses(tmp_path), atol=1e-6, rtol=0)
    torch.testing.assert_close(*(torch.load(folder / "run" / "weights.pt") for folder in (alone, tmp_path)))


def test_blocks_that_join_later_train_where_weights_are_gathered_in_bf16(tmp_path: Path) -> None:
    """FSDP2 settles the format of gradients by the weights that are trained in the first pass."""
    growing = JUMPING | {"depth": {"stages": [[0, 1], [10, 2]], "rule": "stack"}}
    run = RUN | {"precision": "bf16", "hybrid": growing}
    assert main(["-f", written(tmp_path, run, ranks={"gather": "bf16"})]) == 0
    steps = Run.load(tmp_path / "run").steps
    assert steps["depth"].tolist() == [1] * 10 + [2] * 26
    assert steps["validation_loss"].dropna().is_monotonic_decreasing


def started_on_two_and_one_dies(run: dict[str, Any], folder: Path) -> tuple[str, subprocess.CompletedProcess[str]]:
    """The second of two ranks dies in step 22."""
    (folder / "dying.py").write_text(DYING)
    file = written(folder, run | {"task": f"{folder}/dying.py:Task"})
    return file, on_ranks(2, file)


def on_ranks(ranks: int, file: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"]
    return subprocess.run(
        [*command, "-m", "hybridlab.train", "-f", file, *options],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.slow
def test_two_ranks_train_the_same_and_when_one_dies_another_number_goes_on(alone: Path, tmp_path: Path) -> None:
    """The same batches on any number of ranks; whoever is left says in one line why the run ends."""
    file, done = started_on_two_and_one_dies(RUN, tmp_path)
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if line.startswith("hybridlab")]
    # torchrun stops all ranks a tenth of a second after one has ended: a rank may learn of that first
    why = "another rank has ended, and the run with it", "stopped, as every rank is where one has ended"
    assert said[0] in [f"hybridlab.train: rank 0: {reason}: see what it said; --resume goes on" for reason in why]
    assert Run.load(tmp_path / "run").summary is None
    with pytest.warns(UserWarning, match="2 ranks wrote the checkpoint and 1 go on: random streams"):
        assert main(["-f", file, "--resume"]) == 0
    assert not (tmp_path / "run" / "checkpoints").exists()
    pd.testing.assert_frame_equal(losses(alone), losses(tmp_path), atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrap", "reason"),
    [
        ("fsdp", "count different numbers of targets, and their mean losses would weigh alike: give each rank as many"),
        ("ddp", "every weight needs a gradient, and aside.weight has none (2 in all): set requires_grad to False"),
    ],
)
def test_ranks_whose_losses_cannot_be_averaged_end_in_one_line(wrap: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text(UNEQUAL)
    run = RUN | {"task": f"{tmp_path / 'task.py'}:Task", "steps": 4, "hybrid": {"max_predict_steps": 0}}
    done = on_ranks(2, written(tmp_path, run, ranks={"wrap": wrap}))
    said = [line for line in done.stderr.splitlines() if line.startswith("hybridlab")]
    assert done.returncode == 1
    assert any(reason in line for line in said), done.stderr[-3000:]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(("wrap", "graphs"), [("ddp", "in use"), ("fsdp", "weights that ranks gather")])
def test_two_gpus_train_as_one(wrap: str, graphs: str, tmp_path: Path) -> None:
    run = RUN | {"device": "cuda", "compiled": True}
    folders = []
    for count in (1, 2):
        (folder := tmp_path / str(count)).mkdir()
        assert on_ranks(count, written(folder, run, ranks={"wrap": wrap})).returncode == 0
        folders.append(folder)
    pd.testing.assert_frame_equal(*map(losses, folders), atol=1e-3, rtol=0)
    assert Run.load(folders[1] / "run").closing_figures["cuda_graphs"].startswith(graphs)


@pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs four GPUs")
def test_what_two_gpus_began_four_go_on_with(tmp_path: Path) -> None:
    """Kernels of a GPU add in an order that the size of a part decides: the losses are equal within rounding."""
    run = RUN | {"device": "cuda"}
    file, done = started_on_two_and_one_dies(run, tmp_path)
    assert done.returncode == 1
    resumed = on_ranks(4, file, "--resume")
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert "2 ranks wrote the checkpoint and 4 go on" in resumed.stderr
    (whole := tmp_path / "whole").mkdir()
    assert on_ranks(2, written(whole, run)).returncode == 0
    pd.testing.assert_frame_equal(losses(whole), losses(tmp_path), atol=1e-4, rtol=0)


def changed(**settings: Any) -> dict[str, Any]:
    return RUN | settings


def test_a_run_that_diverges_has_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It was not refused before the start."""
    unclipped = {"max_predict_steps": 0, "clip_norm": None}
    run = changed(optimizer={"name": "sgd", "lr": 1e3}, hybrid=unclipped, steps=12, evaluate_every=12)
    assert main(["-f", written(tmp_path, run)]) == 1
    assert "'toy', seed 0 diverged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("run", "ranks", "said"),
    [
        (changed(stpes=3), {}, "run: there is no setting 'stpes': did you mean 'steps'?"),
        (changed(steps="many"), {}, "run: steps is 'many': int is wanted"),
        (changed(optimizer={"lr": "1e-4"}), {}, "optimizer: lr is '1e-4': float is wanted (YAML reads 1e-4 as text"),
        (changed(hybrid={"memory": {"checkpointing": {"keep": 1}}}), {}, "checkpointing: there is no setting 'keep'"),
        (changed(task=TASK | {"kind": "txt"}), {}, "run: task: kind 'txt' is unknown: did you mean 'text'?"),
        (changed(task=TASK | {"kind": ["text"]}), {}, "run: task: kind ['text'] is unknown"),
        (changed(hybrid={"depth": EARLY}), {}, "two begin at the same of 36 steps"),
        (RUN, {"timeout_s": 10**15}, "ranks: timeout_s"),
        (changed(cpu_threads=100_000), {}, "cpu_threads is 100000: it must be at least 0 and at most 1024"),
        ({"name": "toy"}, {}, "run: task is missing: write it down"),
        (RUN, {"wrap": "fspd"}, "ranks: wrap 'fspd' is unknown: did you mean 'fsdp'?"),
        (RUN, {"wrap": "ddp", "copies": 2}, "keep_gathered are of wrap='fsdp'"),
        (RUN, {"gather": "bf16"}, "gather='bf16' computes in bfloat16, and precision is 'fp32'"),
        (RUN, {"copies": 2}, "1 ranks do not hold 2 copies of the model: change copies"),
    ],
)
def test_what_cannot_be_meant_is_one_line(
    run: Any, ranks: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["-f", written(tmp_path, run, ranks=ranks)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("  steps: 1:30", "run: steps: YAML reads 1:30 as 90"),
        ("  steps: 0050", "run: steps: YAML reads 0050 as 40"),
        ("  optimizer: {lr: 0x1}", "run: optimizer: lr: YAML reads 0x1 as 1"),
        ("  optimizer: !!set {lr}", "run: optimizer is {'lr'}: OptimizerConfig is wanted"),
        ("  optimizer: !!omap [lr: 1]", "run: optimizer is [('lr', 1)]: OptimizerConfig is wanted"),
        ("  steps: 40\n  steps: 50", "'steps' is given twice"),
        ("  name: ../toy", "the run's name, '../toy', is no name of a folder"),
        ("  name: ''", "the run's name, '', is no name of a folder"),
    ],
)
def test_settings_within_are_read_as_strictly_as_those_outside(
    line: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    others = {"name": "  name: toy\n", "steps": "  steps: 4\n"}
    run = "".join(text for name, text in others.items() if f"  {name}:" not in line)
    (tmp_path / "settings.yaml").write_text(f"run:\n{run}{line}\n  task: {TASK}\n  device: cpu\n")
    assert main(["-f", "settings.yaml"]) == 2
    assert said in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"settings.yaml"}


def test_a_fault_of_the_task_keeps_its_traceback_and_is_no_refusal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(*_: object, **__: object) -> None:
        raise ValueError("two widths differ")

    monkeypatch.setattr("hybridlab.batch.train_file.read_settings", faulty)
    assert main(["-f", written(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "in faulty" in said
    assert said.endswith("hybridlab.train: ValueError: two widths differ\n")


def test_a_full_disk_is_one_line_and_no_refusal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = written(tmp_path)
    with full_disk(3000), pytest.warns(UserWarning, match="no checkpoint at step"):
        assert main(["-f", file]) == 1
    *_, last = capsys.readouterr().err.splitlines()
    assert "make room there or choose another folder" in last


def test_ctrl_c_says_that_it_has_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hybridlab.batch.train_file.read_settings", interrupted)
    assert main(["-f", written(tmp_path)]) == 130
    assert capsys.readouterr().err == "hybridlab.train: stopped\n"
    monkeypatch.setattr("hybridlab.batch.train_file.main", interrupted)  # as while it is imported
    assert program() == 130
    assert capsys.readouterr().err == "hybridlab.train: stopped\n"


@pytest.mark.parametrize("checkpoint_every", [0, 1])
def test_a_stopped_run_says_whether_it_can_be_gone_on_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, checkpoint_every: int
) -> None:
    def interrupted(_: object, record: StepRecord) -> None:
        if record.statistics.nominal_steps == 3:
            raise KeyboardInterrupt

    file = written(tmp_path, RUN | {"checkpoint_every": checkpoint_every})
    with monkeypatch.context() as patched:
        patched.setattr("hybridlab.batch.train_file._say_progress", interrupted)
        assert main(["-f", file]) == 130
    left, begun = f"{tmp_path / 'run'}", f"no checkpoint was written to {tmp_path / 'run'}: the run begins anew\n"
    intact = f"hybridlab.train: stopped, the record and the last checkpoint in {left} are intact; --resume goes on\n"
    assert capsys.readouterr().err == (intact if checkpoint_every else f"hybridlab.train: stopped, {begun}")
    assert main(["-f", file, "--resume"]) == 0
    assert capsys.readouterr().out.startswith(begun) == (not checkpoint_every)


def test_ranks_that_do_not_find_each_other_and_missing_files_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    assert main(["-f", written(tmp_path)]) == 2
    assert main(["-f", str(tmp_path / "none.yaml")]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "the ranks do not find each other" in first
    assert "WORLD_SIZE expected, but not set" in first
    assert "none.yaml: no such parameter file" in second
