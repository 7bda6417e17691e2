"""Built tokens on disk: built once, whole or not at all, checked whenever they are read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import platformdirs
from filelock import FileLock

from hybridlab.base.files import writing_to
from hybridlab.data.token_batches import TextData, Tokens

FORMAT = 1
ELSEWHERE = "name another cache folder in the environment variable HYBRIDLAB_CACHE"


class BrokenCacheError(Exception):
    """The folder does not hold what its record says, or holds no record."""


@dataclass(frozen=True, eq=False)
class CachedTokens:
    """Token streams in the cache, memory-mapped; `facts` is what their builder returned."""

    train: Tokens
    validation: Tokens
    sha256: str
    facts: dict[str, Any]

    def text_data(self, source: str, description: str, vocab_size: int) -> TextData:
        """The streams of a text whose builder has measured `bytes_per_token`."""
        bytes_per_token = self.facts["bytes_per_token"]
        return TextData(
            source, description, self.train, self.validation, vocab_size, self.sha256, bytes_per_token=bytes_per_token
        )


def cache_folder(cache: Path | None) -> Path:
    """The folder for built data: the one given, else `HYBRIDLAB_CACHE`, else the user's cache folder."""
    return Path(cache or os.environ.get("HYBRIDLAB_CACHE") or platformdirs.user_cache_dir("hybridlab"))


def cache_key(*inputs: object) -> str:
    """Name what is built from these inputs (anything JSON can hold) in this format."""
    return hashlib.sha256(json.dumps([FORMAT, *inputs]).encode()).hexdigest()[:20]


def cached_tokens(folder: Path, build: Callable[[Path], dict[str, Any]]) -> CachedTokens:
    """Read the tokens in `folder`; build them first where they are missing or broken.

    build: given an empty folder, writes `train.bin` and `validation.bin` there (see `append_tokens`), and returns
        facts to keep with them

    Processes that want the same folder wait for the one that builds it.

    Raises UserError when the folder cannot be written; nothing half-written stays.
    """
    with suppress(BrokenCacheError):
        return _read(folder)
    with writing_to(folder.parent, otherwise=ELSEWHERE):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            return _read_or_build(folder, build)


def largest_validation_bytes(max_bytes: int) -> int:
    """The cap on validation text beside `max_bytes` of training text: a nineteenth, but not below 200 kB."""
    return max(max_bytes // 19, 200_000)


def append_tokens(file: BinaryIO, tokens: Sequence[int]) -> None:
    """Append tokens to a file of uint16."""
    file.write(np.asarray(tokens, dtype=np.uint16).tobytes())


def tokens_sha256(train: Tokens, validation: Tokens) -> str:
    """The SHA-256 of the tokens, those for training first."""
    digest = hashlib.sha256()
    for tokens in (train, validation):
        digest.update(np.ascontiguousarray(tokens).data)
    return digest.hexdigest()


def _read_or_build(folder: Path, build: Callable[[Path], dict[str, Any]]) -> CachedTokens:
    try:
        return _read(folder)  # another process may have built it while this one waited for the lock
    except BrokenCacheError as problem:
        if folder.exists():
            warnings.warn(f"the cache {folder} is broken ({problem}): building it again", stacklevel=4)
            shutil.rmtree(folder)
    building = folder.with_name(f"{folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)  # left by a process that was killed
    building.mkdir()
    try:
        _write_record(building, build(building))
        os.replace(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return _read(folder)


def _write_record(folder: Path, facts: dict[str, Any]) -> None:
    train, validation = _mapped(folder / "train.bin"), _mapped(folder / "validation.bin")
    record = {
        "format": FORMAT,
        "train_tokens": len(train),
        "validation_tokens": len(validation),
        "sha256": tokens_sha256(train, validation),
        "facts": facts,
    }
    (folder / "meta.json").write_text(json.dumps(record, indent=1))


def _read(folder: Path) -> CachedTokens:
    try:
        record = json.loads((folder / "meta.json").read_text())
        train, validation = _mapped(folder / "train.bin"), _mapped(folder / "validation.bin")
        counts, facts, sha256 = (record["train_tokens"], record["validation_tokens"]), record["facts"], record["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BrokenCacheError(f"{type(error).__name__} while reading it") from error
    if counts != (len(train), len(validation)):
        raise BrokenCacheError(f"{len(train)} + {len(validation)} tokens, its record says {counts[0]} + {counts[1]}")
    if tokens_sha256(train, validation) != sha256:
        raise BrokenCacheError("its tokens do not match their checksum")
    return CachedTokens(train, validation, sha256, facts)


def _mapped(path: Path) -> Tokens:
    return np.memmap(path, dtype=np.uint16, mode="r")
