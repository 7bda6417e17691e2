"""docs/RTX_5080_GUIDE.md: which settings for which model on a 16 GB card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

from hybridlab.config import HybridTrainerConfig
from hybridlab.memory import forecast
from hybridlab.notebook.bounds import QUALITY_TOLERANCE_NATS, SAFE_PEAK_BYTES
from hybridlab.report.evidence import MAIN, Evidence
from hybridlab.report.validation import NOT_RUN, notebook_link, predicted_share
from hybridlab.report.words import gigabytes, interval, markdown_table, verdict_word

Row = dict[str, Any]

HEAD = """\
# Training on an RTX 5080 (16 GB)

Written by `hybridlab report` from `executed/*/results.json` and from the presets in the code; no number here is typed
by hand. [VALIDATION_RESULTS.md](VALIDATION_RESULTS.md) has the criteria, the controls and every claim.

In three lines:

- Ask first, without a GPU: `hybridlab plan --model xl --card 16GB` says what fits, and the least to switch on if it
  does not.
- Take the memory settings from the table below: the fastest with a peak below 14 GB and a loss within 2 %.
- Switch prediction on only for a setting whose row says that it pays.
"""

EMULATED = """\
## What we could only emulate

The figures come from: {devices}.

An emulated card is a larger one whose allocator refuses what a 16 GB card would not have: 16 decimal gigabytes, less
the context that was measured. References that need more than that ran on the whole card, as their peaks show. So what
fits, what fails and the peaks carry over, as far as the same kernels run.
What does not:

- **Time.** Steps a second are those of the card that ran. Compare arms with each other, not with your clock.
- **The bus.** How fast state travels to the host and back depends on the slot: on a slower one, offloading costs
  more.
- **The display.** A desktop on the same card takes memory that no run here had to share: the bound of 14 GB leaves
  room for it and for fragmentation.
- **Number formats.** bf16 is the same everywhere; which kernels are fast is not.
"""

BY_MODEL = """\
## Which settings for which model

**Take this** marks, for each model, the arm with the shortest step among those whose peak stays below 14 GB and whose
loss was within 2 % of the control's perplexity. **Watch its loss** is added where that is not certain: one seed, or an
interval that reaches beyond.
"""

NONE_QUALIFIES = """\
For **{model}** there is nothing to recommend yet: no arm stayed below 14 GB *and* within 2 % of the control. If you
must train it on this card, watch its loss."""

TAKE, WATCH = "**take this**", "**take this, watch its loss**"

PRESETS = """\
## Conservative against aggressive

The memory presets, as the code has them (`MemoryConfig.conservative()` and so on). Conservative changes nothing by
more than rounding. Aggressive trades time and the optimizer's precision for memory. `fit_16gb` is what the largest
model needs.
"""

HYBRIDS = """\
The prediction presets, `HybridTrainerConfig.conservative()` and `.aggressive()`:
"""

MEASURED = """\
And what prediction was measured to be worth with them, against a plain run with as many gradient steps:
"""

CURVES = """\
## Memory against quality

Down and to the left is better; left of the line at 14 GB is safe. The control is drawn hollow.
"""

NO_FIT = """\
## When it does not fit

Switch on one thing at a time, in this order: from free to costly.

1. **bf16 autocast** (`mixed_precision`). What matrix products keep for the backward pass takes half the room, and they
   run on the card's tensor cores. Weights stay float32.
2. **Chunked loss** (`loss_chunk_tokens`). The logits of a large vocabulary are often the largest thing in memory;
   they need not exist all at once. The same loss.
3. **Checkpointing** (`checkpointing`). Activations of each block are computed again in the backward pass: about one
   more forward pass a step. The same gradients. With `inputs="host"` the blocks' inputs, all that is left, wait in
   host memory; they cross the bus beside the computation.
4. **A smaller micro-batch** (`gradient_accumulation`). The same batch in parts: exact up to rounding, and slower
   where the parts no longer fill the card.
5. **8-bit optimizer state** (`optimizer_state="int8"`, with `pad_vocab_to` so that the embedding divides into
   blocks). Not exact: look at what it did to the loss, above.
6. **The optimizer's step inside the backward pass** (`step_in_backward`). Gradients no longer exist all at once.
   Excludes accumulation; clipping goes by an estimate of the norm (`clip_in_backward`).
7. **State on the host** (`state_on_host`). The card holds weights and activations only; the bus sets the pace.
8. **Weights in bf16** (`weights="bf16"`). The last resort: stochastic rounding, or float32 masters on the host.

`predict_aware` is not in this list: it frees memory *during Predict* and leaves the peak alone, which the Full phase
sets. Settings that cannot work together are refused when the configuration is built, with the two names and the
reason.

