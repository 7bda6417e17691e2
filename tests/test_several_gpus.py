"""The page on several GPUs: its settings are read, its script parses, and its arithmetic is what the code counts."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from hybridlab.models import GPT2, GPT2Config
from hybridlab.planner.gpu_specs import GPUS
from hybridlab.study.ranks import RanksConfig
from hybridlab.train import read_settings

PAGE = (Path(__file__).parents[1] / "docs" / "several_gpus.md").read_text(encoding="utf-8")
RATE, NVLINK, BETWEEN = 0.4 * GPUS["h100"].bfloat16_flops, 450e9, 50e9
FLAT, BY_NODE = RanksConfig(gather="bf16"), RanksConfig(gather="bf16", copies=8)


def block(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
    return found


def test_the_settings_of_the_page_are_read(tmp_path: Path) -> None:
    file = tmp_path / "small.yaml"
    file.write_text(block("yaml"))
    settings = read_settings(file)
    assert settings.resume
    assert settings.run.task.batch_size % 64 == 0
    assert settings.ranks == RanksConfig(gather="bf16")


@pytest.mark.skipif(not shutil.which("bash"), reason="there is no bash")
def test_the_script_of_the_page_parses() -> None:
    subprocess.run(["bash", "-n"], input=block("bash"), text=True, check=True)


def test_the_least_tokens_of_the_page() -> None:
    in_node, flat, by_node = (
        FLAT.communication_bytes(1, 8)["within"] / NVLINK,
        FLAT.communication_bytes(1, 64)["within"] / BETWEEN,
        BY_NODE.communication_bytes(1, 64)["between"] / BETWEEN,
    )
    said = re.findall(r"\| ([\d,]+) tokens \|", PAGE)
    assert said == [f"{seconds * RATE / 6:,.0f}" for seconds in (in_node, flat, by_node)]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("GPT-2 Small", GPT2Config.small().parameter_count),
        ("GPT-2 XL", GPT2Config.xl().parameter_count),
        ("a 7B model", 6_738_415_616),  # Llama 2 7B
    ],
)
def test_the_steps_of_the_page(name: str, parameters: int) -> None:
    flat, by_node = FLAT.communication_bytes(parameters, 64)["within"], BY_NODE.communication_bytes(parameters, 64)
    sent = [f"{bytes_ / 1e9:.2f} GB, {1e3 * bytes_ / BETWEEN:,.0f} ms" for bytes_ in (flat, by_node["between"])]
    computed = f"{1e3 * 6 * parameters * 8192 / RATE:,.0f} ms"
    assert f"| {' | '.join([name, f'{parameters / 1e9:.3f} billion', computed, *sent])} |" in PAGE


def test_ddp_sends_each_gradient_twice_and_one_rank_nothing() -> None:
    assert RanksConfig(wrap="ddp").communication_bytes(100, 4) == {"within": 600.0, "between": 0.0}
    assert set(RanksConfig().communication_bytes(100, 1).values()) == {0.0}


class Sent(TorchDispatchMode):
    """The bytes that each of two ranks sends, call by call."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered: list[int] = []
        self.scattered: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name == "c10d::_allgather_base_":
            self.gathered.append(args[1].nbytes)
        if func._schema.name == "c10d::_reduce_scatter_base_":
            self.scattered.append(args[0].nbytes)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(
    ("ranks", "gathers"),
    [
        (RanksConfig(), 7 + 6),
        (RanksConfig(gather="bf16", blocks_per_group=4), 3 + 2),
        (RanksConfig(blocks_per_group=3, keep_gathered=True), 3),
    ],
)
def test_ranks_send_what_is_counted(ranks: RanksConfig, gathers: int) -> None:
    distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        net = GPT2(GPT2Config.micro())
        numbers = sum(p.numel() for p in net.parameters())
        outside = numbers - sum(p.numel() for p in net.h.parameters())
        net, tokens = ranks.wrapped(net), torch.zeros(1, 8, dtype=torch.long)  # type: ignore[assignment]
        with Sent() as sent:
            net(tokens, tokens).backward()
    finally:
        distributed.destroy_process_group()
    assert len(sent.gathered) == gathers
    assert len(sent.scattered) == 1 + -(-6 // ranks.blocks_per_group)
    stays = 0 if ranks.keep_gathered else (2 if ranks.gather == "bf16" else 4) * outside // 2
    assert sum(sent.gathered + sent.scattered) == ranks.communication_bytes(numbers, 2)["within"] - stays


@pytest.mark.parametrize("model", ["small", "xl"])
def test_what_was_measured_stands_on_the_page(model: str) -> None:
    file = Path(__file__).parents[1] / "docs" / "experiments" / f"ranks_{model}.json"
    for row in json.loads(file.read_text(encoding="utf-8"))["rows"]:
        speed = f"{row['step_ms']:.0f} | {row['tokens_per_second']:,.0f} | {row['scaling_efficiency']:.2f}"
        (line,) = (line for line in PAGE.splitlines() if f"| {row['ranks']} | {speed} |" in line)
        with_path = "peak_with_path_bytes" in row
        peaks = [
            f"{max(row[f'peak{kind}_bytes']) / 1e9:.1f} ({row[f'planned{kind}_bytes'] / 1e9:.1f})"
            for kind in ("", *(["_with_path"] if with_path else []))
        ]
        assert line.endswith(f"| {' | '.join(peaks)} |" if with_path else f"| {peaks[0]} | – |")
        if with_path:
            low, middle, high = (f"{100 * row['recording_overhead'][end]:+.0f}" for end in ("low", "median", "high"))
            assert f"| {middle} [{low}, {high}] |" in line


def test_how_busy_the_gpus_were_stands_on_the_page() -> None:
    seconds = pd.read_csv(Path(__file__).parents[1] / "docs" / "experiments" / "ranks_xl_busy.csv")
    seconds["least"] = [min(row[3 : 3 + row.ranks]) for row in seconds.itertuples()]
    one, two, four = (f"{busy:.0f}" for busy in seconds.groupby("ranks")["least"].median())
    words = " ".join(PAGE.split())
    assert f"was busy {one} % of a second by NVML" in words
    assert f"the least busy one was at {two} and {four} %" in words


def test_how_far_the_plans_were_off_stands_on_the_page() -> None:
    files = (Path(__file__).parents[1] / "docs" / "experiments" / f"ranks_{model}.json" for model in ("small", "xl"))
    rows = [row for file in files for row in json.loads(file.read_text(encoding="utf-8"))["rows"]]
    for kind, words in (("", "% above the peak without a path"), ("_with_path", r"%\s+with one")):
        ratios = [
            row[f"planned{kind}_bytes"] / max(row[f"peak{kind}_bytes"]) for row in rows if f"peak{kind}_bytes" in row
        ]
        off = [round(100 * (ratio - 1)) for ratio in ratios]
        assert re.search(rf"between {min(off)} and {max(off)} {words}", PAGE)
