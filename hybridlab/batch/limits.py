"""What a parameter may be beyond its type: bounds, choices, and what must hold between two of them.

A parameter's name means the same in every notebook, so that one table serves all. What needs torch stands here as text
or a number, since a refusal must not wait for it; tests hold these against what the library knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybridlab.base.errors import UserError, nearest
from hybridlab.base.settings import broken_bound
from hybridlab.base.text_file import unreadable
from hybridlab.predictors import PREDICTORS

TEXTS = ("python", "markov", "uniform", "file:PATH", "bin:PATH", "hf:NAME")
IMAGES = ("digits", "mnist", "mnist:PATH")
JUMP_WARMUP_STEPS = 2
"""Of `benchmarks.footprint.jumping_with`."""

BLOCKS = {"nano": 2, "micro": 6, "tiny": 4, "mini": 12, "small": 12, "medium": 24, "large": 36, "xl": 48}
"""Of the GPT-2 sizes."""

ANY: dict[str, float] = {}
COUNT, COUNT_OR_NONE, SIZE = {"least": 1}, {"least": 0}, {"least": 1, "most": 10**6}
RATE, SHARE = {"above": 0, "most": 1000}, {"least": 0, "below": 1}
LIMITS: dict[str, Mapping[str, float] | tuple[str, ...]] = {
    "at_once": SIZE,
    "batch_size": SIZE,
    "beta1": SHARE,
    "beta1_tried": SHARE,
    "beta2": SHARE,
    "block_size": SIZE,
    "budgets": COUNT,
    "card_gb": COUNT_OR_NONE,
    "checkpoint_every": COUNT_OR_NONE,
    "controls": {"above": 0, "most": 4},
    "cpu_threads": {"least": 0, "most": 1024},
    "depth_seeds": SIZE,
    "depth_steps": COUNT,
    "device": ("auto", "cuda", "cpu"),
    "evaluate_every": COUNT,
    "full_steps": COUNT,
    "gather": ("fp32", "bf16"),
    "grow_at": {"above": 0, "below": 1},
    "grown_lr": RATE,
    "least_ratio": {"above": 0},
    "long_seeds": SIZE,
    "lr": RATE,
    "lr_factors": RATE,
    "lr_multiples": RATE,
    "max_bytes": COUNT_OR_NONE,
    "minutes": {"above": 0},
    "model": tuple(BLOCKS),
    "muon_lr": RATE,
    "nproc": SIZE,
    "optimizer": ("adamw", "adam", "muon", "sgd"),
    "overhead_rounds": SIZE,
    "panel_rounds": SIZE,
    "panel_turn_steps": SIZE,
    "precision": ("fp32", "tf32", "bf16"),
    "predict_after": COUNT_OR_NONE,
    "predict_steps": COUNT_OR_NONE,
    "predictor": tuple(PREDICTORS),
    "predictors": tuple(PREDICTORS),
    "profile_steps": COUNT_OR_NONE,
    "reference_steps": COUNT_OR_NONE,
    "rate_trials": COUNT_OR_NONE,
    "rungs": ("TF32", "bf16", "compiled", "CUDA graph", "tuned rates", "Muon", "predicted depth"),
    "rules": ("interleave", "stack", "linear", "fresh", "best"),
    "seeds": SIZE,
    "steps": COUNT,
    "strict_steps": COUNT,
    "tail_average": SHARE,
    "timed_steps": COUNT,
    "validation_batches": SIZE,
    "vocab_size": {"least": 2, "most": 2**16},
    "warmup_steps": COUNT_OR_NONE,
    "wrap": ("fsdp", "ddp"),
}
"""name -> bounds, as `base.settings.broken_bound` takes them, or the names that are known; of a list, for each item.

A notebook whose own default breaks it means something else by the name, and is let be."""

NOT_ABOVE = [("evaluate_every", "steps"), ("timed_steps", "steps"), ("reference_steps", "steps")]
NOT_ABOVE += [("strict_steps", "reference_steps")]
BELOW = [("warmup_steps", "steps"), ("warmup_steps", "predict_steps"), ("full_steps", "predict_steps")]
"""Pairs of which the first must not be above the second, or must be below it; a second of 0 switches off its part."""


def check_limits(values: Mapping[str, Any], defaults: Mapping[str, Any], places: Mapping[str, str]) -> None:
    """Hold all parameters of a notebook against their limits, then against each other.

    values: what the notebook would run with; defaults: what it declares; places: where a value was given, if it was

    Raises UserError that names the parameter and what would do.
    """
    for name, value in values.items():
        if (said := broken(name, value)) and not broken(name, defaults[name]):
            raise UserError(f"{name}: {value!r}{_place(name, places)}: {said}")
    for check in (_order, _data, _text_file, _vocabulary, _something_predicts, _jumps, _trials, _depth):
        if said := check(values):
            named = said.split(":")[0]
            raise UserError(f"{said}{_place(named, places, ' (given {})')}")


def broken(name: str, value: Any) -> str | None:
    """What is wrong with a parameter's value by itself; None where nothing is."""
    items = value if isinstance(value, list) else [value]
    if doubled := next((item for item in items if items.count(item) > 1), None):
        return f"{doubled!r} is named twice: keep one"
    limit = LIMITS.get(name, ANY)
    for item in items:
        if isinstance(limit, tuple):
            if item not in limit:
                return f"{item!r} is unknown: {nearest(item, limit)}"
        elif isinstance(item, int | float) and (bound := broken_bound(item, **limit)):
            return f"it must be {bound}"
    return None


