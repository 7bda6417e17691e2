"""From the name of a text source to its tokens; a file of one's own among them."""

from __future__ import annotations

import hashlib
from pathlib import Path

from hybridlab.base.errors import UserError, nearest
from hybridlab.base.files import project_root
from hybridlab.data.cache import cache_folder, cache_key
from hybridlab.data.huggingface import load_huggingface
from hybridlab.data.python_sources import learned_tokens, load_python
from hybridlab.data.synthetic import load_markov, load_uniform
from hybridlab.data.token_batches import TextData
from hybridlab.data.token_files import load_token_files

OWN_VOCAB_SIZE = 4096
GPT2_VOCAB_SIZE = 50257
VALIDATION_SHARE = 0.1
"""Of a text file: its end."""

SOURCES = {
    "python": "python",
    "markov": "markov",
    "uniform": "uniform",
    "file": "file:PATH",
    "bin": "bin:PATH",
    "hf": "hf:NAME",
}


def load_text(
    source: str,
    *,
    vocab_size: int | None = None,
    seed: int = 0,
    max_bytes: int | None = None,
    cache: Path | None = None,
) -> TextData:
    """Load the text that `source` names.

    source: `python`, `markov`, `uniform`, `file:PATH` (UTF-8), `bin:PATH`, `hf:NAME`, `hf:NAME:CONFIG` or `hf:FOLDER`
    vocab_size: None is 4096 for `python`, `markov`, `uniform` and `file`, and GPT-2's 50257 for `bin` and `hf`
    seed: chooses the split and the files of `python`, and the tokens of `markov` and `uniform`. Keep it
        fixed while comparing runs: another seed is another validation set
    max_bytes: caps the training text (a synthetic token counts as two bytes); None takes all of it
    cache: the folder for built tokens; None is `HYBRIDLAB_CACHE`, else the user's cache folder

    Raises UserError for an unknown source, a missing file, and settings that the source cannot meet.
    """
    kind, argument = _parsed(source)
    _check(vocab_size, seed, max_bytes)
    vocab = vocab_size or (GPT2_VOCAB_SIZE if kind in ("bin", "hf") else OWN_VOCAB_SIZE)
    match kind:
        case "python":
            return load_python(vocab_size=vocab, seed=seed, max_bytes=max_bytes, cache=cache)
        case "markov":
            return load_markov(vocab_size=vocab, seed=seed, max_bytes=max_bytes)
        case "uniform":
            return load_uniform(vocab_size=vocab, seed=seed, max_bytes=max_bytes)
        case "file":
            return load_text_file(Path(argument), vocab_size=vocab, max_bytes=max_bytes, cache=cache)
        case "bin":
            return load_token_files(argument, vocab_size=vocab, max_bytes=max_bytes, cache=cache)
        case _:
            return load_huggingface(argument, vocab_size=vocab, max_bytes=max_bytes, cache=cache)


def _parsed(source: str) -> tuple[str, str]:
    kind, _, argument = source.partition(":")
    if kind not in SOURCES:
        raise UserError(f"unknown text source {source!r}: {nearest(source, SOURCES.values())}")
    if bool(argument) != (":" in SOURCES[kind]):
        raise UserError(f"the text source {source!r} must be written {SOURCES[kind]!r}.")
    return kind, argument


def _check(vocab_size: int | None, seed: int, max_bytes: int | None) -> None:
    if vocab_size is not None and not 2 <= vocab_size <= 2**16:
        raise UserError(f"vocab_size={vocab_size}: choose 2 to 65536, since tokens are stored in 16 bits.")
    if seed < 0:
        raise UserError(f"seed={seed}: choose 0 or more.")
    if max_bytes is not None and max_bytes <= 0:
        raise UserError(f"max_bytes={max_bytes}: choose a positive number of bytes, or none for all the text.")


def load_text_file(path: Path, *, vocab_size: int, max_bytes: int | None, cache: Path | None) -> TextData:
    """Encode a UTF-8 file, or the first `max_bytes` of it; the last tenth validates.

    path: from the working folder, or else from the project's root

    Raises UserError for a file that is not there, is no UTF-8, or is too short to split.
    """
    path = path if path.exists() else project_root() / path
    if path.is_char_device() or path.is_block_device():
        raise UserError(f"{path} is a device and may have no end: name a text file, as file:my_text.txt")
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
