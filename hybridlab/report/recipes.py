"""The guide's recipes: what each size is trained with on one GPU, as `hybridlab.benchmarks.recipes` planned it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybridlab.report.evidence import Evidence
from hybridlab.report.recommendation import recommended
from hybridlab.report.words import Markdown, known_columns
from hybridlab.results.words import amount

Row = Mapping[str, Any]
HOURS = 3600


def recipe_rows(evidence: Evidence) -> list[dict[str, Any]]:
    """One row per size: estimated speed beside the measured one, memory, and how long it trains."""
    measured = {row["model"]: row for rows in evidence.tables("memory").values() if (row := recommended(rows))}
    return known_columns([_recipe(row, measured.get(row["model"])) for row in evidence.planned.get("recipes", ())])


def code_of_recipes(evidence: Evidence) -> list[dict[str, Any]]:
    """For each size its name, its settings as Python, and whether they are exact."""
    return [
        {"model": row["model"], "code": Markdown(_code(row)), "exact": row["exact"]}
        for row in evidence.planned.get("recipes", ())
    ]


def way_rows(evidence: Evidence, table: str) -> list[dict[str, Any]]:
    """One row per way to train a large model: "largest" or "seven_billion"."""
    return [_way(row) for row in evidence.planned.get(table, ())]


def plan_errors(evidence: Evidence) -> dict[str, Any] | None:
    """How far plans of allocated memory were from what was measured, in percent, and over how many arms."""
    rows = [row for rows in evidence.tables("memory").values() for row in rows if row.get("predicted_allocated_bytes")]
    errors = [100 * (row["predicted_allocated_bytes"] / row["measured_allocated_bytes"] - 1) for row in rows]
    return {"low": f"{min(errors):+.1f}", "high": f"{max(errors):+.1f}", "count": len(errors)} if errors else None


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
    return f"{1e3 * tokens / measured['step_ms']:,.0f} ({measured['arm']})"


def _time(row: Row, tokens_per_parameter: int) -> str:
    hours = tokens_per_parameter * row["parameters"] / row["tokens_per_second"] / HOURS
    return f"{hours / 24:,.1f} days" if hours > 48 else f"{hours:,.1f} hours"


def _code(row: Row) -> str:
    compiled = ", compiled=True" if row["compiled"] else ""
    return "\n".join(
        [
            f"memory = {row['memory']}",
            f"optimizer = {row['optimizer']}",
            f'config = RunConfig("{row["model"]}", task, steps, optimizer=optimizer, '
            f"hybrid=HybridTrainerConfig.plain(memory=memory){compiled})",
        ]
    )


def _way(row: Row) -> dict[str, Any]:
    return {
        "trained with": row["way"],
        "model": f"{row['parameters'] / 1e9:.2f} B ({row['n_layer']} blocks of {row['n_embd']})",
        "fits": "yes" if row["fits"] else "no",
        "peak on the GPU": amount(row["peak_on_gpu_bytes"], "bytes"),
        "allocated in training": amount(row["peak_allocated_bytes"], "bytes"),
        "of it per parameter": f"{row['peak_allocated_bytes'] / row['parameters']:.1f} bytes",
        "host memory": amount(row["host_bytes"], "bytes"),
        "host bytes per parameter": f"{row['host_bytes_per_parameter']:.1f}",
        "est. step": f"{row['step_ms'] / 1e3:.1f} s",
        "1 token per parameter": _time(row, 1),
        "loss of exactness": row["inexact"],
    }
