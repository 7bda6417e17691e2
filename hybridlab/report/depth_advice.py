"""How deep a model to train, and whether to grow it: by budget, from what was published on shallow controls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hybridlab.models.gpt2 import SIZES, GPT2Config
from hybridlab.report.evidence import Evidence, Published
from hybridlab.report.validation import Cells
from hybridlab.report.words import notebook_link
from hybridlab.results.words import in_words, quantity_interval
from hybridlab.study.base import LEAST

ADVICE = {
    ("holds", "holds"): "grow it",
    ("holds", "fails"): "train the shallow model: depth does not pay yet",
    ("holds", "open"): "grow it, or train the shallow model: open which",
    ("fails", "holds"): "train all blocks from the start",
    ("fails", "fails"): "train the shallow model",
    ("fails", "open"): "train all blocks from the start, or the shallow model: open which",
}
"""By the verdicts on growing and on depth; with any other, the runs cannot tell."""


def depth_advice(evidence: Evidence) -> list[Cells]:
    """A row per budget and first depth of every profile, by model and by tokens per parameter.

    Runs that only show that a notebook works are left out.
    """
    rows = [row for profile in evidence.entries for row in _rows(evidence, profile)]
    models = list(dict.fromkeys(row["model"] for row in rows))
    rows.sort(key=lambda row: (models.index(row["model"]), float(row["tokens per parameter"] or 0)))
    return rows


def _rows(evidence: Evidence, profile: str) -> Iterator[Cells]:
    for depth in evidence.claims(kind="depth-pays", profile=profile):
        entry, pays = evidence.entry(depth.notebook, profile) or {}, evidence.beside(depth, "pays")
        if pays is not None and (pays.value("gradient_steps") or 0) >= LEAST.steps:
            yield _row(entry.get("parameters", {}), pays, depth)


def _row(parameters: Mapping[str, Any], pays: Published, depth: Published) -> Cells:
    ratios = {name: q and in_words(q) for name in ("compute_to_loss", "time_to_loss") for q in [pays.quantity(name)]}
    return {
        "model": parameters.get("model"),
        "tokens per parameter": _tokens_per_parameter(parameters, pays),
        "arm": pays.arm if "budgets" in parameters else _with_budget(parameters),
        "against as much computation": quantity_interval(pays.quantity("loss_to_control")),
        "growing pays": pays.verdict,
        "against the shallow model": quantity_interval(depth.quantity("loss_to_shallow")),
        "depth pays": depth.verdict,
        "computation to its loss": ratios["compute_to_loss"] or "open",
        "time to its loss": ratios["time_to_loss"] or "open",
        "what to run": ADVICE.get((pays.verdict, depth.verdict), "open"),
        "notebook": notebook_link(pays.notebook, pays.profile, short=True),
        "profile": pays.profile,
    }


def _tokens_per_parameter(parameters: Mapping[str, Any], pays: Published) -> str | None:
    """That the grown run has seen; None for a model that is no GPT-2 of ours."""
    if parameters.get("model") not in SIZES or "vocab_size" not in parameters:
        return None
    block_size = parameters["block_size"]
    model = GPT2Config.named(parameters["model"], vocab_size=parameters["vocab_size"], block_size=block_size)
    tokens = (pays.value("gradient_steps") or 0) * parameters["batch_size"] * block_size
    return f"{tokens / model.parameter_count:.2g}"


def _with_budget(parameters: Mapping[str, Any]) -> str:
    """The grown arm of a notebook with one budget, in the words of notebook 10."""
    return f"grown from {parameters['first_blocks']}, {parameters.get('depth_steps') or parameters['steps']} steps"
