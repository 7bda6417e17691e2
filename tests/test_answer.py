"""A notebook's first screen: sentences, verdicts and the picture that decides."""

from __future__ import annotations

import re
from dataclasses import replace

import nbformat
import pytest

from hybridlab.base.errors import UserError
from hybridlab.batch.run import prepared, run_notebook
from hybridlab.engine.config import HybridTrainerConfig
from hybridlab.notebook.views.answer import answer_rows, claims_in_sentences
from hybridlab.notebook.views.your_model import blocks_in, fit_report, steps_within
from hybridlab.optim import Schedule
from hybridlab.results.claims import Claim, Quantity, Verdict
from hybridlab.study import RunConfig, Study, TextTaskConfig
from tests.notebook_maker import save, tiny_notebook

PLACE = "from hybridlab.notebook import answer_place\nanswer_place()"
END = """\
from hybridlab.charts.builders import interval_chart
from hybridlab.notebook import Claim, Quantity, show_answer
loss = Quantity("loss", 2.5, 2.4, 2.6, "nats", bound=2.0)
picture = interval_chart("Which is lower?", "nats", [("hybrid", 2.5, 2.4, 2.6)])
show_answer(["It fails at 2.5 nats."], [Claim("low", "the loss is low", "fails", (loss,))], picture)
"""


def claim(verdict: Verdict, value: float, arm: str = "") -> Claim:
    text = f"{arm}: it is low" if arm else "it is low"
    return Claim("low", text, verdict, (Quantity("seeds", 3), Quantity("loss", value, unit="nats", bound=1.0)), arm)


def test_the_answer_stands_at_the_top_of_an_executed_copy(root):
    """Written by the last cell, kept in the first output; its table of verdicts needs no JavaScript."""
    run_notebook(prepared(save(tiny_notebook(PLACE, END), root / "tiny.ipynb"), root / "out" / "tiny.ipynb"))
    cells = nbformat.read(root / "out" / "tiny.ipynb", as_version=4).cells
    answer, picture = next(cell for cell in cells if "answer_place()" in cell.source).outputs
    assert "It fails at 2.5 nats." in answer.data["text/plain"]
    assert re.search(r"<td style=\"[^\"]*color: #\w+[^\"]*\">fails</td>", answer.data["text/html"])
    assert re.search(
        r"the loss is low +\+2\.500 \[\+2\.400, \+2\.600\] nats +2\.000 nats +fails", answer.data["text/plain"]
    )
    assert {"image/png", "application/vnd.plotly.v1+json"} <= picture.data.keys()
    assert [output for cell in cells if "show_answer" in cell.source for output in cell.outputs] == []


def test_what_was_decided_comes_first_and_many_arms_are_one_row():
    idle = [claim("predicted nothing", value, f"arm {value}") for value in (0.5, 2.0, 1.5)]
    rows = answer_rows([*idle, claim("open", 1.0, "a"), claim("fails", 3.0, "b"), claim("holds", 0.5, "c")])
    assert [row["verdict"] for row in rows] == ["holds", "fails", "open", "predicted nothing"]
    assert rows[1] == {"claim": "b: it is low", "value": "3.000 nats", "bound": "1.000 nats", "verdict": "fails"}
    assert (rows[3]["claim"], rows[3]["value"]) == ("it is low (3 arms)", "0.500 nats … 2.000 nats")
    asked = Claim("pays", "a: it pays", "open", (), "a")
    assert answer_rows([claim("holds", 0.5, "c"), asked])[0]["claim"] == "a: it pays"


