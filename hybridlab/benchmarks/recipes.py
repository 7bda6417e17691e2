"""What each GPT-2 size should be trained with on one GPU, and the largest model that it trains: by plan, as JSON.

python -m hybridlab.benchmarks.recipes [--gpu rtx5080] [--out executed/rtx5080/recipes.json]
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from hybridlab.base.settings import check_choice
from hybridlab.benchmarks import one_line
from hybridlab.engine.config import HybridTrainerConfig
from hybridlab.memory.config import CheckpointingConfig, MemoryConfig, MixedPrecisionConfig
from hybridlab.models import GPT2Config
from hybridlab.optim import OptimizerConfig
from hybridlab.planner.gpu_specs import GPUS, GpuSpec, step_time_ms
from hybridlab.planner.plan import Plan, plan_training
from hybridlab.planner.spec import BatchShape, TrainingSpec
from hybridlab.planner.suggest import best_fit, largest_batch, largest_that_fits, options
from hybridlab.planner.text_report import code_of

SIZES = ("small", "medium", "large", "xl")
BATCH: BatchShape = (8, 512)
SPARED_BYTES = 2_000_000_000
"""Of the GPU that a recipe leaves: for a desktop, for fragmentation, and for what a plan is off by."""

GRAIN = 256
"""Tokens by which the longest sequence is searched."""

HEAD = 64
"""Width of an attention head, as GPT-2 has it."""

DEPTH = 48
"""Blocks of the largest model, as many as XL has: its width is searched."""

SEVEN_BILLION = GPT2Config(n_layer=32, n_head=32, n_embd=4096)

RECIPE_BASE = MemoryConfig(mixed_precision=MixedPrecisionConfig.conservative())
with_inputs_on_host = partial(MemoryConfig.fit_16gb, checkpointing=CheckpointingConfig(inputs="host"))
ON_HOST = with_inputs_on_host(
    weights="bf16",
    state_on_host=True,
    optimizer_state="fp32",
    pad_vocab_to=0,
    step_in_backward=False,
    clip_in_backward=None,
)
WAYS = {
    "fp32 masters and 8-bit state on the GPU": with_inputs_on_host(weights="fp32", optimizer_state="int8"),
    "24-bit weights and 8-bit state on the GPU": with_inputs_on_host(weights="24bit", optimizer_state="int8"),
    "24-bit weights and 4-bit state on the GPU": with_inputs_on_host(weights="24bit", optimizer_state="int4"),
    "bf16 weights and 8-bit state on the GPU": with_inputs_on_host(weights="bf16", optimizer_state="int8"),
    "fp32 weights on the GPU, fp32 state on the host": replace(ON_HOST, weights="fp32"),
    "bf16 weights on the GPU, fp32 masters and state on the host": ON_HOST,
}
"""How a model can be trained that is too large for the settings of its smaller relatives."""


def recipe(size: str, gpu: GpuSpec, gpu_bytes: int) -> dict[str, Any]:
    """The fastest settings that fit, by estimated time; the largest batch and sequence with them.

    All compute in bf16 autocast, compiled where that fits: it was faster wherever it was measured, and the estimate,
    which takes nothing to be fused, does not tell.

    gpu_bytes: that the training may take of the GPU
    """
    model = GPT2Config.named(size)
    plain = TrainingSpec(model, BATCH, RECIPE_BASE, OptimizerConfig.tuned())
    asked = [replace(plain, compiled=True, cuda_graphs=True), plain]
    fits = (best_fit(options(spec, gpu, gpu_bytes), gpu_bytes) for spec in asked)
    best = next(option for option in fits if option)
    spec = best.spec
    return {
        "model": size,
        "parameters": model.parameter_count,
        "compiled": spec.compiled,
        "cuda_graphs": spec.replays_graphs,
        "optimizer": code_of(spec.optimizer),
        "memory": code_of(spec.memory),
        "features": list(best.features),
        "exact": best.exact,
        **_figures(best.plan, spec, gpu),
        "largest_batch": largest_batch(spec, gpu_bytes),
        "longest_sequence": _longest_sequence(spec, model, gpu_bytes),
        "host_bytes_with_jumps": _with_jumps(spec).host_memory_bytes,
    }


def largest_model(way: str, gpu: GpuSpec) -> dict[str, Any]:
    """The widest GPT-2 of `DEPTH` blocks that trains this way."""
    heads = largest_that_fits(lambda n: plan_training(_spec(_wide(n), way)), gpu.memory_bytes)
    return planned(_wide(heads), way, gpu)


def planned(model: GPT2Config, way: str, gpu: GpuSpec) -> dict[str, Any]:
    """A model that is trained this way: what it takes of GPU and host, in all and per parameter."""
    spec = _spec(model, way)
    figures = _figures(plan_training(spec), spec, gpu)
    per = {
        f"{name}_per_parameter": figures[name] / model.parameter_count for name in ("peak_on_gpu_bytes", "host_bytes")
    }
    shape = {"n_layer": model.n_layer, "n_head": model.n_head, "n_embd": model.n_embd}
    return {
        "way": way,
        "inexact": _inexact(spec.memory),
        "parameters": model.parameter_count,
        **shape,
        "memory": code_of(spec.memory),
        **figures,
        **per,
    }


def _inexact(memory: MemoryConfig) -> str:
    """What in these settings changes the result by more than rounding in bf16 autocast."""
    is_bf16, has_masters = memory.weights == "bf16", memory.state_on_host
    found = {
        f"{memory.optimizer_state} state": memory.optimizer_state != "fp32",
        "clipping by an estimated norm": memory.clip_in_backward is not None,
        "weights rounded from masters on the host": is_bf16 and has_masters,
        "weights rounded stochastically, without masters": is_bf16 and not has_masters,
        "weights of 24 bits": memory.weights == "24bit",
    }
    return ", ".join(what for what, holds in found.items() if holds) or "none"


def _figures(plan: Plan, spec: TrainingSpec, gpu: GpuSpec) -> dict[str, Any]:
    step_ms = step_time_ms(plan, gpu)
    return {
        "batch": list(spec.batch),
        "peak_allocated_bytes": plan.peak_allocated_bytes,
        "peak_on_gpu_bytes": plan.peak_on_gpu_bytes,
        "fits": plan.fits(gpu.memory_bytes),
        "host_bytes": plan.host_memory_bytes,
        "step_ms": step_ms,
        "tokens_per_second": 1e3 * spec.batch[0] * spec.batch[1] / step_ms,
    }


def _longest_sequence(spec: TrainingSpec, model: GPT2Config, gpu_bytes: int) -> int:
    """Tokens of one window, with as many positions in the model."""
    memory = replace(spec.memory, gradient_accumulation=None)

    def plan_of(count: int) -> Plan:
        longer = replace(model, block_size=GRAIN * count)
        return plan_training(replace(spec, model=longer, batch=(1, GRAIN * count), memory=memory))

    return GRAIN * largest_that_fits(plan_of, gpu_bytes)


def _with_jumps(spec: TrainingSpec) -> Plan:
    """The same with the path of the presets' predictor and its snapshot on the host."""
    hybrid = HybridTrainerConfig.conservative(path_device="host", memory=spec.memory)
    return plan_training(replace(spec, path=hybrid.path_needs, path_storage=hybrid.path_storage))


