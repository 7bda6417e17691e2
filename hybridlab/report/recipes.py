"""The guide's recipes and largest models: what was planned, beside what was measured."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hybridlab.charts.tables import known_columns
from hybridlab.report.validation import loss_change
from hybridlab.results.words import amount

Row = Mapping[str, Any]


def planned_recipes(planned: Mapping[str, Any], measured: Mapping[str, Row | None]) -> dict[str, Any]:
    """What the guide's template shows of `hybridlab.benchmarks.recipes` and `hybridlab.benchmarks.largest`.

    planned: as `Evidence` has it; measured: model -> the recommended row of the tables "memory", if there is one
    """
    recipes = planned.get("recipes", ())
    trained = {row["way"]: row for row in planned.get("trained", ())}
    return {
        "answers": known_columns([_answer(row, measured.get(row["model"])) for row in recipes]),
        "recipes": known_columns([_recipe(row, measured.get(row["model"])) for row in recipes]),
        "recipe_codes": [_code(row, measured.get(row["model"])) for row in recipes],
        "largest": known_columns([_way(row, trained.get(row["way"])) for row in planned.get("largest", ())]),
        "trained": max((row.get("steps", 0) for row in trained.values()), default=0),
        "seven_billion": known_columns([_way(row, None) for row in planned.get("seven_billion", ())]),
        "planned_gpu": planned.get("gpu", {}).get("name"),
        "spared": amount(planned.get("spared_bytes", 0), "bytes"),
    }


def _code(row: Row, measured: Row | None) -> dict[str, Any]:
    """What the template needs of a recipe, with the learning rate of the arm that was measured."""
    optimizer, names = row["optimizer"], sorted(set(re.findall(r"[A-Z]\w+Config", row["memory"])))
    if measured and measured["lr"] and "lr=" not in optimizer:
        optimizer = optimizer.replace("OptimizerConfig(", f"OptimizerConfig(lr={measured['lr']}, ")
    return {**row, "optimizer": optimizer, "names": names}


def _answer(row: Row, measured: Row | None) -> dict[str, Any]:
    return {
        "model": row["model"],
        "switch on": ", ".join(["bf16 autocast", *row.get("features", ()), *(["compiled"] if row["compiled"] else [])]),
        "the result": "the same but for rounding" if row["exact"] else "changes: watch the loss",
        "peak on the GPU, planned": amount(row["peak_on_gpu_bytes"], "bytes"),
        "fastest arm measured": measured and measured["called"],
        "its loss against the control (nats)": measured and loss_change(measured),
    }


def _recipe(row: Row, measured: Row | None) -> dict[str, Any]:
    return {
        "model": row["model"],
        "parameters": f"{row['parameters'] / 1e6:,.0f} M",
        "batch": f"{row['batch'][0]} x {row['batch'][1]}",
        "est. step": f"{row['step_ms']:.0f} ms",
        "est. tokens per second": f"{row['tokens_per_second']:,.0f}",
        "measured elsewhere": _measured(row, measured),
        "peak on the GPU": amount(row["peak_on_gpu_bytes"], "bytes"),
        "largest batch": f"{row['largest_batch']} x {row['batch'][1]}",
        "longest sequence": f"{row['longest_sequence']:,}",
        "host memory": amount(row["host_bytes"], "bytes"),
        "with jumps": amount(row["host_bytes_with_jumps"], "bytes"),
        "1 token per parameter": _time(row, 1),
        "20 tokens per parameter": _time(row, 20),
    }


def _measured(row: Row, measured: Row | None) -> str | None:
    """Tokens per second of the recommended arm on the GPU that ran."""
    if not measured:
        return None
    tokens = row["batch"][0] * row["batch"][1]
    return f"{1e3 * tokens / measured['step_ms']:,.0f} ({measured['called']})"


def _time(row: Row, tokens_per_parameter: int) -> str:
    hours = tokens_per_parameter * row["parameters"] / row["tokens_per_second"] / 3600
    return f"{hours / 24:,.1f} days" if hours > 48 else f"{hours:,.1f} hours"


def _way(row: Row, trained: Row | None) -> dict[str, Any]:
    return {
        "trained with": row["way"],
        "model": f"{row['parameters'] / 1e9:.2f} B ({row['n_layer']} blocks of {row['n_embd']})",
        "fits": "yes" if row["fits"] else "no",
        "peak on the GPU": amount(row["peak_on_gpu_bytes"], "bytes"),
        "measured": trained and (trained["stopped"] or amount(trained["peak_memory_bytes"], "bytes")),
        "loss": trained and amount(trained.get("validation_loss"), "nats"),
        "allocated in training": amount(row["peak_allocated_bytes"], "bytes"),
        "of it per parameter": f"{row['peak_allocated_bytes'] / row['parameters']:.1f} bytes",
        "host memory": amount(row["host_bytes"], "bytes"),
        "est. step": f"{row['step_ms'] / 1e3:.1f} s",
        "step measured elsewhere": trained and trained.get("step_ms") and f"{trained['step_ms'] / 1e3:.2f} s",
        "1 token per parameter": _time(row, 1),
        "loss of exactness": row["inexact"],
    }
