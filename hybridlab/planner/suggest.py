"""What to switch on for a training to fit a GPU, and the largest training that fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
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
from hybridlab.planner.gpu_specs import GpuSpec, nearest_gpu, step_time_ms
from hybridlab.planner.plan import Plan, plan_training
from hybridlab.planner.spec import TrainingSpec
from hybridlab.weights.residency import Residency

Change = Callable[[TrainingSpec], TrainingSpec | None]
"""Switches a feature on; None where it is on already, or changes nothing. It may raise what such settings do."""

CHUNK_TOKENS, PAD_VOCAB_TO, GRAIN = 1024, 128, 64

FAR = 16
"""Times a GPU's memory that what takes the least must take, for nothing else to be tried."""


@dataclass(frozen=True)
class Option:
    """A training with some features switched on.

    features: their names; none for the training as it is
    step_ms: estimated, on the GPU that it was planned for
    """

    features: tuple[str, ...]
    spec: TrainingSpec
    plan: Plan
    step_ms: float

    @property
    def name(self) -> str:
        """In words."""
        return ", ".join(self.features) or "as it is"

    @property
    def exact(self) -> bool:
        """Whether all of them leave the result as it is, but for rounding."""
        return INEXACT.isdisjoint(self.features)


def options(spec: TrainingSpec, gpu: GpuSpec, gpu_bytes: int = 0, *, asked: Plan | None = None) -> list[Option]:
    """The training as it is, and with each combination of features that goes with it, from fast to slow.

    gpu_bytes: left out is a combination that holds one which fits, since it can only be slower, and one whose weights,
        gradients and state alone do not fit, but for the one that takes the least; 0 keeps all
    asked: the plan of the training as it is, where it is known

    Of a training that takes more than FAR times the GPU with all of them, there are two: as it is, and with all.
    """
    plan = asked or plan_training(spec)
    found = [Option((), spec, plan, step_time_ms(plan, gpu))]
    least = min(LEAST, key=lambda changes: _least_bytes(_switched_on(spec, changes)[1], plan.trained_numbers))
    if _is_far(found[0], gpu_bytes) and (option := _planned(spec, least, gpu)):
        found.append(option)
    for changes in COMBINATIONS if not _is_far(found[-1], gpu_bytes) else ():
        features, changed = _switched_on(spec, changes)
        fitting = (set(o.features) for o in found if o.plan.fits(gpu_bytes))
        if any(set(features) == set(o.features) for o in found) or any(fits <= set(features) for fits in fitting):
            continue
        hopeless = gpu_bytes and _least_bytes(changed, plan.trained_numbers) > gpu_bytes
        if (not hopeless or changes is least) and (option := _planned(spec, changes, gpu)):
            found.append(option)
    return sorted(found, key=lambda option: option.step_ms)


def _planned(spec: TrainingSpec, changes: Sequence[Change], gpu: GpuSpec) -> Option | None:
    """The training with these changes; None where they do not go with it."""
    features, changed = _switched_on(spec, changes)
    try:
        plan = plan_training(changed)
    except UserError:  # a model without blocks cannot be checkpointed
        return None
    return Option(features, changed, plan, step_time_ms(plan, gpu))


def _is_far(option: Option, gpu_bytes: int) -> bool:
    """Whether it takes more than FAR times the GPU."""
    return 0 < FAR * gpu_bytes < option.plan.peak_on_gpu_bytes


def best_fit(options: list[Option], gpu_bytes: int) -> Option | None:
    """The fastest of those that fit."""
    return next((option for option in options if option.plan.fits(gpu_bytes)), None)


def fit_or_least(spec: TrainingSpec, gpu_bytes: int) -> Option:
    """The fastest option that fits, and where none does the one that takes the least."""
    tried = options(spec, nearest_gpu(gpu_bytes), gpu_bytes)
    return best_fit(tried, gpu_bytes) or min(tried, key=lambda option: option.plan.peak_on_gpu_bytes)


