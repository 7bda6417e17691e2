"""docs/RTX_5080_GUIDE.md: which settings for which model on a 16 GB GPU, and planned recipes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from typing import Any

from hybridlab.charts.tables import known_columns
from hybridlab.engine.config import HybridTrainerConfig
from hybridlab.memory import MemoryConfig
from hybridlab.notebook.views.memory_charts import MemoryRow
from hybridlab.planner.gpu_specs import GPUS, OF_MEASURED, GpuSpec, spec_of
from hybridlab.planner.text_report import MEMORY_PRESETS
from hybridlab.report.depth_advice import STEADY, depth_advice
from hybridlab.report.evidence import MAIN, Evidence, Published, arm_in_words, base_asked_for
from hybridlab.report.recipes import planned_recipes
from hybridlab.report.validation import Cells, devices, loss_change, speedup, step_time
from hybridlab.report.words import Markdown, escaped, notebook_link, render
from hybridlab.results.claims import GPU_BYTES, QUALITY_TOLERANCE_NATS, SAFE_PEAK_BYTES
from hybridlab.results.words import amount
from hybridlab.study.statistics import Base, Interval, formatted

SHOWN = ("confidence_threshold", "max_predict_steps", "correction_interval")
"""Settings in which the presets of prediction differ."""


def gpu_guide(evidence: Evidence, pictures: Mapping[str, str]) -> str:
    """The whole guide; pictures as for `validation_document`."""
    hybrids = [claim for claim in evidence.claims("03_gpt2_small_hybrid", kind="pays") if not claim.grew]
    preset = HybridTrainerConfig.conservative()
    needs = preset.path_needs
    measured = {model: recommended(rows) for model, rows in _memory_rows(evidence).items()}
    memory = {name: build() for name, build in MEMORY_PRESETS.items() if name != "none"}
    return render(
        "RTX_5080_GUIDE.md",
        pictures=pictures,
        devices=devices(evidence),
        paying=[claim.about for claim in hybrids if claim.verdict == "holds" and not claim.is_idle],
        emulated=any("emulated" in device for device in evidence.devices(MAIN)),
        mebibytes=f"{GPU_BYTES / 2**20:.0f}",
        ratios=[bf16_over_float32(gpu) for gpu in (GPUS["h100"], GPUS["rtx5080"])],
        waiting=any(row.get("gpu_busy_percent") for rows in evidence.tables("memory").values() for row in rows),
        by_model=by_model(evidence),
        **planned_recipes(evidence.planned, measured),
        plan_errors=plan_errors(evidence),
        step_errors=OF_MEASURED,
        depths=depth_advice(evidence),
        steady=STEADY,
        memory_presets=_settings(memory, [field.name for field in fields(MemoryConfig)]),
        hybrid_presets=_settings({"conservative": preset, "aggressive": HybridTrainerConfig.aggressive()}, SHOWN),
        hybrids=known_columns([_hybrid(claim, evidence) for claim in hybrids]),
        path_rows=needs.rows if needs else 0,
        predictor=preset.predictor,
    )


def bf16_over_float32(gpu: GpuSpec) -> str:
    """How many times as fast a GPU computes in bf16 as in float32, by its data sheet."""
    return f"{gpu.bfloat16_flops / gpu.float32_flops:.1f} times ({gpu.name})"


def _settings(presets: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, str]]:
    """One row per setting, one column per preset."""
    return [
        {"setting": Markdown(f"`{name}`")}
        | {preset: _setting(getattr(config, name)) for preset, config in presets.items()}
        for name in names
    ]


def _setting(value: Any) -> str:
    if is_dataclass(value) and not isinstance(value, type):
        return ", ".join(f"{name} {setting}" for name, setting in asdict(value).items())
    return "on" if value is True else str(value or "off")


def _hybrid(claim: Published, evidence: Evidence) -> Cells:
    row, vram = speedup(claim, evidence), evidence.beside(claim, "vram")
    shown = {name: row[name] for name in ("arm", "steps predicted", "loss against the control", "p, corrected")}
    return shown | {"peak VRAM": vram and amount(vram.value("peak_memory"), "bytes"), "pays": row["pays"]}


def by_model(evidence: Evidence) -> str:
    """Every row of the tables "memory", the recommended ones marked, and a sentence on each model that has none."""
    of = _memory_rows(evidence)
    best = {model: recommended(mine) for model, mine in of.items()}
    rows = [(row, mine) for mine in of.values() for row in mine]
    presets = [row for row, _ in rows if row["arm"] == "fit_16gb"]
    return render(
        "recommendation.md",
        rows=known_columns([_shown(evidence, row, mine, row is best[row["model"]]) for row, mine in rows]),
        estimated=any(row.get("estimated_5080_ms") for row, _ in rows),
        lacking=[(model, *why_none(mine)) for model, mine in of.items() if best[model] is None],
        former=sorted({row["model"] for row in presets if is_former(evidence, row["notebook"])}),
    )


FORMER_PRESETS = ("c68fc476", "4ef0d9fd")
"""Training code of copies in which `fit_16gb` had float32 weights."""

EARLIER_ARMS = {"step-time": "fit_16gb", "few-bits-step-time": "24-bit weights"}
"""By kind of claim, of older results: what it is about."""


def is_former(evidence: Evidence, notebook: str) -> bool:
    """Whether a notebook's copy ran before `fit_16gb` had 24-bit weights."""
    return (evidence.entry(notebook) or {}).get("code", {}).get("trains") in FORMER_PRESETS


