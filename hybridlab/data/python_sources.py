"""The default text: the Python sources that came with this machine's Python and torch. No download."""

from __future__ import annotations

import importlib.util
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybridlab.base.errors import UserError
from hybridlab.data.bpe import train_tokenizer, write_encoded
from hybridlab.data.cache import cache_folder, cache_key, cached_tokens
from hybridlab.data.corpus import Corpus, read_corpus
from hybridlab.data.text_data import TextData

DESCRIPTION = "Python sources of this machine (standard library and torch)"


def load_python(
    *,
    vocab_size: int,
    seed: int,
    max_bytes: int | None,
    cache: Path | None,
    roots: Sequence[Path] | None = None,
) -> TextData:
    """Encode this machine's Python sources (or those below `roots`) with a tokenizer learned from them."""
    corpus = read_corpus(roots or installed_sources(), seed=seed, max_bytes=max_bytes)
    if not corpus.train or not corpus.validation:
        raise UserError(
            f"the Python sources give {len(corpus.train)} files to train on and {len(corpus.validation)} to "
            f"validate with at max_bytes={max_bytes}: raise max_bytes, or name another source."
        )
    folder = cache_folder(cache) / "text" / cache_key("python", vocab_size, corpus.digest)
    tokens = cached_tokens(folder, lambda empty: _build(corpus, vocab_size, empty))
    return TextData(
        source="python",
        description=DESCRIPTION,
        train=tokens.train,
        validation=tokens.validation,
        vocab_size=vocab_size,
        sha256=tokens.sha256,
        bytes_per_token=tokens.facts["bytes_per_token"],
        entropy_floor_nats=None,
    )


def installed_sources() -> list[Path]:
    """The folders of the standard library and of torch."""
    torch = importlib.util.find_spec("torch")
    packages = torch.submodule_search_locations if torch else None
    return [Path(sysconfig.get_path("stdlib")), *map(Path, packages or [])]


def _build(corpus: Corpus, vocab_size: int, folder: Path) -> dict[str, Any]:
    tokenizer = train_tokenizer(corpus.train, vocab_size)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    write_encoded(corpus.train, tokenizer, folder / "train.bin")
    validation_tokens = write_encoded(corpus.validation, tokenizer, folder / "validation.bin")
    validation_bytes = sum(len(text.encode()) for text in corpus.validation)
    return {"bytes_per_token": validation_bytes / validation_tokens}
