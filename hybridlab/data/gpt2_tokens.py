"""GPT-2's own tokenizer, by the parts that are needed here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hybridlab.base.errors import UserError


@dataclass(frozen=True)
class Encoder:
    """A tokenizer by its parts; `name` tells one from another in the cache."""

    name: str
    encode_batch: Callable[[list[str]], list[list[int]]]
    end_of_text: int
    vocab_size: int


def gpt2_encoder() -> Encoder:
    """GPT-2's 50,257 tokens, through tiktoken, which downloads the vocabulary once."""
    try:
        import tiktoken
    except ImportError as error:
        raise UserError("GPT-2's tokens need tiktoken: .venv/bin/pip install -e '.[hf]'") from error
    try:
        gpt2 = tiktoken.get_encoding("gpt2")
    except Exception as error:  # whatever the network stack raises
        raise UserError(
            f"GPT-2's vocabulary cannot be downloaded ({type(error).__name__}): connect once, let "
            "TIKTOKEN_CACHE_DIR name a folder that has it, or use the source 'python'."
        ) from error
    return Encoder("gpt2", gpt2.encode_ordinary_batch, gpt2.eot_token, gpt2.n_vocab)
