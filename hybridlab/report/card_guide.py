"""docs/RTX_5080_GUIDE.md: which settings for which model on a 16 GB card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

from hybridlab.engine.config import HybridTrainerConfig
from hybridlab.planner.gpu_specs import GPUS
from hybridlab.planner.text_report import MEMORY_PRESETS
from hybridlab.report.evidence import MAIN, Evidence, Found
from hybridlab.report.recommendation import by_model
from hybridlab.report.validation import NOT_RUN, predicted_share
from hybridlab.report.words import gigabytes, interval, known_columns, markdown_table, verdict_word
from hybridlab.results.bounds import CARD_BYTES

HEAD = """\
# Training on an RTX 5080 (16 GB)

Written by `hybridlab report` from `executed/*/results.json` and from the presets in the code; no number here is typed
by hand. [VALIDATION_RESULTS.md](VALIDATION_RESULTS.md) has the criteria, the controls and every claim.

In three lines:

- Ask first, without a GPU: `hybridlab plan --model xl --card 16GB` says what fits, and the least to switch on if it
  does not.
- Take the memory settings from the table below: the fastest with a peak below 14 GB and a loss within 2 %.
- {prediction}

The figures come from: {devices}.
"""

PAYS = "Switch prediction on only as here: {arms}. The table of the presets below says what it is worth."
NONE_PAYS = "Leave prediction off: no preset was shown to pay."

EMULATED = """\
## What we could only emulate

An emulated card is a larger one whose allocator refuses what a 16 GB card would not have: 16 decimal gigabytes, less
the context that was measured. References that need more than that ran on the whole card, as their peaks show. So what
fits, what fails and the peaks carry over, as far as the same kernels run. A real card of this class has a little more:
16 decimal gigabytes are {mebibytes:.0f} of the MiB that `nvidia-smi` counts in, and it shows more than that.
What does not carry over:

- **Time.** Steps a second are those of the card that ran. Nor do ratios between arms carry over, since cards differ in
  how much faster bf16 is than float32. By the data sheets that is
  {ratios}.
  What bf16 saves, and what computing something twice costs, differs with it. Time the arms on your own card;
  `hybridlab plan --card rtx5080` estimates their times from its data sheet.{waiting}
- **The bus.** How fast state travels to the host and back depends on the slot: on a slower one, offloading costs
  more.
- **The display.** A desktop on the same card takes memory that no run here had to share: the bound of 14 GB leaves
  room for it and for fragmentation. `hybridlab plan --taken 1` leaves a gigabyte to it.
- **Number formats.** bf16 is the same everywhere; which kernels are fast is not.
"""

WAITING = """ Where **card busy** is
  well below 100 %, the step waited for the host, for which the card that ran is too fast: a slower card waits less."""

COUNTED = """\
## How memory is counted

- **A GB is decimal**: a billion bytes, here, in every notebook and in `hybridlab plan`. `nvidia-smi` counts in MiB
  of 2^20 bytes.
- **A peak is what torch reserved, and the CUDA context.** Containers, WSL and Windows hide from a process what the
  others hold. The context is then all that the card counts beyond torch's reserve, so the peak includes what other
  programs hold: close them before you measure.
- **On Windows and WSL the driver may spill into host memory instead of failing.** A run then gets slow where it would
  have stopped elsewhere, and nothing says so. Look at the peak, not at whether the run came through.
"""

BY_MODEL = """\
## Which settings for which model

**Take this** marks, for each model, the arm with the shortest step, on the card that ran, among those whose peak stays
below 14 GB and whose loss was within 2 % of the control's perplexity. **Watch its loss** is added where that is not
certain: one seed, or an interval that reaches beyond.
"""

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

PATH = """\
Prediction takes memory of its own. It keeps {rows} rows of the path with the presets' predictor, and the last recorded
weights, each as large as the trainable weights (`path_dtype="bf16"` halves the rows), and before a jump the way back: a
copy of the weights and of the optimizer's state. All of it lies on the card unless `path_device="host"`, and then it
takes host memory instead; what leaves the card in Predict (`predict_aware`) is in the way back already and takes no
more. `hybridlab plan --model small --predictor {predictor} --path-device host` says how much of either.
"""

CURVES = """\
## Memory against quality

Down and to the left is better; left of the line at 14 GB is safe. The control is drawn hollow.
"""

NO_FIT = """\
## When it does not fit

Switch on one thing at a time, in this order, from harmless to costly. `hybridlab plan` climbs the same ladder, stops
where it fits, and prints the code.

