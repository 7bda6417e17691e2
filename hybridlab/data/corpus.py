"""Source files of a machine as two sets of texts: every choice follows from content and seed alone."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

VALIDATION_SHARE = 0.05
VALIDATION_LEAST_BYTES = 200_000
# Packages installed later, tests, codec and help tables: not what this machine's Python is written in.
LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "pydoc_data"}


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
        proportional_bytes = int(max_bytes * VALIDATION_SHARE / (1 - VALIDATION_SHARE))
        held_out = _fitting(held_out, contents, max(proportional_bytes, VALIDATION_LEAST_BYTES))
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
                    if content.strip() and _is_utf8(content):
                        yield content


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True
