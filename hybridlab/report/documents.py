"""Every document that follows from the results, and whether those on disk still do."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from hybridlab.base.errors import UserError
from hybridlab.base.files import replaced
from hybridlab.report.criteria import BASELINE, MEMORY, XL, Claims, Criterion, of_presets
from hybridlab.report.evidence import Evidence
from hybridlab.report.gpu_guide import gpu_guide
from hybridlab.report.pictures import charts_of, same_picture, signed
from hybridlab.report.validation import criterion_verdict, devices, notebook_link, validation_document
from hybridlab.report.words import render
from hybridlab.results.words import quantity_interval

BEGIN, END = "<!-- results: written by `hybridlab report` -->", "<!-- end of results -->"

HEADLINES: dict[str, Claims] = {
    "The baseline is tuned: no neighbouring learning rate ends lower": Claims(BASELINE, "lr-is-tuned"),
    "The trainer's own step costs at most 2 % over the bare loop": Claims(BASELINE, "trainer-is-thin"),
    "The plan's presets reach the baseline's perplexity in 40 % less time": of_presets("speed"),
    "Predicting with them beats stopping earlier": of_presets("pays"),
    "Made to predict always, they beat stopping earlier": of_presets("pays", ", unguarded"),
    "The memory plan is right within 10 %": Claims(MEMORY, "predicted-within-10-percent"),
    "GPT-2 XL trains on a 16 GB GPU": Claims(XL, "fits-16gb"),
    "Its peak stays below 14 GB": Claims(XL, "peak-below-14gb"),
    "Its validation loss stays within 1 % of FP32's": Claims(XL, "quality"),
}
"""The README's sentences, and the claims that decide each."""

PREDICTORS = "07_step_value"
SCALES = {"rtx5080": "GPT-2 Small on a GPU", "cpu_long": "A nano GPT-2 on a CPU"}
"""Where every predictor was tried, by profile."""


def report_files(root: Path) -> dict[Path, bytes]:
    """What `hybridlab report` writes: from path to content, for the project at `root`.

    Raises UserError where README.md, its markers or every results file is missing.
    """
    evidence = Evidence.read(root)
    if not evidence.entries:
        raise UserError(f"{root / 'executed'} holds no results.json: run `make milestones` first")
    docs, charts = root / "docs", charts_of(evidence)
    titles = {name: chart.title for name, chart in charts.items()}
    texts = {
        root / "README.md": _with_section(root / "README.md", readme_section(evidence)),
        docs / "VALIDATION_RESULTS.md": validation_document(evidence, titles),
        docs / "RTX_5080_GUIDE.md": gpu_guide(evidence, titles),
    }
    pictures = {docs / "images" / name: signed(chart) for name, chart in charts.items()}
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


def readme_section(evidence: Evidence) -> str:
    """The README's section between its markers: the questions that matter most, and what the results answer."""
    rows = [headline(text, rule, evidence) for text, rule in HEADLINES.items()]
    scales = [_scale(evidence, profile, where) for profile, where in SCALES.items()]
    return render("README_section.md", headlines=rows, scales=scales, devices=devices(evidence))


def headline(text: str, rule: Claims, evidence: Evidence) -> dict[str, str]:
    """A sentence with its verdict and where it was measured."""
    criterion = Criterion(text, (rule,))
    where = rule.notebook if criterion.outcome(evidence) == "not run yet" else notebook_link(rule.notebook, docs="")
    return {"claim": text, "verdict": criterion_verdict(criterion, evidence), "notebook": where}


def _scale(evidence: Evidence, profile: str, where: str) -> dict[str, Any]:
    """How many of the settings that predicted anything beat stopping earlier, and the one worth most per step."""
    claims = evidence.claims(PREDICTORS, kind="pays", profile=profile)
    tried = [claim for claim in claims if not claim.is_idle]
    paying = [claim for claim in tried if claim.verdict == "holds"]
    best = max(paying, key=lambda claim: claim.value("step_value") or 0.0, default=None)
    return {
        "where": where,
        "link": notebook_link(PREDICTORS, profile, docs=""),
        "counts": Counter(claim.verdict for claim in tried),
        "tried": len(tried),
        "best": best and best.about,
        "worth": best and quantity_interval(best.quantity("step_value"), digits=2),
    }
