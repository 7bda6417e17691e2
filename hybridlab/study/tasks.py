"""What is trained on what: a model beside its data, with a loss for each nominal step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import fmean
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from hybridlab.base.errors import UserError
from hybridlab.base.ranks import from_each, rank, running
from hybridlab.base.settings import check_bounds, check_types
from hybridlab.data import (
    ImageBatches,
    ImageData,
    TextData,
    TokenBatches,
    evenly_spaced,
    images_in_order,
    load_images,
    load_text,
)
from hybridlab.memory.config import MemoryConfig
from hybridlab.models import GPT2, GPT2Config, MnistCNN
from hybridlab.models.huggingface import causal_config, fresh_model, read_config

load_text_once = lru_cache(load_text)
load_images_once = lru_cache(load_images)


Batch = Any
"""What a loss is computed on: a tuple, list or dictionary of tensors whose first dimension counts the same examples."""


class Task(Protocol):
    """A model, and its losses on the data: all that panel, session, study, plan and record need of a training."""

    model: nn.Module

    def batch(self, step: int) -> Batch:
        """The batch of a nominal step, counted from 0, on the model's device."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Loss in nats: the mean over a batch, or over a part of one."""

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Validation figures, "validation_loss" in nats among them; called in eval mode, without gradients."""


@runtime_checkable
class TaskConfig(Protocol):
    """Settings from which a task is built, the same for the same seed."""

    @property
    def batch_size(self) -> int:
        """Windows or images per step."""

    def build(self, seed: int, device: torch.device, memory: MemoryConfig | None = None) -> Task:
        """Load the data and make the model, with weights drawn from the seed, as `memory` wants it built."""

    def data_record(self) -> dict[str, Any]:
        """Where the data come from: source, hash and counts."""


@dataclass(frozen=True)
class TokenWindows:
    """A language model's text, in windows of tokens.

    model: says which model, as each kind of task has it
    data: a source that `load_text` knows; vocab_size: of the tokenizer trained on it, and of the model
    block_size: tokens per window; batch_size: windows per step
    validation_batches: batches, evenly spaced over the validation tokens, on which a model is judged
    max_bytes: cap on the training text; 0 takes all
    """

    model: str
    data: str = "python"
    vocab_size: int = 2048
    block_size: int = 64
    batch_size: int = 8
    validation_batches: int = 16
    max_bytes: int = 0

    def load_text(self) -> TextData:
        """The tokens, read once per process."""
        return load_text_once(self.data, vocab_size=self.vocab_size, max_bytes=self.max_bytes or None)


@dataclass(frozen=True)
class TextTaskConfig(TokenWindows):
    """A GPT-2 on tokens.

    model: a name that `GPT2Config.named` knows; dropout: its dropout, in training
    others: as `TokenWindows` has them
    """

    model: str = "tiny"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what cannot be trained."""
        check_types(self)
        check_bounds(self, "batch_size", "validation_batches", least=1)
        check_bounds(self, "max_bytes", least=0)
        _ = self.model_config  # refuses its own part

    @property
    def model_config(self) -> GPT2Config:
        """The model's shape; vocabularies that the data leave smaller stay as asked."""
        return GPT2Config.named(
            self.model, vocab_size=self.vocab_size, block_size=self.block_size, dropout=self.dropout
        )

    def build(self, seed: int, device: torch.device, memory: MemoryConfig | None = None) -> TextTask:
        """A fresh model, and batches drawn by the same seed."""
        torch.manual_seed(seed)
        settings = memory.model_settings if memory else {}
        with device:
            model = GPT2(replace(self.model_config, **settings))
        return TextTask(model, self, seed, device, parts=memory.micro_batches if memory else 1)

    def data_record(self) -> dict[str, Any]:
        """Source, hash, token counts."""
        return self.load_text().record()


class _ModelTask:
    """A model that gives the loss of a batch itself: its mean cross-entropy, in nats."""

    def __init__(self, model: nn.Module, batches: Callable[[int], Batch]) -> None:
        self.model, self._batches = model, batches

    def batch(self, step: int) -> Batch:
        """The step's windows and the tokens that follow, or its images and their classes."""
        return self._batches(step)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy over the batch."""
        return model(*batch)


@contextmanager
def judging(model: nn.Module) -> Iterator[None]:
    """Without gradients and dropout; the model's mode is put back."""
    was_training = model.training
    with torch.no_grad():
        model.eval()
        yield
    model.train(was_training)


