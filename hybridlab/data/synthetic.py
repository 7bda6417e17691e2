"""Tokens made on the spot, with a known floor for the loss."""

from __future__ import annotations

import math

import numpy as np

from hybridlab.data.cache import tokens_sha256
from hybridlab.data.markov import MarkovChain
from hybridlab.data.text_data import TextData, Tokens

TRAIN_TOKENS = 2_000_000
BYTES_PER_STORED_TOKEN = 2


def load_markov(*, vocab_size: int, seed: int, max_bytes: int | None) -> TextData:
    """Walk a seeded Markov chain; its entropy rate is the floor of the loss."""
    chain_rng, train_rng, validation_rng = np.random.default_rng(seed).spawn(3)
    chain = MarkovChain.random(vocab_size, chain_rng)
    train_tokens, validation_tokens = _counts(max_bytes)
    return _text_data(
        "markov",
        "a seeded Markov chain with Zipf-weighted successors: its entropy is known",
        chain.sample(train_tokens, train_rng),
        chain.sample(validation_tokens, validation_rng),
        vocab_size,
        chain.entropy_rate_nats(),
    )


def load_uniform(*, vocab_size: int, seed: int, max_bytes: int | None) -> TextData:
    """Draw independent uniform tokens; no model can do better than ln(vocab_size)."""
    train_rng, validation_rng = np.random.default_rng(seed).spawn(2)
    train_tokens, validation_tokens = _counts(max_bytes)
    return _text_data(
        "uniform",
        "uniform random tokens: nothing to learn",
        train_rng.integers(vocab_size, size=train_tokens, dtype=np.uint16),
        validation_rng.integers(vocab_size, size=validation_tokens, dtype=np.uint16),
        vocab_size,
        math.log(vocab_size),
    )


def _counts(max_bytes: int | None) -> tuple[int, int]:
    train = min(TRAIN_TOKENS, (max_bytes or math.inf) // BYTES_PER_STORED_TOKEN)
    return max(1, int(train)), max(1, int(train) // 10)


def _text_data(
    source: str, description: str, train: Tokens, validation: Tokens, vocab_size: int, floor_nats: float
) -> TextData:
    return TextData(
        source=source,
        description=description,
        train=train,
        validation=validation,
        vocab_size=vocab_size,
        sha256=tokens_sha256(train, validation),
        bytes_per_token=None,
        entropy_floor_nats=floor_nats,
    )
