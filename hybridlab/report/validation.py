"""docs/VALIDATION_RESULTS.md: every criterion of the plan, and every claim that was published."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from hybridlab.planner.plan import PARTS
from hybridlab.report.criteria import CRITERIA, Criterion, Finding, Outcome
from hybridlab.report.evidence import MAIN, PROFILES, Evidence, Found
from hybridlab.report.words import (
    gigabytes,
    interval,
    known_columns,
    markdown_table,
    numbers_in_words,
    percent,
    verdict_word,
)

Row = dict[str, Any]

HEAD = """\
# Validation results

Written by `hybridlab report` from `executed/*/results.json`; no number here is typed by hand, and a test fails when
this page and the results disagree. The plan's numbers are targets to test, not results to believe.

**holds**, **fails**: the numbers decide it, with their whole interval where there is one. **open**: they cannot tell.
**not run yet**: nothing was measured. **not measured**: the notebook ran, but makes no such claim. **predicted
nothing**: every step was a gradient step, so that nothing is shown about predicting. Intervals are 95 % confidence
intervals over seeds, paired: the same seed means the same first weights and the same batches. With one seed there is no
interval, and the verdict is about that run alone. Losses are in nats, on text that was held out.
"""

SPEEDUP = """\
## Speedup, with the control beside it

Fewer gradient steps are always faster and always a little worse, so speed alone says nothing. Beside each hybrid
stands its **truncated control**: a plain run with as many gradient steps, its schedule fitted to that length. A
hybrid whose loss lies above its control's is worth less than stopping earlier. The **worth of a predicted step** is 1
when it replaces a real one, 0 when it might as well be left out, below 0 when it harms.
"""

QUALITY = """\
## Quality

The change of the final perplexity against the full baseline, or against the FP32 control for memory settings. A
tolerance for quality is no speedup: a plain run that stops a little earlier stays within 2 % as well.
"""

MEMORY = """\
## Memory: predicted beside measured

Predicted by `hybridlab.memory.plan` without a GPU; measured as the peak of what torch allocated. The peak VRAM is
what the card counts: what torch reserved, and the context beyond it.
"""

VRAM = """\
## VRAM over time

Used memory over wall time, the phases behind it.
"""

EVERY_CLAIM = """\
## Every claim

As the notebooks published them, all profiles, the small ones included.
"""

NOT_RUN = "Not run yet.\n"


def validation_document(evidence: Evidence, pictures: Mapping[str, str]) -> str:
    """The whole document.

    pictures: file name below docs/images -> its title; each is shown in the section that its name begins with
    """
    sections: tuple[str, ...] = (HEAD, measured_on(evidence), at_a_glance(evidence), *_criteria(evidence))
    sections += (SPEEDUP, _speedup(evidence), _shown(pictures, "against_control"))
    sections += (QUALITY, _quality(evidence), _shown(pictures, "quality_against_memory"))
    sections += (MEMORY, _memory(evidence), _shown(pictures, "memory_breakdown"))
    sections += (VRAM, _shown(pictures, "vram") or NOT_RUN, EVERY_CLAIM, *_claims(evidence))
    return "\n".join(section.rstrip("\n") + "\n" for section in sections if section)


def predicted_share(claim: Found) -> str:
    """How many of an arm's nominal steps were predicted, from its claim that it pays."""
    predicted, gradient = (float(claim.numbers[name] or 0) for name in ("predicted_steps", "gradient_steps"))
    return f"{predicted:.0f} of {predicted + gradient:.0f}"


def measured_on(evidence: Evidence) -> str:
    """The devices of the profile that decides."""
    return f"Measured on: {'; '.join(evidence.devices(MAIN)) or 'nothing yet'}."


def notebook_link(notebook: str, profile: str = MAIN, *, docs: str = "../", short: bool = False) -> str:
    """A link to an executed notebook; docs: the way from the document to the project's root; short: by its number."""
    return f"[{notebook[:2] if short else notebook}]({docs}executed/{profile}/{notebook}.ipynb)"


def at_a_glance(evidence: Evidence) -> str:
    """How many of the plan's criteria came out which way, in one sentence."""
    counts = Counter(criterion.outcome(evidence) for group in CRITERIA.values() for criterion in group)
    words = [f"{outcome} {counts[outcome]}" for outcome in get_args(Outcome)]
    return f"The plan's {counts.total()} criteria: {', '.join(words)}."


def _criteria(evidence: Evidence) -> Iterator[str]:
    yield "## The plan's criteria\n"
    for title, group in CRITERIA.items():
        rows = [row for criterion in group for row in _rows(criterion, evidence)]
        yield f"### {title}\n\n{markdown_table(rows)}\n"


def _rows(criterion: Criterion, evidence: Evidence) -> Iterator[Row]:
    """The criterion with its verdict, then a row for each finding."""
    findings = criterion.findings(evidence)
    whole: Row = {"criterion": f"**{criterion.text}**", "verdict": verdict_word(criterion.outcome(evidence))}
    if len(findings) == 1:
        yield whole | _numbers(findings[0])
        return
    yield whole | {"numbers": "", "notebook": ""}
    mixed = len({finding.notebook for finding in findings}) > 1
    for finding in findings:
        about = f"{_model_and_topic(finding.notebook or '')}: {finding.about}" if mixed else finding.about
        yield {"criterion": about, "verdict": finding.outcome} | _numbers(finding)