1. **bf16 autocast** (`mixed_precision`). What matrix products keep for the backward pass takes half the room, and they
   run on the card's tensor cores. Weights stay float32.
2. **Chunked loss** (`loss_chunk_tokens`). The logits of a large vocabulary are often the largest thing in memory;
   they need not exist all at once. The same loss.
3. **The path on the host** (`path_device="host"`), where you predict at all. The same jumps.
4. **Checkpointing** (`checkpointing`). Activations of each block are computed again in the backward pass: about one
   more forward pass a step. The same gradients.
5. **8-bit optimizer state** (`optimizer_state="int8"`, with `pad_vocab_to` so that the embedding divides into
   blocks). Not exact: look at what it did to the loss, above.
6. **The optimizer's step inside the backward pass** (`step_in_backward`). Gradients no longer exist all at once.
   Clipping goes by an estimate of the norm (`clip_in_backward`).
7. **Inputs on the host** (`inputs="host"` in `checkpointing`). The blocks' inputs, all that checkpointing leaves, wait
   in host memory; they cross the bus beside the computation.
8. **State on the host** (`state_on_host`), in place of 5 and 6. The card holds weights and activations only; the state
   is float32 again, and the bus sets the pace.
9. **Weights in bf16** (`weights="bf16"`), their float32 masters on the host. Nothing can be predicted with them.
10. **A smaller micro-batch** (`gradient_accumulation`). The same batch in parts: exact up to rounding, but slower where
    the parts no longer fill the card, and with the state on the host each part crosses the bus. Not together with 6.

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
    hybrids = evidence.claims("03_gpt2_small_hybrid", "*-pays")
    sections: tuple[str, ...] = (_head(evidence, hybrids), *_emulated(evidence), COUNTED, BY_MODEL, by_model(evidence))
    sections += (PRESETS, _memory_presets(), HYBRIDS, _hybrid_presets(), MEASURED, _hybrids(evidence, hybrids), _path())
    sections += (CURVES, shown or NOT_RUN, NO_FIT)
    return "\n".join(section.rstrip("\n") + "\n" for section in sections)


def _head(evidence: Evidence, hybrids: Sequence[Found]) -> str:
    paying = [claim.arm for claim in hybrids if claim.verdict == "holds" and claim.numbers.get("predicted_steps")]
    advice = PAYS.format(arms="; ".join(paying)) if paying else NONE_PAYS
    return HEAD.format(prediction=advice, devices="; ".join(evidence.devices(MAIN)) or "nothing yet")


def _emulated(evidence: Evidence) -> list[str]:
    """The section on what a larger card cannot show, if one of the cards was emulated."""
    if not any("emulated" in device for device in evidence.devices(MAIN)):
        return []
    ratios = [
        f"{card.bfloat16_flops / card.float32_flops:.1f} times ({card.name})"
        for card in (GPUS["h100"], GPUS["rtx5080"])
    ]
    rows = [row for rows in evidence.tables("memory").values() for row in rows]
    waiting = WAITING if any(row.get("card_busy_percent") is not None for row in rows) else ""
    return [EMULATED.format(ratios=" and ".join(ratios), mebibytes=CARD_BYTES / 2**20, waiting=waiting)]


def _memory_presets() -> str:
    return _settings({name: preset() for name, preset in MEMORY_PRESETS.items() if name != "none"})


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


def _hybrids(evidence: Evidence, claims: Sequence[Found]) -> str:
    rows = [
        {
            "arm": claim.arm,
            "steps predicted": predicted_share(claim),
            "worth of a predicted step": interval(claim.numbers, "step_value", digits=2),
            "peak VRAM": _peak(evidence, claim),
            "pays": verdict_word(claim.outcome),
        }
        for claim in claims
    ]
    return markdown_table(known_columns(rows)) if rows else NOT_RUN


def _peak(evidence: Evidence, claim: Found) -> str | None:
    """The peak of the same arm, where the notebook claims one."""
    peaks = evidence.claims(claim.notebook, f"{claim.id.removesuffix('-pays')}-vram", profile=claim.profile)
    measured = peaks[0].numbers.get("peak_memory_bytes") if peaks else None
    return gigabytes(float(measured)) if measured is not None else None


def _path() -> str:
    """What prediction keeps, with the predictor that the presets share."""
    preset = HybridTrainerConfig.conservative()
    needs = preset.path_needs
    return PATH.format(rows=needs.rows if needs else 0, predictor=preset.predictor)
