"""What the results files hold: entries by profile and notebook, their claims and tables."""

from __future__ import annotations

import hashlib
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import scipy

from hybridlab.base.errors import UserError
from hybridlab.batch.yaml_files import settings_in_file
from hybridlab.notebook.views.depth import GROWN, UNEQUAL
from hybridlab.results.claims import TOO_LITTLE, Claim, Quantity, Verdict, too_little
from hybridlab.results.reading import load_results
from hybridlab.results.words import quantities_in_words
from hybridlab.study.comparison import SIGNIFICANCE
from hybridlab.study.statistics import Base, holm

MAIN = "rtx5080"
"""The profile that decides the plan's criteria: they are about a GPU."""

MEMORY_NOTEBOOKS = ("00_", "04_", "05_", "06_")
"""How the notebooks begin whose arms are memory settings."""

MEMORY = "04_gpt2_small_memory"
"""The notebook of each memory setting alone; beyond the first seed its float32 arms take TF32."""

REPORT = "09_report"
"""The notebook that only reads results: its own entry is no evidence."""

PRESETS = ("conservative", "aggressive")
"""Names that the presets of prediction and those of memory share."""

IN_DOCUMENTS = {
    "loss_to_shallow": "loss against the shallow model of as many steps",
    "perplexity_change": "change of the perplexity",
    "perplexity_gap": "change of the perplexity",
    "beyond": "time beyond the control's jump",
    "null_over_bare": "the trainer's step over the bare loop's",
    "recording_over_bare": "recording, over the bare loop's step",
    "library_over_nanogpt_step": "the library's step over nanoGPT's",
    "muon_over_adamw_step": "a step with Muon over one with AdamW",
    "panel_over_none": "a step with the panel over one without",
    "none_over_none": "one without over another without",
}
"""Names of quantities in documents, where executed copies have shorter ones."""

Entry = Mapping[str, Any]


def named_in_full(quantity: Quantity) -> Quantity:
    """With the name that documents have for it."""
    return replace(quantity, name=IN_DOCUMENTS.get(quantity.name, quantity.name))


