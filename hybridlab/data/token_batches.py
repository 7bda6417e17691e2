"""Token streams, and their windows as pairs of tokens and targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int64
from torch import Tensor

from hybridlab.base.errors import UserError

Tokens = npt.NDArray[np.uint16]
TokenBatch = tuple[Int64[Tensor, "batch time"], Int64[Tensor, "batch time"]]


@dataclass(frozen=True, eq=False)
class TextData:
    """Token streams for training and validation, with their provenance.

    source: the string that named the data, such as `python` or `bin:PATH`
    description: what the data is, in words, for tables
    train, validation: uint16 tokens, one-dimensional, memory-mapped where they live in a file
    vocab_size: every token is below it
    sha256: of the tokens, those for training first
    bytes_per_token: UTF-8 bytes of validation text per validation token, so that losses at other
        vocabularies can be compared; None where the text is not known
    entropy_floor_nats: the lowest mean loss per token that any model can expect; None where unknown
    """

    source: str
    description: str
    train: Tokens
    validation: Tokens
    vocab_size: int
    sha256: str
    bytes_per_token: float | None = None
    entropy_floor_nats: float | None = None

    def record(self) -> dict[str, Any]:
        """Everything but the tokens, ready for JSON."""
        return {
            "source": self.source,
            "description": self.description,
            "sha256": self.sha256,
            "train_tokens": len(self.train),
            "validation_tokens": len(self.validation),
            "vocab_size": self.vocab_size,
            "bytes_per_token": self.bytes_per_token,
            "entropy_floor_nats": self.entropy_floor_nats,
        }


class TokenBatches:
    """Random windows of a token stream; batch n depends on (seed, n) alone.

    So a run can go on at any step, and every arm of a comparison sees the same batches.

    tokens: the stream, uint16, one-dimensional; may be memory-mapped
    batch_size, block_size: windows per batch, tokens per window

    Raises UserError when the stream is shorter than one window and its last target.
    """

    def __init__(
        self, tokens: Tokens, *, batch_size: int, block_size: int, seed: int, device: torch.device | str = "cpu"
    ) -> None:
        _check("training text", tokens, 1, batch_size, block_size)
        self._tokens, self._seed, self._device = tokens, seed, torch.device(device)
        self.batch_size, self.block_size = batch_size, block_size

    def __call__(self, step: int) -> TokenBatch:
        """The batch of this step: tokens, and as targets the tokens one place later."""
        rng = np.random.default_rng([self._seed, step])
        starts = rng.integers(len(self._tokens) - self.block_size, size=self.batch_size)
        return _windows(self._tokens, starts, self.block_size, self._device)


def evenly_spaced(
    tokens: Tokens, *, batches: int, batch_size: int, block_size: int, device: torch.device | str = "cpu"
) -> list[TokenBatch]:
    """Cut validation windows that do not overlap, spread from the first token of the stream to the last.

    No token is the target of two windows. Raises UserError when the stream is too short for that.
    """
    count = batches * batch_size
    _check("held-out text", tokens, count, batch_size, block_size)
    room = len(tokens) - block_size - 1
    starts = np.arange(count) * room // max(1, count - 1)
    return [_windows(tokens, some, block_size, torch.device(device)) for some in starts.reshape(-1, batch_size)]


def _windows(tokens: Tokens, starts: npt.NDArray[np.int64], block_size: int, device: torch.device) -> TokenBatch:
    inputs = starts[:, None] + np.arange(block_size)
    both = torch.from_numpy(np.stack([tokens[inputs], tokens[inputs + 1]]).astype(np.int64))
    if device.type == "cuda":
        both = both.pin_memory()
    moved, targets = both.to(device, non_blocking=True)
    return moved, targets


def _check(what: str, tokens: Tokens, windows: int, batch_size: int, block_size: int) -> None:
    if windows < 1 or batch_size < 1 or block_size < 1:
        raise UserError("batches, batch_size and block_size must be at least 1.")
    needed = windows * block_size + 1
    if len(tokens) < needed:
        each = f"{windows} windows" if windows > 1 else "a window"
        lower = "validation_batches, batch_size or block_size" if windows > 1 else "block_size"
        raise UserError(
            f"the {what} has {len(tokens):,} tokens, but {each} of {block_size} need{'s' * (windows == 1)} {needed:,}: "
            f"lower {lower}, or take more text (a longer file, or a larger max_bytes)."
        )
