"""What is wrong with a file that cannot be read; without torch, so that a refusal does not wait for it."""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hybridlab.base.errors import UserError
from hybridlab.base.files import missing, project_root


@contextmanager
def reading(path: Path, what: str, pattern: str, otherwise: str) -> Iterator[None]:
    """Turn whatever goes wrong while a file is read into one line.

    what, pattern: as for `missing`; otherwise: what it is instead, where its content is wrong

    Raises UserError.
    """
    try:
        yield
    except FileNotFoundError:
        raise missing(path, what, pattern) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except Exception:
        raise UserError(f"{path}: {otherwise}") from None


def unreadable(data: str, max_bytes: int) -> str | None:
    """Why the file that `file:PATH` names is no UTF-8 text, up to a character that `max_bytes` cuts; None where it is.

    max_bytes: read of it; 0 takes all
    """
    kind, _, name = data.partition(":")
    if kind != "file":
        return None
    path = Path(name)
    path = path if path.exists() else project_root() / path
    if path.is_char_device() or path.is_block_device():
        return None  # it may have no end: the loader says so
    try:
        with path.open("rb") as file:
            getincrementaldecoder("utf-8")().decode(file.read(max_bytes or -1), final=not max_bytes)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}; name a text file, as file:my_text.txt"
    except UnicodeDecodeError as error:
        return f"{path} is not UTF-8 text (byte {error.start}): convert it"
    return None
