"""Byte-level byte-pair encoding, learned from the training text alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from hybridlab.base.errors import UserError
from hybridlab.data.cache import append_tokens

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0  # special tokens come before the bytes and the merges
SMALLEST_VOCAB_SIZE = 257
LARGEST_VOCAB_SIZE = 50257
FILES_AT_ONCE = 64


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Learn GPT-2's kind of tokenizer: 256 bytes, the end of a text, and `vocab_size - 257` merges.

    The same texts give the same tokenizer. A text too small for that many merges leaves tokens unused.
    """
    if not SMALLEST_VOCAB_SIZE <= vocab_size <= LARGEST_VOCAB_SIZE:
        raise UserError(
            f"vocab_size={vocab_size}: choose {SMALLEST_VOCAB_SIZE} (256 bytes and the end of a text) "
            f"to {LARGEST_VOCAB_SIZE}."
        )
    # Said outright, so that a later fork (a shell command in a notebook) draws no warning about threads.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.encode_special_tokens = True  # a source that spells the end of a text does not end there
    return tokenizer


def write_encoded(texts: Sequence[str], tokenizer: Tokenizer, path: Path) -> int:
    """Write the tokens of each text, each followed by the end of a text; return how many."""
    count = 0
    with path.open("wb") as file:
        for start in range(0, len(texts), FILES_AT_ONCE):
            for encoding in tokenizer.encode_batch_fast(texts[start : start + FILES_AT_ONCE]):
                append_tokens(file, [*encoding.ids, END_OF_TEXT_ID])
                count += len(encoding.ids) + 1
    return count
