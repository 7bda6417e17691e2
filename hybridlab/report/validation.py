"""docs/VALIDATION_RESULTS.md: every criterion of the plan with its numbers; docs/CLAIMS.md: all that was published."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any, get_args

from hybridlab.charts.tables import known_columns
from hybridlab.notebook.views.memory_charts import MemoryRow
from hybridlab.notebook.views.study import RELIABILITIES, pooled_reliability
from hybridlab.report.criteria import CRITERIA, IN_DEPTH, OURS, OVERALL, Criterion, everywhere
from hybridlab.report.estimates import ESTIMATES
from hybridlab.report.evidence import MAIN, Entry, Evidence, Published, arm_in_words, device_of, named_in_full
from hybridlab.report.rules import Finding, Outcome
from hybridlab.report.words import Markdown, escaped, notebook_link, render, verdict_word
from hybridlab.results.claims import Quantity
from hybridlab.results.words import amount, bound_in_words, in_words, interval, name_in_words, quantity_interval
from hybridlab.study.code_version import code_hashes
from hybridlab.study.comparison import SIGNIFICANCE
from hybridlab.study.statistics import LEAST

MOST = 4
"""Findings of one notebook and outcome that are listed one by one below a criterion."""

EMULATED = " (emulated)"
"""Beside a verdict that rests on a larger GPU standing for one of 16 GB."""

WELL_TOLD, ENOUGH_PROPOSALS = 0.15, 20
"""How near a bin's acceptance must be to what was told before, and of how many proposals that is asked."""

Cells = dict[str, Any]
"""A row of a document's table: heading -> what stands below it."""


def validation_document(evidence: Evidence, pictures: Mapping[str, str]) -> str:
    """The whole document.

    pictures: file name below docs/images -> its title; each is shown in the section that its name begins with
    """
    pays = evidence.claims(kind="pays")
    memory = [(notebook, row) for notebook, rows in evidence.tables("memory").items() for row in rows]
    return render(
        "VALIDATION_RESULTS.md",
        pictures=pictures,
        devices=devices(evidence),
        glance=at_a_glance(evidence),
        least=LEAST,
        significance=f"{100 * SIGNIFICANCE:.0f} %",
        verdicts=_verdicts(evidence),
        criteria=[(title, list(_criteria(title, evidence))) for title in CRITERIA],
        speedup=known_columns([speedup(claim, evidence) for claim in pays if not claim.is_idle]),
        idle=[_idle(claim, evidence) for claim in pays if claim.is_idle],
        jumps=[_jump(claim) for claim in evidence.claims(kind="transition") if claim.value("whole_jump")],
        reliability=[row for profile in evidence.entries for row in _reliability(evidence, profile)],
        well_told=WELL_TOLD,
        quality=[
            {
                "arm": claim.about,
                **_decided(claim),
                "bound": claim.deciding and bound_in_words(claim.deciding),
                "notebook": notebook_link(claim.notebook, short=True),
            }
            for claim in evidence.claims(kind="quality")
        ],
        percents=Markdown(
            ", ".join(f"{p} ({notebook_link(n, short=True)})" for n, p in bounds_in_perplexity(evidence).items())
        ),
        memory=known_columns([_memory(notebook, row) for notebook, row in memory]),
        estimates=[estimate.cells(evidence) for estimate in ESTIMATES] if memory else [],
        copies=copies(evidence),
        copies_at_a_glance=copies_at_a_glance(evidence),
        repeats=repeats(evidence),
    )


def claims_document(evidence: Evidence) -> str:
    """Every claim of every profile."""
    profiles = []
    for profile, entries in evidence.entries.items():
        claims = {name: evidence.claims(name, profile=profile) for name in entries}
        rows = {name: [{"claim": it.sentence, **_decided(it)} for it in of] for name, of in claims.items()}
        tables = [(notebook_link(name, profile), of) for name, of in rows.items()]
        profiles.append((profile, evidence.label(profile), tables))
    return render("CLAIMS.md", claims=profiles)


