"""The README's few lines: the questions that matter most, and what the results answer."""

from __future__ import annotations

from dataclasses import dataclass

from hybridlab.report.criteria import BASELINE, MEMORY, XL, Claims, Criterion, claims, of_presets
from hybridlab.report.evidence import Evidence, Found
from hybridlab.report.validation import measured_on, notebook_link
from hybridlab.report.words import interval, markdown_table, verdict_word


@dataclass(frozen=True)
class Headline:
    """A sentence of the README, and the claims that decide it."""

    text: str
    rule: Claims

    def row(self, evidence: Evidence) -> dict[str, str | None]:
        """The sentence with its verdict and where it was measured."""
        outcome = Criterion(self.text, (self.rule,)).outcome(evidence)
        link = None if outcome == "not run yet" else notebook_link(self.rule.notebook, docs="")
        word = "**predicted nothing**" if self._idle(evidence) else verdict_word(outcome)
        return {"claim": self.text, "verdict": word, "notebook": link or self.rule.notebook}

    def _idle(self, evidence: Evidence) -> bool:
        """Whether all arms that could have predicted took gradient steps only: they neither won nor lost."""
        found = evidence.claims(self.rule.notebook, *self.rule.patterns)
        return bool(found) and all(claim.is_idle for claim in found)


HEADLINES = (
    Headline("The baseline is tuned: no neighbouring learning rate ends lower", claims(BASELINE, "lr-is-tuned")),
    Headline("The trainer's own step costs at most 2 % over the bare loop", claims(BASELINE, "trainer-is-thin")),
    Headline("The plan's presets reach the baseline's perplexity in 40 % less time", of_presets("speed")),
    Headline("Predicting with them beats stopping earlier", of_presets("pays")),
    Headline("Made to predict always, they beat stopping earlier", of_presets("pays", "-unguarded")),
    Headline("The memory plan is right within 10 %", claims(MEMORY, "*-predicted-within-10-percent")),
    Headline("GPT-2 XL trains on a 16 GB card", claims(XL, "fits-16gb")),
    Headline("Its peak stays below 14 GB", claims(XL, "peak-below-14gb")),
    Headline("Its validation loss stays within 1 % of FP32's", claims(XL, "quality")),
)

MORE = """\
Every criterion with its numbers and intervals: [docs/VALIDATION_RESULTS.md](docs/VALIDATION_RESULTS.md). Which settings
to take on a 16 GB card: [docs/RTX_5080_GUIDE.md](docs/RTX_5080_GUIDE.md)."""

SCALES = {"rtx5080": "GPT-2 Small on a GPU", "cpu_long": "A nano GPT-2 on a CPU"}
"""Where every predictor was tried."""


def headlines(evidence: Evidence) -> str:
    """The README's section between its markers."""
    table = markdown_table([headline.row(evidence) for headline in HEADLINES])
    scales = [_predictors(evidence, profile, where) for profile, where in SCALES.items()]
    tried = "Every predictor, each setting held against its truncated controls:"
    return "\n\n".join([table, tried, "\n".join(scales), f"{measured_on(evidence)} {MORE}"])


def _predictors(evidence: Evidence, profile: str, where: str) -> str:
    """How many of the settings that predicted anything beat stopping earlier, and the best of them."""
    notebook = "07_step_value"
    tried = [c for c in evidence.claims(notebook, "*-pays", profile=profile) if c.numbers.get("predicted_steps")]
    if not tried:
        return f"- {where}: not run yet."
    verdicts = [claim.verdict for claim in tried]
    paying = [claim for claim in tried if claim.verdict == "holds"]
    best = f" Best: {_best(paying)}." if paying else ""
    link = notebook_link(notebook, profile, docs="")
    worse, unclear = verdicts.count("fails"), verdicts.count("open")
    return (
        f"- {where} ({link}), {len(tried)} settings that predicted anything: {len(paying)} better than stopping "
        f"earlier, {worse} worse, {unclear} without a difference shown.{best}"
    )


def _best(paying: list[Found]) -> str:
    """The arm whose predicted steps were worth most."""
    best = max(paying, key=lambda claim: float(claim.numbers.get("step_value") or 0.0))
    worth = interval(best.numbers, "step_value", digits=2)
    return f"{best.arm}, a predicted step worth {worth} real ones" if worth else best.arm
