"""The first screen of a notebook: what it found, in sentences, a table of verdicts and the picture that decides."""

from __future__ import annotations

import html
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from IPython.display import display, update_display

from hybridlab.charts.display import Chart, Panels
from hybridlab.charts.tables import Table, table
from hybridlab.results.claims import Claim, Verdict
from hybridlab.results.words import bound_in_words, in_words, quantities_in_words
from hybridlab.study.comparison import Comparison

PLACES = ("hybridlab-answer", "hybridlab-answer-picture")
"""The display ids of the answer's two outputs."""

SHORT = ("value", "bound", "verdict")
"""Columns of the answer's table whose cells stay on one line."""

ALONE = 2
"""More claims than these of one kind and verdict are one row of the answer."""

IDLE: Verdict = "predicted nothing"
"""The verdict on an arm that did."""

VERBS: dict[Verdict, tuple[str, str]] = {
    "holds": ("holds", "hold"),
    "fails": ("fails", "fail"),
    "open": ("is open", "are open"),
    IDLE: ("predicted nothing", "predicted nothing"),
}
"""Each verdict of one claim, and of several."""

NAMED = 3
"""A sentence names so many claims; the others are counted."""


@dataclass(frozen=True)
class Answer:
    """Sentences above a table of verdicts; without a table, the sentences alone."""

    sentences: tuple[str, ...]
    verdicts: Table | None = None

    def __str__(self) -> str:
        return "\n".join([*self.sentences, *([str(self.verdicts)] if self.verdicts else [])])

    def _repr_mimebundle_(self, **_: object) -> dict[str, str]:
        paragraphs = "".join(f"<p>{html.escape(sentence)}</p>\n" for sentence in self.sentences)
        verdicts = self.verdicts.html(unbroken=SHORT) if self.verdicts else ""
        return {"text/html": paragraphs + verdicts, "text/plain": str(self)}


def answer_place() -> None:
    """Keep a notebook's first screen for what `show_answer` writes there when every cell has run."""
    display(Answer(("The answer is shown here when every cell has run.",)), display_id=PLACES[0])  # type: ignore[no-untyped-call]
    display(Answer(()), display_id=PLACES[1])  # type: ignore[no-untyped-call]


def show_answer(sentences: Iterable[str], claims: Sequence[Claim], picture: Chart | Panels | str | None = None) -> None:
    """Write the answer at the top: one to three sentences, the verdicts, and the picture that decides, if there is."""
    verdicts = table(answer_rows(claims), "Every claim with what decides it") if claims else None
    update_display(Answer(tuple(sentences), verdicts), display_id=PLACES[0])  # type: ignore[no-untyped-call]
    if not isinstance(picture, str | None):
        update_display(picture, display_id=PLACES[1])  # type: ignore[no-untyped-call]


def claims_table(claims: Iterable[Claim]) -> Table:
    """Every claim with its verdict and all of its numbers, times and memory included; these differ from run to run."""
    rows = [{"verdict": c.verdict, "claim": c.text, "numbers": quantities_in_words(c.quantities)} for c in claims]
    return table(rows or [{"verdict": None, "claim": "nothing is claimed: see the table above", "numbers": None}])


def answer_rows(claims: Iterable[Claim]) -> list[dict[str, Any]]:
    """A row per claim; many claims of one kind and verdict, and all that predicted nothing, are one with their range.

    What the notebook asks, whether predicting pays, comes first; then what was decided.
    """
    alike: dict[tuple[str, str], list[Claim]] = defaultdict(list)
    for claim in claims:
        alike[claim.verdict, claim.kind].append(claim)
    order = get_args(Verdict)

    def place(group: Sequence[Claim]) -> tuple[bool, bool, int]:
        return group[0].verdict == IDLE, group[0].kind != "pays", order.index(group[0].verdict)

    def is_one_row(group: Sequence[Claim]) -> bool:
        return len(group) > (1 if group[0].verdict == IDLE else ALONE)

    groups = sorted(alike.values(), key=place)
    return [row for group in groups for row in ([_range(group)] if is_one_row(group) else map(_row, group))]