def _place(name: str, places: Mapping[str, str], form: str = " {}") -> str:
    return form.format(places[name]) if name in places else ""


def _order(values: Mapping[str, Any]) -> str | None:
    """`warmup_steps` and `evaluate_every` within the run, references within what they stand beside."""
    for pairs, margin, word in ((NOT_ABOVE, 0, "at most"), (BELOW, 1, "below")):
        for name, other in pairs:
            value, most = values.get(name), values.get(other)
            if isinstance(value, int) and isinstance(most, int) and most and value + margin > most:
                return f"{name}: {value} must be {word} {other}, which is {most}"
    return None


def _data(values: Mapping[str, Any]) -> str | None:
    """The source is one of text where there is a language model, else one of images."""
    source, forms = values.get("data"), TEXTS if "vocab_size" in values else IMAGES
    if not isinstance(source, str) or "batch_size" not in values:
        return None
    kind, colon, rest = source.partition(":")
    known = {(form.partition(":")[0], ":" in form) for form in forms}
    fits = (kind, bool(colon)) in known and bool(rest) == bool(colon)
    return None if fits else f"data: {source!r} is no source: {nearest(source, forms)}"


def _text_file(values: Mapping[str, Any]) -> str | None:
    said = unreadable(str(values.get("data")), values.get("max_bytes") or 0)
    return said and f"data: {said}"


def _vocabulary(values: Mapping[str, Any]) -> str | None:
    small = values.get("data") == "python" and values.get("vocab_size", 257) < 257
    return (
        f"vocab_size: {values['vocab_size']} must be at least 257 (256 bytes and the end of a text)" if small else None
    )


def _something_predicts(values: Mapping[str, Any]) -> str | None:
    """With no arm that predicts, a study of step value has nothing to compare."""
    if not {"predictors", "guarded", "gate_alone", "unguarded"} <= set(values):
        return None
    if not values["predictors"]:
        return "predictors: none is left: name one at least"
    others = (values["gate_alone"] or values["unguarded"]) and set(values["predictors"]) - {"null"}
    if values["guarded"] or others:
        return None
    return (
        "predictors: none of them makes an arm: set guarded to true, or name one beside null and set unguarded to true"
    )


def _jumps(values: Mapping[str, Any]) -> str | None:
    """Runs that jump must come to a jump; the memory study, which grows no model, cannot leave them out."""
    steps, block, studied = values.get("predict_steps"), values.get("full_steps"), "first_blocks" not in values
    if steps is None or block is None or not (steps or studied):
        return None
    first = first_jump("linear" if studied else "ema_nesterov", block)
    if steps > first:
        return None
    otherwise = ", since strategies are compared on these runs" if studied else ", or 0 to run none"
    return f"predict_steps: {steps} must be above {first}, where the first jump comes{otherwise}"


def _trials(values: Mapping[str, Any]) -> str | None:
    few = values.get("rate_trials") in (1, 2)
    return f"rate_trials: {values['rate_trials']} must be at least 3, or 0 to try none" if few else None


def _depth(values: Mapping[str, Any]) -> str | None:
    """A grown arm begins with fewer blocks than its model has; it comes last in some notebooks."""
    first, model = values.get("first_blocks", 0), values.get("model")
    blocks = BLOCKS.get(str(model))
    if blocks is None or all(0 <= few < blocks for few in (first if isinstance(first, list) else [first])):
        return None
    return f"first_blocks: {first} must be at least 0 and below the blocks of {model}, {blocks}"


def first_jump(predictor: str, full_steps: int) -> int:
    """Steps of a run of `jumping_with` before its first jump."""
    return JUMP_WARMUP_STEPS + PREDICTORS[predictor]().needs(full_steps).first_asked(full_steps)
