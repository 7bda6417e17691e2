"""A causal language model of Hugging Face transformers, as the planner takes it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hybridlab.models.huggingface import causal_config, fresh_model, read_config


@dataclass(frozen=True)
class CausalLM:
    """A model that transformers builds from its config; call it to build."""

    config: Any

    @property
    def name(self) -> str:
        """Its model_type, as "llama"."""
        return self.config.model_type

    @property
    def longest(self) -> int | None:
        """Tokens per window that it takes; None without a limit."""
        return getattr(self.config, "max_position_embeddings", None)

    def __call__(self) -> nn.Module:
        """The model, in float32 and in training mode."""
        return fresh_model(self.config)


def causal_lm(place: str | Path) -> CausalLM:
    """The model that a config.json describes; `place` is that file or its folder.

    Raises UserError where transformers is missing, there is no such file, or it describes no causal language model.
    """
    return CausalLM(causal_config(read_config(str(place))))


def language_model_loss(module: nn.Module, batch: tuple[int, int]) -> Tensor:
    """As transformers computes it, from tokens that are their own labels."""
    tokens = torch.zeros(batch, dtype=torch.long)
    return module(input_ids=tokens, labels=tokens).loss