def arm_in_words(arm: str, notebook: str) -> str:
    """An arm as documents name it: of a preset, whether of prediction or of memory; of a grown one, what it is."""
    if arm == GROWN:
        return f"{arm} (predicted depth)"
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
    def numbers(self) -> str:
        """Its quantities in words, as documents name them."""
        return quantities_in_words([named_in_full(quantity) for quantity in self.quantities])

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

    entries: profile -> notebook -> what it published
    planned: what `hybridlab.benchmarks.recipes` wrote, and as "trained" the rows of `hybridlab.benchmarks.largest`
    side_by_side: what `hybridlab.benchmarks.against_others` wrote, a record per machine
    parameters: profile -> notebook -> what the folder `params` gives it today
    labels: profile -> what documents call it, from the table [tool.hybridlab.profiles] of `pyproject.toml`
    """

    entries: Mapping[str, Mapping[str, Entry]]
    planned: Mapping[str, Any] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    side_by_side: Sequence[Mapping[str, Any]] = ()
    parameters: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)

    @classmethod
    def read(cls, root: Path) -> Self:
        """Read `executed/*/*.json`, `params`, and what was measured on further machines; what never ran is absent.

        A profile whose label is empty is left out: it shows that notebooks work, and decides nothing.
        """
        labels = _labels(root / "pyproject.toml")
        ran = sorted(path.parent.name for path in root.glob("executed/*/results.json"))
        there = [profile for profile in ran if labels.get(profile) != ""]
        profiles = [*(profile for profile in labels if profile in there), *(p for p in there if p not in labels)]
        read = {profile: load_results(root / "executed" / profile / "results.json") for profile in profiles}
        own = {profile: {k: v for k, v in entries.items() if k != REPORT} for profile, entries in read.items()}
        planned = dict(_json(root / "executed" / MAIN / "recipes.json", {}))
        planned["trained"] = _json(root / "executed" / MAIN / "largest.json", {}).get("rows", [])
        entries = {profile: dict(sorted(of.items())) for profile, of in own.items() if of}
        side_by_side = _json(root / "docs" / "experiments" / "against_others.json", [])
        files = {profile: (root / "params" / profile).glob("*.yaml") for profile in entries}
        today = {profile: {path.stem: settings_in_file(path) for path in paths} for profile, paths in files.items()}
        return cls(entries, planned, labels, side_by_side, today)

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
        found = []
        for name, entry in self.entries.get(profile, {}).items():
            if notebook in (None, name):
                claims = [Published.from_record(it, profile=profile, notebook=name) for it in entry.get("claims", [])]
                found += judged(claims, entry["parameters"])
        return [claim for claim in found if kind in (None, claim.kind) and arm in (None, claim.arm)]

    def ran_with(self, notebook: str, profile: str = MAIN) -> dict[str, Any]:
        """The parameters that a notebook ran with; empty where it did not run."""
        return (self.entry(notebook, profile) or {}).get("parameters", {})

    def device(self, notebook: str, profile: str = MAIN) -> str:
        """What a notebook ran on; "" where it did not."""
        entry = self.entry(notebook, profile)
        return device_of(entry) if entry else ""

    def beside(self, claim: Published, kind: str) -> Published | None:
        """The claim of another kind that the same notebook makes on the same arm."""
        return next(iter(self.claims(claim.notebook, kind=kind, arm=claim.arm, profile=claim.profile)), None)

    def tried_rates(self, notebook: str, profile: str = MAIN) -> bool:
        """Whether several learning rates were tried for each arm and control of a notebook."""
        return bool(self.ran_with(notebook, profile).get("rate_trials"))

    def steps_judged(self, notebook: str, profile: str = MAIN) -> int:
        """After how many steps the losses of a notebook with one length are compared; 0 where that is not known."""
        return base_asked_for(self.ran_with(notebook, profile)).steps

    def tf32_stands_for_fp32(self, notebook: str) -> Verdict | None:
        """Of a notebook whose losses are held against FP32 in TF32, whether that gives the loss of strict FP32."""
        return next((claim.verdict for claim in self.claims(notebook, kind="tf32-stands-for-fp32")), None)

    def tables(self, name: str, profile: str = MAIN) -> dict[str, list[dict[str, Any]]]:
        """Rows by notebook, for every notebook of a profile that published a table of this name."""
        entries = self.entries.get(profile, {}).items()
        return {notebook: rows for notebook, entry in entries if (rows := entry.get("tables", {}).get(name))}

    def changed_parameters(self, notebook: str, profile: str) -> list[str]:
        """Those whose value in `params` is another one today than its copy ran with, or that are new."""
        ran = self.entries[profile][notebook]["parameters"]
        today = self.parameters.get(profile, {}).get(notebook, {})
        return [name for name, value in today.items() if name not in ran or ran[name] != value]

    def devices(self, profile: str) -> list[str]:
        """What a profile was measured on."""
        return sorted({device_of(entry) for entry in self.entries.get(profile, {}).values()})

    def is_emulated(self, notebook: str) -> bool:
        """Whether a larger GPU stood for a smaller one when this notebook ran."""
        return "emulated" in self.device(notebook)

    def sha256(self) -> str:
        """The hash of every results file."""
        return hashlib.sha256(json.dumps(self.entries, sort_keys=True).encode()).hexdigest()


def _json(path: Path, absent: Any) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return absent
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}): restore the file with git checkout, or delete it") from None


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


ON_LOSSES = ("pays", "quality", "speed", "speedup", "lr-is-tuned", "beta1-is-tuned", "beats-vanilla")
"""The kinds of claims that rest on losses."""


def judged(claims: Sequence[Published], parameters: Mapping[str, Any]) -> list[Published]:
    """The claims of one notebook; those on losses are open where too little was trained, and one ratio of times is.

    parameters: the notebook's own. A claim that several arms are corrected for keeps its verdict; an older one, without
    a p-value, gets it from its interval and those of the notebook's other arms, and loses its step value, which
    depended on the other arms' controls. An arm that grew was judged when it was published, by its study's own base.
    """
    claims = [_by_equal_computation(_by_one_ratio(claim)) for claim in claims]
    base, grown = base_asked_for(parameters), {claim.arm for claim in claims if claim.grew}
    untested = [claim for claim in claims if claim.kind == "pays" and claim.quantity("p_value") is None]
    idle = {claim.arm for claim in untested if claim.value("predicted_steps") == 0}
    older = [claim for claim in untested if claim.value("predicted_steps")]
    p_values = holm({claim.id: _p_value(claim, base.seeds) for claim in older})
    corrected = [_corrected(c, p_values[c.id], len(older), base.seeds) if c in older else c for c in claims]
    return [_judged(c, base, c.arm in idle) if c.kind in ON_LOSSES and c.arm not in grown else c for c in corrected]


def base_asked_for(parameters: Mapping[str, Any]) -> Base:
    """What the notebook trained; how far the losses fell is not among its parameters."""
    budgets = parameters.get("budgets") or [0]  # of several, the notebook has judged each
    steps = parameters.get("reference_steps") or parameters.get("steps") or max(budgets)
    tokens = steps * (parameters.get("batch_size") or 0) * (parameters.get("block_size") or 1)
    return Base(steps, parameters.get("seeds") or 1, tokens, math.inf)


def _p_value(claim: Claim, seeds: int) -> float:
    """Of Student's test, from the interval that was published."""
    loss = claim.quantity("loss_to_control")
    if seeds < 2 or loss is None or loss.value is None or loss.low is None or loss.high is None:
        return 1.0
    if loss.high == loss.low:
        return float(not loss.value)
    t = abs(loss.value) / ((loss.high - loss.low) / 2) * scipy.stats.t.ppf(0.975, seeds - 1)
    return float(2 * scipy.stats.t.sf(t, seeds - 1))


