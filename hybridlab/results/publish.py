"""results.json: what notebooks found, their claims and what these depend on."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from hybridlab import __version__
from hybridlab.base.device import device_name, find_device
from hybridlab.base.files import marked_root, project_root, replaced
from hybridlab.base.settings import LARGEST
from hybridlab.results.claims import Claim, rounded
from hybridlab.results.parameters import parameters_sha256
from hybridlab.results.reading import load_results
from hybridlab.results.repeats import repeats_of
from hybridlab.study.code_version import code_hashes

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
    (project_root() / "runs").mkdir(exist_ok=True)
    with FileLock(project_root() / "runs" / ".results.lock"):
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
    if len(set(ids)) < len(ids):
        raise ValueError(f"claim ids repeat in {ids}: give each claim its own")
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
    if isinstance(value, float):
        return rounded(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    raise TypeError(f"{where} is a {type(value).__name__}: results hold numbers, texts, lists and mappings")


def environment() -> dict[str, Any]:
    """Record what a result depends on beside its parameters: device, versions, commit, the code's hashes.

    `environment_fingerprint` is one line; where it is equal, seeded CPU runs repeat to four decimals. `host` is a hash
    of the machine's name: times differ between hosts of one kind.
    """
    versions = {"python": platform.python_version(), "torch": str(torch.__version__), "hybridlab": __version__}
    capability = torch.backends.cpu.get_cpu_capability()
    fingerprint = f"python {versions['python']}, torch {versions['torch']}, {capability}, {platform.machine()}"
    return {
        "device": device_name(find_device()),
        "versions": versions,
        "host": hashlib.sha256(platform.node().encode()).hexdigest()[:8],
        "git_commit": git_commit(),
        "code": code_hashes(),
        "environment_fingerprint": fingerprint,
    }


def git_commit() -> str:
    """Give the short commit of the project, "+dirty" where its sources differ from it, or "unknown".

    What runs write themselves (`executed/`, `docs/`) does not count as a difference. Where the sources travel without
    their history, a file `COMMIT` beside them names it: `git describe --always --dirty=+dirty > COMMIT`.
    """
    if not (root := marked_root()):
        return "unknown"
    if commit := _git(root, "rev-parse", "--short", "HEAD"):
        changed = _git(root, "status", "--porcelain", "--", ".", ":(exclude)executed", ":(exclude)docs")
        return f"{commit}+dirty" if changed else commit
    named = root / "COMMIT"
    return named.read_text(encoding="utf-8").strip() if named.is_file() else "unknown"


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
