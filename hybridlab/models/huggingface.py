"""Causal language models of Hugging Face transformers, from a configuration: without weights and without a download."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hybridlab.base.errors import UserError, first_line, nearest
from hybridlab.base.lazy import quiet_imports

NO_TOKENS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
"""The special tokens of a config's own tokenizer mean nothing here, and may lie outside the vocabulary."""

LARGEST = {("_layer", "_layers"): 1000, ("_head", "_heads"): 1000, ("hidden_size", "n_embd", "d_model"): 100_000}
"""Ends of names in a config -> the largest size that a model may have."""


def read_config(model: str) -> dict[str, Any]:
    """A config from JSON text, a JSON file, or a folder with a config.json. Raises UserError for anything else."""
    text, place = model, "the config"
    if not model.lstrip().startswith("{"):
        path = Path(model) / "config.json" if Path(model).is_dir() else Path(model)
        if not path.is_file():
            raise UserError(f"{path}: no such config: give a config.json, its folder, or its JSON text")
        text, place = path.read_text(encoding="utf-8", errors="replace"), str(path)
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise UserError(f"{place} is not readable JSON: {error}") from None
    if not isinstance(settings, dict) or not isinstance(settings.get("model_type"), str):
        raise UserError(f'{place} has no "model_type": write one, such as {{"model_type": "gpt2"}}')
    return settings


def causal_config(settings: dict[str, Any]) -> Any:
    """What transformers makes of a config, for training: it keeps no keys and values of earlier tokens.

    Raises UserError where transformers is missing or refuses it, and where it is no causal language model's.
    """
    _refuse_sizes(settings)
    kind = settings["model_type"]
    others = {name: value for name, value in settings.items() if name != "model_type"}
    try:
        from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        config = AutoConfig.for_model(kind, **others | NO_TOKENS | {"use_cache": False})
    except ImportError:
        raise UserError("transformers is not installed: pip install 'hybridlab[hf]'") from None
    except (ValueError, TypeError, KeyError) as error:
        said = first_line(error) if kind in CONFIG_MAPPING else nearest(kind, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        raise UserError(f"transformers refuses the config with model_type={kind!r}: {said}") from None
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UserError(f"a {kind!r} is not a causal language model: give the config of one")
    return config


def fresh_model(config: Any) -> nn.Module:
    """The model of a config, in float32 whatever its weights are published in, and in training mode."""
    with quiet_imports():  # transformers imports torchao with its models
        from transformers import AutoModelForCausalLM, modeling_utils  # noqa: F401

    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    model.loss_type = model.loss_type or "ForCausalLM"  # which it takes for GPT-2's, with a warning
    return model.train()


def _refuse_sizes(settings: dict[str, Any]) -> None:
    """Raise UserError for a size that no model has, under whatever name, before anything of that size is made."""
    for name, value in settings.items():
        most = next((most for ends, most in LARGEST.items() if name.endswith(ends)), None)
        if most and type(value) in (int, float) and value > most:
            raise UserError(f"the config has {name}={value!r}: a whole number up to {most:,} is wanted")
