"""Every document that follows from the results, and whether those on disk still do."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Container, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from hybridlab.base.errors import UserError
from hybridlab.base.files import replace_all
from hybridlab.charts.display import Chart
from hybridlab.planner.gpu_specs import GPUS, spec_of
from hybridlab.report.criteria import BASELINE, DEPTH, HYBRID, LADDER, XL, Criterion, in_less_time, of_presets
from hybridlab.report.depth_advice import STEADY, control_times, depth_advice, grown_claims, parameter_count
from hybridlab.report.evidence import MAIN, MEMORY, Evidence, Published, device_of, least_difference
from hybridlab.report.gpu_guide import bf16_over_float32, gpu_guide, is_former
from hybridlab.report.pictures import charts_of, shows, signed
from hybridlab.report.rules import Claims
from hybridlab.report.validation import (
    bounds_in_perplexity,
    claims_document,
    criterion_verdict,
    devices,
    validation_document,
)
from hybridlab.report.words import BY_OTHER_MEANS, Markdown, notebook_link, render
from hybridlab.results.words import amount, quantity_interval
from hybridlab.study.statistics import LEAST

FIRST = "run `make milestones` first, or `hybridlab run NAME -o executed/cpu/NAME.ipynb`"
FOREIGN = "surrogateescape"
"""Bytes of a README that are no UTF-8 are written as they were read."""

BEGIN, END = "<!-- results: written by `hybridlab report` -->", "<!-- end of results -->"

HEADLINES = (
    Criterion("The baseline is tuned: no neighbouring learning rate ends lower", (Claims(BASELINE, "lr-is-tuned"),)),
    Criterion("Nor does one with a neighbouring beta1", (Claims(BASELINE, "beta1-is-tuned"),)),
    Criterion("The trainer's own step costs at most 2 % over the bare loop", (Claims(BASELINE, "trainer-is-thin"),)),
    Criterion(
        "The whole stack of faster training reaches the loss of the plan's FP32 run in 1/15 of its time",
        (Claims(LADDER, "stack-is-fast"),),
    ),
    Criterion(
        "The plan's promise: the baseline's perplexity in 40 % less time",
        (of_presets("speed"),),
        otherwise=in_less_time(0.6),
    ),
    Criterion("Prediction in time by the plan's presets beats stopping earlier", (of_presets("pays"),)),
    Criterion("Prediction in time, unguarded, beats stopping earlier", (of_presets("pays", ", unguarded"),)),
    Criterion(
        "hybridlab plan predicts the peak of allocated memory within 10 %",
        (Claims(MEMORY, "predicted-within-10-percent"),),
    ),
    Criterion("GPT-2 XL trains on a 16 GB GPU", (Claims(XL, "fits-16gb"),)),
    Criterion("Its peak stays below 14 GB", (Claims(XL, "peak-below-14gb"),)),
    Criterion("Its validation loss ends at most 1 % above that of FP32 in TF32", (Claims(XL, "quality"),)),
)
"""The README's sentences, and what decides each."""

IN_CODE = ("model", "steps", "vocab_size", "block_size", "batch_size", "muon_lr")
"""Parameters of notebook 08 that the README names."""

PREDICTORS = "07_step_value"
"""Where every predictor is tried."""

IN_GUIDE = (
    "against as much computation",
    "against the shallow model",
    "time of as much computation",
    "notebook",
    "profile",
)
"""Of the advice on depth, what the README leaves to the guide."""


def report_files(root: Path) -> dict[Path, str | Chart]:
    """What `hybridlab report` writes for the project at `root`: from path to text, or to the chart that is drawn.

    Raises UserError where every results file is missing, and for a damaged one.
    """
    evidence = Evidence.read(root)
    if not evidence.entries:
        raise UserError(f"{root / 'executed'} holds no results.json of a profile: {FIRST}")
    docs = root / "docs"
    try:
        charts = charts_of(evidence)
        titles = {name: chart.title for name, chart in charts.items()}
        return {
            **_with_section(root / "README.md", readme_section(evidence)),
            docs / "VALIDATION_RESULTS.md": validation_document(evidence, titles),
            docs / "CLAIMS.md": claims_document(evidence),
            docs / "RTX_5080_GUIDE.md": gpu_guide(evidence, titles),
            **{docs / "images" / name: chart for name, chart in charts.items()},
        }
    except KeyError as error:
        raise UserError(
            f"an entry of {root / 'executed'} lacks {error}: restore its results.json with git checkout, or run its "
            "notebook again"
        ) from error


def stale_files(root: Path) -> list[Path]:
    """The documents and pictures on disk that are missing, or say something else than the results."""
    return [path for path, content in report_files(root).items() if not _is_up_to_date(path, content)]


def write_report(root: Path) -> list[Path]:
    """Write every document that follows from the results, all or none; returns those that changed."""
    changed = {path: content for path, content in report_files(root).items() if not _is_up_to_date(path, content)}
    replace_all({path: signed(c) if isinstance(c, Chart) else c.encode(errors=FOREIGN) for path, c in changed.items()})
    return list(changed)


