"""The library computes what tests/reference/train_gpt2.py computes, bit for bit: there, the whole is in one file."""

from __future__ import annotations

import ast
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from hybridlab import HybridTrainer, HybridTrainerConfig
from hybridlab.models import GPT2, GPT2Config
from hybridlab.optim import OptimizerConfig, Schedule, build_optimizer, set_lr_
from tests.reference import train_gpt2 as reference

TEXT = reference.markov_text(20_000)
MANY_JUMPS = reference.Settings(steps=420)
LONG_JUMPS = replace(
    MANY_JUMPS, steps=250, max_predict_steps=40, correction_interval=10, correct_steps=3, clip_norm=0.3
)
STRAY_STEPS = replace(MANY_JUMPS, steps=200, full_steps=12, max_predict_steps=7, correction_interval=3)

History = list[tuple[str, float | None, float | None, str | None]]
"""Phase, measured loss, predicted loss and event of each step."""


def batch_of(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    return reference.batch_at(TEXT, step, batch_size=2)


@cache
def of_reference(s: reference.Settings) -> tuple[History, nn.Module, Optimizer]:
    torch.manual_seed(1)
    model = reference.GPT2()
    history, optimizer = reference.train(model, batch_of, s)
    return history, model, optimizer


def of_library(s: reference.Settings, schedule: Schedule | None = None) -> tuple[History, nn.Module, Optimizer]:
    torch.manual_seed(1)
    start, model = reference.GPT2(), GPT2(GPT2Config.nano())
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), start.parameters(), strict=True):
            mine.copy_(theirs)
    optimizer = build_optimizer(model, OptimizerConfig(lr=s.lr, weight_decay=s.weight_decay))
    schedule = schedule or schedule_of(s)
    trainer = HybridTrainer(model, optimizer, unguarded(s))
    results = []
    for step in range(s.steps):
        set_lr_(optimizer, schedule(trainer.steps_by("nominal")))
        batch = batch_of(step)
        results.append(trainer.step(lambda batch=batch: model(*batch)))
    events = [result.event and result.event.split(":")[0] for result in results]
    history = [
        (str(result.phase), result.measured_loss, result.predicted_loss, event)
        for result, event in zip(results, events, strict=True)
    ]
    return history, model, optimizer


def schedule_of(s: reference.Settings) -> Schedule:
    return Schedule("wsd", s.lr_warmup_steps, s.steps, s.lr_decay_share)


def unguarded(s: reference.Settings) -> HybridTrainerConfig:
    return HybridTrainerConfig(
        warmup_steps=s.warmup_steps,
        full_steps=s.full_steps,
        max_predict_steps=s.max_predict_steps,
        correction_interval=s.correction_interval,
        correct_steps=s.correct_steps,
        clip_norm=s.clip_norm,
        predictor="linear",
        confidence_threshold=0.0,
        gate=False,
    )


def same_bits(a: tuple[History, nn.Module, Optimizer], b: tuple[History, nn.Module, Optimizer]) -> None:
    """Same losses, phases and events of every step, same weights and optimizer state at the end."""
    assert a[0] == b[0]
    for mine, theirs in zip(a[1].parameters(), b[1].parameters(), strict=True):
        assert torch.equal(mine, theirs)
    states: list[dict[str, Any]] = [optimizer.state_dict() for *_, optimizer in (a, b)]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for i, state in states[0]["state"].items():
        assert state.keys() == {"step", "exp_avg", "exp_avg_sq"} == states[1]["state"][i].keys()
        assert all(torch.equal(value, states[1]["state"][i][name]) for name, value in state.items())
    for mine, theirs in zip(*(state["param_groups"] for state in states), strict=True):
        assert all(mine[name] == theirs[name] for name in ("lr", "betas", "eps", "weight_decay", "params"))


def test_a_plain_run_is_the_same() -> None:
    plain = MANY_JUMPS.truncated(150)
    same_bits(of_library(plain), of_reference(plain))


@pytest.mark.parametrize("s", [MANY_JUMPS, LONG_JUMPS, STRAY_STEPS], ids=["many", "long", "stray"])
def test_a_run_with_jumps_is_the_same(s: reference.Settings) -> None:
    same_bits(of_library(s), of_reference(s))


def test_the_runs_that_are_compared_have_all_that_can_happen_in_a_jump() -> None:
    events = [event for _, _, _, event in of_reference(LONG_JUMPS)[0]]
    assert set(events) == {None, "accepted", "shortened", "left Predict"}
    corrected = [phase for phase, *_ in of_reference(MANY_JUMPS)[0]].count("correct") // MANY_JUMPS.correct_steps
    assert corrected > 8  # so that the nearest in confidence are chosen from more


def test_a_truncated_control_is_the_same() -> None:
    control = MANY_JUMPS.truncated(120)
    assert control.lr_warmup_steps < MANY_JUMPS.lr_warmup_steps
    fitted = schedule_of(MANY_JUMPS).fitted_to(120)
    same_bits(of_library(control, fitted), of_reference(control))


def test_the_script_says_how_the_three_runs_ended(capsys: pytest.CaptureFixture[str]) -> None:
    text, short = reference.markov_text(200_000), reference.Settings(steps=100)
    taken = reference.run("with jumps", text, short)
    reference.run("truncated control", text, short.truncated(taken))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" gradient")[0].split() for line in lines] == [
        ["with", "jumps", str(taken)],
        ["truncated", "control", str(taken)],
    ]
    assert 50 < taken < 100


def test_the_file_is_short_and_needs_nothing_of_the_library() -> None:
    source = Path(reference.__file__).read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 300
    imported = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in imported for alias in node.names} | {
        node.module for node in imported if isinstance(node, ast.ImportFrom) and node.module
    }
    assert not [name for name in names if "hybridlab" in name]
