"""The least that must be switched on for a training to fit a card."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from hybridlab.base.errors import UserError
from hybridlab.memory.config import (
    CLIP_NORM,
    CheckpointingConfig,
    GradientAccumulationConfig,
    MemoryConfig,
    MixedPrecisionConfig,
    PredictAwareMemoryConfig,
)
from hybridlab.optim import OptimizerConfig
from hybridlab.planner.plan import Batch, CardShare, Loss, Model, Plan, plan
from hybridlab.weights.gram import PathNeeds
from hybridlab.weights.path import PathStorage

CHUNK_TOKENS, PAD_VOCAB_TO = 1024, 128


@dataclass(frozen=True)
class Situation:
    """A training to make smaller: what `plan` takes, with its defaults."""

    model: Model
    batch: Batch
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    path: PathNeeds | None = None
    path_storage: PathStorage = field(default_factory=PathStorage)
    loss: Loss | None = None
    share: CardShare = field(default_factory=CardShare)

    def plan(self) -> Plan:
        """Its memory."""
        return plan(
            self.model,
            self.batch,
            self.memory,
            self.optimizer,
            path=self.path,
            path_storage=self.path_storage,
            loss=self.loss,
            share=self.share,
        )

    def changed(self, **settings: Any) -> Situation:
        """The same with other memory settings."""
        return replace(self, memory=replace(self.memory, **settings))


@dataclass(frozen=True)
class Rung:
    """One more feature than the rung before: its name, the training with it, and what that takes."""

    name: str
    situation: Situation
    plan: Plan


def ladder(situation: Situation) -> Iterator[Rung]:
    """The training as it is, then one feature after the other switched on, from harmless to costly.

    Each rung keeps what the ones before it switched on. A feature that is on already, or that does not go with the
    training, has no rung.
    """
    yield Rung("as it is", situation, situation.plan())
    for name, change in FEATURES:
        changed = change(situation)
        if changed is None:
            continue
        try:
            yield Rung(name, changed, changed.plan())
        except UserError:  # a model without blocks cannot be checkpointed
            continue
        situation = changed


def climb(situation: Situation, card_bytes: int) -> list[Rung]:
    """The ladder up to the first rung that fits the card; the whole of it where none does."""
    rungs: list[Rung] = []
    for rung in ladder(situation):
        rungs.append(rung)
        if rung.plan.fits(card_bytes):
            break
    return rungs


def nearest_fit(situation: Situation, card_bytes: int) -> str:
    """One line for who has run out of memory: what to switch on, and the peak that it is expected to have.

    card_bytes: of the card, its context included
    """
    rungs = climb(situation, card_bytes)
    last = rungs[-1]
    peak = f"{last.plan.peak_on_card_bytes / 1e9:.1f} GB of {card_bytes / 1e9:.1f} on the card"
    if not last.plan.fits(card_bytes):
        return f"no setting makes it fit: with all of them it takes {peak}; take a shorter batch or a smaller model"
    names = ", ".join(rung.name for rung in rungs[1:]) or "the settings as they are"
    return f"nearest fitting setting: {names} (expected peak {peak})"


# --- the features, from harmless to costly ---------------------------------------------------------------


def _autocast(it: Situation) -> Situation | None:
    numbers = it.memory.mixed_precision
    if it.memory.weights == "bf16" or (numbers and numbers.training == "bf16"):
        return None
    return it.changed(mixed_precision=MixedPrecisionConfig("bf16", numbers.predict if numbers else "bf16"))


def _chunked_loss(it: Situation) -> Situation | None:
    is_on = callable(it.model) or it.memory.loss_chunk_tokens
    return None if is_on else it.changed(loss_chunk_tokens=CHUNK_TOKENS)


def _path_on_host(it: Situation) -> Situation | None:
    if it.path is None or it.path_storage.on_host:
        return None
    return replace(it, path_storage=replace(it.path_storage, on_host=True))


def _checkpointing(it: Situation) -> Situation | None:
    return None if it.memory.checkpointing else it.changed(checkpointing=CheckpointingConfig())


def _low_bit(it: Situation) -> Situation | None:
    if it.optimizer.name != "adamw" or it.memory.optimizer_state != "fp32" or it.memory.state_on_host:
        return None
    aware = it.memory.predict_aware
    if aware and aware.strategy == "compress":
        aware = PredictAwareMemoryConfig("none")
    padding = it.memory.pad_vocab_to or PAD_VOCAB_TO
    return it.changed(optimizer_state="int8", pad_vocab_to=padding, predict_aware=aware)


def _in_backward(it: Situation) -> Situation | None:
    memory = it.memory
    if memory.step_in_backward or memory.gradient_accumulation or memory.state_on_host:
        return None
    return it.changed(step_in_backward=True, clip_in_backward=CLIP_NORM)


def _inputs_on_host(it: Situation) -> Situation | None:
    checkpointing = it.memory.checkpointing
    if checkpointing is None or checkpointing.inputs == "host":
        return None
    return it.changed(checkpointing=replace(checkpointing, inputs="host"))


def _on_host(it: Situation) -> Situation | None:
    if it.optimizer.name != "adamw" or it.memory.state_on_host:
        return None
    return it.changed(
        state_on_host=True, optimizer_state="fp32", step_in_backward=False, clip_in_backward=None, predict_aware=None
    )


def _bf16_weights(it: Situation) -> Situation | None:
    numbers, memory = it.memory.mixed_precision, it.memory
    if it.path or memory.weights == "bf16" or not memory.state_on_host:
        return None
    return it.changed(weights="bf16", mixed_precision=numbers and replace(numbers, predict="bf16"))


def _parts(count: int) -> Callable[[Situation], Situation | None]:
    def change(it: Situation) -> Situation | None:
        if it.memory.step_in_backward or it.memory.micro_batches >= count or it.batch[0] % count:
            return None
        return it.changed(gradient_accumulation=GradientAccumulationConfig(count))

    return change


FEATURES: tuple[tuple[str, Callable[[Situation], Situation | None]], ...] = (
    ("bf16 autocast", _autocast),
    (f"loss in chunks of {CHUNK_TOKENS} tokens", _chunked_loss),
    ("path on the host", _path_on_host),
    ("checkpointing of every block", _checkpointing),
    (f"int8 optimizer state, vocabulary padded to {PAD_VOCAB_TO}s", _low_bit),
    (f"optimizer step inside backward, clipped at norm {CLIP_NORM:g}", _in_backward),
    ("inputs of checkpointed blocks on the host", _inputs_on_host),
    ("gradients and fp32 state on the host instead of int8 state", _on_host),
    ("bf16 weights, their fp32 masters on the host", _bf16_weights),
    *((f"{count} micro batches", _parts(count)) for count in (2, 4, 8)),
)