def nearest_fit(spec: TrainingSpec, gpu_bytes: int) -> str:
    """One line for who has run out of memory: what to switch on, and the peak that it is expected to have.

    gpu_bytes: of the GPU, its context included
    """
    least = fit_or_least(spec, gpu_bytes)
    peak = f"{least.plan.peak_on_gpu_bytes / 1e9:.1f} GB of {gpu_bytes / 1e9:.1f} on the GPU"
    if not least.plan.fits(gpu_bytes):
        return f"no setting makes it fit: the least that it takes is {peak}; take a shorter batch or a smaller model"
    names = ", ".join(least.features) or "the settings as they are"
    return f"nearest fitting setting: {names} (expected peak {peak})"


def largest_batch(spec: TrainingSpec, gpu_bytes: int) -> int:
    """The most windows of these tokens that fit; 0 where not one per micro batch does."""
    parts, tokens = spec.parts, spec.batch[1]
    return parts * largest_that_fits(lambda count: plan_training(spec.resized((parts * count, tokens))), gpu_bytes)


def longest_sequence(spec: TrainingSpec, gpu_bytes: int) -> int:
    """Tokens per window, in steps of GRAIN, that fit with as many windows where one step more does not.

    It is at most what the model takes, and 0 where one step does not fit. Peaks do not always rise with the length: a
    shorter window may not fit, and a longer one may.
    """
    windows, most = spec.batch[0], spec.longest
    at_most = None if most is None else most // GRAIN
    return GRAIN * largest_that_fits(
        lambda count: plan_training(spec.resized((windows, GRAIN * count))), gpu_bytes, at_most
    )