def test_arms_in_one_row_name_all_their_numbers_of_seeds():
    arms = [
        Claim(
            "low", f"{arm}: it is low ({seeds} seeds)", "holds", (Quantity("loss", 1.0), Quantity("seeds", seeds)), arm
        )
        for arm, seeds in zip("abc", (4, 3, 4), strict=True)
    ]
    assert [row["claim"] for row in answer_rows(arms)] == ["it is low (3 to 4 seeds) (3 arms)"]
    open_ones = [
        Claim(
            "low",
            f"{arm}: it is low ({n} seeds) (too little to tell: {n} of 3 seeds)",
            "open",
            (Quantity("seeds", n),),
            arm,
        )
        for arm, n in zip("abc", (2, 1, 2), strict=True)
    ]
    (row,) = answer_rows(open_ones)
    assert row["claim"].startswith("it is low (1 to 2 seeds) (too little to tell: 2 of 3 seeds)")
    uncounted = Claim("low", "d: it is low", "holds", (Quantity("loss", 1.0),), "d")
    assert [row["claim"] for row in answer_rows([uncounted, *arms])] == ["it is low (4 arms)"]


@pytest.mark.parametrize("failed", [0, 1, 5])
def test_sentences_name_what_holds_and_what_fails(failed):
    """Of one kind, as a notebook picks them out of all its claims: "1 of 1 claims" would contradict its table."""
    claims = [claim("holds", 0.5), *(claim("fails", 3.0, f"arm {i}") for i in range(failed))]
    holds, *fails = claims_in_sentences(claims)
    assert holds == "What holds: it is low (loss 0.500 nats)."
    assert len(fails) == min(failed, 1)
    assert "".join(fails).count("3.000 nats") == min(failed, 3)
    assert ("and 2 more" in "".join(fails)) == (failed == 5)


@pytest.mark.parametrize(
    ("verdicts", "count"),
    [
        (["holds", "open", "open"], "1 of 3 claims holds, 2 are open."),
        (["holds", "holds"], "2 of 2 claims hold."),
        (["fails", "open", "predicted nothing"], "0 of 3 claims hold, 1 fails, 1 is open, 1 predicted nothing."),
    ],
)
def test_the_count_agrees_with_the_verdicts_of_the_table(verdicts, count):
    claims = [replace(claim(verdict, 0.5), kind=f"kind {i}") for i, verdict in enumerate(verdicts)]
    said, *named = claims_in_sentences(claims)
    assert said == count
    assert (named[0] == "One that holds: it is low (loss 0.500 nats).") == ("holds" in verdicts)
    assert [row["verdict"] for row in answer_rows(claims)] == verdicts


def test_the_plan_says_for_which_batch_and_vocabulary_it_is() -> None:
    task = TextTaskConfig("nano", "markov", vocab_size=64, block_size=16, batch_size=2)
    said = fit_report(RunConfig("baseline", task, 10, device="cpu"), "16GB")
    assert said.startswith("A vocabulary of 64 tokens\nA batch of 2 windows of 16 tokens\n")


@pytest.mark.parametrize("first", [2, 9])
def test_a_model_begins_with_fewer_blocks_than_it_has(first: int) -> None:
    base = RunConfig("baseline", TextTaskConfig("nano", "markov", vocab_size=64, block_size=8, batch_size=2), 10)
    assert blocks_in(base, 1) == blocks_in(base) == 2
    with pytest.raises(UserError, match="first_blocks must be below the model's blocks, 2; -1 predicts no depth"):
        blocks_in(base, first)


@pytest.mark.parametrize(("predictor", "least"), [("linear", 200), ("river", 500)])
def test_a_short_study_is_long_enough_for_a_verdict_and_for_its_predictor(predictor: str, least: int) -> None:
    task = TextTaskConfig("nano", "markov", vocab_size=64, block_size=8, batch_size=2)
    base = RunConfig("baseline", task, 10, schedule=Schedule("constant", warmup_steps=2), device="cpu")
    jumping = HybridTrainerConfig.conservative(predictor=predictor, warmup_steps=50)
    study = Study(base, {"jumping": jumping})
    assert steps_within(1e-6, study) == least
    assert replace(base, steps=steps_within(60.0, study)).steps > least  # a number of steps that a run takes
