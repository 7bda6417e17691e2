"""The page on several GPUs: its settings are read, its script parses, and its arithmetic is what the code counts."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from hybridlab.batch.train_file import read_settings
from hybridlab.models import GPT2, GPT2Config
from hybridlab.planner.gpu_specs import GPUS
from hybridlab.study.ranks import RanksConfig

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


EXPERIMENTS = Path(__file__).parents[1] / "docs" / "experiments"
MEASURED = {
    "xl_groups": "`fsdp`, 4 blocks per group, kept gathered",
    "xl_groups_first": "the same, another host",
    "xl_ddp": "`ddp`, CUDA graphs, another host",
    "small_ddp": "`ddp`, CUDA graphs",
    "small_ddp_four": "`ddp`, CUDA graphs, whole held-out batches, a second host",
    "small_ddp_first": "the same, a third host",
    "7b": "`fsdp`, 2 blocks per group, checkpointing",
    "7b_first": "the same, another host",
    "small": "`fsdp`, earlier code",
    "xl": "`fsdp`, earlier code",
}
"""File of the benchmark -> how the page names its settings."""


def measured(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((EXPERIMENTS / f"ranks_{name}.json").read_text(encoding="utf-8"))
    return found


def beside_plan(row: dict[str, Any], kind: str) -> str:
    if f"peak{kind}_bytes" not in row:
        return "–"
    return f"{max(row[f'peak{kind}_bytes']) / 1e9:.1f} ({row[f'planned{kind}_bytes'] / 1e9:.1f})"


@pytest.mark.parametrize("name", MEASURED)
def test_what_was_measured_stands_on_the_page(name: str) -> None:
    found = measured(name)
    for row in found["rows"]:
        recording = "–"
        if cost := row.get("recording_overhead"):
            middle, low, high = (f"{100 * cost[end]:+.1f}" for end in ("median", "low", "high"))
            recording = f"{middle} [{low}, {high}]"
        cells = [
            Path(found["question"]["model"]).stem,
            MEASURED[name],
            row["ranks"],
            f"{row['step_ms']:.0f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['scaling_efficiency']:.2f}",
            recording,
            beside_plan(row, ""),
            beside_plan(row, "_with_path"),
        ]
        assert f"\n| {' | '.join(map(str, cells))} |\n" in PAGE


def test_what_the_page_says_of_two_and_four_gpus() -> None:
    (_, two, four), (_, last) = measured("xl_groups")["rows"], measured("7b")["rows"]
    (fastest, averaged), (_, sharded) = measured("xl_ddp")["rows"], measured("xl_groups_first")["rows"]
    (small, half), earlier_small = measured("small_ddp")["rows"], measured("small_ddp_four")["rows"]
    words = " ".join(PAGE.split())
    kept = [f"{row['scaling_efficiency']:.2f}" for row in (two, four, last, measured("7b_first")["rows"][1])]
    assert f"comes to {kept[0]} with two, and {kept[1]} with four; on another host to" in words
    assert f"A 7B model comes to {kept[2]} with four, over two, and on another host to {kept[3]} with two" in words
    assert f"on another host to {sharded['scaling_efficiency']:.2f} with two" in words
    each = sharded["tokens_per_second"] / 2 / fastest["tokens_per_second"]
    assert f"each of two did {each:.2f} times the tokens per second of the fastest settings on one GPU" in words
    earlier = [f"{row['scaling_efficiency']:.2f}" for row in measured("xl")["rows"]]
    assert f"missed both aims**, at {earlier[1]} and {earlier[2]} for XL" in words
    assert f"at {averaged['scaling_efficiency']:.2f} for XL" in words
    assert f"That is {averaged['step_ms'] - fastest['step_ms']:.1f} ms of XL's step" in words
    _, second, quarter = (f"{row['scaling_efficiency']:.2f}" for row in earlier_small)
    assert (
        f"at {half['scaling_efficiency']:.2f} with two, and on a second host at {second} with two and {quarter} with"
        in words
    )
    assert f"on one GPU a step is {small['step_ms']:.1f} ms" in words
    rows = (half, small, *(earlier_small[i] for i in (1, 2, 0)))
    costs = [f"{100 * row['recording_overhead']['median']:+.1f}" for row in rows]
    assert f"is {costs[0]} % with two GPUs, and {costs[1]} % with one; the aim is 2 %" in words
    assert f"is {costs[2]}, {costs[3]} and {costs[4]} % with two, four and one" in words
    assert [row["recording_overhead"]["high"] < 0.02 for row in rows] == [False, False, True, True, False]


def least_busy(file: str, *runs: str) -> pd.Series:
    seconds = pd.read_csv(EXPERIMENTS / file)
    gpus = seconds.filter(like="gpu")
    seconds["least"] = [min(busy[:ranks]) for busy, ranks in zip(gpus.values, seconds["ranks"], strict=True)]
    return seconds.groupby([*runs, "ranks"])["least"].median()


def test_how_busy_the_gpus_were_stands_on_the_page() -> None:
    one, two, four = (f"{busy:.0f}" for busy in least_busy("ranks_xl_busy.csv"))
    words = " ".join(PAGE.split())
    assert f"was busy {one} % of a second by NVML" in words
    assert f"the least busy one was at {two} and {four} %" in words
    groups = [f"{busy:.0f}" for busy in least_busy("ranks_busy.csv", "run")["xl_groups"]]
    assert f"of one, two and four is at {groups[0]}, {groups[1]} and {groups[2]} %" in words


def peaks_over_plans(rows: Sequence[dict[str, Any]], kind: str) -> list[float]:
    measured_rows = [row for row in rows if f"peak{kind}_bytes" in row]
    return [max(row[f"peak{kind}_bytes"]) / row[f"planned{kind}_bytes"] for row in measured_rows]


def test_how_far_the_plans_were_off_stands_on_the_page() -> None:
    sharded, words = (
        [row for name in MEASURED if "ddp" not in name for row in measured(name)["rows"]],
        " ".join(PAGE.split()),
    )
    for kind, said in (("", "from the peak without a path"), ("_with_path", "with one")):
        off = [round(100 * (1 / ratio - 1)) for ratio in peaks_over_plans(sharded, kind)]
        assert f"between {min(off)} and {max(off)} % {said}" in words
    low = [ratio for kind in ("", "_with_path") for ratio in peaks_over_plans(measured("small_ddp")["rows"], kind)]
    assert min(low) > 1
    assert (
        f"at most {100 * (max(low) - 1):.0f} % too low for Small by `ddp` in graphs, with a path and without" in words
    )
    most = max(peaks_over_plans(measured("small_ddp_four")["rows"], ""))
    assert f"the peak lay up to {100 * (most - 1):.0f} % above the plan then" in words
