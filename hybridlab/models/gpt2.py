"""GPT-2: pre-norm decoder blocks, learned positions, and an output head tied to the token embedding."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from hybridlab.base.settings import check_bounds, check_choice, check_types
from hybridlab.models.loss import linear_cross_entropy
from hybridlab.models.pretrained import load_pretrained_, read_settings

Hidden = Float[Tensor, "batch time dim"]
SIZES = ("nano", "micro", "tiny", "mini", "small", "medium", "large", "xl")


@dataclass(frozen=True)
class GPT2Config:
    """The size of a GPT-2 and how it computes its loss; the defaults are GPT-2 Small.

    vocab_size: number of tokens; logits have this width
    block_size: longest sequence, in tokens; one learned position each
    n_layer: number of blocks; n_head: attention heads, must divide n_embd; n_embd: width of the residual stream
    dropout: probability, on the embedding, the attention weights and both residual branches
    loss_chunk_tokens: compute the loss in pieces of so many tokens, each with its gradients, so that the logits of a
        whole batch are never in memory; 0 computes it in one piece
    pad_vocab_to: round the embedding's rows up to a multiple of this, as kernels and quantizers like it; the added rows
        stay zero and logits keep vocab_size columns, so that no loss changes; 0 adds no row

    Raises TypeError or ValueError for a setting that makes no model; the message says what would.
    """

    vocab_size: int = 50257
    block_size: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    loss_chunk_tokens: int = 0
    pad_vocab_to: int = 64

    def __post_init__(self) -> None:
        check_types(self)
        check_bounds(self, "vocab_size", "block_size", "n_layer", "n_head", "n_embd", least=1)
        check_bounds(self, "loss_chunk_tokens", "pad_vocab_to", least=0)
        check_bounds(self, "dropout", least=0, below=1)
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}: "
                f"use n_embd={max(1, self.n_embd // self.n_head) * self.n_head}"
            )

    @classmethod
    def nano(cls, **changes: Any) -> GPT2Config:
        """137,024 parameters, for a CPU and seconds."""
        return replace(cls(vocab_size=512, block_size=64, n_layer=2, n_head=4, n_embd=64), **changes)

    @classmethod
    def micro(cls, **changes: Any) -> GPT2Config:
        """435,200 parameters in six blocks, for a CPU and minutes where depth is looked at."""
        return replace(cls(vocab_size=2048, block_size=64, n_layer=6, n_head=4, n_embd=64), **changes)

    @classmethod
    def tiny(cls, **changes: Any) -> GPT2Config:
        """1.07 million parameters, for a CPU and minutes."""
        return replace(cls(vocab_size=2048, block_size=128, n_layer=4, n_head=4, n_embd=128), **changes)

    @classmethod
    def mini(cls, **changes: Any) -> GPT2Config:
        """2,674,432 parameters in twelve blocks, as deep as GPT-2 Small: small enough for 20 tokens per parameter."""
        return replace(cls(vocab_size=2048, block_size=256, n_layer=12, n_head=4, n_embd=128), **changes)

    @classmethod
    def small(cls, **changes: Any) -> GPT2Config:
        """124,439,808 parameters."""
        return replace(cls(), **changes)

    @classmethod
    def medium(cls, **changes: Any) -> GPT2Config:
        """354,823,168 parameters."""
        return replace(cls(n_layer=24, n_head=16, n_embd=1024), **changes)

    @classmethod
    def large(cls, **changes: Any) -> GPT2Config:
        """774,030,080 parameters."""
        return replace(cls(n_layer=36, n_head=20, n_embd=1280), **changes)

    @classmethod
    def xl(cls, **changes: Any) -> GPT2Config:
        """1,557,611,200 parameters."""
        return replace(cls(n_layer=48, n_head=25, n_embd=1600), **changes)

    @classmethod
    def named(cls, name: str, **changes: Any) -> GPT2Config:
        """The size of this name: one of `SIZES`, or blocks x heads x width, as "48x32x2048".

        Raises ValueError for another; the message gives the nearest.
        """
        if shape := re.fullmatch(r"(\d{1,6})x(\d{1,6})x(\d{1,6})", name):
            blocks, heads, width = map(int, shape.groups())
            return cls(**{"n_layer": blocks, "n_head": heads, "n_embd": width} | changes)
        check_choice("GPT-2 size", name, SIZES)
        made: GPT2Config = getattr(cls, name)(**changes)
        return made

    @property
    def parameter_count(self) -> int:
        """Parameters of the model, the tied embedding counted once and its padding not at all.

        V d + T d + L (12 d² + 13 d) + 2 d

        where V is vocab_size, T block_size, L n_layer and d n_embd.
        """
        d = self.n_embd
        return (self.vocab_size + self.block_size + 2) * d + self.n_layer * (12 * d**2 + 13 * d)

    @property
    def embedding_rows(self) -> int:
        """Rows of the token embedding: the vocabulary, and the padding that rounds it up."""
        return -(-self.vocab_size // self.pad_vocab_to) * self.pad_vocab_to if self.pad_vocab_to else self.vocab_size


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Hidden) -> Hidden:
        """Mix each position with the ones before it."""
        heads = "batch time (three head dim) -> three batch head time dim"
        query, key, value = rearrange(self.c_attn(x), heads, three=3, head=self.n_head)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        return self.c_proj(rearrange(mixed, "batch head time dim -> batch time (head dim)"))


class MLP(nn.Module):
    """Two dense layers around a tanh-approximated GELU, four times as wide inside."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Hidden) -> Hidden:
        """Transform each position by itself."""
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """x + attention(norm(x)), then the same with the MLP."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(config.n_embd, eps=1e-5), Attention(config)
        self.ln_2, self.mlp = nn.LayerNorm(config.n_embd, eps=1e-5), MLP(config)
        self.drop = nn.Dropout(config.dropout)

    @property
    def draws_random_numbers(self) -> bool:
        """Whether anything is dropped; if not, checkpointing need not look after the random numbers."""
        return self.drop.p > 0 or self.attn.dropout > 0

    def forward(self, x: Hidden) -> Hidden:
        """Add both branches to the residual stream."""
        x = x + self.drop(self.attn(self.ln_1(x)))
        return x + self.drop(self.mlp(self.ln_2(x)))


class GPT2(nn.Module):
    """The language model of Radford et al. 2019, with the parameter names of its published checkpoints.

    h₀ = wte[tokens] + wpe[0 .. time - 1];  hᵢ = block_i(hᵢ₋₁);  logits = ln_f(h_L) wteᵀ

    Weights start as N(0, 0.02²), those that write into the residual stream as N(0, 0.02² / (2 n_layer)),
    biases as zero.

    Source: Language Models are Unsupervised Multitask Learners; https://github.com/openai/gpt-2.
    """

    @property
    def compiled_methods(self) -> tuple[str, ...]:
        """What is compiled beside the blocks. Compiled, a loss in chunks would hold the products of four at a time."""
        return ("_embed",) if self.config.loss_chunk_tokens else ("_embed", "_loss")

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=1e-5)
        self._initialize_()
        self._pad_vocabulary_()
        self.register_load_state_dict_pre_hook(_fit_padding_)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _initialize_(self) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 2:
                into_residual = name.endswith("c_proj.weight")
                parameter.normal_(std=0.02 / (2 * self.config.n_layer) ** 0.5 if into_residual else 0.02)

    def _pad_vocabulary_(self) -> None:
        """Add rows of zeros to the embedding; they are drawn from nothing, so that all else stays as it is."""
        rows = self.config.embedding_rows
        if added := rows - self.wte.num_embeddings:
            self.wte.weight = nn.Parameter(F.pad(self.wte.weight.detach(), (0, 0, 0, added)))
            self.wte.num_embeddings = rows

    @classmethod
    def from_pretrained(cls, folder: str | Path, **changes: Any) -> GPT2:
        """Read a GPT-2 that Hugging Face transformers saved, in fp32.

        folder: holds config.json and model.safetensors or pytorch_model.bin
        changes: settings to change that keep the weights' shapes, such as dropout

        Raises UserError where a file is missing, it is not a GPT-2, or the weights do not fit its config.json.
        """
        config = GPT2Config(**(read_settings(Path(folder)) | changes))
        with torch.device("meta"):
            model = cls(replace(config, pad_vocab_to=0))
        load_pretrained_(model, Path(folder))
        model.config = config
        model._pad_vocabulary_()
        return model

    def forward(
        self, tokens: Int[Tensor, "batch time"], targets: Int[Tensor, "batch time"] | None = None
    ) -> Float[Tensor, "batch time vocab"] | Float[Tensor, ""]:
        """Logits of every next token; with targets, their mean cross-entropy in nats instead.

        Targets of -100 do not count; where all are -100, the loss is 0. Raises ValueError for a sequence longer than
        config.block_size.
        """
        x = self._embed(tokens)
        for block in self.h:
            x = block(x)
        if targets is None:
            return F.linear(self.ln_f(x), self.wte.weight)[..., : self.config.vocab_size]
        return self._loss(x, targets)

    def _embed(self, tokens: Int[Tensor, "batch time"]) -> Hidden:
        time, longest = tokens.shape[1], self.config.block_size
        if time > longest:
            raise ValueError(
                f"a sequence of {time} tokens is longer than block_size={longest}: "
                f"cut it to {longest} or build the model with block_size={time}"
            )
        return self.drop(self.wte(tokens) + self.wpe.weight[:time])

    def _loss(self, x: Hidden, targets: Int[Tensor, "batch time"]) -> Float[Tensor, ""]:
        x, chunk = rearrange(self.ln_f(x), "batch time dim -> (batch time) dim"), self.config.loss_chunk_tokens
        return linear_cross_entropy(x, self.wte.weight, targets.flatten(), self.config.vocab_size, chunk)


def _fit_padding_(model: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Give weights that were saved under another padding, or none, the model's own."""
    name = f"{prefix}wte.weight"
    rows, vocab_size = model.wte.num_embeddings, model.config.vocab_size
    if name in state and vocab_size <= len(state[name]) != rows:
        state[name] = F.pad(state[name][:vocab_size], (0, 0, 0, rows - vocab_size))
