"""Token files of nanoGPT and of modded-nanogpt, told apart by their header."""

from __future__ import annotations

import codecs
import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hybridlab.base.errors import UserError
from hybridlab.data.cache import cache_folder, cache_key, cached_tokens, tokens_sha256
from hybridlab.data.token_batches import TextData, Tokens

MAGIC, VERSION = 20240520, 1
HEADER_BYTES = 256 * 4


def load_token_files(argument: str, *, vocab_size: int, max_bytes: int | None, cache: Path | None) -> TextData:
    """Map the token files of a folder, or of a glob, into memory.

    - nanoGPT: `train.bin` and `val.bin`, nothing but uint16 tokens. Its `meta.pkl` is never opened.
    - modded-nanogpt: `*_train_*.bin` and `*_val_*.bin`: 256 int32 (magic 20240520, version 1, count), then
      uint16 tokens. Several shards are joined in the cache.

    `max_bytes` caps the training tokens at two bytes per token.

    Raises UserError for missing files, a file that contradicts its header, and tokens >= `vocab_size`.
    """
    train_paths, validation_paths = _found(argument)
    train, validation = _joined(train_paths, validation_paths, cache)
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
    """Map one token file into memory, with or without a header."""
    if not path.is_file():
        raise UserError(f"{path} is a folder: a token file is wanted.")
    size_bytes = path.stat().st_size
    _refuse_other_formats(path)
    header = np.fromfile(path, dtype="<i4", count=3)
    has_header = size_bytes >= HEADER_BYTES and header[0] == MAGIC
    offset = HEADER_BYTES if has_header else 0
    count, odd_bytes = divmod(size_bytes - offset, 2)
    if has_header and header[1] != VERSION:
        raise UserError(f"{path}: version {header[1]} of the token format; only version {VERSION} is known.")
    if odd_bytes or (has_header and header[2] != count):
        promised = f"{header[2]:,} tokens" if has_header else "a whole number of 16-bit tokens"
        raise UserError(f"{path}: {size_bytes - offset:,} bytes are not {promised}: fetch the file again.")
    if count == 0:
        raise UserError(f"{path}: the file holds no tokens.")
    return np.memmap(path, dtype="<u2", mode="r", offset=offset)


def _refuse_other_formats(path: Path) -> None:
    """Raise UserError for a file that begins as something other than uint16 tokens, by what it is."""
    with path.open("rb") as file:
        start = file.read(8192)
    magic, version = np.frombuffer(start[:8].ljust(8, b"\0"), "<i4").tolist()
    if magic == MAGIC:
        return
    if kind := _other_format(start, magic, version):
        raise UserError(f"{path}: {kind}; only little-endian uint16 tokens are read: convert it to those.")


def _other_format(start: bytes, magic: int, version: int) -> str | None:
    if magic == 20240801:
        return "an llm.c file of Llama-3 tokens (uint32): write it with llm.c's GPT-2 tokenizer"
    if 20_200_000 <= magic < 20_400_000 and 0 <= version < 100:
        return f"a header with the unknown magic {magic}"
    if start.startswith(b"\x93NUMPY"):
        return "a .npy array"
    if len(start) >= 64 and _is_text(start):
        return "text"
    words = np.frombuffer(start[: len(start) // 8 * 8], "<u2")
    if len(words) < 32 or words.max() <= 1:
        return None
    if words[1::2].max() <= 1 < words[::2].max():
        return "64-bit integers" if not words[2::4].any() else "32-bit integers"
    if not (words & 0xFF).any():
        return "big-endian tokens"
    size = np.abs(words.view("<f4").astype(np.float64))
    return "32-bit floats" if ((size > 1e-8) & (size < 1e4)).all() and len(np.unique(words)) > 16 else None


def _is_text(start: bytes) -> bool:
    try:
        text, _ = codecs.utf_8_decode(start, "strict", False)
    except UnicodeDecodeError:
        return False
    return all(letter.isprintable() or letter in "\n\r\t" for letter in text)


def _found(argument: str) -> tuple[list[Path], list[Path]]:
    path = Path(argument).expanduser()
    if path.is_dir():
        if (path / "train.bin").exists() and (path / "val.bin").exists():
            return [path / "train.bin"], [path / "val.bin"]
        if (path / "train.bin").exists() and (path / "validation.bin").exists():
            raise UserError(f"{path / 'validation.bin'}: rename it to val.bin.")
        files = sorted(path.glob("*.bin"))
    else:
        files = sorted(map(Path, glob.glob(str(path))))
    train = [file for file in files if "_train_" in file.name]
    validation = [file for file in files if "_val_" in file.name]
    for what, found, plain in (("training", train, "train"), ("validation", validation, "val")):
        if not found:
            raise UserError(f"{path}: no {what} tokens there: expected {plain}.bin or *_{plain}_*.bin.")
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
