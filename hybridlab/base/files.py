"""Files written as a whole: a reader, or a process that starts again, never meets half of one."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from hybridlab.base.errors import UserError, nearest

SHIPPED = "shipped"
"""Of the installed package: the folder that the wheel's notebooks and params are in."""

RESULTS_LOCK = "runs/.results.lock"
"""Of a project: held while a results.json is changed."""

NOTEBOOKS, PARAMS = "notebooks/*.ipynb", "params/*/*.yaml"

MARK = "[tool.hybridlab]"
"""The line of a `pyproject.toml` that makes its folder a project of hybridlab's."""

ON_WINDOWS = os.name == "nt"
"""There no folder can be opened, and the system itself brings names to the disk."""


@contextmanager
def replaced(path: Path, *, keep_as: Path | None = None, lasting: bool = True) -> Iterator[Path]:
    """Yield a name beside `path`; what the block writes there takes the place of `path` when the block ends.

    path: its folder is made where it is missing
    keep_as: where the file that is replaced goes; None lets it go
    lasting: the content is on the disk before the name is given to it, and the name when the block has ended; False
        waits for no disk, for what counts only as long as the machine runs

    If the block fails, `path` is as it was and nothing lies beside it; a process killed at the worst moment leaves the
    old file under `keep_as`.

    Raises UserError where the disk is full or cannot be written.
    """
    beside = _beside(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file in it")
    try:
        with writing_to(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield beside
            if lasting:
                _content_to_disk(beside)
            if keep_as and path.exists():
                os.replace(path, keep_as)
            os.replace(beside, path)
            if lasting:
                names_to_disk(path.parent)
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def replace_all(contents: Mapping[Path, bytes]) -> None:
    """Write several files, all or none: the first one is replaced when all are on the disk.

    Raises UserError where the disk is full or cannot be written; then each is as it was, or is not there as before.
    """
    before: dict[Path, bytes | None] = {}
    try:
        with ExitStack() as written:
            for path, content in contents.items():
                beside = written.enter_context(replaced(path, lasting=False))
                beside.write_bytes(content)
                _content_to_disk(beside)
            before |= {path: path.read_bytes() if path.exists() else None for path in contents}
    except BaseException:
        for path, earlier in before.items():
            _put_back(path, earlier)
        raise


def _put_back(path: Path, content: bytes | None) -> None:
    """Give a file what it held before; None: it was not there."""
    if content is None:
        path.unlink(missing_ok=True)
    else:
        with replaced(path, lasting=False) as beside:
            beside.write_bytes(content)


def remove(*paths: Path) -> None:
    """Delete those of the files that are there, and what a killed process left beside them.

    Raises UserError where that cannot be done.
    """
    for path in paths:
        with writing_to(path.parent):
            path.unlink(missing_ok=True)
            _beside(path).unlink(missing_ok=True)


@contextmanager
def writing_to(folder: Path, *, otherwise: str = "choose another folder") -> Iterator[None]:
    """Turn a full or unwritable disk into one line that says what to do.

    otherwise: what helps where there is no room to make

    Raises UserError for any OSError of the block, and for an address.
    """
    refuse_address(folder)
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise UserError(f"cannot write in the folder {folder}: {reason}; make room there or {otherwise}") from error


def make_folders(*files: Path) -> None:
    """Make the folders of what is written when all is done; none is made where one of the files is refused.

    Raises UserError where a file cannot be written.
    """
    for file in files:
        refuse_address(file)
        if file.exists() and not file.is_file():
            raise UserError(f"{file} is no file: name one that can be written")
        there = next(place for place in file.absolute().parents if place.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise UserError(f"{file}: cannot write into {there}: choose another folder")
    for file in files:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{file}: cannot make its folder: {error.strerror}") from None


def refuse_address(place: Path) -> None:
    """Raise UserError for an address, such as s3://bucket: what is written goes to a disk."""
    if re.search(r"(^|/)[A-Za-z][\w+.-]+:/", place.as_posix()):
        raise UserError(f"{place}: an address is no place to write to: name a file or folder on this machine")


def find_source(path: Path, pattern: str) -> Path:
    """A notebook or parameter file: at `path`, or else of that name among those that came with hybridlab.

    pattern: where those are, as "notebooks/*.ipynb"; folder and suffix may be left out of `path`
    """
    named = path if path.suffix == Path(pattern).suffix else path.with_name(path.name + Path(pattern).suffix)
    places = (path, shipped() / named, shipped() / Path(pattern).parts[0] / named)
    return next((place for place in places if place.is_file()), path)


def missing(path: Path, what: str, pattern: str) -> UserError:
    """The error for a file that is not there, with the likeliest of those beside it, in the project or of hybridlab.

    what: as "parameter file"; pattern: as for `find_source`
    """
    known = {str(file) for file in path.parent.glob(f"*{Path(pattern).suffix}")}
    known |= {os.path.relpath(file) for file in project_root().glob(pattern)}
    known |= {str(file.relative_to(shipped())) for file in shipped().glob(pattern)}
    return UserError(f"{path}: no such {what}{f': {nearest(path, sorted(known))}' if known else ''}")


def shipped() -> Path:
    """The folder with the notebooks and params of hybridlab itself: the checkout, or inside an installed package."""
    package = Path(__file__).parents[1]
    return package / SHIPPED if (package / SHIPPED).is_dir() else package.parent


def project_root() -> Path:
    """Where runs, results and documents lie: the marked project around the working folder, or else that folder."""
    return marked_root() or Path.cwd().resolve()


def marked_root() -> Path | None:
    """The folder whose `pyproject.toml` has a table [tool.hybridlab], from the working folder upward, if any.

    A project of somebody else's has none, and gets nothing written into it for having a `pyproject.toml`.

    Raises UserError where the working folder is there no more.
    """
    try:
        here = Path.cwd().resolve()
    except FileNotFoundError:
        raise UserError("the working folder is gone: go to another one") from None
    return next((folder for folder in (here, *here.parents) if _is_marked(folder / "pyproject.toml")), None)


def _is_marked(file: Path) -> bool:
    with suppress(OSError):
        return MARK in file.read_text(encoding="utf-8", errors="replace").splitlines()
    return False


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.tmp")


def _content_to_disk(path: Path) -> None:
    """Wait until a file's content has reached the disk; Windows wants the file open for writing."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def names_to_disk(folder: Path) -> None:
    """Wait until a folder's list of names has reached the disk."""
    if ON_WINDOWS:
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