def _is_up_to_date(path: Path, content: str | Chart) -> bool:
    if not path.exists():
        return False
    there = path.read_bytes()
    return shows(there, content) if isinstance(content, Chart) else there == content.encode(errors=FOREIGN)


def _with_section(readme: Path, section: str) -> dict[Path, str]:
    """The README with what lies between the two markers replaced; without these it is left as it is, and told.

    Raises UserError where one of them is missing.
    """
    if not readme.exists():
        return {}
    document = readme.read_text(encoding="utf-8", errors=FOREIGN)
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if not pattern.search(document):
        if found := [marker for marker in (BEGIN, END) if marker in document]:
            raise UserError(f"{readme} has {found[0]!r}, but not {BEGIN!r} followed by {END!r}: put both back")
        warnings.warn(f"{readme} lacks the lines {BEGIN!r} and {END!r}, and is left as it is", stacklevel=2)
        return {}
    return {readme: pattern.sub(lambda _: f"{BEGIN}\n\n{section}\n\n{END}", document)}


def readme_section(evidence: Evidence) -> str:
    """The README's section between its markers: the questions that matter most, and what the results answer."""
    tried = [claim for claim in evidence.claims(kind="pays") if not (claim.is_idle or claim.grew)]
    advice = depth_advice(evidence)
    depths = [row for row in advice if row["profile"].startswith(MAIN)] or advice  # of the GPU, where it ran
    long_enough = [it for it in evidence.entries if evidence.steps_judged(PREDICTORS, it) >= LEAST.steps]
    return render(
        "README_section.md",
        stack=_stack(evidence),
        pictured=HYBRID in evidence.tables("losses"),
        tried=len(tried),
        tried_over=_tried_over(evidence, tried),
        steps_5080=_steps_on_5080(evidence),
        largest=_largest_trained(evidence),
        least_shown=_least_shown(tried),
        paying=[f"{claim.about} ({claim.notebook[:2]})" for claim in tried if claim.verdict == "holds"],
        least=LEAST,
        xl_percent=bounds_in_perplexity(evidence).get(XL),
        xl_tf32=evidence.tf32_stands_for_fp32(XL),
        xl_steps=evidence.steps_judged(XL),
        xl_former=is_former(evidence, XL),
        headlines=[headline(criterion, evidence) for criterion in HEADLINES],
        scales=[_scale(evidence, profile) for profile in long_enough],
        depths=[{key: cell for key, cell in row.items() if key not in IN_GUIDE} for row in depths],
        control_times=_control_times(evidence),
        steady=STEADY,
        sizes=_sizes(evidence, {row["model"] for row in depths}),
        devices=devices(evidence),
        shallow_is_better=any(claim.verdict == "fails" for claim in evidence.claims(DEPTH, kind="depth-pays")),
    )


def _least_shown(tried: Sequence[Published]) -> dict[str, str] | None:
    """What difference of losses could have been shown: in nats, the median over the settings, and with which seeds."""
    known = [(least, claim.value("seeds") or 0) for claim in tried if (least := least_difference(claim)) is not None]
    if not known:
        return None
    seeds = sorted({f"{count:.0f}" for _, count in known})
    return {"nats": f"{median(least for least, _ in known):.2f}", "seeds": " or ".join(seeds)}


def _control_times(evidence: Evidence) -> str:
    """What controls of as much computation took of the grown runs' time, from the least to the greatest."""
    grown = [pays for profile in evidence.entries for pays, _ in grown_claims(evidence, profile)]
    found = [control_times(evidence, pays) for pays in grown]
    told = []
    for name, control in (("plain", "the plain run took"), ("shallow", "the shallow model took")):
        if times := [each[name] for each in found if name in each]:
            least, greatest = (f"{of(times):.2f}" for of in (min, max))
            told.append(f"{control} {' to '.join(dict.fromkeys((least, greatest)))} times the grown run's time")
    return ", ".join(told)


def _sizes(evidence: Evidence, models: Container[str]) -> str:
    """The parameters of these models of the advice on depth, as "mini 2.7", in millions, the least first."""
    entries = [entry["parameters"] for profile in evidence.entries.values() for entry in profile.values()]
    counts = {it["model"]: count for it in entries if it.get("model") in models and (count := parameter_count(it))}
    return ", ".join(f"{model} {counts[model] / 1e6:.4g}" for model in sorted(counts, key=counts.__getitem__))