def _memory_rows(evidence: Evidence) -> dict[str, list[dict[str, Any]]]:
    """Model -> its rows of the tables "memory", each with its notebook and, where claimed, its steps by seed.

    step_ratios: per seed, over the step of the notebook's arm without limits
    least_5080_ms: the measured step, where the GPU that ran has higher rates throughout than an RTX 5080
    called: the arm in words; lr: the learning rate that the notebook gave it
    """
    of: dict[str, list[dict[str, Any]]] = {}
    for notebook, rows in evidence.tables("memory").items():
        claims = [(claim, claim.quantity("step_ratio")) for claim in evidence.claims(notebook)]
        ratios = {claim.arm or EARLIER_ARMS.get(claim.kind): ratio.per_seed for claim, ratio in claims if ratio}
        ran = spec_of(evidence.device(notebook))
        common = {"notebook": notebook, "lr": evidence.ran_with(notebook).get("lr")}
        for row in rows:
            former = " (former)" if row["arm"] == "fit_16gb" and is_former(evidence, notebook) else ""
            least = row.get("step_ms") if ran and ran.outruns(GPUS["rtx5080"]) else None
            more = {"called": arm_in_words(row["arm"], notebook) + former, "least_5080_ms": least}
            more["step_ratios"] = ratios.get(row["arm"], ())
            of.setdefault(row["model"], []).append(row | more | common)
    return of


def recommended(rows: Sequence[MemoryRow]) -> MemoryRow | None:
    """The fastest arm of one model that stays below 14 GB and within 2 % of the control; None where none does."""
    return min(_timed(rows), key=_step_ms, default=None)


def _timed(rows: Sequence[MemoryRow]) -> list[MemoryRow]:
    """Those that may be recommended."""
    return [row for row in rows if _is_safe(row) and _within(row.get("loss_change")) and row.get("step_ms")]


def _step_ms(row: MemoryRow) -> float:
    """Mean over seeds; of a row without ratios, its own, which is the first seed's."""
    ratios = row.get("step_ratios")
    return float(row["step_ms"] * (Interval.of_ratios(ratios).mean / ratios[0] if ratios else 1.0))


def not_told_apart(best: MemoryRow, rows: Sequence[MemoryRow]) -> list[str]:
    """The arms that might be recommended too, as the interval of their steps' ratio over the best one's holds 1."""
    mine = best.get("step_ratios") or ()
    others = {row["arm"]: row.get("step_ratios") or () for row in _timed(rows) if row is not best}
    paired = {arm: [its / own for its, own in zip(ratios, mine, strict=False)] for arm, ratios in others.items()}
    return [arm for arm, ratios in paired.items() if len(ratios) > 1 and Interval.of_ratios(ratios).low < 1]


