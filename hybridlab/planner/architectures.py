"""A causal language model from its Hugging Face config.json, without weights and without a download."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hybridlab.base.errors import UserError

DTYPE_NAMES = ("dtype", "torch_dtype")
"""Of the type that weights are published in; training keeps them in float32."""


@dataclass(frozen=True)
class CausalLM:
    """A model that transformers builds from a configuration; call it to build.

    name: its model_type, as "llama"; longest: tokens per window that it takes, None without a limit
    """

    name: str
    longest: int | None
    build: Callable[[], nn.Module]

    def __call__(self) -> nn.Module:
        """The model, in float32 and in training mode; it keeps no keys and values of earlier tokens."""
        return self.build()


def causal_lm(place: str | Path) -> CausalLM:
    """The model that a config.json describes; `place` is that file or its folder.

    Raises UserError where transformers is missing, there is no such file, or it describes no causal language model.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise UserError("--config needs transformers: pip install 'hybridlab[hf]'") from error
    settings = _read(Path(place))
    name = settings.pop("model_type")
    try:
        config = AutoConfig.for_model(name, **settings)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{place}: transformers cannot read it: {error}") from error
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UserError(f"{place}: a {name!r} is no causal language model: give the configuration of one")
    return CausalLM(name, getattr(config, "max_position_embeddings", None), lambda: _built(config))


def language_model_loss(module: nn.Module, batch: tuple[int, int]) -> Tensor:
    """As transformers computes it, from tokens that are their own labels."""
    tokens = torch.zeros(batch, dtype=torch.long)
    return module(input_ids=tokens, labels=tokens).loss


def _built(config: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    config.use_cache = False
    return AutoModelForCausalLM.from_config(config).train()  # type: ignore[no-untyped-call]


def _read(place: Path) -> dict[str, Any]:
    file = place / "config.json" if place.is_dir() else place
    try:
        settings = json.loads(file.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{file} is no config.json of a model: {error}") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("model_type"), str):
        raise UserError(f"{file} names no model_type: give the config.json of a Hugging Face model")
    return {name: value for name, value in settings.items() if name not in DTYPE_NAMES}
