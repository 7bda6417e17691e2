"""A causal language model of Hugging Face transformers, from its config alone, on tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hybridlab.base.settings import check_bounds, check_types
from hybridlab.memory.config import MemoryConfig
from hybridlab.models.huggingface import causal_config, fresh_model, read_config
from hybridlab.study.tasks import Batch, TextTask, TokenWindows


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
        return F.cross_entropy(model(input_ids=tokens).logits.flatten(0, 1).float(), targets.flatten())
