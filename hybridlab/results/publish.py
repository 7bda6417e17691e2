"""Writes what a notebook found into results.json, beside what it depends on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from hybridlab.base.files import RESULTS_LOCK, make_folders, project_root, replaced
from hybridlab.base.settings import LARGEST
from hybridlab.results.claims import Claim, rounded
from hybridlab.results.environment import environment
from hybridlab.results.parameters import parameters_sha256
from hybridlab.results.reading import load_results
from hybridlab.results.repeats import repeats_of

Tables = Mapping[str, Sequence[Mapping[str, Any]]]
"""name -> rows: what documents draw and tabulate beside the claims, such as "memory" and "vram"."""


def publish(
    notebook: str,
    *,
    claims: Sequence[Claim],
    summary: list[str],
    record: dict[str, Any],
    folder: str,
    tables: Tables | None = None,
) -> Path:
    """Merge a notebook's entry into `<project root>/<folder>/results.json`, atomically.

    Figures of an entry that it replaces, measured with the same parameters elsewhere, stay in it (`repeats_of`).

    notebook: the notebook's slug, as "03_gpt2_small_hybrid"
    claims: what was tested; ids are unique
    summary: the closing sentences, shown when a batch run ends
    record: further facts (data, device, times); it must hold `parameters`, and its keys win over the environment's
    folder: where the file lies, relative to the project root
    tables: what documents draw: "memory" as `Footprint.row` makes its rows, and "vram" as `vram_rows` does

    Numbers keep six significant digits. NaN and infinities become null and are listed under `not_finite`.

    Raises ValueError where two claims share an id or the parameters are missing, and UserError where the file that is
    there cannot be read or the new one not written.
    """
    path = project_root() / folder / "results.json"
    entry = _entry(claims, summary, record | ({"tables": dict(tables)} if tables else {}))
    make_folders(lock := project_root() / RESULTS_LOCK)
    with FileLock(lock):
        everything = load_results(path)
        if repeats := repeats_of(everything.get(notebook), entry):
            entry["repeats"] = repeats
        with replaced(path) as beside:
            text = json.dumps(everything | {notebook: entry}, indent=1, sort_keys=True, allow_nan=False)
            beside.write_text(f"{text}\n", encoding="utf-8")
    return path


def _entry(claims: Sequence[Claim], summary: list[str], record: dict[str, Any]) -> dict[str, Any]:
    if "parameters" not in record:
        raise ValueError("record has no 'parameters': add parameters_from(globals()) of the parameters cell")
    ids = [claim.id for claim in claims]
    if repeated := sorted({it for it in ids if ids.count(it) > 1}):
        raise ValueError(f"several claims have the id {', '.join(repeated)}: give each its own")
    whole = environment() | record | {"claims": [claim.record() for claim in claims], "summary": list(summary)}
    whole["parameters_sha256"] = parameters_sha256(record["parameters"])
    not_finite: list[str] = []
    entry = plain(whole, not_finite=not_finite)
    return entry | {"parameters": record["parameters"]} | ({"not_finite": not_finite} if not_finite else {})


def plain(value: Any, where: str = "", *, not_finite: list[str]) -> Any:
    """Turn a value into JSON's types, floats at six significant digits.

    A NaN, an infinity or what is larger than any number here can be becomes None, and its place is added to
    `not_finite`.

    Raises TypeError where something inside is neither a number, text, list nor mapping.
    """
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, Mapping):
        return {str(k): plain(v, f"{where}.{k}".lstrip("."), not_finite=not_finite) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v, f"{where}[{i}]", not_finite=not_finite) for i, v in enumerate(value)]
    if isinstance(value, float) and not abs(value) <= LARGEST:
        not_finite.append(f"{where} was {value}")
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return rounded(value)
    raise TypeError(f"{where} is a {type(value).__name__}: results hold numbers, texts, lists and mappings")
