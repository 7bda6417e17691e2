"""A text file of one's own: its end validates, the rest trains, and the tokenizer is learned from that."""

from __future__ import annotations

import hashlib
from pathlib import Path

from hybridlab.base.errors import UserError
from hybridlab.base.files import project_root
from hybridlab.data.cache import cache_folder, cache_key
from hybridlab.data.python_sources import learned_tokens
from hybridlab.data.token_batches import TextData

VALIDATION_SHARE = 0.1


def load_text_file(path: Path, *, vocab_size: int, max_bytes: int | None, cache: Path | None) -> TextData:
    """Encode a UTF-8 file, or the first `max_bytes` of it; the last tenth validates.

    path: from the working folder, or else from the project's root

    Raises UserError for a file that is not there, is no UTF-8, or is too short to split.
    """
    path = path if path.exists() else project_root() / path
    try:
        with path.open("rb") as file:
            content = file.read(max_bytes or -1)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; name a text file, as file:my_text.txt") from None
    try:
        text = content.decode(errors="ignore" if max_bytes else "strict")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}): convert it") from None
    cut = round(len(text) * (1 - VALIDATION_SHARE))
    train, validation = text[:cut], text[cut:]
    if not train.strip() or not validation.strip():
        raise UserError(f"{path} has {len(text)} characters, too few to train and to validate on")

    folder = cache_folder(cache) / "text" / cache_key("file", vocab_size, hashlib.sha256(text.encode()).hexdigest())
    tokens = learned_tokens([train], [validation], vocab_size, folder)
    return tokens.text_data(f"file:{path}", f"the file {path.name}", vocab_size)