class TextTask(_ModelTask):
    """Next-token prediction; evaluates to loss (nats per token) and perplexity.

    config: a `TextTaskConfig`, or other settings with its sizes and its text
    parts: that a held-out batch is judged in, so that it takes no more memory than training does
    """

    def __init__(self, model: nn.Module, config: Any, seed: int, device: torch.device, parts: int = 1) -> None:
        text, size = config.load_text(), {"batch_size": config.batch_size, "block_size": config.block_size}
        super().__init__(model, TokenBatches(text.train, **size, seed=seed, device=device))
        self._parts = parts
        self._held_out = evenly_spaced(text.validation, batches=config.validation_batches, **size, device=device)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Mean over the held-out batches, of which each rank judges its part; dropout off."""
        own = [own_part(batch) for batch in self._held_out]
        losses = [self.loss(model, part) for batch in own for part in in_parts(batch, self._parts)]
        loss = fmean(from_each(float(torch.stack(losses).mean())))
        return {"validation_loss": loss, "perplexity": math.exp(min(loss, 700.0))}


@dataclass(frozen=True)
class HuggingFaceTaskConfig(TokenWindows):
    """A model of transformers with fresh weights; nothing is downloaded.

    model: a config as JSON text, such as '{"model_type": "llama", "num_hidden_layers": 4}', or the path of a
        config.json or of a folder that holds one
    data, vocab_size, block_size, batch_size, validation_batches, max_bytes: as `TokenWindows` has them; the config's
        own vocabulary gives way to `vocab_size`

    Raises UserError for a config that is not readable or that transformers refuses, and where it is not installed.
    """

    def __post_init__(self) -> None:
        check_types(self)
        check_bounds(self, "vocab_size", "batch_size", "block_size", "validation_batches", least=1)
        check_bounds(self, "max_bytes", least=0)
        self.model_config()

    def model_config(self) -> Any:
        """The config as transformers has it, with this vocabulary."""
        return causal_config(read_config(self.model) | {"vocab_size": self.vocab_size})

    def build(self, seed: int, device: torch.device, memory: MemoryConfig | None = None) -> HuggingFaceTask:
        """A fresh model in training mode, and batches drawn by the same seed; loss chunks and padding are GPT-2's."""
        torch.manual_seed(seed)
        with device:
            model = fresh_model(self.model_config())
        return HuggingFaceTask(model, self, seed, device, parts=memory.micro_batches if memory else 1)

    def data_record(self) -> dict[str, Any]:
        """Source, hash, token counts, and the config as it was read."""
        return self.load_text().record() | {"config": read_config(self.model)}


class HuggingFaceTask(TextTask):
    """Next-token prediction by the logits of a transformers model."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy over the batch, in nats."""
        tokens, targets = batch
        return nn.functional.cross_entropy(model(input_ids=tokens).logits.flatten(0, 1).float(), targets.flatten())


@dataclass(frozen=True)
class ImageTaskConfig:
    """The plan's MNIST CNN on images: `data` is a source that `load_images` knows."""

    data: str = "digits"
    batch_size: int = 64

    def __post_init__(self) -> None:
        """Refuse what cannot be trained."""
        check_types(self)
        check_bounds(self, "batch_size", least=1)

    def load_images(self) -> ImageData:
        """The images, read once per process."""
        return load_images_once(self.data)

    def build(self, seed: int, device: torch.device, memory: MemoryConfig | None = None) -> ImageTask:
        """A fresh CNN, and batches drawn by the same seed; there is nothing in it to chunk or to pad."""
        torch.manual_seed(seed)
        with device:
            model = MnistCNN()
        return ImageTask(model, self, seed, device)

    def data_record(self) -> dict[str, Any]:
        """Source, hash, image counts."""
        return self.load_images().record()


class ImageTask(_ModelTask):
    """Ten-class recognition; evaluates to loss (nats per image) and accuracy."""

    def __init__(self, model: MnistCNN, config: ImageTaskConfig, seed: int, device: torch.device) -> None:
        images = config.load_images()
        super().__init__(model, ImageBatches(images, batch_size=config.batch_size, seed=seed, device=device))
        self._held_out = images_in_order(images, batch_size=1024, device=device)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Over the whole test set."""
        logits = torch.cat([model(images) for images, _ in self._held_out])
        labels = torch.cat([labels for _, labels in self._held_out])
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        return {"validation_loss": float(nn.functional.cross_entropy(logits, labels)), "accuracy": float(accuracy)}


def own_part(batch: Batch) -> Batch:
    """What this rank takes of a batch that is the same on every rank."""
    return in_parts(batch, running())[rank()] if running() > 1 else batch


def in_parts(batch: Batch, parts: int) -> list[Batch]:
    """A batch in so many equal parts, which share its memory.

    Tensors of one row, or of none, go into each, as does what is no tensor. Raises UserError where the others have
    different numbers of rows, or one that does not split.
    """
    leaves, form = tree_flatten(batch)
    rows = sorted({len(leaf) for leaf in leaves if _has_rows(leaf)})
    if parts > 1 and (len(rows) > 1 or any(count % parts for count in rows)):
        raise UserError(
            f"{parts} equal parts of a batch are wanted, and its tensors have {' and '.join(map(str, rows))} rows: "
            f"give each as many, a multiple of {parts}, or one row where all windows share it"
        )
    split = [leaf.chunk(parts) if _has_rows(leaf) else [leaf] * parts for leaf in leaves]
    return [tree_unflatten(part, form) for part in zip(*split, strict=True)]


def _has_rows(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) > 1
