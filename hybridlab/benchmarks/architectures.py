"""The plan beside what a GPU counts, for models of Hugging Face transformers.

python -m hybridlab.benchmarks.architectures FOLDER_OR_FILE... [--batch 8x512] [--device cuda] [--out planned.json]
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from hybridlab.base.device import find_device
from hybridlab.memory import MemoryConfig, MixedPrecisionConfig
from hybridlab.memory.precision import autocast
from hybridlab.optim import OptimizerConfig, build_optimizer
from hybridlab.planner import plan
from hybridlab.planner.architectures import CausalLM, causal_lm, language_model_loss
from hybridlab.planner.spec import BatchShape
from hybridlab.planner.text_report import read_batch
from hybridlab.vram.meter import MemoryMeter

STEPS = 4
PRECISIONS = {"fp32": MemoryConfig(), "bf16": MemoryConfig(mixed_precision=MixedPrecisionConfig.conservative())}


def planned_and_measured(model: CausalLM, batch: BatchShape, precision: str, device: torch.device) -> dict[str, Any]:
    """One row: peaks that were planned, those that a few AdamW steps took, and planned over measured, less one.

    What a machine without a GPU cannot measure is None.
    """
    expected, peak = plan(model, batch, PRECISIONS[precision]), measure(model, batch, precision, device)
    row: dict[str, Any] = {"model": model.name, "precision": precision, "batch": list(batch)}
    pairs = {
        "allocated": (expected.peak_allocated_bytes, peak.get("peak_allocated_bytes")),
        "on_gpu": (expected.peak_on_gpu_bytes, peak["peak_memory_bytes"] if device.type == "cuda" else None),
    }
    for name, (planned, found) in pairs.items():
        row |= {f"planned_{name}_bytes": planned, f"measured_{name}_bytes": found}
        row[f"{name}_error"] = planned / found - 1 if found else None
    return row


def measure(model: CausalLM, batch: BatchShape, precision: str, device: torch.device) -> dict[str, Any]:
    """Peaks of a few steps, in a process that should have nothing else on the GPU."""
    meter = MemoryMeter(device)
    meter.reset_peak()
    with device:
        module = model()
        optimizer = build_optimizer(module, OptimizerConfig())
        for _ in range(STEPS):
            with autocast(precision, device):
                loss = language_model_loss(module, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return meter.peak()


def main(
    configs: list[Path],
    batch: str = "8x512",
    device: str = "auto",
    out: Annotated[Path | None, typer.Option(help="Where the rows go, as JSON.")] = None,
) -> None:
    """Plan and train each model for a few steps, in fp32 and in bf16 autocast."""
    rows = []
    for config in configs:
        for precision in PRECISIONS:
            rows.append(planned_and_measured(causal_lm(config), read_batch(batch), precision, find_device(device)))
            print(json.dumps(rows[-1]), flush=True)
    if out:
        out.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
