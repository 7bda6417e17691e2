"""docs/RTX_5080_GUIDE.md: which settings for which model on a 16 GB GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from typing import Any

from hybridlab.engine.config import HybridTrainerConfig
from hybridlab.memory import MemoryConfig
from hybridlab.planner.gpu_specs import GPUS, OF_MEASURED
from hybridlab.planner.text_report import MEMORY_PRESETS
from hybridlab.report.depth_advice import depth_advice
from hybridlab.report.evidence import MAIN, Evidence, Published
from hybridlab.report.recipes import code_of_recipes, plan_errors, recipe_rows, way_rows
from hybridlab.report.recommendation import by_model
from hybridlab.report.validation import devices, p_value, predicted_share
from hybridlab.report.words import Markdown, known_columns, render, verdict_word
from hybridlab.results.bounds import GPU_BYTES
from hybridlab.results.words import amount, quantity_interval

SHOWN = ("confidence_threshold", "max_predict_steps", "correction_interval")
"""Settings in which the presets of prediction differ."""


def gpu_guide(evidence: Evidence, pictures: Mapping[str, str]) -> str:
    """The whole guide; pictures as for `validation_document`."""
    hybrids = [claim for claim in evidence.claims("03_gpt2_small_hybrid", kind="pays") if not claim.grew]
    preset = HybridTrainerConfig.conservative()
    needs = preset.path_needs
    memory = {name: build() for name, build in MEMORY_PRESETS.items() if name != "none"}
    return render(
        "RTX_5080_GUIDE.md",
        pictures=pictures,
        devices=devices(evidence),
        paying=[claim.about for claim in hybrids if claim.verdict == "holds" and not claim.is_idle],
        emulated=any("emulated" in device for device in evidence.devices(MAIN)),
        mebibytes=f"{GPU_BYTES / 2**20:.0f}",
        ratios=[_bf16_over_float32(name) for name in ("h100", "rtx5080")],
        waiting=any(row.get("gpu_busy_percent") for rows in evidence.tables("memory").values() for row in rows),
        by_model=by_model(evidence),
        recipes=recipe_rows(evidence),
        recipe_codes=code_of_recipes(evidence),
        largest=way_rows(evidence, "largest"),
        seven_billion=way_rows(evidence, "seven_billion"),
        plan_errors=plan_errors(evidence),
        step_errors=OF_MEASURED,
        planned_gpu=evidence.planned.get("gpu", {}).get("name"),
        spared=amount(evidence.planned.get("spared_bytes", 0), "bytes"),
        depths=depth_advice(evidence),
        memory_presets=_settings(memory, [field.name for field in fields(MemoryConfig)]),
        hybrid_presets=_settings({"conservative": preset, "aggressive": HybridTrainerConfig.aggressive()}, SHOWN),
        hybrids=known_columns([_hybrid(claim, evidence) for claim in hybrids]),
        path_rows=needs.rows if needs else 0,
        predictor=preset.predictor,
    )


def _bf16_over_float32(gpu: str) -> str:
    """How much faster a GPU multiplies in bf16, by its data sheet."""
    specs = GPUS[gpu]
    return f"{specs.bfloat16_flops / specs.float32_flops:.1f} times ({specs.name})"


def _settings(presets: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, str]]:
    """One row per setting, one column per preset."""
    return [
        {"setting": Markdown(f"`{name}`")}
        | {preset: _setting(getattr(config, name)) for preset, config in presets.items()}
        for name in names
    ]


def _setting(value: Any) -> str:
    if value is None or (value is False) or value == 0:
        return "off"
    if is_dataclass(value) and not isinstance(value, type):
        return ", ".join(f"{name} {setting}" for name, setting in asdict(value).items())
    return "on" if value is True else str(value)


def _hybrid(claim: Published, evidence: Evidence) -> dict[str, str | None]:
    vram = evidence.beside(claim, "vram")
    return {
        "arm": claim.about,
        "steps predicted": predicted_share(claim),
        "loss against the control": quantity_interval(claim.quantity("loss_to_control")),
        "p, corrected": p_value(claim),
        "peak VRAM": amount(vram.value("peak_memory"), "bytes") if vram else None,
        "pays": verdict_word(claim.verdict),
    }