def predicted_share(claim: Published) -> str | None:
    """How many of an arm's nominal steps were predicted, from its claim that it pays; of one that grew, their cost."""
    gradient = claim.value("gradient_steps")
    counted = claim.value("cost_in_full_steps" if claim.grew else "predicted_steps")
    if gradient is None or counted is None:
        return None
    in_depth = f"in depth: {gradient:.0f} at the computation of {counted:.0f} full ones"
    return in_depth if claim.grew else f"{counted:.0f} of {counted + gradient:.0f}"


def devices(evidence: Evidence) -> str:
    """The devices of the profile that decides."""
    return "; ".join(evidence.devices(MAIN)) or "nothing yet"


def at_a_glance(evidence: Evidence) -> str:
    """How many of the plan's criteria came out which way, in one sentence; those that repeat each other count once."""
    once = {criterion for title, criterion in everywhere() if title not in (IN_DEPTH, OURS)}
    counts = Counter(criterion.outcome(evidence) for criterion in once)
    words = [f"{outcome} {counts[outcome]}" for outcome in get_args(Outcome) if counts[outcome]]
    return f"The plan's {counts.total()} criteria: {'; '.join(words)}."


def _verdicts(evidence: Evidence) -> list[Cells]:
    """The first page: a row per criterion, those that the same findings decide in one."""
    alike: dict[Criterion, list[tuple[str, str]]] = {}
    for title, criterion in everywhere():
        alike.setdefault(criterion, []).append((title, criterion.text))
    return [
        {
            "of": "; ".join(dict.fromkeys(title for title, _ in group)),
            "criterion": "; ".join(dict.fromkeys(text for _, text in group)),
            "verdict": criterion_verdict(criterion, evidence),
        }
        for criterion, group in alike.items()
    ]


def criterion_verdict(criterion: Criterion, evidence: Evidence) -> str:
    """A criterion's outcome as documents set it, "emulated" beside it where it rests on that."""
    emulated = any(finding.emulated for finding in criterion.findings(evidence))
    return Markdown(verdict_word(criterion.outcome(evidence)) + (EMULATED if emulated else ""))


def _criteria(title: str, evidence: Evidence) -> Iterator[Cells]:
    """Each criterion of a group with its verdict, then, where there are several findings, their rows."""
    before = {criterion for _, criterion in takewhile(lambda it: it[0] != title, everywhere())}
    for criterion in CRITERIA[title]:
        verdict, findings = criterion_verdict(criterion, evidence), criterion.findings(evidence)
        whole = {"criterion": Markdown(f"**{escaped(criterion.text)}**"), "verdict": verdict}
        if criterion in before:
            yield whole | {"numbers": "as above", "notebook": ""}
        elif len(findings) == 1:
            yield whole | _numbers(findings[0])
        else:
            yield whole | {"numbers": "", "notebook": ""}
            yield from _rows(findings, most=1 if title in OVERALL else MOST)


def _rows(findings: Sequence[Finding], most: int) -> Iterator[Cells]:
    """A row per finding; of more than so many alike in notebook and outcome one for all, without their numbers."""
    groups: dict[Any, list[Finding]] = {}
    counts = Counter(map(_alike, findings))
    for number, finding in enumerate(findings):
        alike = _alike(finding)
        groups.setdefault(alike if counts[alike] > most else number, []).append(finding)
    mixed = len({finding.notebook for finding in findings}) > 1
    for group in groups.values():
        first, about = group[0], ", ".join(finding.about for finding in group)
        topic = first.notebook.partition("_")[2].removeprefix("gpt2_").replace("_", ", ")
        yield {
            "criterion": ("by other means: " if first.otherwise else f"{topic}: " if mixed and topic else "") + about,
            "verdict": first.outcome + (EMULATED if first.emulated else ""),
        } | _numbers(first if len(group) == 1 else replace(first, words=f"of {len(group)} arms"))


def _alike(finding: Finding) -> Any:
    return finding.notebook, finding.outcome, finding.emulated, finding.otherwise


