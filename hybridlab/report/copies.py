"""Where each executed copy ran and by which code, and what was measured more than once."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hybridlab.report.evidence import MAIN, Entry, Evidence, Published, device_of
from hybridlab.report.words import notebook_link
from hybridlab.results.claims import Quantity
from hybridlab.results.words import amount, in_words, name_in_words
from hybridlab.study.code_version import code_hashes

Cells = dict[str, Any]

TODAYS, CHANGED, UNKNOWN = "today's", "changed since", "not recorded"


def copies(evidence: Evidence) -> list[Cells]:
    """A row per executed copy: device, torch, commit, and whether the code that trains and measures is today's."""
    return [
        {
            "profile": profile,
            "notebook": notebook_link(notebook, profile, short=True),
            "commit": entry.get("git_commit", "unknown"),
            "torch": entry.get("versions", {}).get("torch"),
            "device": device_of(entry),
            "code that trains": _state(entry, "trains"),
            "code that measures": _state(entry, "measures"),
        }
        for profile, entries in evidence.entries.items()
        for notebook, entry in entries.items()
    ]


def copies_at_a_glance(evidence: Evidence) -> str:
    """How many devices and commits the copies of the deciding profile come from, and how many ran by today's code."""
    entries = list(evidence.entries.get(MAIN, {}).values())
    kinds, commits = len(evidence.devices(MAIN)), len({entry.get("git_commit") for entry in entries})
    states = Counter(_state(entry, "trains") for entry in entries)
    said = ", ".join(f"{state} in {count}" for state, count in states.items())
    where = f"{len(entries)} copies on {_several(kinds, 'kind')} of GPU, at {_several(commits, 'commit')}"
    return f"{MAIN}: {where}. Their code that trains is: {said}."


def _several(count: int, name: str) -> str:
    return f"{count} {name}{'s' if count != 1 else ''}"


def _state(entry: Entry, kind: str) -> str:
    """By its own hash, in which words and places do not count."""
    hashed = entry.get("code", {}).get(kind)
    if hashed is None:
        return UNKNOWN
    return TODAYS if hashed == code_hashes()[kind] else f"{CHANGED} ({hashed})"


def repeats(evidence: Evidence) -> list[Cells]:
    """A row per figure that decides a claim and was measured more than once: every value, and from where to where."""
    rows = [
        row
        for profile, entries in evidence.entries.items()
        for claim in evidence.claims(profile=profile)
        if (row := _repeated(claim, entries[claim.notebook]))
    ]
    return list({(row["notebook"], row["measured"]): row for row in reversed(rows)}.values())[::-1]


def _repeated(claim: Published, entry: Entry) -> Cells | None:
    """Nothing where it was measured once."""
    q = claim.deciding
    if q is None or q.value is None:
        return None
    measured = [(repeat["figures"].get(f"{claim.id}.{q.name}"), repeat) for repeat in entry.get("repeats", ())]
    earlier = [(Quantity(q.name, **figure, unit=q.unit), repeat) for figure, repeat in measured if figure]
    values = [(q, entry), *((one, repeat) for one, repeat in earlier if one.value is not None)]
    least, most = (end(values, key=lambda it: it[0].value or 0.0)[0].value for end in (min, max))
    return (
        {
            "claim": f"{claim.about}: {name_in_words(q)}",
            "notebook": notebook_link(claim.notebook, claim.profile, short=True),
            "measured": "; ".join(f"{in_words(one)} ({_origin(where, entry)})" for one, where in values),
            "times": len(values),
            "from": amount(least, q.unit),
            "to": amount(most, q.unit),
        }
        if earlier
        else None
    )


def _origin(measured: Entry, entry: Entry) -> str:
    """The commit; and the device, where it is another one than the entry's."""
    commit, device = measured.get("git_commit", "unknown"), device_of(measured)
    return commit if device == device_of(entry) and measured is not entry else f"{commit}, {device}"
