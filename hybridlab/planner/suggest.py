"""The least that must be switched on for a training to fit a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from hybridlab.base.errors import UserError
from hybridlab.memory.config import (
    CLIP_NORM,
    CheckpointingConfig,
    GradientAccumulationConfig,
    MixedPrecisionConfig,
    PredictAwareMemoryConfig,
)
from hybridlab.planner.plan import Plan, plan_training
from hybridlab.planner.spec import TrainingSpec
from hybridlab.weights.residency import Residency

CHUNK_TOKENS, PAD_VOCAB_TO = 1024, 128


@dataclass(frozen=True)
class Option:
    """One more feature than the option before: its name, the training with it, and what that takes."""

    name: str
    spec: TrainingSpec
    plan: Plan


def options(spec: TrainingSpec) -> Iterator[Option]:
    """The training as it is, then one feature after the other switched on, from harmless to costly.

    Each option keeps what the ones before it switched on. A feature that is on already, or that does not go with the
    training, gives no option.
    """
    yield Option("as it is", spec, plan_training(spec))
    for name, change in FEATURES:
        if (changed := change(spec)) is None:
            continue
        try:
            yield Option(name, changed, plan_training(changed))
        except UserError:  # a model without blocks cannot be checkpointed
            continue
        spec = changed


def smallest_fit(spec: TrainingSpec, gpu_bytes: int) -> list[Option]:
    """The options up to the first that fits the GPU; all of them where none does."""
    tried: list[Option] = []
    for option in options(spec):
        tried.append(option)
        if option.plan.fits(gpu_bytes):
            break
    return tried


def nearest_fit(spec: TrainingSpec, gpu_bytes: int) -> str:
    """One line for who has run out of memory: what to switch on, and the peak that it is expected to have.

    gpu_bytes: of the GPU, its context included
    """
    _, *changes = tried = smallest_fit(spec, gpu_bytes)
    last = tried[-1].plan
    peak = f"{last.peak_on_gpu_bytes / 1e9:.1f} GB of {gpu_bytes / 1e9:.1f} on the GPU"
    if not last.fits(gpu_bytes):
        return f"no setting makes it fit: with all of them it takes {peak}; take a shorter batch or a smaller model"
    names = ", ".join(option.name for option in changes) or "the settings as they are"
    return f"nearest fitting setting: {names} (expected peak {peak})"


# --- the features, from harmless to costly ---------------------------------------------------------------


def _autocast(spec: TrainingSpec) -> TrainingSpec | None:
    numbers = spec.memory.mixed_precision
    if spec.memory.weights == "bf16" or (numbers and numbers.training == "bf16"):
        return None
    return spec.changed(mixed_precision=MixedPrecisionConfig("bf16", numbers.predict if numbers else "bf16"))


def _chunked_loss(spec: TrainingSpec) -> TrainingSpec | None:
    is_on = callable(spec.model) or spec.memory.loss_chunk_tokens
    return None if is_on else spec.changed(loss_chunk_tokens=CHUNK_TOKENS)


def _path_on_host(spec: TrainingSpec) -> TrainingSpec | None:
    if spec.path is None or spec.path_storage.on_host:
        return None
    return replace(spec, path_storage=replace(spec.path_storage, residency=Residency.OFFLOADED))


def _checkpointing(spec: TrainingSpec) -> TrainingSpec | None:
    return None if spec.memory.checkpointing else spec.changed(checkpointing=CheckpointingConfig())


def _low_bit(spec: TrainingSpec) -> TrainingSpec | None:
    if spec.optimizer.name != "adamw" or spec.memory.optimizer_state != "fp32" or spec.memory.state_on_host:
        return None
    aware = spec.memory.predict_aware
    if aware and aware.strategy == "compress":
        aware = PredictAwareMemoryConfig("none")
    padding = spec.memory.pad_vocab_to or PAD_VOCAB_TO
    return spec.changed(optimizer_state="int8", pad_vocab_to=padding, predict_aware=aware)


def _in_backward(spec: TrainingSpec) -> TrainingSpec | None:
    memory = spec.memory
    if memory.step_in_backward or memory.gradient_accumulation or memory.state_on_host:
        return None
    return spec.changed(step_in_backward=True, clip_in_backward=CLIP_NORM)


def _inputs_on_host(spec: TrainingSpec) -> TrainingSpec | None:
    checkpointing = spec.memory.checkpointing
    if checkpointing is None or checkpointing.inputs == "host":
        return None
    return spec.changed(checkpointing=replace(checkpointing, inputs="host"))


def _state_on_host(spec: TrainingSpec) -> TrainingSpec | None:
    if spec.optimizer.name != "adamw" or spec.memory.state_on_host:
        return None
    return spec.changed(
        state_on_host=True, optimizer_state="fp32", step_in_backward=False, clip_in_backward=None, predict_aware=None
    )


def _bf16_weights(spec: TrainingSpec) -> TrainingSpec | None:
    numbers, memory = spec.memory.mixed_precision, spec.memory
    if spec.path or memory.weights == "bf16" or not memory.state_on_host:
        return None
    return spec.changed(weights="bf16", mixed_precision=numbers and replace(numbers, predict="bf16"))


def _micro_batches(count: int, spec: TrainingSpec) -> TrainingSpec | None:
    if spec.memory.step_in_backward or spec.memory.micro_batches >= count or spec.batch[0] % count:
        return None
    return spec.changed(gradient_accumulation=GradientAccumulationConfig(count))


FEATURES: tuple[tuple[str, Callable[[TrainingSpec], TrainingSpec | None]], ...] = (
    ("bf16 autocast", _autocast),
    (f"loss in chunks of {CHUNK_TOKENS} tokens", _chunked_loss),
    ("path on the host", _path_on_host),
    ("checkpointing of every block", _checkpointing),
    (f"int8 optimizer state, vocabulary padded to {PAD_VOCAB_TO}s", _low_bit),
    (f"optimizer step inside backward, clipped at norm {CLIP_NORM:g}", _in_backward),
    ("inputs of checkpointed blocks on the host", _inputs_on_host),
    ("gradients and fp32 state on the host instead of int8 state", _state_on_host),
    ("bf16 weights, their fp32 masters on the host", _bf16_weights),
    *((f"{count} micro batches", partial(_micro_batches, count)) for count in (2, 4, 8)),
)