def _stack(evidence: Evidence) -> dict[str, Any] | None:
    """What notebook 08 ran up to Muon, and how many times as fast as vanilla; None unless that is shown."""
    parameters = evidence.ran_with(LADDER)
    rungs = {row["rung"]: row for row in evidence.tables("ladder").get(LADDER, [])}
    times = rungs.get("Muon", {}).get("vanilla's time over it", "open")
    is_fast = any(claim.verdict == "holds" for claim in evidence.claims(LADDER, kind="stack-is-fast"))
    if not is_fast or times == "open" or not {"bf16", "compiled", "CUDA graph"} <= rungs.keys():
        return None
    told = {"times": times, "steps_taken": rungs["Muon"].get("steps to the loss", "open")}
    told |= {"tuned": rungs.get("tuned rates", {}).get("vanilla's time over it", "open")}
    short = {name: re.sub(r"\d+\.\d+", lambda n: f"{float(n[0]):.3g}", text) for name, text in told.items()}
    told = {name: parameters[name] for name in IN_CODE} | short | {"link": notebook_link(LADDER, docs="")}
    device = evidence.device(LADDER)
    gpus = filter(None, (spec_of(device), GPUS["rtx5080"]))
    told |= {"device": device, "bf16": [bf16_over_float32(gpu) for gpu in gpus]}
    formats = rungs["CUDA graph"].get("vanilla's time over it", "open")
    return told | {"formats": formats, "on_5080": _bf16_on_5080(evidence)}


def _bf16_on_5080(evidence: Evidence) -> str | None:
    """How many times as fast GPT-2 Small is estimated to step on an RTX 5080 in bf16 as in float32."""
    rows = evidence.tables("memory").get(MEMORY, [])
    steps = {row["arm"]: row["estimated_5080_ms"] for row in rows if row.get("estimated_5080_ms")}
    return f"{steps['fp32'] / steps['mixed precision']:.1f}" if {"fp32", "mixed precision"} <= steps.keys() else None


def _steps_on_5080(evidence: Evidence) -> str:
    """The estimated step of each recipe, by batch, as "8 x 512 tokens: small 81 ms, medium 194 ms"."""
    steps: dict[str, list[str]] = {}
    for row in evidence.planned.get("recipes", ()):
        steps.setdefault("{} x {} tokens".format(*row["batch"]), []).append(f"{row['model']} {row['step_ms']:.0f} ms")
    return "; ".join(f"{batch}: {', '.join(each)}" for batch, each in steps.items())


def _largest_trained(evidence: Evidence) -> str | None:
    """The largest model that trained in 16 GB, with how and how long, and its peak."""
    planned = {row["way"]: row["parameters"] for row in evidence.planned.get("largest", ())}
    trained = [row for row in evidence.planned.get("trained", ()) if not row["stopped"] and row["way"] in planned]
    if not trained:
        return None
    best = max(trained, key=lambda row: planned[row["way"]])
    how = f"{best['way']}; {best['steps']} steps, peak {amount(best['peak_memory_bytes'], 'bytes')}"
    return f"{planned[best['way']] / 1e9:.2f} billion parameters ({how})"


def _tried_over(evidence: Evidence, tried: Sequence[Published]) -> str:
    """The lengths over which settings were tried, as "15 of GPT-2 small over 230 steps"."""
    counts: Counter[str] = Counter()
    for claim in tried:
        ran = evidence.ran_with(claim.notebook, claim.profile)
        other = "a CNN on MNIST" if claim.notebook.startswith("01_") else f"notebook {claim.notebook[:2]}"
        model = f"GPT-2 {ran['model']}" if "model" in ran else other
        counts[f"{model} over {ran['steps']:,} steps" if "steps" in ran else model] += 1
    return ", ".join(f"{count} of {of}" for of, count in counts.items())


def headline(criterion: Criterion, evidence: Evidence) -> dict[str, str]:
    """A sentence with its verdict and where it was measured."""
    outcome, findings = criterion.outcome(evidence), criterion.findings(evidence)
    saved = outcome in BY_OTHER_MEANS
    deciding = [f for f in findings if f.otherwise == saved and (f.outcome == "holds" or not saved)]
    notebooks = dict.fromkeys(finding.notebook for finding in deciding)
    links = notebooks if outcome == "not run yet" else [notebook_link(notebook, docs="") for notebook in notebooks]
    verdict = criterion_verdict(criterion, evidence)
    return {"claim": criterion.text, "verdict": verdict, "notebook": Markdown(", ".join(links))}


def _scale(evidence: Evidence, profile: str) -> dict[str, Any]:
    """How many of the settings that predicted anything beat stopping earlier, and the one worth most per step."""
    claims = evidence.claims(PREDICTORS, kind="pays", profile=profile)
    tried = [claim for claim in claims if not claim.is_idle]
    paying = [claim for claim in tried if claim.verdict == "holds"]
    valued = [claim for claim in paying if claim.value("step_value") is not None]
    best = max(valued, key=lambda claim: claim.value("step_value") or 0.0, default=next(iter(paying), None))
    entry = evidence.entries[profile][PREDICTORS]
    ran = "GPT-2 {model}, {steps} steps of {batch_size} x {block_size} tokens".format_map(entry["parameters"])
    return {
        "where": f"{ran}, {device_of(entry)}",
        "link": notebook_link(PREDICTORS, profile, docs=""),
        "counts": Counter(claim.verdict for claim in tried),
        "tried": len(tried),
        "best": best and best.about,
        "worth": best and quantity_interval(best.quantity("step_value"), digits=2),
    }
