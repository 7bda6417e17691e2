"""What the results files hold: entries by profile and notebook, their claims and tables."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from hybridlab.notebook.views.depth import GROWN
from hybridlab.report.judged import judged
from hybridlab.results.claims import Claim
from hybridlab.results.reading import load_results

MAIN = "rtx5080"
"""The profile that decides the plan's criteria: they are about a GPU."""

MEMORY_NOTEBOOKS = ("00_", "04_", "05_", "06_")
"""How the notebooks begin whose arms are memory settings."""

REPORT = "09_report"
"""The notebook that only reads results: its own entry is no evidence."""

PRESETS = ("conservative", "aggressive")
"""Names that the presets of prediction and those of memory share."""

EARLIER_NAMES = {"card_busy_percent": "gpu_busy_percent"}
"""Columns of tables by their names in older results, and what they are called now."""

Entry = Mapping[str, Any]


def arm_in_words(arm: str, notebook: str) -> str:
    """An arm as documents name it: of a preset, whether of prediction or of memory; of a grown one, what it is."""
    if arm == GROWN:
        return f"{arm} (prediction in depth)"
    kind = "memory" if notebook.startswith(MEMORY_NOTEBOOKS) else "prediction"
    return f"{arm} ({kind} preset)" if arm.partition(",")[0] in PRESETS else arm


@dataclass(frozen=True)
class Published(Claim):
    """A claim, and the profile and notebook that published it."""

    profile: str = MAIN
    notebook: str = ""

    @property
    def about(self) -> str:
        """Its arm in words, or where it has none, its id."""
        return arm_in_words(self.arm, self.notebook) or self.id

    @property
    def sentence(self) -> str:
        """Its text, its arm in words."""
        return self.text.replace(f"{self.arm}: ", f"{self.about}: ", 1) if self.arm else self.text

    @property
    def grew(self) -> bool:
        """Whether it is about an arm that predicted depth, not time: that one says what its steps cost."""
        return self.quantity("cost_in_full_steps") is not None

    @property
    def is_idle(self) -> bool:
        """Whether it is about a hybrid that took gradient steps only."""
        return self.verdict == "predicted nothing"


@dataclass(frozen=True)
class Evidence:
    """Every committed result.

    entries: profile -> notebook -> what it published; planned: what `hybridlab.benchmarks.recipes` wrote
    labels: profile -> what documents call it, from the table [tool.hybridlab.profiles] of `pyproject.toml`
    """

    entries: Mapping[str, Mapping[str, Entry]]
    planned: Mapping[str, Any] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, root: Path) -> Self:
        """Read `executed/*/results.json` and `recipes.json` below a project's root; what was never run is absent."""
        labels = _labels(root / "pyproject.toml")
        there = sorted(path.parent.name for path in root.glob("executed/*/results.json"))
        profiles = [*(profile for profile in labels if profile in there), *(p for p in there if p not in labels)]
        read = {profile: load_results(root / "executed" / profile / "results.json") for profile in profiles}
        own = {profile: {k: v for k, v in entries.items() if k != REPORT} for profile, entries in read.items()}
        recipes = root / "executed" / MAIN / "recipes.json"
        planned = json.loads(recipes.read_text(encoding="utf-8")) if recipes.exists() else {}
        entries = {profile: dict(sorted(of.items())) for profile, of in own.items() if of}
        return cls(entries, planned, labels)

    def label(self, profile: str) -> str:
        """What documents call a profile."""
        return self.labels.get(profile, profile)

    def entry(self, notebook: str, profile: str = MAIN) -> Entry | None:
        """What a notebook published, or None where it has not run."""
        return self.entries.get(profile, {}).get(notebook)

    def claims(
        self, notebook: str | None = None, *, kind: str | None = None, arm: str | None = None, profile: str = MAIN
    ) -> list[Published]:
        """A profile's claims in the order of its notebooks, of one notebook, kind or arm where these are given."""
        claims = [
            claim
            for name, entry in self.entries.get(profile, {}).items()
            if notebook in (None, name)
            for claim in _claims(profile, name, entry)
        ]
        return [claim for claim in claims if kind in (None, claim.kind) and arm in (None, claim.arm)]

    def beside(self, claim: Published, kind: str) -> Published | None:
        """The claim of another kind that the same notebook makes on the same arm."""
        return next(iter(self.claims(claim.notebook, kind=kind, arm=claim.arm, profile=claim.profile)), None)

    def tables(self, name: str, profile: str = MAIN) -> dict[str, list[dict[str, Any]]]:
        """Rows by notebook, for every notebook of a profile that published a table of this name."""
        found = {n: entry.get("tables", {}).get(name) for n, entry in self.entries.get(profile, {}).items()}
        return {notebook: [_renamed(row) for row in rows] for notebook, rows in found.items() if rows}

    def devices(self, profile: str) -> list[str]:
        """What a profile was measured on."""
        return sorted({device_of(entry) for entry in self.entries.get(profile, {}).values()})

    def is_emulated(self, notebook: str, profile: str = MAIN) -> bool:
        """Whether a larger GPU stood for a smaller one when this notebook ran."""
        return "emulated" in str((self.entry(notebook, profile) or {}).get("device", ""))

    def sha256(self) -> str:
        """The hash of everything that documents are written from."""
        return hashlib.sha256(json.dumps(self.entries, sort_keys=True).encode()).hexdigest()


def _labels(pyproject: Path) -> dict[str, str]:
    """Of the profiles, by name; empty where the file has none."""
    try:
        tables = tomllib.loads(pyproject.read_text(encoding="utf-8"))
        return dict(tables["tool"]["hybridlab"]["profiles"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def device_of(entry: Entry) -> str:
    """What an entry was measured on, in today's words."""
    return str(entry["device"]).replace("GB card", "GB GPU")


def _renamed(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a table with today's names; older results have some by earlier ones."""
    return {EARLIER_NAMES.get(name, name): value for name, value in row.items()}


def _claims(profile: str, notebook: str, entry: Entry) -> list[Published]:
    """An entry's claims, with the verdicts that their bases allow."""
    claims = [Published.from_record(claim, profile=profile, notebook=notebook) for claim in entry.get("claims", [])]
    return judged(claims, entry["parameters"])
