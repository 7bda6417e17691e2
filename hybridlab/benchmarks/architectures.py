"""The plan beside what a GPU counts, for GPT-2 sizes and models of Hugging Face transformers.

python -m hybridlab.benchmarks.architectures SIZE_OR_CONFIG... [--batch 8x512] [--speed graphs] [--out planned.json]
"""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from hybridlab.base.device import find_device
from hybridlab.base.settings import check_choice
from hybridlab.benchmarks import one_line
from hybridlab.memory import MemoryConfig, MixedPrecisionConfig
from hybridlab.memory.precision import autocast
from hybridlab.models import GPT2, GPT2Config
from hybridlab.models.gpt2 import SIZES
from hybridlab.optim import OptimizerConfig, build_optimizer
from hybridlab.planner import plan
from hybridlab.planner.architectures import CausalLM, causal_lm, language_model_loss
from hybridlab.planner.spec import BatchShape, next_token_loss
from hybridlab.planner.text_report import read_batch
from hybridlab.speed import CudaGraphs, compile_
from hybridlab.vram.meter import MemoryMeter

STEPS = 4
PRECISIONS = {"fp32": MemoryConfig(), "bf16": MemoryConfig(mixed_precision=MixedPrecisionConfig.conservative())}


SPEEDS: dict[str, dict[str, Any]] = {
    "eager": {},
    "compiled": {"compiled": True},
    "graphs": {"compiled": True, "cuda_graphs": True},
}
"""How it runs -> the same to the planner."""


def planned_and_measured(
    model: CausalLM | str, batch: BatchShape, precision: str, device: torch.device, speed: str = "eager"
) -> dict[str, Any]:
    """One row: peaks that were planned, those that a few AdamW steps took, and planned over measured, less one.

    What a machine without a GPU cannot measure is None.
    """
    expected = plan(model, batch, PRECISIONS[precision], **SPEEDS[speed])
    peak, name = measure(model, batch, precision, device, speed), getattr(model, "name", model)
    row: dict[str, Any] = {"model": name, "precision": precision, "speed": speed, "batch": list(batch)}
    pairs = {
        "allocated": (expected.peak_allocated_bytes, peak.get("peak_allocated_bytes")),
        "on_gpu": (expected.peak_on_gpu_bytes, peak["peak_memory_bytes"] if device.type == "cuda" else None),
    }
    for name, (planned, found) in pairs.items():
        row |= {f"planned_{name}_bytes": planned, f"measured_{name}_bytes": found}
        row[f"{name}_error"] = planned / found - 1 if found else None
    return row


def measure(
    model: CausalLM | str, batch: BatchShape, precision: str, device: torch.device, speed: str = "eager"
) -> dict[str, Any]:
    """Peaks of a few steps after one that is not counted; the process should have nothing else on the GPU."""
    meter = MemoryMeter(device)
    meter.reset_peak()
    with device:
        module = GPT2(GPT2Config.named(model)) if isinstance(model, str) else model()
        optimizer, run = build_optimizer(module, OptimizerConfig()), module
        if speed != "eager":
            compile_(module, by_block=speed == "graphs", settings=precision)
            run = CudaGraphs(module) if speed == "graphs" else module
        compute = next_token_loss if isinstance(model, str) else language_model_loss
        for step in range(STEPS):
            if step == 1 and speed != "eager":
                meter.reset_peak()
            with autocast(precision, device):
                loss = compute(run, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step == 0 and speed == "graphs":  # an evaluation's graph shares the pool, in the plan too
                with torch.no_grad(), autocast(precision, device):
                    compute(run, batch)
    return meter.peak()


def main(
    models: Annotated[list[str], typer.Argument(help="GPT-2 sizes, and config.json files or their folders.")],
    batch: str = "8x512",
    device: str = "auto",
    out: Annotated[Path | None, typer.Option(help="Where the rows go, as JSON.")] = None,
    speed: Annotated[str, typer.Option(help=f"{', '.join(SPEEDS)}.")] = "eager",
) -> None:
    """Plan and train each model for a few steps, in fp32 and in bf16 autocast, each in a process of its own."""
    rows = []
    with one_line("architectures", out) as write:
        shape, on = read_batch(batch), find_device(device)
        check_choice("speed", speed, SPEEDS)
        for model in [name if name in SIZES else causal_lm(name) for name in models]:
            for precision in PRECISIONS:
                with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
                    rows.append(fresh.submit(planned_and_measured, model, shape, precision, on, speed).result())
                print(json.dumps(rows[-1]), flush=True)
                write(rows)


if __name__ == "__main__":
    typer.run(main)
