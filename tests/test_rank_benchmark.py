"""The benchmark of several ranks, at toy size."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from hybridlab.base.errors import UserError
from hybridlab.benchmarks.ranks import Question, _started, main, measured, summary
from hybridlab.models import GPT2Config

TOY = Question("nano", 2, 16, "fp32", False, "fsdp", "fp32", device="cpu", rounds=1, turns=1, steps=1)


@pytest.mark.slow
def test_one_rank_is_measured() -> None:
    with TOY.ranks.started(TOY.config(1)):
        row = measured(TOY)
    assert row["ranks"] == 1
    assert row["tokens_per_second"] == pytest.approx(2 * 16 * 1000 / row["step_ms"])
    assert row["parameters"] == GPT2Config.nano().parameter_count - (64 - 16) * 64  # 16 positions
    assert len(row["peak_bytes"]) == len(row["peak_with_path_bytes"]) == 1
    assert row["recording_overhead"]["low"] is None


LLAMA = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 2, "vocab_size": 128}


@pytest.mark.slow
def test_a_hugging_face_config_is_measured_with_checkpointing_and_without_a_path() -> None:
    pytest.importorskip("transformers")
    question = replace(TOY, model=json.dumps(LLAMA), checkpointing=True, path=False)
    with question.ranks.started(question.config(1)):
        row = measured(question)
    model = question.config(1).task.build(0, torch.device("meta")).model
    assert row["parameters"] == sum(p.numel() for p in model.parameters())
    assert not {"recording_overhead", "peak_with_path_bytes"} & row.keys()


def test_without_transformers_one_line_says_what_to_install() -> None:
    with patch.dict(sys.modules, {"transformers": None}), pytest.raises(SystemExit, match="pip install 'hybridlab"):
        main(model=json.dumps(LLAMA), counts="1", device="cpu")


def test_efficiency_is_per_rank_over_that_of_the_fewest() -> None:
    rows = [{"ranks": ranks, "tokens_per_second": rate} for ranks, rate in ((2, 190.0), (1, 100.0), (4, 340.0))]
    assert [row["scaling_efficiency"] for row in summary(TOY, rows)["rows"]] == [0.95, 1.0, 0.85]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"counts": "1,x"}, "--counts is '1,x': write whole numbers"),
        ({"counts": "0"}, "--counts is 0: give a whole number, 1 or more"),
        ({"counts": "2,-1"}, "--counts is -1"),
        ({"model": "nope"}, "'nope' is unknown"),
        ({"windows": -1}, "batch_size"),
        pytest.param(
            {"device": "cuda"}, "CUDA", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
        ),
        ({"precision": "fp32", "gather": "bf16"}, "gather='bf16' computes in bfloat16, and precision is 'fp32'"),
    ],
)
def test_what_cannot_be_measured_is_one_line_before_anything_starts(options: dict[str, Any], said: str) -> None:
    with pytest.raises(SystemExit, match=f"^ranks: .*{said}"):
        main(**{"model": "nano", "counts": "1"} | options)


ROW = {"ranks": 2, "tokens_per_second": 1.0, "step_ms": 1.0, "peak_bytes": [1]}


@pytest.mark.parametrize("is_measured", [True, False])
def test_a_rank_that_fails_after_all_was_measured_loses_no_row(is_measured: bool) -> None:
    def fails(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        if is_measured:
            Path(command[-1]).write_text(json.dumps(ROW))
        return subprocess.CompletedProcess(command, 1)

    refused = nullcontext() if is_measured else pytest.raises(UserError, match="2 ranks ended with exit code 1")
    with patch.object(subprocess, "run", fails), refused:
        assert _started(2) == ROW