def why_none(rows: Sequence[MemoryRow]) -> tuple[str, list[str]]:
    """Why none of one model's arms is recommended ("too large", "not judged" or "worse"), and those that are safe."""
    safe = [row for row in rows if _is_safe(row)]
    arms = [arm_in_words(row["arm"], row.get("notebook", "")) for row in safe]
    if not safe:
        return "too large", arms
    unjudged = all(row.get("loss_change") is None and control_of(row, rows) is None for row in safe)
    return "not judged" if unjudged else "worse", arms


def control_of(row: MemoryRow, rows: Sequence[MemoryRow]) -> MemoryRow | None:
    """A row's control among those of its model: the arm of its notebook without a change of its own.

    None where it did not run: then no arm has a change.
    """
    beside = [other for other in rows if other.get("notebook") == row.get("notebook")]
    without = [other for other in beside if other.get("loss_change") is None]
    return without[0] if len(without) == 1 < len(beside) else None


def _is_safe(row: MemoryRow) -> bool:
    return row["peak_memory_bytes"] < SAFE_PEAK_BYTES


def _within(change: float | None) -> bool:
    """Whether a change of the loss, in nats, was measured and costs no more than is tolerated."""
    return change is not None and change < QUALITY_TOLERANCE_NATS


def _judged_over(evidence: Evidence, row: MemoryRow, rows: Sequence[MemoryRow]) -> str | None:
    """What the loss of a row rests on: how long a training, how many seeds, and how far the control came."""
    control, base = control_of(row, rows), _base(evidence, row)
    if control is None:
        return None
    said = [f"{base.steps} steps", f"{base.seeds} seed{'s' if base.seeds > 1 else ''}"] if base.steps else []
    if (loss := control.get("validation_loss")) is not None:
        said.append(f"to a loss of {loss:.2f}")
    return ", ".join(said)


def _advice(evidence: Evidence, row: MemoryRow, rows: Sequence[MemoryRow]) -> str:
    """To watch the loss, unless its whole interval is good and rests on what a verdict needs; and what is as fast."""
    is_shown = _within(row.get("loss_change_high")) and not _base(evidence, row).lacks
    advice = "**take this**" if is_shown else "**take this, watch its loss**"
    alike = ", ".join(not_told_apart(row, rows))
    return Markdown(f"{advice}; its step is not told apart from that of {escaped(alike)}" if alike else advice)


def _base(evidence: Evidence, row: MemoryRow) -> Base:
    """What the notebook trained, and as many seeds as the row's own claim on its loss counts."""
    base = base_asked_for(evidence.ran_with(row["notebook"]))
    claims = evidence.claims(row["notebook"], arm=row["arm"])
    counted = [claim.value("seeds") for claim in claims if claim.quantity("loss_change")]
    return replace(base, seeds=int(next(filter(None, counted), base.seeds)))


def _shown(evidence: Evidence, row: MemoryRow, rows: Sequence[MemoryRow], is_best: bool) -> Cells:
    """rows: of the same model"""
    estimated, least = row.get("estimated_5080_ms"), row["least_5080_ms"]
    at_least = f"at least {least:.0f} ms" if estimated and least and least > estimated else None
    return {
        "model": row["model"],
        "arm": row["called"],
        "peak VRAM": amount(row["peak_memory_bytes"], "bytes"),
        "below 14 GB": "yes" if _is_safe(row) else "no",
        **step_time(row),
        "est. on a 5080": at_least or (estimated and f"{estimated:.0f} ms"),
        "loss against the control": loss_change(row),
        "judged over": _judged_over(evidence, row, rows),
        "advice": _advice(evidence, row, rows) if is_best else "",
        "notebook": notebook_link(row["notebook"], short=True),
    }


def plan_errors(evidence: Evidence) -> dict[str, Any] | None:
    """How far plans of allocated memory were from what was measured, in percent, and over how many arms."""
    rows = [row for rows in evidence.tables("memory").values() for row in rows if row.get("predicted_allocated_bytes")]
    errors = [100 * (row["predicted_allocated_bytes"] / row["measured_allocated_bytes"] - 1) for row in rows]
    low, high = (formatted(of(errors, default=0.0), "+.1f") for of in (min, max))
    return {"low": low, "high": high, "count": len(errors)} if errors else None
