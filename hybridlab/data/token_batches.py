"""Windows of a token stream, as pairs of tokens and targets."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int64
from torch import Tensor

from hybridlab.base.errors import UserError
from hybridlab.data.text_data import Tokens

TokenBatch = tuple[Int64[Tensor, "batch time"], Int64[Tensor, "batch time"]]


class TokenBatches:
    """Random windows of a token stream; batch n depends on (seed, n) alone.

    So a run can go on at any step, and every arm of a comparison sees the same batches.

    tokens: the stream, uint16, one-dimensional; may be memory-mapped
    batch_size, block_size: windows a batch, tokens a window

    Raises UserError when the stream is shorter than one window and its last target.
    """

    def __init__(
        self,
        tokens: Tokens,
        *,
        batch_size: int,
        block_size: int,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        _check(tokens, 1, batch_size, block_size)
        self._tokens, self._seed, self._device = tokens, seed, torch.device(device)
        self.batch_size, self.block_size = batch_size, block_size

    def __call__(self, step: int) -> TokenBatch:
        """The batch of this step: tokens, and as targets the tokens one place later."""
        rng = np.random.default_rng([self._seed, step])
        starts = rng.integers(len(self._tokens) - self.block_size, size=self.batch_size)
        return _windows(self._tokens, starts, self.block_size, self._device)


def evenly_spaced(
    tokens: Tokens,
    *,
    batches: int,
    batch_size: int,
    block_size: int,
    device: torch.device | str = "cpu",
) -> list[TokenBatch]:
    """Cut validation windows that do not overlap, spread from the first token of the stream to the last.

    No token is the target of two windows. Raises UserError when the stream is too short for that.
    """
    count = batches * batch_size
    _check(tokens, count, batch_size, block_size)
    room = len(tokens) - block_size - 1
    starts = np.arange(count) * room // max(1, count - 1)
    return [
        _windows(tokens, starts[at : at + batch_size], block_size, torch.device(device))
        for at in range(0, count, batch_size)
    ]


def _windows(tokens: Tokens, starts: npt.NDArray[np.int64], block_size: int, device: torch.device) -> TokenBatch:
    inputs = starts[:, None] + np.arange(block_size)
    both = torch.from_numpy(np.stack([tokens[inputs], tokens[inputs + 1]]).astype(np.int64))
    if device.type == "cuda":
        both = both.pin_memory()
    moved, targets = both.to(device, non_blocking=True)
    return moved, targets


def _check(tokens: Tokens, windows: int, batch_size: int, block_size: int) -> None:
    if windows < 1 or batch_size < 1 or block_size < 1:
        raise UserError("batches, batch_size and block_size must be at least 1.")
    needed = windows * block_size + 1
    if len(tokens) < needed:
        raise UserError(
            f"the token stream has {len(tokens):,} tokens, but {windows} windows of {block_size} need {needed:,}: "
            "lower block_size, batch_size or the number of batches, or take more text (max_bytes)."
        )
