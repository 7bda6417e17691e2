"""Learning rates by bracketing, and the mean of the weights over a run's tail."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hybridlab.base.errors import UserError
from hybridlab.cli import main
from hybridlab.engine.config import HybridTrainerConfig
from hybridlab.models import GPT2Config
from hybridlab.optim import OptimizerConfig
from hybridlab.study import RunConfig, Study, StudyResult, TextTaskConfig, bracket_rates, bracket_study, rates, train
from hybridlab.weights.tail_average import TailAverage

TASK = TextTaskConfig("nano", "markov", vocab_size=512, block_size=16, batch_size=2, validation_batches=2)
RUN = RunConfig("run", TASK, steps=6, optimizer=OptimizerConfig(lr=1e-3), evaluate_every=3, device="cpu")
HYBRID = HybridTrainerConfig(warmup_steps=2)


def pretend(
    monkeypatch: pytest.MonkeyPatch, best: dict[str, float], cost: dict[str, float] | None = None
) -> list[tuple[str, float]]:
    """Each trial's loss is its distance from the best rate of its arm; returns what was tried."""
    tried: list[tuple[str, float]] = []

    def run_arms(configs: list[RunConfig], **_: object) -> StudyResult:
        return StudyResult({(config.name, config.seed): ended(config) for config in configs})

    def ended(config: RunConfig) -> SimpleNamespace:
        name = config.name.partition(", rate")[0]
        tried.append((name, config.optimizer.lr))
        figures = {"validation_loss": abs(config.optimizer.lr - best[name]), "gradient_steps": config.steps}
        return SimpleNamespace(closing_figures=figures | {"cost_in_full_steps": (cost or {}).get(name)})

    monkeypatch.setattr(rates, "run_arms", run_arms)
    return tried


