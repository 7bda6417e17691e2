"""What a notebook shows of the library's loop beside those of others, as `benchmarks.against_others` timed them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from hybridlab.base.errors import UserError
from hybridlab.base.files import project_root
from hybridlab.charts.tables import Table, table
from hybridlab.notebook.views.ladder import FORMATS
from hybridlab.results.claims import Claim, Quantity, holds_below

BESIDE = {
    "library_over_nanogpt_step": ("step-beside-nanogpt", "a step takes at most {} of that of nanoGPT's loop", 0.75),
    "muon_over_adamw_step": ("muon-beside-adamw", "a step with Muon takes at most {} of one with AdamW", 1.25),
}
"""Figure of the benchmark -> kind and text of its claim, and the bound."""


def side_by_side(file: str) -> dict[str, Any]:
    """What `python -m hybridlab.benchmarks.against_others --out FILE` wrote, a path below the project's root.

    Empty where no file is named, and, told in one line, where it is not there. Raises UserError for another file.
    """
    if not file:
        return {}
    path = project_root() / file
    if not path.exists():
        print(f"{file} is not there: python -m hybridlab.benchmarks.against_others --out {file} writes it")
        return {}
    try:
        measured = json.loads(path.read_text(encoding="utf-8"))
        return {part: measured[part] for part in ("loops", "figures")}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file} is no file of the benchmark: write it again, or set others to ''") from None


def side_by_side_table(measured: Mapping[str, Any]) -> Table:
    """A step of each loop of the benchmark, or that none was measured."""
    if not measured:
        return table([{"loop": "none was measured beside this run"}])
    rows = [
        {
            "loop": row["loop"],
            "step (ms)": row["step_ms"],
            "tokens per second": row["tokens_per_second"],
            "GPU busy": row["gpu_busy_share"],
            "launches per step": row["launches_per_step"],
            "peak memory (GB)": None if row["peak_memory_bytes"] is None else row["peak_memory_bytes"] / 1e9,
        }
        for row in measured["loops"]
    ]
    columns = {name: spec for name, spec in FORMATS.items() if name in rows[0]} | {"peak memory (GB)": ".2f"}
    return table(rows, "Loops in turns on one device, medians over rounds", columns)


def side_by_side_claims(measured: Mapping[str, Any]) -> list[Claim]:
    """That the library's step is not behind, by the ratios that the benchmark found."""
    claims = []
    for name, (kind, text, bound) in BESIDE.items():
        if figure := measured.get("figures", {}).get(name):
            value, low, high = (figure[end] for end in ("value", "low", "high"))
            rounds = tuple(figure.get("per_round", ()))
            quantity = Quantity(name, value, low, high, "time ratio", rounds, bound)
            claims.append(Claim(kind, text.format(bound), holds_below(low, high, bound), (quantity,)))
    return claims