def _numbers(finding: Finding) -> Cells:
    ran, where = finding.outcome != "not run yet", finding.notebook
    return {"numbers": finding.words, "notebook": notebook_link(where, short=True) if ran and where else where[:2]}


def speedup(claim: Published, evidence: Evidence) -> Cells:
    """Whether a hybrid pays, its control beside it."""
    time = _time(claim, evidence)
    predicted, gradient = claim.value("predicted_steps"), claim.value("gradient_steps")
    return {
        "arm": claim.about,
        "steps predicted": predicted_share(claim),
        "time over the baseline's": None if time is None else f"{time:.2f}",
        "control: share of the steps": f"{gradient / (predicted + gradient):.2f}" if predicted and gradient else None,
        "loss against the control": quantity_interval(claim.quantity("loss_to_control")),
        "p, corrected": amount(claim.value("p_value"), "probability"),
        "worth of a predicted step": quantity_interval(claim.quantity("step_value"), digits=2),
        "pays": verdict_word(claim.verdict),
        "notebook": notebook_link(claim.notebook, short=True),
    }


def _jump(claim: Published) -> Cells:
    """What a jump took, from the claim on offloading for it."""
    whole, step = claim.value("whole_jump"), claim.value("gradient_step")
    return {
        "arm": claim.about,
        "a jump": amount(whole, "ms"),
        "of that proposing": amount(claim.value("of_that_proposing"), "ms"),
        "in gradient steps": f"{whole / step:.1f}" if whole and step else None,
        "notebook": notebook_link(claim.notebook, short=True),
    }


def _reliability(evidence: Evidence, profile: str) -> Iterator[Cells]:
    """What was told before the gate's trials beside how they ended, over all runs of a profile."""
    runs = [run for rows in evidence.tables("runs", profile).values() for run in rows]
    for by, figure in RELIABILITIES.items():
        for row in pooled_reliability([outcome for run in runs for outcome in run.get(figure, [])], by):
            told, accepted, proposals = row.values()
            near = "yes" if abs(told - accepted) <= WELL_TOLD else "no"
            yield {
                "profile": profile,
                "what was told": by.replace("_", " "),
                "told": f"{told:.2f}",
                "accepted": f"{accepted:.2f}",
                "proposals": proposals,
                f"within {WELL_TOLD}": near if proposals >= ENOUGH_PROPOSALS else "too few",
            }


def _time(claim: Published, evidence: Evidence) -> float | None:
    """Over the baseline's; of older results it stands in the claim on speed."""
    times = (it.value("time_over_baseline") for it in (claim, evidence.beside(claim, "speed")) if it)
    return next((time for time in times if time is not None), None)


def _idle(claim: Published, evidence: Evidence) -> str:
    """An arm that predicted nothing, with what asking cost it where that was published."""
    time = _time(claim, evidence)
    cost = "" if time is None else f"; {time:.2f} times the baseline's time"
    return f"{claim.about} ({claim.notebook[:2]}{cost})"


def _memory(notebook: str, row: MemoryRow) -> Cells:
    predicted, measured = row.get("predicted_allocated_bytes"), row.get("measured_allocated_bytes")
    return {
        "model": row["model"],
        "arm": arm_in_words(row["arm"], notebook),
        "predicted": amount(predicted, "bytes"),
        "measured": amount(measured, "bytes"),
        "predicted over measured": f"{predicted / measured:.3f}" if predicted and measured else None,
        "peak VRAM": amount(row["peak_memory_bytes"], "bytes"),
        "notebook": notebook_link(notebook, short=True),
    }


def step_time(row: MemoryRow) -> Cells:
    """What a row of the table "memory" says of a step's time."""
    step = f"{row['step_ms']:.1f} ms" if row.get("step_ms") else None
    return {"step time": step, "GPU busy": amount(row.get("gpu_busy_percent"), "percent")}


def loss_change(row: MemoryRow) -> str | None:
    """What a row of the table "memory" lost against the control."""
    return interval(row.get("loss_change"), row.get("loss_change_low"), row.get("loss_change_high"))


