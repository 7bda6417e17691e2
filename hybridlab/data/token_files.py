"""Token files of nanoGPT and of modded-nanogpt, told apart by their header."""

from __future__ import annotations

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
    size_bytes = path.stat().st_size
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


def _found(argument: str) -> tuple[list[Path], list[Path]]:
    path = Path(argument).expanduser()
    if path.is_dir():
        if (path / "train.bin").exists() and (path / "val.bin").exists():
            return [path / "train.bin"], [path / "val.bin"]
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