def test_a_bracket_widens_while_the_best_is_at_an_edge(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend(monkeypatch, {"run": 4e-3})
    trial = bracket_rates([RUN], tmp_path)["run"]
    assert sorted(trial.losses) == pytest.approx([5e-4, 1e-3, 2e-3, 4e-3, 8e-3])
    assert trial.best == pytest.approx(4e-3)
    assert not trial.edge
    assert "bracketed" in str(trial)


def test_a_bracket_that_ends_at_an_edge_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend(monkeypatch, {"run": 1.0})
    trial = bracket_rates([RUN], tmp_path, most=4)["run"]
    assert len(trial.losses) == 4
    assert "the highest that was tried: a better one may lie beyond" in str(trial)
    with pytest.raises(ValueError, match="most is 2: a bracket takes at least 3 trials"):
        bracket_rates([RUN], tmp_path, most=2)


def test_a_study_tries_each_arm_and_control_at_as_many_rates_at_its_own_length(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    best = {"baseline": 1e-3, "hybrid": 4e-3, "control, 50% of the steps": 2e-3, "control of hybrid": 5e-4}
    tried = pretend(monkeypatch, best, cost={"hybrid": 4.0})
    study, trials = bracket_study(Study(RUN, {"hybrid": HYBRID}, control_fractions=(0.5,)), tmp_path, most=5)
    assert {name: sum(arm == name for arm, _ in tried) for name in trials} == dict.fromkeys(best, 5)
    assert {name: trial.best for name, trial in trials.items()} == pytest.approx(best)
    planned = {run.name: run.optimizer.lr for run in study.planned()}
    assert planned == pytest.approx({name: rate for name, rate in best.items() if name != "control of hybrid"})
    control = study.shortened("control of hybrid", 4)
    assert (control.optimizer.lr, control.lr_schedule.total_steps) == (pytest.approx(5e-4), 4)
    assert dict(study.tried) == dict.fromkeys(best, "")


@pytest.mark.parametrize(("most", "control_at", "trials"), [(7, 1.25e-4, 6), (5, 1.25e-4, 5), (7, 1e-3, 4)])
def test_arms_are_tried_at_as_many_rates_as_a_control_that_needs_more(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, most: int, control_at: float, trials: int
) -> None:
    best = {"baseline": 1e-3, "hybrid": 2e-3, "control of hybrid": control_at}
    tried = pretend(monkeypatch, best, cost={"hybrid": 4.0})
    study, _ = bracket_study(Study(RUN, {"hybrid": HYBRID}, control_fractions=()), tmp_path, most=most)
    assert {name: sum(arm == name for arm, _ in tried) for name in best} == dict.fromkeys(best, trials)
    assert len(set(tried)) == len(tried), "none twice"
    assert study.hybrid_run("hybrid").optimizer.lr == pytest.approx(2e-3)
    edge = "the best rate of control of hybrid is the lowest tried, 0.000125: bracket it" * (most == 5)
    assert dict(study.tried)["control of hybrid"] == edge


def test_a_bracket_ends_at_the_largest_rate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And what was tried before is not lost."""
    pretend(monkeypatch, {"run": 5000.0})
    trial = bracket_rates([replace(RUN, optimizer=OptimizerConfig("sgd", lr=200.0))], tmp_path)["run"]
    assert sorted(trial.losses) == [100.0, 200.0, 400.0, 800.0]
    assert trial.edge == "highest"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--lr=1e9", "lr is 1000000000.0: it must be above 0 and at most 1000"),
        ("--lr=0", "lr is 0.0: it must be above 0 and at most 1000"),
        ("--lr=nan", "lr is nan: it must be finite and above 0 and at most 1000"),
        ("--lr=600", "rates on both sides are tried, up to 1000: begin at 500 or lower"),
        ("--momentum=1", "momentum is 1: it must be at least 0 and below 1"),
        ("--momentum=nan", "momentum is nan: it must be finite and at least 0 and below 1"),
    ],
)
def test_what_is_no_rate_gives_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, option: str, message: str
) -> None:
    assert main(["rates", "--model=nano", "--data=markov", option, "--folder", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"hybridlab: {message}\n"
    assert not list(tmp_path.iterdir())


def test_a_study_keeps_which_best_rates_are_at_an_edge(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend(monkeypatch, {"baseline": 1e-3, "hybrid": 1.0, "control of hybrid": 1e-6}, cost={"hybrid": 4.0})
    study, _ = bracket_study(Study(RUN, {"hybrid": HYBRID}, control_fractions=()), tmp_path, most=3)
    assert dict(study.tried) == {
        "baseline": "",
        "hybrid": "the best rate of hybrid is the highest tried, 0.002: bracket it",
        "control of hybrid": "the best rate of control of hybrid is the lowest tried, 0.0005: bracket it",
    }


def test_a_diverged_trial_is_the_worst(tmp_path: Path) -> None:
    unclipped = HybridTrainerConfig.plain(clip_norm=None)
    run = replace(RUN, steps=12, optimizer=OptimizerConfig("sgd", lr=2.0), hybrid=unclipped)
    trial = bracket_rates([run, replace(RUN, name="other")], tmp_path, most=3)
    assert math.isinf(trial["run"].losses[4.0])
    assert all(math.isfinite(loss) for loss in trial["other"].losses.values())


def test_where_every_rate_diverges_none_is_best(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, {"baseline": 1e-3, "hybrid": math.inf})
    with pytest.raises(UserError, match=r"hybrid diverged at every rate \(5 trials, from 0.000125 .*; baseline: best"):
        bracket_study(Study(RUN, {"hybrid": HYBRID}, control_fractions=()), tmp_path, most=5)
    options = ["--model=nano", "--data=markov", "--steps=2", "--batch=2x16", "--optimizer=sgd", "--most=3"]
    pretend(monkeypatch, {"nano, sgd": math.inf})
    assert main(["rates", *options, "--lr=1", "--folder", str(tmp_path)]) == 2
    told = capsys.readouterr()
    assert "nano, sgd diverged at every rate (3 trials, from 0.5 to 2): begin at a lower one" in told.err
    assert not told.out


def test_the_command_brackets_a_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model=nano", "--data=markov", "--steps=2", "--batch=2x16", "--optimizer=muon", "--most=3"]
    assert main(["rates", *options, "--folder", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("nano, muon: best rate 0.00")


def test_the_command_brackets_the_rate_of_each_momentum(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, {"nano, adamw, momentum 0.5": 1e-3, "nano, adamw, momentum 0.9": 2e-3})
    options = ["--model=nano", "--lr=1e-3", "--momentum=0.5", "--momentum=0.9", "--folder", str(tmp_path)]
    assert main(["rates", *options]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("nano, adamw, momentum 0.5: best rate 0.001 (bracketed)")
    assert second.startswith("nano, adamw, momentum 0.9: best rate 0.002 (bracketed)")
    assert OptimizerConfig("adam").with_momentum(0.5).betas == (0.5, 0.999)
    assert OptimizerConfig("muon").with_momentum(0.5).momentum == 0.5


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_the_mean_of_the_tail_is_that_of_its_weights(decay: float) -> None:
    weight = torch.zeros(3)
    average = TailAverage([weight], decay)
    for value in (1.0, 2.0, 6.0):
        weight.fill_(value)
        average.add_()
    with average.in_place():
        assert weight.tolist() == [3.0 if not decay else 3.75] * 3
    assert weight.tolist() == [6.0] * 3
    assert average.nbytes == 12


def test_a_run_shows_the_averaged_readout_beside_the_plain_one(tmp_path: Path) -> None:
    plain = train(RUN, tmp_path / "plain").closing_figures
    run = train(replace(RUN, tail_average=0.5), tmp_path / "averaged")
    figures = run.closing_figures
    assert figures["validation_loss"] == plain["validation_loss"], "the run itself is unchanged"
    assert figures["averaged_validation_loss"] != figures["validation_loss"]
    assert figures["averaged_bytes"] == 4 * GPT2Config.nano(block_size=16).parameter_count
    assert "averaged_validation_loss" not in plain
    assert run.steps["averaged_validation_loss"].notna().sum() == 1


def test_an_averaged_run_that_was_interrupted_ends_the_same(tmp_path: Path) -> None:
    config = replace(RUN, tail_average=0.5, checkpoint_every=5)

    def stop(_: object, record: object) -> None:
        if record.result.nominal_step == 5:  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    whole = train(config, tmp_path / "whole").closing_figures
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "parts", watch=stop)
    parts = train(config, tmp_path / "parts", resume=True).closing_figures
    assert parts["averaged_validation_loss"] == whole["averaged_validation_loss"]