def _spec(model: GPT2Config, way: str) -> TrainingSpec:
    return TrainingSpec(model, BATCH, WAYS[way], OptimizerConfig.tuned())


def _wide(heads: int) -> GPT2Config:
    return GPT2Config(n_layer=DEPTH, n_head=heads, n_embd=HEAD * heads)


def tables(gpu: GpuSpec, sizes: tuple[str, ...] = SIZES) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name of a table, and a row of it, one after the other."""
    for size in sizes:
        yield "recipes", recipe(size, gpu, gpu.memory_bytes - SPARED_BYTES)
    for way in WAYS:
        yield "largest", largest_model(way, gpu)
    for way in WAYS:
        yield "seven_billion", planned(SEVEN_BILLION, way, gpu)


def main(
    gpu: str = "rtx5080", out: Annotated[Path | None, typer.Option(help="Where it goes, as JSON.")] = None
) -> None:
    """Plan every size, the largest model and one of seven billion parameters; minutes, without a GPU."""
    with one_line("recipes", out) as write:
        check_choice("GPU", gpu, GPUS)
        found: dict[str, Any] = {"gpu": asdict(GPUS[gpu]), "spared_bytes": SPARED_BYTES}
        for table, row in tables(GPUS[gpu]):
            found.setdefault(table, []).append(row)
            print(table, json.dumps(row), flush=True)
        write(found)


if __name__ == "__main__":
    typer.run(main)