def _model_and_topic(notebook: str) -> str:
    """What a notebook is about, from its name: "small, memory" of "04_gpt2_small_memory"."""
    return notebook.partition("_")[2].removeprefix("gpt2_").replace("_", ", ")


def _numbers(finding: Finding) -> Row:
    where = finding.notebook or ""
    ran = finding.outcome != "not run yet"
    return {"numbers": finding.words, "notebook": notebook_link(where, short=True) if ran else where[:2]}


def _speedup(evidence: Evidence) -> str:
    claims = [c for notebook in evidence.entries.get(MAIN, {}) for c in evidence.claims(notebook, "*-pays")]
    if not claims:
        return NOT_RUN
    idle = [f"{claim.arm} ({claim.notebook[:2]})" for claim in claims if not claim.numbers.get("predicted_steps")]
    rows = [_speedup_row(claim, evidence) for claim in claims if claim.numbers.get("predicted_steps")]
    nothing = f"Predicted nothing, and are the baseline with the cost of asking: {'; '.join(idle)}." if idle else ""
    return "\n\n".join([*([markdown_table(rows)] if rows else []), nothing])


def _speedup_row(claim: Found, evidence: Evidence) -> Row:
    predicted, gradient = (float(claim.numbers[name] or 0) for name in ("predicted_steps", "gradient_steps"))
    time = [c.numbers.get("baseline_ratio_time") for c in _siblings(claim, "speed", evidence)]
    seconds = f"{float(time[0]):.2f}" if time and time[0] is not None else None
    return {
        "arm": claim.arm,
        "steps predicted": predicted_share(claim),
        "time over the baseline's": seconds,
        "control: share of the steps": f"{gradient / (predicted + gradient):.2f}",
        "loss against the control": interval(claim.numbers, "loss_to_control"),
        "worth of a predicted step": interval(claim.numbers, "step_value", digits=2),
        "pays": verdict_word(claim.outcome),
        "notebook": notebook_link(claim.notebook, short=True),
    }


def _siblings(claim: Found, ending: str, evidence: Evidence) -> list[Found]:
    """The claim of another ending on the same arm."""
    return evidence.claims(claim.notebook, f"{claim.id.rpartition('-')[0]}-{ending}", profile=claim.profile)


def _quality(evidence: Evidence) -> str:
    claims = [c for notebook in evidence.entries.get(MAIN, {}) for c in evidence.claims(notebook, "*quality")]
    rows: list[Row] = [
        {
            "arm": claim.arm,
            "verdict": verdict_word(claim.verdict),
            "numbers": numbers_in_words(claim.numbers),
            "notebook": notebook_link(claim.notebook, short=True),
        }
        for claim in claims
    ]
    return markdown_table(rows) if rows else NOT_RUN


def _memory(evidence: Evidence) -> str:
    tables = evidence.tables("memory")
    if not tables:
        return NOT_RUN
    rows = [(notebook, row) for notebook, rows in tables.items() for row in rows]
    peaks = markdown_table(known_columns([_memory_row(notebook, row) for notebook, row in rows]))
    parts = markdown_table([_parts_row(row) for _, row in rows])
    return f"{peaks}\n\nThe predicted parts, at the moment of the peak:\n\n{parts}\n"


def _memory_row(notebook: str, row: Row) -> Row:
    predicted, measured = row.get("predicted_allocated_bytes"), row.get("measured_allocated_bytes")
    return {
        "model": row["model"],
        "arm": row["arm"],
        "predicted": gigabytes(predicted),
        "measured": gigabytes(measured),
        "predicted over measured": f"{predicted / measured:.3f}" if predicted and measured else None,
        "peak VRAM": gigabytes(row.get("peak_memory_bytes")),
        "a step": f"{row['step_ms']:.1f} ms" if row.get("step_ms") else None,
        "card busy": percent(row.get("card_busy_percent")),
        "loss against the control": interval(row, "loss_change"),
        "notebook": notebook_link(notebook, short=True),
    }


def _parts_row(row: Row) -> Row:
    parts = row.get("parts", {})
    return {"model": row["model"], "arm": row["arm"]} | {part: gigabytes(parts.get(part)) for part in PARTS}


def _shown(pictures: Mapping[str, str], section: str) -> str:
    return "\n\n".join(f"![{title}](images/{name})" for name, title in pictures.items() if name.startswith(section))


def _claims(evidence: Evidence) -> Iterator[str]:
    for profile in evidence.entries:
        title = PROFILES[profile]
        yield f"### {title[0].upper()}{title[1:]} (`params/{profile}`)\n"
        for notebook, entry in evidence.entries[profile].items():
            versions = ", ".join(f"{name} {version}" for name, version in entry.get("versions", {}).items())
            where = f"{entry['device']}; {versions}; commit {entry.get('git_commit', 'unknown')}"
            yield f"{notebook_link(notebook, profile)}: {where}.\n"
            rows = [_claim_row(claim) for claim in evidence.claims(notebook, "*", profile=profile)]
            yield f"{markdown_table(rows)}\n" if rows else "It makes no claim.\n"


def _claim_row(claim: Found) -> Row:
    return {"claim": claim.text, "verdict": verdict_word(claim.outcome), "numbers": numbers_in_words(claim.numbers)}
