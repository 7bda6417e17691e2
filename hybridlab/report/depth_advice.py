"""How deep a model to train, and whether to grow it: by budget, from what notebook 10 published."""

from __future__ import annotations

from collections.abc import Iterator

from hybridlab.report.evidence import Evidence, Published
from hybridlab.report.validation import Cells, notebook_link
from hybridlab.results.words import quantity_interval

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
    numbers = {name: pays.quantity(name) for name in ("loss_to_control", "compute_to_loss", "time_to_loss")}
    shown = {name: None if q is None or q.value is None else quantity_interval(q) for name, q in numbers.items()}
    shallow = depth.quantity("loss_to_shallow")
    return {
        "profile": pays.profile,
        "model": model,
        "arm": pays.arm,
        "against as much computation": shown["loss_to_control"],
        "growing pays": pays.verdict,
        "against the shallow model": shallow and quantity_interval(shallow),
        "depth pays": depth.verdict,
        "computation to its loss": shown["compute_to_loss"] or "open",
        "time to its loss": shown["time_to_loss"] or "open",
        "what to run": ADVICE.get((pays.verdict, depth.verdict), "open: these runs cannot tell"),
        "notebook": notebook_link(NOTEBOOK, pays.profile, short=True),
    }
