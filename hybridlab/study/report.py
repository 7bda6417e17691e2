"""Writes the documents' results from committed results files alone: no number is typed by hand."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROFILES = {
    "rtx5080": "GPT-2 scale, on a GPU",
    "cpu": "small scale, on two CPU cores",
    "cpu_long": "small scale, every predictor",
}
PICTURED = "03_gpt2_small_hybrid"
PICTURE_CELL = 'curves(result, [*shown, *controls], "gradient_step")'
BEGIN, END = "<!-- results: written by `hybridlab report` -->", "<!-- end of results -->"


def report_files(root: Path) -> dict[Path, bytes]:
    """What `hybridlab report` writes: from path to content, for the project at `root`.

    Raises FileNotFoundError where README.md or every results file is missing.
    """
    results = dict(_results(root))
    if not results:
        raise FileNotFoundError(f"{root / 'executed'} holds no results.json: run `make milestones` first")
    readme = root / "README.md"
    files = {readme: _with_section(readme.read_text(), _section(results)).encode()}
    for profile in results:
        picture = _picture(root / "executed" / profile / f"{PICTURED}.ipynb")
        if picture:
            files[root / "docs" / "images" / f"{PICTURED}_{profile}.png"] = picture
    return files


def write_report(root: Path) -> list[Path]:
    """Write every document that follows from the results; returns those that changed."""
    changed = []
    for path, content in report_files(root).items():
        if not path.exists() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            changed.append(path)
    return changed


def _results(root: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for profile in PROFILES:
        path = root / "executed" / profile / "results.json"
        if path.exists():
            yield profile, json.loads(path.read_text())


def _section(results: dict[str, dict[str, Any]]) -> str:
    return "\n\n".join(_profile_section(profile, entries) for profile, entries in results.items())


def _profile_section(profile: str, entries: dict[str, Any]) -> str:
    devices = sorted({entry["device"] for entry in entries.values()})
    lines = [
        f"### {PROFILES[profile][0].upper()}{PROFILES[profile][1:]}",
        "",
        f"Measured on: {'; '.join(devices)}.",
        "",
    ]
    for notebook, entry in sorted(entries.items()):
        link = f"[{notebook}](executed/{profile}/{notebook}.ipynb)"
        lines += [f"{link}:", "", *(f"- {sentence}" for sentence in entry["summary"]), ""]
    return "\n".join(lines).rstrip()


def _with_section(document: str, section: str) -> str:
    """Replace what lies between the two markers."""
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if not pattern.search(document):
        raise ValueError(f"README.md lacks the lines {BEGIN!r} and {END!r} between which results are written")
    return pattern.sub(lambda _: f"{BEGIN}\n\n{section}\n\n{END}", document)


def _picture(notebook: Path) -> bytes | None:
    """The chart of losses against gradient steps, as the executed notebook shows it."""
    if not notebook.exists():
        return None
    for cell in json.loads(notebook.read_text())["cells"]:
        if "".join(cell["source"]).endswith(PICTURE_CELL):
            images = [o["data"]["image/png"] for o in cell["outputs"] if "image/png" in o.get("data", {})]
            return base64.b64decode("".join(images[0])) if images else None
    return None
