"""Any text data set through Hugging Face `datasets`, streamed, in GPT-2's tokens by tiktoken."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from hybridlab.base.errors import UserError, first_line
from hybridlab.data.cache import append_tokens, cache_folder, cache_key, cached_tokens, largest_validation_bytes
from hybridlab.data.token_batches import TextData

if TYPE_CHECKING:
    from tiktoken import Encoding

VALIDATION_SPLITS = ("validation", "valid", "dev", "test")
VALIDATION_EVERY = 20


def gpt2_encoder() -> Encoding:
    """GPT-2's 50,257 tokens; tiktoken downloads the vocabulary once.

    Raises UserError where tiktoken, or the network, is missing.
    """
    try:
        import tiktoken
    except ImportError as error:
        raise UserError("GPT-2's tokens need tiktoken: .venv/bin/pip install -e '.[hf]'") from error
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # whatever the network stack raises
        raise UserError(
            f"GPT-2's vocabulary cannot be downloaded ({type(error).__name__}): connect once, let "
            "TIKTOKEN_CACHE_DIR name a folder that has it, or use the source 'python'."
        ) from error


def load_huggingface(
    argument: str,
    *,
    vocab_size: int,
    max_bytes: int | None,
    cache: Path | None,
    make_encoder: Callable[[], Encoding] = gpt2_encoder,
) -> TextData:
    """Stream the data set `NAME`, `NAME:CONFIG`, or a local folder or file, and keep its tokens in the cache.

    The text is the column `text`, else the first column of strings. Validation is the data set's own split
    where it has one, else every 20th document. `max_bytes` caps the UTF-8 bytes of the training documents;
    validation is capped at a nineteenth of that, but not below 200 kB. A data set from the hub is known by
    its name: a cached one is used until its cache folder is removed.

    Raises UserError for a missing extra, a data set that cannot be had, and one without text.
    """
    name, config = _name_and_config(argument)
    key = cache_key("hf", name, config, _stamps(name), max_bytes, make_encoder.__name__)

    def build(folder: Path) -> dict[str, Any]:
        encoder = make_encoder()
        _check_vocab_size(vocab_size, encoder.n_vocab)  # before anything is streamed
        return _build(name, config, encoder, max_bytes, folder)

    tokens = cached_tokens(cache_folder(cache) / "text" / key, build)
    _check_vocab_size(vocab_size, tokens.facts["vocab_size"])
    description = f"the data set {argument} in {tokens.facts['encoder']} tokens"
    return tokens.text_data(f"hf:{argument}", description, vocab_size)


# --- writing tokens ----------------------------------------------------------------------------------


class _CappedWriter:
    """Writes whole documents, each with the end of a text, until the next one would exceed the cap."""

    def __init__(self, file: BinaryIO, encoder: Encoding, cap_bytes: float) -> None:
        self._file, self._encoder, self._cap_bytes = file, encoder, cap_bytes
        self.written_bytes, self.written_tokens, self.full = 0, 0, False

    def add(self, texts: list[str]) -> None:
        """Write as many of the texts as fit."""
        for tokens in self._encoder.encode_ordinary_batch(list(self._fitting(texts))):
            append_tokens(self._file, [*tokens, self._encoder.eot_token])
            self.written_tokens += len(tokens) + 1

    def _fitting(self, texts: list[str]) -> Iterator[str]:
        for text in texts:
            size_bytes = len(text.encode())
            self.full = self.full or self.written_bytes + size_bytes > self._cap_bytes
            if not self.full:
                self.written_bytes += size_bytes
                yield text


def _build(name: str, config: str | None, encoder: Encoding, max_bytes: int | None, folder: Path) -> dict[str, Any]:
    train_cap, validation_cap = (max_bytes, largest_validation_bytes(max_bytes)) if max_bytes else (math.inf, math.inf)
    with (folder / "train.bin").open("wb") as one, (folder / "validation.bin").open("wb") as other:
        train, validation = _CappedWriter(one, encoder, train_cap), _CappedWriter(other, encoder, validation_cap)
        _write(_splits(name, config), train, validation)
    if not train.written_tokens or not validation.written_tokens:
        raise UserError(
            f"the data set {name} gave {train.written_bytes} bytes to train on and {validation.written_bytes} "
            f"to validate with at max_bytes={max_bytes}: raise max_bytes, or take a larger data set."
        )
    bytes_per_token = validation.written_bytes / validation.written_tokens
    return {"encoder": encoder.name, "vocab_size": encoder.n_vocab, "bytes_per_token": bytes_per_token}


def _check_vocab_size(vocab_size: int, needed: int) -> None:
    if vocab_size < needed:
        raise UserError(f"vocab_size={vocab_size}: hf:NAME comes in {needed} tokens: set vocab_size={needed}.")


def _write(splits: Mapping[str, Iterator[str]], train: _CappedWriter, validation: _CappedWriter) -> None:
    """Fill both halves: from two splits, or with every 20th document of one."""
    held_out = next((splits[name] for name in VALIDATION_SPLITS if name in splits), None)
    learned = splits["train"] if "train" in splits else next(iter(splits.values()))
    if held_out is not None and held_out is not learned:
        for texts, writer in ((learned, train), (held_out, validation)):
            while not writer.full and (batch := list(islice(texts, VALIDATION_EVERY))):
                writer.add(batch)
        return
    while not (train.full and validation.full) and (batch := list(islice(learned, VALIDATION_EVERY))):
        train.add(batch[: VALIDATION_EVERY - 1])
        validation.add(batch[VALIDATION_EVERY - 1 :])


# --- reading documents -------------------------------------------------------------------------------


def _name_and_config(argument: str) -> tuple[str, str | None]:
    if Path(argument).expanduser().exists():
        return str(Path(argument).expanduser().resolve()), None
    if argument.startswith(("/", "./", "../", "~")):
        raise UserError(f"hf:{argument}: there is no such folder or file.")
    name, _, config = argument.partition(":")
    return name, config or None


def _stamps(name: str) -> list[tuple[str, int, int]]:
    """What tells whether local files have changed; nothing for a name of the hub."""
    files = [Path(name), *sorted(Path(name).rglob("*"))]
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]


def _splits(name: str, config: str | None) -> dict[str, Iterator[str]]:
    """The texts of each of the data set's splits."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError("the source hf:NAME needs datasets: .venv/bin/pip install -e '.[hf]'") from error
    path = Path(name)
    where = {"path": str(path.parent), "data_files": path.name} if path.is_file() else {"path": name, "name": config}
    try:
        splits = load_dataset(**where, streaming=True)
    except Exception as error:  # the hub, the network and the parsers each raise their own
        raise _unavailable(name, error) from error
    return {split: _texts(name, documents) for split, documents in splits.items()}


def _texts(name: str, documents: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """The texts of one split that are not empty."""
    column = None
    try:
        for document in documents:
            column = column or _text_column(name, document)
            if document[column]:
                yield document[column]
    except UserError:
        raise
    except Exception as error:  # a stream may break off in as many ways as it may fail to start
        raise _unavailable(name, error) from error


def _text_column(name: str, document: Mapping[str, Any]) -> str:
    if "text" in document:
        return "text"
    column = next((column for column, value in document.items() if isinstance(value, str)), None)
    if column is None:
        raise UserError(f"the data set {name} has no column of text: its columns are {', '.join(document)}.")
    return column


def _unavailable(name: str, error: Exception) -> UserError:
    said = first_line(error)
    return UserError(f"the data set {name} cannot be read: {said} (text without a network: the source 'python')")
