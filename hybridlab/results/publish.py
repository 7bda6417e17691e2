"""results.json: what notebooks found, their claims and what these depend on."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from hybridlab import __version__
from hybridlab.base.device import device_name, find_device, host
from hybridlab.base.files import RESULTS_LOCK, make_folders, marked_root, project_root, replaced
from hybridlab.base.settings import LARGEST
from hybridlab.results.claims import VOLATILE_UNITS, Claim, rounded
from hybridlab.results.parameters import parameters_sha256
from hybridlab.results.reading import load_results
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
        "host": host(),
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


Entry = Mapping[str, Any]

MOST = 8
"""Earlier measurements that an entry keeps, the latest ones."""

ORIGIN = ("git_commit", "device", "host")
"""What tells two measurements apart; of equal ones the later stays alone."""


def repeats_of(before: Entry | None, entry: Entry) -> list[dict[str, Any]]:
    """What a new entry keeps of the one that it replaces, and of those that this one kept, the earliest first.

    Each has its origin, its torch and its figures, claim and quantity by name: times and memory, and of those that
    repeat the ones that differ from the new entry's. An entry with other parameters asked something else, and is
    dropped; a parameter that only one of them has counts as equal.
    """
    if before is None:
        return []
    old, new = before["parameters"], entry["parameters"]
    if any(old[name] != new[name] for name in old.keys() & new.keys()):
        return []
    own = {name: figure for name, figure, _ in _figures(entry)}
    earlier = {_origin(repeat): repeat for repeat in [*before.get("repeats", ()), _repeat(before, own)]}
    earlier.pop(_origin(entry), None)
    return [repeat for repeat in earlier.values() if repeat["figures"]][-MOST:]


def _repeat(entry: Entry, other: Mapping[str, Any]) -> dict[str, Any]:
    """What an entry measured otherwise than another one."""
    origin = {name: entry[name] for name in ORIGIN if name in entry}
    torch = {"torch": entry["versions"]["torch"]} if "versions" in entry else {}
    figures = {
        name: figure
        for name, figure, volatile in _figures(entry)
        if name in other and (volatile or other[name] != figure)
    }
    return origin | torch | {"figures": figures}


def _figures(entry: Entry) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """Name, figure and whether it may differ between two equal runs."""
    for claim in entry["claims"]:
        for quantity in claim["quantities"]:
            figure = {end: quantity.get(end) for end in ("value", "low", "high")}
            yield f"{claim['id']}.{quantity['name']}", figure, quantity["unit"] in VOLATILE_UNITS


def _origin(measured: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(measured.get(name) for name in ORIGIN)
