"""Whether to grow a model or to train it shallow, by model and budget, from the claims on predicted depth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import fmean
from typing import Any

import numpy as np

from hybridlab.models.gpt2 import SIZES, GPT2Config
from hybridlab.notebook.views.depth import SHALLOW
from hybridlab.planner.gpu_specs import spec_of
from hybridlab.report.evidence import Evidence, Published
from hybridlab.report.validation import Cells
from hybridlab.report.words import notebook_link
from hybridlab.results.words import in_words, quantity_interval
from hybridlab.study.statistics import LEAST, Interval
from hybridlab.study.study import control_name, shallow_control_name

ADVICE = {
    ("holds", "holds"): "grow it",
    ("holds", "fails"): "train the shallow model: depth does not pay yet",
    ("holds", "open"): "grow it, or train the shallow model: open which",
    ("open", "holds"): "grow it, or train all blocks from the start: open which",
    ("open", "fails"): "train all blocks from the start, or the shallow model: open which",
    ("fails", "holds"): "train all blocks from the start",
    ("fails", "fails"): "train all blocks from the start, or the shallow model: open which",
    ("fails", "open"): "train all blocks from the start, or the shallow model: open which",
}
"""By the verdicts on growing and on depth; with any other, the runs cannot tell."""


STEADY = 1.25
"""Times of an arm count where its slowest seed, of several, took at most so many times as long as its fastest."""


def depth_advice(evidence: Evidence) -> list[Cells]:
    """A row per budget and first depth of every profile, by model and by tokens per parameter.

    Runs that only show that a notebook works are left out, and those of a model that is no GPT-2 of ours.
    """
    rows = [_row(evidence, *claims) for profile in evidence.entries for claims in grown_claims(evidence, profile)]
    models = list(dict.fromkeys(row["model"] for row in rows))
    rows.sort(key=lambda row: (models.index(row["model"]), float(row["tokens per parameter"] or 0)))
    return rows


def grown_claims(evidence: Evidence, profile: str) -> Iterator[tuple[Published, Published]]:
    """Of each grown arm that ran long enough for a verdict: the claim that growing pays, and that depth does."""
    for depth in evidence.claims(kind="depth-pays", profile=profile):
        pays, is_gpt2 = evidence.beside(depth, "pays"), "model" in evidence.ran_with(depth.notebook, profile)
        if pays is not None and is_gpt2 and (pays.value("gradient_steps") or 0) >= LEAST.steps:
            yield pays, depth


def control_times(evidence: Evidence, pays: Published) -> dict[str, float]:
    """The measured time of a control of as much computation, over that of the grown run.

    "plain", "shallow": seconds per counted computation of its runs, over the grown ones'. Where the shallow control has
    not run, of the shallow model of as many steps. Nothing without a known GPU, and where times vary from seed to seed,
    as where other work shared the machine.
    """
    is_known = spec_of(evidence.device(pays.notebook, pays.profile))
    rows = evidence.tables("runs", pays.profile).get(pays.notebook, []) if is_known else []
    rows = [row for row in rows if row.get("budget") in (None, pays.value("gradient_steps"))]
    rows = [row for row in rows if row.get("seconds") and row.get("cost_in_full_steps")]
    arms = dict.fromkeys(row["arm"] for row in rows)
    grown = next((arm for arm in arms if pays.arm in (arm, f"{arm}, {rows[0].get('budget')} steps")), "")
    shallow = [arm for arm in arms if arm.startswith(SHALLOW)]
    also = shallow[0] if len(shallow) == 1 else ""
    of = {
        "plain": control_name(grown),
        "shallow": next(filter(arms.__contains__, (shallow_control_name(grown), also)), ""),
    }
    paces = {arm: [row["seconds"] / row["cost_in_full_steps"] for row in rows if row["arm"] == arm] for arm in arms}
    steady = {arm: fmean(each) for arm, each in paces.items() if len(each) > 1 and max(each) <= STEADY * min(each)}
    return {name: steady[arm] / steady[grown] for name, arm in of.items() if {arm, grown} <= steady.keys()}


def _row(evidence: Evidence, pays: Published, depth: Published) -> Cells:
    parameters, deciding = evidence.ran_with(pays.notebook, pays.profile), depth.deciding
    times = [f"{name} {ratio:.2f}" for name, ratio in control_times(evidence, pays).items()]
    beside = ", as many steps" if deciding and deciding.name == "loss_to_shallow" else ""
    count = parameter_count(parameters)
    tokens = (pays.value("gradient_steps") or 0) * parameters["batch_size"] * parameters["block_size"]
    computation, time = (
        in_words(ratio) if (ratio := pays.quantity(name)) else "open" for name in ("compute_to_loss", "time_to_loss")
    )
    return {
        "model": parameters.get("model"),
        "tokens per parameter": f"{float(f'{tokens / count:.2g}'):g}" if count else None,
        "optimizer": {"muon": "Muon"}.get(parameters.get("optimizer", ""), "AdamW"),
        "arm": pays.arm if "budgets" in parameters else _with_budget(parameters),
        "against as much computation": quantity_interval(pays.quantity("loss_to_control")),
        "growing pays": _verdict(pays),
        "against the shallow model": deciding and f"{quantity_interval(deciding)}{beside}",
        "depth pays": _verdict(depth),
        "computation to its loss": computation,
        "time to its loss": time,
        "time of as much computation": ", ".join(times) or None,
        "rates": "tried" if evidence.tried_rates(pays.notebook, pays.profile) else "not tried",
        "what to run": _what_to_run(pays, depth),
        "notebook": notebook_link(pays.notebook, pays.profile, short=True),
        "profile": pays.profile,
    }


def _verdict(claim: Published) -> str:
    """With the seeds, where it is open and these are too few for any other."""
    seeds = claim.value("seeds") or LEAST.seeds
    lacking = claim.verdict == "open" and seeds < LEAST.seeds
    return f"{claim.verdict} ({seeds:.0f} of {LEAST.seeds} seeds)" if lacking else claim.verdict


def _what_to_run(pays: Published, depth: Published) -> str:
    """By both verdicts; where depth fails and growing is not shown, by the plain run beside the shallow model too.

    Their difference is that of the grown run's two differences, seed by seed.
    """
    to_plain, to_shallow = pays.quantity("loss_to_control"), depth.deciding
    is_sound = depth.verdict == "fails" and pays.verdict != "holds" and not pays.rests_on_too_little
    if is_sound and to_plain and to_shallow and 0 < len(to_plain.per_seed) == len(to_shallow.per_seed):
        ends = np.array([to_shallow.per_seed, to_plain.per_seed], dtype=float)  # None, of a run that diverged, is NaN
        plain_above = Interval.of(list(ends[0] - ends[1]))
        if plain_above.low > 0:
            return ADVICE["holds", "fails"]
        if plain_above.high < 0 and to_shallow.name == "loss_to_shallow_control":
            return ADVICE["fails", "holds"]
    return ADVICE.get((pays.verdict, depth.verdict), "open")


def parameter_count(parameters: Mapping[str, Any]) -> int | None:
    """Of a notebook's model; None for one that is no GPT-2 of ours."""
    if parameters.get("model") not in SIZES or "vocab_size" not in parameters:
        return None
    shape = {name: parameters[name] for name in ("vocab_size", "block_size")}
    return GPT2Config.named(parameters["model"], **shape).parameter_count


def _with_budget(parameters: Mapping[str, Any]) -> str:
    """The grown arm of a notebook with one budget, in the words of notebook 10."""
    return f"grown from {parameters['first_blocks']}, {parameters.get('depth_steps') or parameters['steps']} steps"