def largest_that_fits(plan_of: Callable[[int], Plan], gpu_bytes: int, at_most: int | None = None) -> int:
    """A number whose plan fits where the next one's does not: the largest, where peaks rise. 0 where 1 does not fit."""
    peaks: dict[int, int] = {}
    fits, too_many, guess = 0, None if at_most is None else at_most + 1, 1
    while too_many is None or too_many - fits > 1:
        peaks[guess] = plan_of(guess).peak_on_gpu_bytes
        fits, too_many = (guess, too_many) if peaks[guess] <= gpu_bytes else (fits, guess)
        most = (too_many or 8 * fits + 1) - 1
        guess = max(fits + 1, min(most, _on_the_line(peaks, fits, gpu_bytes) or (fits + most) // 2))
    return fits


def _on_the_line(peaks: dict[int, int], fits: int, gpu_bytes: int) -> int | None:
    """Where a line through the two largest numbers known meets the GPU's size, since peaks rise about in line."""
    if len(peaks) < 2 or len(peaks) > 8 or not fits:
        return None
    low, high = sorted(peaks)[-2:]
    slope = max(1.0, (peaks[high] - peaks[low]) / (high - low))
    return int(fits + (gpu_bytes - peaks[fits]) / slope)


def _least_bytes(spec: TrainingSpec, numbers: int) -> int:
    """Weights, gradients and AdamW's state on the GPU, of so many numbers that are trained."""
    memory = spec.memory
    weight = 2 if memory.lowers_weights else 4
    gradient = 0 if memory.step_in_backward or memory.state_on_host else weight
    moments = {"fp32": 8, "int4": 1}.get(memory.optimizer_state, 2) + (memory.weights == "24bit")
    state = 0 if memory.state_on_host or spec.optimizer.name != "adamw" else moments
    return numbers * (weight + gradient + state) + spec.overhead.context_bytes


def _switched_on(spec: TrainingSpec, changes: Sequence[Change]) -> tuple[tuple[str, ...], TrainingSpec]:
    """The names of the changes that go with the training, and the training with them."""
    names = []
    for change in changes:
        with suppress(ValueError, UserError):
            if (changed := change(spec)) is not None:
                changed.check()
                names.append(NAMES[change])
                spec = changed
    return tuple(names), spec


# --- the features, from harmless to costly ---------------------------------------------------------------


def _autocast(spec: TrainingSpec) -> TrainingSpec | None:
    numbers = spec.memory.mixed_precision
    if spec.memory.lowers_weights or (numbers and numbers.training == "bf16"):
        return None
    changed = spec.changed(mixed_precision=MixedPrecisionConfig("bf16", numbers.predict if numbers else "bf16"))
    return replace(changed, gather="bf16") if spec.is_sharded else changed  # or autocast keeps copies of all weights


def _chunked_loss(spec: TrainingSpec) -> TrainingSpec | None:
    is_on = not spec.is_gpt2 or spec.memory.loss_chunk_tokens
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
    is_on = spec.memory.step_in_backward
    return None if is_on else spec.changed(step_in_backward=True, clip_in_backward=CLIP_NORM)


def _inputs_on_host(spec: TrainingSpec) -> TrainingSpec | None:
    checkpointing = spec.memory.checkpointing
    if checkpointing is None or checkpointing.inputs == "host":
        return None
    return spec.changed(checkpointing=replace(checkpointing, inputs="host"))


def _state_on_host(spec: TrainingSpec) -> TrainingSpec | None:
    if spec.memory.state_on_host:
        return None
    return spec.changed(
        state_on_host=True, optimizer_state="fp32", step_in_backward=False, clip_in_backward=None, predict_aware=None
    )


def _bf16_weights(spec: TrainingSpec) -> TrainingSpec | None:
    numbers, memory = spec.memory.mixed_precision, spec.memory
    if memory.lowers_weights or not memory.state_on_host:
        return None
    return spec.changed(weights="bf16", mixed_precision=numbers and replace(numbers, predict="bf16"))


def _micro_batches(count: int, spec: TrainingSpec) -> TrainingSpec | None:
    is_on = spec.memory.micro_batches >= count
    return None if is_on else spec.changed(gradient_accumulation=GradientAccumulationConfig(count))


_TWO, _FOUR, _EIGHT = (partial(_micro_batches, count) for count in (2, 4, 8))

FEATURES: tuple[tuple[str, Change], ...] = (
    ("bf16 autocast", _autocast),
    (f"loss in chunks of {CHUNK_TOKENS} tokens", _chunked_loss),
    ("path on the host", _path_on_host),
    ("checkpointing of every block", _checkpointing),
    (f"int8 optimizer state, vocabulary padded to {PAD_VOCAB_TO}s", _low_bit),
    (f"optimizer step inside backward, clipped at norm {CLIP_NORM:g}", _in_backward),
    ("inputs of checkpointed blocks on the host", _inputs_on_host),
    ("gradients and fp32 state on the host instead of int8 state", _state_on_host),
    ("bf16 weights, their fp32 masters on the host", _bf16_weights),
    *((f"{count} micro batches", change) for count, change in ((2, _TWO), (4, _FOUR), (8, _EIGHT))),
)
NAMES = {change: name for name, change in FEATURES}
INEXACT = {NAMES[change] for change in (_low_bit, _in_backward, _bf16_weights)}

_HARMLESS = (_autocast, _chunked_loss, _path_on_host)
_LEAN = (*_HARMLESS, _checkpointing)
COMBINATIONS: tuple[tuple[Change, ...], ...] = (
    (_path_on_host,),
    (_autocast,),
    _HARMLESS,
    *((*_HARMLESS, change) for change in (_TWO, _FOUR, _EIGHT, _low_bit)),
    (*_HARMLESS, _low_bit, _in_backward),
    _LEAN,
    (*_LEAN, _FOUR),
    (*_LEAN, _low_bit),
    (*_LEAN, _low_bit, _EIGHT),
    (*_LEAN, _low_bit, _in_backward),
    (*_LEAN, _low_bit, _in_backward, _inputs_on_host),
    (*_LEAN, _state_on_host),
    (*_LEAN, _inputs_on_host, _state_on_host, _bf16_weights, _EIGHT),
)
LEAST = (COMBINATIONS[-1], COMBINATIONS[-3])
"""Those that may take the least: the second where the optimizer's state cannot be on the host."""