If a run stops with "out of memory" although the plan said that it fits: close what else uses the card (`nvidia-smi`),
and mind the difference between what torch allocated and what it reserved: a large difference is fragmentation, and
`PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True` helps.
"""


def card_guide(evidence: Evidence, pictures: Mapping[str, str]) -> str:
    """The whole guide; pictures as for `validation_document`."""
    shown = "\n\n".join(
        f"![{title}](images/{name})" for name, title in pictures.items() if name.startswith("quality_against_memory")
    )
    devices = "; ".join(evidence.devices(MAIN)) or "nothing yet"
    sections: tuple[str, ...] = (HEAD, EMULATED.format(devices=devices), BY_MODEL, _by_model(evidence))
    sections += (PRESETS, _memory_presets(), HYBRIDS, _hybrid_presets(), MEASURED, _hybrids(evidence))
    sections += (CURVES, shown or NOT_RUN, NO_FIT)
    return "\n".join(section.rstrip("\n") + "\n" for section in sections)


def recommended(rows: Sequence[Row]) -> Row | None:
    """The fastest arm of one model that stays below 14 GB and within 2 % of the control; None where none does."""
    good = [row for row in rows if _is_safe(row) and _within(row.get("loss_change"))]
    return min((row for row in good if row.get("step_ms")), key=lambda row: row["step_ms"], default=None)


def _is_safe(row: Row) -> bool:
    return row["peak_memory_bytes"] < SAFE_PEAK_BYTES


def _within(change: float | None) -> bool:
    """Whether a change of the loss, in nats, was measured and costs no more than is tolerated."""
    return change is not None and change < QUALITY_TOLERANCE_NATS


def _by_model(evidence: Evidence) -> str:
    tables = evidence.tables("memory")
    rows = [row | {"notebook": notebook} for notebook, rows in tables.items() for row in rows]
    models = dict.fromkeys(row["model"] for row in rows)
    best = {model: recommended([row for row in rows if row["model"] == model]) for model in models}
    if not rows:
        return NOT_RUN
    table = markdown_table([_model_row(row, row is best[row["model"]], _basis(evidence, row)) for row in rows])
    return "\n\n".join([table, *(NONE_QUALIFIES.format(model=model) for model in models if best[model] is None)])


def _basis(evidence: Evidence, row: Row) -> str:
    """What the loss of a row rests on: how long a training, and how many seeds."""
    asked = (evidence.entry(row["notebook"]) or {}).get("parameters", {})
    steps, seeds = asked.get("reference_steps") or asked.get("steps"), asked.get("seeds", 1)
    return f"{steps} steps, {seeds} seed{'s' if seeds > 1 else ''}" if steps else ""


def _model_row(row: Row, best: bool, basis: str) -> Row:
    return {
        "model": row["model"],
        "arm": row["arm"],
        "peak VRAM": gigabytes(row["peak_memory_bytes"]),
        "below 14 GB": "yes" if _is_safe(row) else "no",
        "a step": f"{row['step_ms']:.1f} ms" if row.get("step_ms") else None,
        "loss against the control": interval(row, "loss_change"),
        "judged over": basis,
        "": "" if not best else TAKE if _within(row.get("loss_change_high")) else WATCH,
        "notebook": notebook_link(row["notebook"], short=True),
    }


def _memory_presets() -> str:
    return _settings({name: preset() for name, preset in forecast.PRESETS.items() if name != "none"})


def _hybrid_presets() -> str:
    presets = {"conservative": HybridTrainerConfig.conservative(), "aggressive": HybridTrainerConfig.aggressive()}
    names = ("confidence_threshold", "max_predict_steps", "correction_interval")
    return _settings(presets, names)


def _settings(presets: Mapping[str, Any], names: Sequence[str] = ()) -> str:
    """One row a setting, one column a preset."""
    first = next(iter(presets.values()))
    return markdown_table(
        [
            {"setting": f"`{name}`"} | {preset: _setting(getattr(config, name)) for preset, config in presets.items()}
            for name in names or asdict(first)
        ]
    )


def _setting(value: Any) -> str:
    if value is None or (value is False) or value == 0:
        return "off"
    if is_dataclass(value) and not isinstance(value, type):
        return ", ".join(f"{name} {setting}" for name, setting in asdict(value).items())
    return "on" if value is True else str(value)


def _hybrids(evidence: Evidence) -> str:
    claims = evidence.claims("03_gpt2_small_hybrid", "*-pays")
    rows = [
        {
            "arm": claim.arm,
            "steps predicted": predicted_share(claim),
            "worth of a predicted step": interval(claim.numbers, "step_value", digits=2),
            "pays": verdict_word(claim.verdict) if claim.numbers.get("predicted_steps") else "predicted nothing",
        }
        for claim in claims
    ]
    return markdown_table(rows) if rows else NOT_RUN
