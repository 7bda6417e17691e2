"""What the results files hold: entries by profile and notebook, their claims and tables."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Self

from hybridlab.results.publish import Verdict, load_results

PROFILES = {
    "rtx5080": "the plan's scale, on a GPU",
    "cpu": "small scale, on two CPU cores",
    "cpu_long": "small scale, every predictor",
}
MAIN = "rtx5080"
"""The profile that decides the plan's criteria: they are about a GPU."""

REPORT = "09_report"
"""The notebook that only reads results: its own entry is no evidence."""

Entry = Mapping[str, Any]
Numbers = Mapping[str, float | int | str | None]


@dataclass(frozen=True)
class Found:
    """A claim as it was published: profile and notebook say where, the rest is the claim's own."""

    profile: str
    notebook: str
    id: str
    text: str
    verdict: Verdict
    numbers: Numbers

    @property
    def arm(self) -> str:
        """What the claim is about: its sentence up to the colon, or its id."""
        name, sign, _ = self.text.partition(":")
        return name if sign else self.id

    @property
    def is_idle(self) -> bool:
        """Whether it is about predicting, and its hybrid took gradient steps only."""
        return self.id.endswith("-pays") and self.numbers.get("predicted_steps") == 0

    @property
    def outcome(self) -> str:
        """The verdict; about predicting, a hybrid that never did has shown nothing."""
        return "predicted nothing" if self.is_idle else self.verdict


@dataclass(frozen=True)
class Evidence:
    """Every committed result. entries: profile -> notebook -> what it published."""

    entries: Mapping[str, Mapping[str, Entry]]

    @classmethod
    def read(cls, root: Path) -> Self:
        """Read `executed/*/results.json` below a project's root; what was never run is absent."""
        read = {profile: load_results(root / "executed" / profile / "results.json") for profile in PROFILES}
        own = {profile: {k: v for k, v in entries.items() if k != REPORT} for profile, entries in read.items()}
        return cls({profile: dict(sorted(entries.items())) for profile, entries in own.items() if entries})

    def __iter__(self) -> Iterator[tuple[str, str, Entry]]:
        """Every entry with its profile and notebook."""
        return ((p, notebook, entry) for p, entries in self.entries.items() for notebook, entry in entries.items())

    def entry(self, notebook: str, profile: str = MAIN) -> Entry | None:
        """What a notebook published, or None where it has not run."""
        return self.entries.get(profile, {}).get(notebook)

    def claims(self, notebook: str, *patterns: str, profile: str = MAIN) -> list[Found]:
        """The claims whose ids match one of the patterns ("*-quality"), in the notebook's order."""
        entry = self.entry(notebook, profile) or {}
        found = [Found(profile, notebook, **claim) for claim in entry.get("claims", [])]
        return [claim for claim in found if any(fnmatchcase(claim.id, pattern) for pattern in patterns)]

    def tables(self, name: str) -> dict[str, list[dict[str, Any]]]:
        """Rows by notebook, for every notebook of the main profile that published a table of this name."""
        entries = self.entries.get(MAIN, {})
        found = {notebook: entry.get("tables", {}).get(name) for notebook, entry in entries.items()}
        return {notebook: rows for notebook, rows in found.items() if rows}

    def devices(self, profile: str) -> list[str]:
        """What a profile was measured on."""
        return sorted({entry["device"] for entry in self.entries.get(profile, {}).values()})

    def sha256(self) -> str:
        """The hash of everything that documents are written from."""
        return hashlib.sha256(json.dumps(self.entries, sort_keys=True).encode()).hexdigest()
