"""Token files of nanoGPT and of modded-nanogpt, told apart by their header."""

from __future__ import annotations

import codecs
import glob
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hybridlab.base.errors import UserError
from hybridlab.data.cache import cache_folder, cache_key, cached_tokens, tokens_sha256
from hybridlab.data.token_batches import TextData, Tokens

MAGIC, VERSION = 20240520, 1
LLAMA3_MAGIC = 20240801
HEADER_BYTES = 256 * 4
LOOKED_AT_TOKENS = 4096
CONVERT = "convert it to little-endian uint16 tokens"
MARKS = {
    b"\x93NUMPY": f"a .npy array: {CONVERT}, as with tokens.astype('<u2').tofile(...)",
    b"PK\3\4": "a zip archive: unpack it",
    b"\x1f\x8b\x08": "a gzip file: unpack it",
    b"\x28\xb5\x2f\xfd": "a zstd file: unpack it",
    b"PAR1": f"a Parquet file: {CONVERT}, or name its folder as hf:FOLDER",
    b"version https://git-lfs": "a git-lfs pointer, not the tokens: run `git lfs pull` there",
}
"""How files of other formats begin -> what they are, and what to do."""


def load_token_files(argument: str, *, vocab_size: int, max_bytes: int | None, cache: Path | None) -> TextData:
    """Map the token files of a folder, or of a glob, into memory.

    - nanoGPT: `train.bin` and `val.bin`, nothing but uint16 tokens. Its `meta.pkl` is never opened.
    - modded-nanogpt and llm.c: `*_train_*.bin` and `*_val_*.bin`: 256 int32 (magic 20240520, version 1, count), then
      uint16 tokens. Several shards are joined in the cache.

    `max_bytes` caps the training tokens at two bytes per token.

    Raises UserError for missing files, a file that contradicts its header, validation tokens that are the training
    tokens, and tokens >= `vocab_size`.
    """
    train_paths, validation_paths = _found(argument)
    train, validation = _joined(train_paths, validation_paths, cache)
    if len(train) == len(validation) and np.array_equal(train, validation):
        raise UserError(f"{validation_paths[0]} holds the training tokens again: validate with others")
    if max_bytes is not None:
        train = train[: max(1, max_bytes // train.itemsize)]
    _check_range(train, vocab_size, train_paths[0])
    _check_range(validation, vocab_size, validation_paths[0])
    return TextData(
        source=f"bin:{argument}",
        description=f"token files in {train_paths[0].parent.name} ({len(train_paths)} to train on, "
        f"{len(validation_paths)} to validate with)",
        train=train,
        validation=validation,
        vocab_size=vocab_size,
        sha256=tokens_sha256(train, validation),
    )


def read_tokens(path: Path) -> Tokens:
    """Map one token file into memory, with or without a header.

    Raises UserError for a file that is something else, by what it is as far as its beginning tells.
    """
    start = _beginning(path)
    if said := _other_format(start):
        raise UserError(f"{path} {said}")
    size_bytes = path.stat().st_size
    magic, version, promised = np.frombuffer(start.ljust(12, b"\0"), "<i4", count=3).tolist()
    has_header = size_bytes >= HEADER_BYTES and magic == MAGIC
    offset = HEADER_BYTES if has_header else 0
    count, odd_bytes = divmod(size_bytes - offset, 2)
    if has_header and version != VERSION:
        raise UserError(f"{path}: version {version} of the token format; only version {VERSION} is known.")
    if odd_bytes or (has_header and promised != count):
        wanted = f"{promised:,} tokens" if has_header else "a whole number of 16-bit tokens"
        raise UserError(f"{path}: {size_bytes - offset:,} bytes are not {wanted}: fetch the file again.")
    if count == 0:
        raise UserError(f"{path}: the file holds no tokens.")
    return np.memmap(path, dtype="<u2", mode="r", offset=offset)


def _beginning(path: Path) -> bytes:
    if path.is_dir():
        raise UserError(f"{path} is a folder: a file of tokens is wanted there")
    try:
        with path.open("rb") as file:
            return file.read(2 * LOOKED_AT_TOKENS)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _other_format(start: bytes) -> str | None:
    """What a file is that does not begin with uint16 tokens, and what to do; None where nothing speaks against them."""
    magic, version = np.frombuffer(start.ljust(8, b"\0"), "<i4", count=2).tolist()
    if magic == MAGIC:
        return None
    if magic == LLAMA3_MAGIC:
        return "holds llm.c's Llama-3 tokens, of 32 bits: make it again with llm.c's --model gpt-2"
    if 20_200_000 <= magic < 20_400_000 and 0 <= version < 100:
        return f"has a header with the unknown magic {magic}: {CONVERT}"
    if kind := next((kind for mark, kind in MARKS.items() if start.startswith(mark)), None):
        return f"is {kind}"
    if _is_text(start):
        return f"holds text: {CONVERT}, or name its folder as hf:FOLDER"
    kind = _other_numbers(start)
    return f"holds {kind}: {CONVERT}" if kind else None


def _is_text(start: bytes) -> bool:
    """Whether it is UTF-8 without control characters, its last letter perhaps cut."""
    try:
        codecs.utf_8_decode(start, "strict", False)
    except UnicodeDecodeError:
        return False
    return len(start) >= 32 and min(start) >= 9


def _other_numbers(start: bytes) -> str | None:
    """Numbers that are no uint16 tokens, by what tokens never look like.

    The high half of a wider integer hardly varies. The low byte of a token takes every value where its high byte takes
    many; with the bytes swapped, the other way round.
    """
    words = np.frombuffer(start[: len(start) // 8 * 8], "<u2")
    if len(words) < 32 or words.max() <= 1:
        return None
    if 64 * int(words[1::2].max()) <= words[::2].max():
        return "64-bit integers" if not words[2::4].any() else "32-bit integers"
    low, high = words & 0xFF, words >> 8
    if not low.any():
        return "big-endian tokens"
    if len(np.unique(high)) <= 16:
        return None
    for kind, bits in (("<f4", 32), ("<f8", 64)):
        with np.errstate(invalid="ignore"):  # the bytes of tokens may spell NaN
            size = np.abs(words.view(kind).astype(np.float64))
        if ((size > 1e-8) & (size < 1e4)).all():
            return f"{bits}-bit floats"
    return "big-endian tokens, or bytes" if len(words) >= 256 and low.max() < 224 else None


def _found(argument: str) -> tuple[list[Path], list[Path]]:
    path = Path(argument).expanduser()
    if path.is_dir():
        if (path / "train.bin").exists() and (path / "val.bin").exists():
            return [path / "train.bin"], [path / "val.bin"]
        if (path / "train.bin").exists() and (path / "validation.bin").exists():
            raise UserError(f"{path / 'validation.bin'}: the validation tokens are looked for as val.bin: rename it")
        files = sorted(path.glob("*.bin"))
    else:
        files = sorted(map(Path, glob.glob(str(path))))
    train, validation = ([file for file in files if re.search(f"_{part}[_.]", file.name)] for part in ("train", "val"))
    for what, found, plain in (("training", train, "train"), ("validation", validation, "val")):
        if not found:
            hint = "it is a file: name its folder" if path.is_file() else f"expected {plain}.bin or *_{plain}_*.bin"
            raise UserError(f"{path}: no {what} tokens there: {hint}.")
    return train, validation


def _joined(train_paths: Sequence[Path], validation_paths: Sequence[Path], cache: Path | None) -> tuple[Tokens, Tokens]:
    """Both streams, straight from the files where each is one file, else from a copy in the cache."""
    if len(train_paths) == len(validation_paths) == 1:
        return read_tokens(train_paths[0]), read_tokens(validation_paths[0])

    def build(folder: Path) -> dict[str, Any]:
        for name, paths in (("train.bin", train_paths), ("validation.bin", validation_paths)):
            with (folder / name).open("wb") as file:
                for path in paths:
                    file.write(read_tokens(path).tobytes())
        return {}

    stats = [[_stamp(path) for path in paths] for paths in (train_paths, validation_paths)]
    tokens = cached_tokens(cache_folder(cache) / "text" / cache_key("bin", stats), build)
    return tokens.train, tokens.validation


def _stamp(path: Path) -> tuple[str, int, int]:
    return str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns


def _check_range(tokens: Tokens, vocab_size: int, path: Path) -> None:
    if (largest := tokens.max()) >= vocab_size:
        raise UserError(f"{path}: token {largest} is not below vocab_size={vocab_size}: raise vocab_size.")