def bounds_in_perplexity(evidence: Evidence) -> dict[str, str]:
    """Notebook -> what its bound on the loss of memory settings, 1 % of the control's, is in perplexity."""
    losses = [(claim.notebook, claim.quantity("loss_change")) for claim in evidence.claims(kind="quality")]
    return {notebook: f"{100 * math.expm1(loss.bound):.1f} %" for notebook, loss in losses if loss and loss.bound}


def _decided(claim: Published) -> Cells:
    return {"verdict": verdict_word(claim.verdict), "numbers": claim.numbers}


def copies(evidence: Evidence) -> list[Cells]:
    """A row per executed copy: device, torch, commit, and whether its code and its parameters are today's."""
    return [
        {
            "profile": profile,
            "notebook": notebook_link(notebook, profile, short=True),
            "commit": entry.get("git_commit", "unknown"),
            "torch": entry.get("versions", {}).get("torch"),
            "device": device_of(entry),
            "code that trains": _state(entry, "trains"),
            "code that measures": _state(entry, "measures"),
            "parameters changed since": ", ".join(evidence.changed_parameters(notebook, profile)) or None,
        }
        for profile, entries in evidence.entries.items()
        for notebook, entry in entries.items()
    ]


def copies_at_a_glance(evidence: Evidence) -> str:
    """How many devices and commits the copies of the deciding profile come from, and how many ran by today's code."""
    entries = list(evidence.entries.get(MAIN, {}).values())
    if not entries:
        return f"{MAIN}: nothing has run yet."
    numbers = {"kind": len(evidence.devices(MAIN)), "commit": len({entry.get("git_commit") for entry in entries})}
    kinds, commits = (f"{count} {name}{'s' if count != 1 else ''}" for name, count in numbers.items())
    states = Counter(_state(entry, "trains") for entry in entries)
    said = ", ".join(f"{state} in {count}" for state, count in states.items())
    return f"{MAIN}: {len(entries)} copies on {kinds} of GPU, at {commits}. Their code that trains is: {said}."


def _state(entry: Entry, kind: str) -> str:
    """By its own hash, in which words and places do not count."""
    hashed = entry.get("code", {}).get(kind)
    if hashed is None:
        return "not recorded"
    return "today's" if hashed == code_hashes()[kind] else f"changed since ({hashed})"


def repeats(evidence: Evidence) -> list[Cells]:
    """A row per figure that decides a claim and was measured more than once: every value, and from where to where."""
    claims = [claim for profile in evidence.entries for claim in evidence.claims(profile=profile)]
    rows = [row for claim in claims if (row := _repeated(claim, evidence.entries[claim.profile][claim.notebook]))]
    return list({(row["notebook"], row["measured"]): row for row in reversed(rows)}.values())[::-1]


def _repeated(claim: Published, entry: Entry) -> Cells | None:
    """Nothing where it was measured once."""
    q = claim.deciding
    if q is None or q.value is None:
        return None
    measured = [(repeat["figures"].get(f"{claim.id}.{q.name}"), repeat) for repeat in entry.get("repeats", ())]
    known = [(figure, repeat) for figure, repeat in measured if figure and figure["value"] is not None]
    if not known:
        return None
    values = [(q, entry), *((Quantity(q.name, **figure, unit=q.unit), repeat) for figure, repeat in known)]
    numbers = [one.value for one, _ in values if one.value is not None]
    return {
        "claim": f"{claim.about}: {name_in_words(named_in_full(q), grown=claim.grew)}",
        "notebook": notebook_link(claim.notebook, claim.profile, short=True),
        "measured": "; ".join(f"{in_words(one)} ({_origin(where, entry)})" for one, where in values),
        "times": len(values),
        "from": amount(min(numbers), q.unit),
        "to": amount(max(numbers), q.unit),
    }


def _origin(measured: Entry, entry: Entry) -> str:
    """The commit; and the device, where it is another one than the entry's."""
    commit, device = measured.get("git_commit", "unknown"), device_of(measured)
    return commit if device == device_of(entry) and measured is not entry else f"{commit}, {device}"