def claims_in_sentences(claims: Sequence[Claim]) -> list[str]:
    """How many claims have which verdict, one that holds, and which do not, with the numbers that decide.

    Of claims of one kind, those that hold are named and not counted: the table below has other kinds beside them.
    """
    by = {verdict: [c for c in claims if c.verdict == verdict] for verdict in VERBS}
    several = len({c.kind for c in claims}) > 1
    shown = by | {"holds": by["holds"][:1]} if several else by
    words: dict[Verdict, str] = {
        "holds": "One that holds" if several else "What holds",
        "fails": "What fails",
        "open": "Open, which these numbers cannot decide",
    }
    named = [f"{word}: {_named(shown[verdict])}." for verdict, word in words.items() if shown[verdict]]
    return [_count(by), *named] if several else named


def _count(by: Mapping[Verdict, Sequence[Claim]]) -> str:
    """As "1 of 3 claims holds, 2 are open."."""
    total = sum(map(len, by.values()))
    said = {v: f"{len(of)} {VERBS[v][len(of) != 1]}" for v, of in by.items() if of or v == "holds"}
    return ", ".join(said.values()).replace(" ", f" of {total} claims ", 1) + "."


def comparisons_in_sentences(comparisons: Sequence[Comparison]) -> list[str]:
    """Whether predicting pays: how many arms beat stopping earlier, the best of them, and those that never did."""
    predicted = [c for c in comparisons if c.predicted]
    idle = [c for c in comparisons if not c.predicted and c.validation_loss.mean != math.inf]
    sentences = [c.sentence for c in comparisons if not c.predicted and c not in idle]
    if predicted:
        paying, best = [c for c in predicted if c.pays], min(predicted, key=lambda c: c.order)
        beats, of = "Prediction beats stopping earlier", f"{len(predicted)} arms that predicted anything"
        if all(c.grown for c in predicted):
            beats, of = "Growing beats a plain run of as much computation", f"{len(predicted)} arms"
        sentences += [
            f"{beats} in {len(paying)} of {of}.",
            f"The lowest loss against its control: {best.sentence}",
        ]
    if idle:
        names = "; ".join(c.name for c in idle)
        sentences.append(f"Predicted nothing, every step was a gradient step: {names}. {_why_idle(idle)}")
    return sentences


def _why_idle(idle: Sequence[Comparison]) -> str:
    """What refused the proposals of arms that predicted nothing, and what asking took."""
    tried, unsure = sum(c.rejected for c in idle), [c for c in idle if not c.rejected]
    why = [f"{tried} proposals were tried: none beat the steps that it would replace."] if tried else []
    if unsure:
        why.append(f"Nothing was tried, as {unsure[0].why_idle}: {'; '.join(c.name for c in unsure)}.")
    times = " to ".join(dict.fromkeys(f"{c(one.time_ratio.mean for one in idle):.2f}" for c in (min, max)))
    return " ".join([*why, f"Their runs took {times} times the baseline's time: run plain training instead."])


def _named(claims: Sequence[Claim]) -> str:
    named = [
        f"{c.text} ({quantities_in_words([c.deciding], c.quantities)})" if c.deciding else c.text
        for c in claims[:NAMED]
    ]
    return "; ".join([*named, *([f"and {len(claims) - NAMED} more"] if len(claims) > NAMED else [])])


def _row(claim: Claim) -> dict[str, Any]:
    value, bound = (in_words(q), bound_in_words(q)) if (q := claim.deciding) else (None, None)
    return {"claim": claim.text, "value": value, "bound": bound, "verdict": claim.verdict}


def _range(group: Sequence[Claim]) -> dict[str, Any]:
    """Claims of one kind and verdict in one row: the least and the greatest of what decides them."""
    decided = [c.deciding for c in group if c.deciding and c.deciding.value is not None]
    ordered = sorted(decided, key=lambda q: q.value or 0.0)
    what = group[0].text.partition(": ")[2] if group[0].arm else group[0].text
    if len(seeds := sorted({int(n) for c in group if (n := c.value("seeds"))})) > 1:
        what = re.sub(r"\((\d+|one) seeds?\)", f"({seeds[0]} to {seeds[-1]} seeds)", what)
    return {
        "claim": f"{what} ({len(group)} arms)",
        "value": " … ".join(dict.fromkeys(map(in_words, ordered[:1] + ordered[-1:]))) or None,
        "bound": bound_in_words(ordered[0]) if len({q.bound for q in decided}) == 1 else None,
        "verdict": group[0].verdict,
    }
