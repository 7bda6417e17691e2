"""How deep a model to train, and whether to grow it: by budget, from what notebook 10 published."""

from __future__ import annotations

from collections.abc import Iterator

from hybridlab.report.evidence import Evidence, Published
from hybridlab.report.validation import Cells, notebook_link
from hybridlab.results.words import in_words, quantity_interval

NOTEBOOK = "10_predicted_depth"

ADVICE = {
    ("holds", "holds"): "grow it: that beats as much computation, and the depth pays",
    ("holds", "fails"): "train the shallow model: growing beats as much computation, and depth does not pay yet",
    ("holds", "open"): "grow it, or train the shallow model: these runs do not tell them apart",
    ("fails", "holds"): "train all blocks from the start",
    ("fails", "fails"): "train the shallow model",
    ("fails", "open"): "train all blocks from the start, or the shallow model: these runs do not tell them apart",
}
"""By the verdicts on growing and on depth; with any other, the runs cannot tell."""


def depth_advice(evidence: Evidence) -> list[Cells]:
    """A row per budget and first depth, of every profile."""
    return [row for profile in evidence.entries for row in _rows(evidence, profile)]


def _rows(evidence: Evidence, profile: str) -> Iterator[Cells]:
    entry = evidence.entry(NOTEBOOK, profile) or {}
    for depth in evidence.claims(NOTEBOOK, kind="depth-pays", profile=profile):
        pays = evidence.beside(depth, "pays")
        if pays is not None:
            yield _row(entry.get("parameters", {}).get("model"), pays, depth)


def _row(model: str | None, pays: Published, depth: Published) -> Cells:
    ratios = {name: q and in_words(q) for name in ("compute_to_loss", "time_to_loss") for q in [pays.quantity(name)]}
    return {
        "profile": pays.profile,
        "model": model,
        "arm": pays.arm,
        "against as much computation": quantity_interval(pays.quantity("loss_to_control")),
        "growing pays": pays.verdict,
        "against the shallow model": quantity_interval(depth.quantity("loss_to_shallow")),
        "depth pays": depth.verdict,
        "computation to its loss": ratios["compute_to_loss"] or "open",
        "time to its loss": ratios["time_to_loss"] or "open",
        "what to run": ADVICE.get((pays.verdict, depth.verdict), "open: these runs cannot tell"),
        "notebook": notebook_link(NOTEBOOK, pays.profile, short=True),
    }
