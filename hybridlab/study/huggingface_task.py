"""A causal language model of Hugging Face transformers, from its config alone, on tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hybridlab.base.errors import UserError, first_line
from hybridlab.base.settings import check_bounds, check_types
from hybridlab.memory.config import MemoryConfig
from hybridlab.study.tasks import Batch, TextTask, TokenWindows

NO_TOKENS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
"""The special tokens of a config's own tokenizer mean nothing here, and may lie outside the vocabulary."""

LARGEST = {("_layer", "_layers"): 1000, ("_head", "_heads"): 1000, ("hidden_size", "n_embd", "d_model"): 100_000}
"""Ends of names in a config -> the largest size that a model may have."""


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
        settings = read_config(self.model) | {"vocab_size": self.vocab_size, "use_cache": False}
        kind = settings.pop("model_type", None)
        _refuse_sizes(settings)
        try:
            from transformers import AutoConfig

            return AutoConfig.for_model(kind, **settings | NO_TOKENS)
        except ImportError:
            raise UserError("transformers is not installed: .venv/bin/pip install transformers") from None
        except (ValueError, TypeError) as error:
            raise UserError(f"transformers refuses the config with model_type={kind!r}: {first_line(error)}") from None

    def build(self, seed: int, device: torch.device, memory: MemoryConfig | None = None) -> HuggingFaceTask:
        """A fresh model in training mode, and batches drawn by the same seed; loss chunks and padding are GPT-2's."""
        from transformers import AutoModelForCausalLM

        torch.manual_seed(seed)
        with device:
            model = AutoModelForCausalLM.from_config(self.model_config(), dtype=torch.float32)  # type: ignore[no-untyped-call]
        return HuggingFaceTask(model.train(), self, seed, device, parts=memory.micro_batches if memory else 1)

    def data_record(self) -> dict[str, Any]:
        """Source, hash, token counts, and the config as it was read."""
        return self.load_text().record() | {"config": read_config(self.model)}


class HuggingFaceTask(TextTask):
    """Next-token prediction by the logits of a transformers model."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy over the batch, in nats."""
        tokens, targets = batch
        return F.cross_entropy(model(input_ids=tokens).logits.flatten(0, 1).float(), targets.flatten())


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
    if not isinstance(settings, dict) or "model_type" not in settings:
        raise UserError(f'{place} has no "model_type": write one, such as {{"model_type": "gpt2"}}')
    return settings


def _refuse_sizes(settings: dict[str, Any]) -> None:
    """Raise UserError for a size that no model has, under whatever name, before anything of that size is made."""
    for name, value in settings.items():
        most = next((most for ends, most in LARGEST.items() if name.endswith(ends)), None)
        if most and type(value) in (int, float) and value > most:
            raise UserError(f"the config has {name}={value!r}: a whole number up to {most:,} is wanted")
