"""Every document that follows from the results, and whether those on disk still do."""

from __future__ import annotations

import re
from pathlib import Path

from hybridlab.base.errors import UserError
from hybridlab.base.files import replaced
from hybridlab.report.card_guide import card_guide
from hybridlab.report.evidence import PROFILES, Evidence
from hybridlab.report.headlines import headlines
from hybridlab.report.pictures import CURVES, curves_of, drawn, same_picture, signed
from hybridlab.report.validation import validation_document

BEGIN, END = "<!-- results: written by `hybridlab report` -->", "<!-- end of results -->"


def report_files(root: Path) -> dict[Path, bytes]:
    """What `hybridlab report` writes: from path to content, for the project at `root`.

    Raises UserError where README.md, its markers or every results file is missing.
    """
    evidence = Evidence.read(root)
    if not evidence.entries:
        raise UserError(f"{root / 'executed'} holds no results.json: run `make milestones` first")
    docs, images, charts = root / "docs", root / "docs" / "images", drawn(evidence)
    titles = {name: chart.title for name, chart in charts.items()}
    texts = {
        root / "README.md": _with_section(root / "README.md", headlines(evidence)),
        docs / "VALIDATION_RESULTS.md": validation_document(evidence, titles),
        docs / "RTX_5080_GUIDE.md": card_guide(evidence, titles),
    }
    pictures = {images / name: signed(chart) for name, chart in charts.items()}
    for profile in PROFILES:
        if picture := curves_of(root / "executed" / profile / f"{CURVES}.ipynb"):
            pictures[images / f"{CURVES}_{profile}.png"] = picture
    return {path: text.encode() for path, text in texts.items()} | pictures


def stale_files(root: Path) -> list[Path]:
    """The documents and pictures on disk that are missing, or say something else than the results."""
    return [path for path, content in report_files(root).items() if not _up_to_date(path, content)]


def write_report(root: Path) -> list[Path]:
    """Write every document that follows from the results, each as a whole; returns those that changed."""
    files = report_files(root)
    changed = [path for path, content in files.items() if not _up_to_date(path, content)]
    for path in changed:
        with replaced(path) as beside:
            beside.write_bytes(files[path])
    return changed


def _up_to_date(path: Path, content: bytes) -> bool:
    if not path.exists():
        return False
    before = path.read_bytes()
    return same_picture(before, content) if path.suffix == ".png" else before == content


def _with_section(readme: Path, section: str) -> str:
    """The document with what lies between the two markers replaced."""
    document = readme.read_text(encoding="utf-8") if readme.exists() else ""
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if not pattern.search(document):
        raise UserError(f"{readme} lacks the lines {BEGIN!r} and {END!r} between which results are written")
    return pattern.sub(lambda _: f"{BEGIN}\n\n{section}\n\n{END}", document)
