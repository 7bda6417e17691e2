"""What a text source gives: two token streams and what is known about them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.uint16]


@dataclass(frozen=True, eq=False)
class TextData:
    """Token streams for training and validation, with their provenance.

    source: the string that named the data, such as `python` or `bin:PATH`
    description: what the data is, in words, for tables
    train, validation: uint16 tokens, one-dimensional, memory-mapped where they live in a file
    vocab_size: every token is below it
    sha256: of the tokens, those for training first
    bytes_per_token: UTF-8 bytes of validation text for each validation token, so that losses at other
        vocabularies can be compared; None where the text is not known
    entropy_floor_nats: the lowest mean loss a token that any model can expect; None where unknown
    """

    source: str
    description: str
    train: Tokens
    validation: Tokens
    vocab_size: int
    sha256: str
    bytes_per_token: float | None
    entropy_floor_nats: float | None

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
