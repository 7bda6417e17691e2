"""What notebook 09 shows: the documents' tables, to sort and search."""

from __future__ import annotations

from typing import Any

from hybridlab.charts.display import Chart
from hybridlab.charts.tables import LiveTable, Table, table
from hybridlab.report.criteria import CRITERIA
from hybridlab.report.evidence import Evidence
from hybridlab.report.pictures import charts_of
from hybridlab.results.words import quantities_in_words


def criteria_table(evidence: Evidence) -> Table:
    """Every criterion of the plan with its verdict, and where it was measured."""
    rows: list[dict[str, Any]] = []
    for group, criteria in CRITERIA.items():
        for criterion in criteria:
            notebooks = dict.fromkeys(finding.notebook for finding in criterion.findings(evidence) if finding.notebook)
            where = ", ".join(notebook[:2] for notebook in notebooks)
            rows.append({"of": group, "criterion": criterion.text, "verdict": criterion.outcome(evidence), "in": where})
    return table(rows, "The plan's success criteria, decided by what was measured on a GPU")


def claims_browser(evidence: Evidence) -> LiveTable:
    """Every claim of every notebook and profile."""
    rows = [
        {
            "profile": profile,
            "notebook": claim.notebook,
            "claim": claim.sentence,
            "verdict": claim.verdict,
            "numbers": quantities_in_words(claim.quantities),
        }
        for profile in evidence.entries
        for claim in evidence.claims(profile=profile)
    ]
    return LiveTable(table(rows, f"{len(rows)} claims") if rows else None, "no notebook has published a claim yet")


def charts_beginning(evidence: Evidence, *names: str) -> list[Chart]:
    """The documents' charts whose files' names begin so: against_control, memory_breakdown, quality or vram."""
    return [chart for name, chart in charts_of(evidence).items() if name.startswith(names)]