def least_difference(claim: Claim) -> float | None:
    """The smallest difference to the control, in nats, that a claim's test would have called significant.

    t(1 - 0.05 / 2m) standard errors, with m the arms that it is corrected for: what Holm asks of the first of them.
    """
    loss, seeds, arms = (claim.quantity("loss_to_control"), claim.value("seeds"), claim.value("arms_corrected_for"))
    if loss is None or loss.low is None or loss.high is None or not arms or not seeds or seeds < 2:
        return None
    t = scipy.stats.t(seeds - 1)
    return float((loss.high - loss.low) / 2 / t.ppf(0.975) * t.ppf(1 - SIGNIFICANCE / (2 * arms)))


def _corrected(claim: Published, p_value: float, tested: int, seeds: int) -> Published:
    """An older claim's "seeds" are those of its step value, which it loses; its loss is over all."""
    better = (claim.value("loss_to_control") or 0.0) < 0
    decided: Verdict = "holds" if better else "fails"
    changed = [replace(q, value=seeds) if q.name == "seeds" else q for q in claim.quantities if q.name != "step_value"]
    more = (Quantity("p_value", p_value, unit="probability"), Quantity("arms_corrected_for", tested))
    return replace(claim, verdict=decided if p_value < SIGNIFICANCE else "open", quantities=(*changed, *more))


def _by_one_ratio(claim: Published) -> Published:
    """A claim on times that rests on one ratio, without an interval, decides nothing."""
    ratio = claim.deciding
    is_one = ratio is not None and ratio.unit == "time ratio" and ratio.low is ratio.high is None
    if claim.kind in ON_LOSSES or not is_one:
        return claim
    return replace(claim, text=f"{claim.text} ({TOO_LITTLE}: one ratio, without an interval)", verdict="open")


def _by_equal_computation(claim: Published) -> Published:
    """Whether depth pays is open where the shallow model that it beats had less computation."""
    if claim.kind != "depth-pays" or claim.verdict != "holds" or claim.quantity("loss_to_shallow_control"):
        return claim
    return replace(claim, text=f"{claim.text} ({UNEQUAL})", verdict="open")


def _judged(claim: Published, base: Base, idle: bool) -> Published:
    """A claim on losses: of a hybrid that predicted nothing it shows nothing, and on too little training it is open."""
    if idle:
        return replace(claim, verdict="predicted nothing")
    if not base.lacks:
        return claim
    said = claim.text if claim.rests_on_too_little else claim.text + too_little(base)
    return replace(claim, text=said, verdict="open")
