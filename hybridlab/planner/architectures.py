"""Models that are not ours as the planner takes them: of Hugging Face transformers, or any module with an example."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from hybridlab.base.errors import UserError
from hybridlab.base.one_line import in_one_line
from hybridlab.base.swapped import swapped
from hybridlab.models.huggingface import causal_config, fresh_model, read_config

SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
"""Of a config, by the names that transformers gives them for every architecture."""


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
        """The model, in float32 and in training mode. Raises UserError where transformers cannot build it."""
        with _refusing_config():
            return fresh_model(self.config)


@contextmanager
def _refusing_config() -> Iterator[None]:
    """Tell in one line what transformers or torch say of a config that makes no model, whatever error they raise."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {in_one_line(error).rstrip('.')}"
        raise UserError(f"transformers makes no model of the config: {said}; correct the config") from error


def causal_lm(place: str | Path) -> CausalLM:
    """The model that a config.json describes; `place` is that file or its folder.

    Raises UserError where transformers is missing, there is no such file, or it describes no causal language model.
    """
    settings = read_config(str(place))
    with _refusing_config():
        config = causal_config(settings)
    sizes = {name: getattr(config, name, None) for name in SIZES}
    for name, size in sizes.items():
        if isinstance(size, int) and size < 1:
            raise UserError(f"{place}: the config has {name}={size}: at least 1 is wanted")
    heads, shared = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    if isinstance(heads, int) and isinstance(shared, int) and heads % shared:
        raise UserError(f"{place}: num_key_value_heads={shared} does not divide num_attention_heads={heads}")
    return CausalLM(config)


def language_model_loss(module: nn.Module, batch: tuple[int, int]) -> Tensor:
    """As transformers computes it, from tokens that are their own labels."""
    tokens = torch.zeros(batch, dtype=torch.long)
    return module(input_ids=tokens, labels=tokens).loss


def one_text_per_window() -> AbstractContextManager[None]:
    """Inside, transformers takes a window for one text.

    Of tensors without values it thinks that a window may hold several, and makes an attention mask that a training does
    not have. Where transformers is not imported, the model is none of its own.
    """
    if "transformers" not in sys.modules:
        return nullcontext()
    from transformers import masking_utils

    several = "find_packed_sequence_indices"
    return swapped(masking_utils, **{several: lambda _: None}) if hasattr(masking_utils, several) else nullcontext()


def rebuilt(module: nn.Module) -> Callable[[], nn.Module]:
    """What makes the module again on the fake GPU: its structure, and tensors without values."""

    def build() -> nn.Module:
        replaced: dict[int, Any] = {id(p): nn.Parameter(_like(p), p.requires_grad) for p in module.parameters()}
        replaced |= {id(b): _like(b) for b in module.buffers()}
        return copy.deepcopy(module, replaced)

    return build


def shape_of(example: Any) -> tuple[int, int]:
    """Windows and tokens of an example batch: the first two lengths of its first tensor.

    Raises UserError for a batch without a tensor.
    """
    first = next((leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor) and leaf.ndim), None)
    if first is None:
        raise UserError("the example batch holds no tensor: give one, or a tuple or dict of tensors, or (8, 512)")
    return first.shape[0], first.shape[1] if first.ndim > 1 else 1


def example_loss(example: Any) -> Callable[[nn.Module, tuple[int, int]], Tensor]:
    """The loss of a module called with such a batch: what it returns, or the `loss` or first item of that.

    Raises UserError for a batch without a tensor; the function does so where the module returns no loss.
    """
    windows, tokens = shape_of(example)

    def loss(module: nn.Module, batch: tuple[int, int]) -> Tensor:
        cut = tree_map(lambda leaf: _resized(leaf, (windows, tokens), batch), example)
        out = module(**cut) if isinstance(cut, dict) else module(*cut) if isinstance(cut, tuple) else module(cut)
        found = getattr(out, "loss", out[0] if isinstance(out, tuple) else out)
        if not isinstance(found, Tensor) or found.numel() != 1:
            raise UserError(
                "called with the example batch, the module returns no loss: give plan a loss=f(module, batch)"
            )
        return found

    return loss


def _like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype)


def _resized(leaf: Any, example: tuple[int, int], wanted: tuple[int, int]) -> Any:
    """A tensor of the batch with as many windows and tokens as wanted."""
    if not isinstance(leaf, Tensor):
        return leaf
    pairs = zip(leaf.shape[:2], example, wanted, strict=False)
    lengths = [new if length == old else length for length, old, new in pairs]
    return torch.empty((*lengths, *leaf.shape[2:]), dtype=leaf.dtype)
