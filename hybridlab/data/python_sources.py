"""The default text: the Python sources that came with this machine's Python and torch. No download.

Every choice follows from content and seed alone, and the tokenizer is learned from the training text alone.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from hybridlab.base.errors import UserError
from hybridlab.data.cache import (
    CachedTokens,
    append_tokens,
    cache_folder,
    cache_key,
    cached_tokens,
    largest_validation_bytes,
)
from hybridlab.data.token_batches import TextData

DESCRIPTION = "Python sources of this machine (standard library and torch)"
VALIDATION_SHARE = 0.05
# Packages installed later, tests, codec and help tables: not what this machine's Python is written in.
LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "pydoc_data"}
END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0  # special tokens come before the bytes and the merges
SMALLEST_VOCAB_SIZE, LARGEST_VOCAB_SIZE = 257, 50257
FILES_AT_ONCE = 64


def load_python(
    *, vocab_size: int, seed: int, max_bytes: int | None, cache: Path | None, roots: Sequence[Path] | None = None
) -> TextData:
    """Encode this machine's Python sources (or those below `roots`) with a tokenizer learned from them."""
    corpus = read_corpus(roots or installed_sources(), seed=seed, max_bytes=max_bytes)
    if not corpus.train or not corpus.validation:
        raise UserError(
            f"the Python sources give {len(corpus.train)} files to train on and {len(corpus.validation)} to "
            f"validate with at max_bytes={max_bytes}: raise max_bytes, or name another source."
        )

    folder = cache_folder(cache) / "text" / cache_key("python", vocab_size, corpus.digest)
    return learned_tokens(corpus.train, corpus.validation, vocab_size, folder).text_data(
        "python", DESCRIPTION, vocab_size
    )


def learned_tokens(train: list[str], validation: list[str], vocab_size: int, folder: Path) -> CachedTokens:
    """Both halves of a text in tokens of a tokenizer that is learned from the first, kept in a folder of the cache."""

    def build(folder: Path) -> dict[str, Any]:
        tokenizer = train_tokenizer(train, vocab_size)
        (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
        write_encoded(train, tokenizer, folder / "train.bin")
        validation_tokens = write_encoded(validation, tokenizer, folder / "validation.bin")
        return {"bytes_per_token": sum(len(text.encode()) for text in validation) / validation_tokens}

    return cached_tokens(folder, build)


def installed_sources() -> list[Path]:
    """The folders of the standard library and of torch."""
    torch = importlib.util.find_spec("torch")
    packages = torch.submodule_search_locations if torch else None
    return [Path(sysconfig.get_path("stdlib")), *map(Path, packages or [])]


# --- which files -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus:
    """Whole files, split so that no content is in both halves; `digest` names the two in their order."""

    train: list[str]
    validation: list[str]
    digest: str


def read_corpus(roots: Sequence[Path], *, seed: int, max_bytes: int | None) -> Corpus:
    """Read the `*.py` files below `roots`, drop repeated content, and split by file.

    A file's place is the hash of seed and content, so the split does not depend on where the files lie or
    in which order a disk lists them: about 5 % of the files validate, the rest train.
    `max_bytes` caps the training text in whole files; validation is capped in proportion, to at least 200 kB.
    """
    contents = {hashlib.sha256(b"%d:" % seed + content).hexdigest(): content for content in _contents(roots)}
    places = sorted(contents)
    held_out = [place for place in places if _unit(place) < VALIDATION_SHARE]
    kept = [place for place in places if _unit(place) >= VALIDATION_SHARE]
    if max_bytes is not None:
        held_out = _fitting(held_out, contents, largest_validation_bytes(max_bytes))
        kept = _fitting(kept, contents, max_bytes)
    return Corpus(
        train=[contents[place].decode() for place in kept],
        validation=[contents[place].decode() for place in held_out],
        digest=hashlib.sha256("\n".join([*kept, "", *held_out]).encode()).hexdigest(),
    )


def _unit(place: str) -> float:
    """A number in [0, 1) from a hash: independent of the order within either half."""
    return int(place[-8:], 16) / 16**8


def _fitting(places: list[str], contents: dict[str, bytes], cap_bytes: int) -> list[str]:
    chosen, used_bytes = [], 0
    for place in places:
        size_bytes = len(contents[place])
        if used_bytes + size_bytes <= cap_bytes:
            chosen.append(place)
            used_bytes += size_bytes
    return chosen


def _contents(roots: Sequence[Path]) -> Iterator[bytes]:
    for root in roots:
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = [name for name in subfolders if name not in LEFT_OUT]
            for name in names:
                if name.endswith(".py"):
                    content = Path(folder, name).read_bytes()
                    with suppress(UnicodeDecodeError):
                        content.decode()
                        if content.strip():
                            yield content


# --- byte-level byte-pair encoding -------------------------------------------------------------------


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Learn GPT-2's kind of tokenizer: 256 bytes, the end of a text, and `vocab_size - 257` merges.

    The same texts give the same tokenizer. A text too small for that many merges leaves tokens unused.
    """
    if not SMALLEST_VOCAB_SIZE <= vocab_size <= LARGEST_VOCAB_SIZE:
        raise UserError(
            f"vocab_size={vocab_size}: choose {SMALLEST_VOCAB_SIZE} (256 bytes and the end of a text) "
            f"to {LARGEST_VOCAB_SIZE}."
        )
    # Set, so that a later fork (a shell command in a notebook) gives no warning about threads.
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
