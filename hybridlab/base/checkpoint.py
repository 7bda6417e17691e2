"""Checkpoints: the state of a run in one file that survives a kill at any moment and cannot run code."""

from __future__ import annotations

import pickle
import random
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hybridlab.base.errors import UserError
from hybridlab.base.files import remove, replaced

FORMAT = 6
"""Of the file. Raise it when what a checkpoint holds changes its meaning: other formats are refused."""

_MARK = "hybridlab_checkpoint"
_PLAIN = (type(None), bool, int, float, str, bytes, torch.Size, torch.dtype, torch.device)


class DamagedError(UserError):
    """A checkpoint that was cut short or changed on the disk."""


def save_checkpoint(path: Path, state: Mapping[str, Any], *, meta: Mapping[str, Any]) -> None:
    """Write a checkpoint as a whole; the one before it stays beside it, as `<stem>.previous<suffix>`.

    state: what to go on from; containers, numbers, strings and tensors only
    meta: what it belongs to, such as the run's configuration; `load_checkpoint` compares it

    While it is written, the disk holds up to three: the new one and the two before it.

    Raises TypeError, before anything is written, for a value that could not be read back, and UserError where the
    disk is full or cannot be written; the earlier checkpoints are then as they were.
    """
    content = {_MARK: FORMAT, "meta": dict(meta), "state": dict(state)}
    _refuse_foreign(content)
    with replaced(path, keep_as=_previous(path)) as beside:
        save_tensors(content, beside)


def save_tensors(content: Mapping[str, Any], path: Path) -> None:
    """Write a file as torch does. Raises OSError where the disk is full or cannot be written."""
    with path.open("wb") as file, disk_errors():
        torch.save(content, file)


@contextmanager
def disk_errors() -> Iterator[None]:
    """Raise what the disk said, which torch's writer hides behind an error of its own."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def load_checkpoint(
    path: Path, *, expect: Mapping[str, Any], device: torch.device | str = "cpu"
) -> dict[str, Any] | None:
    """Read the state that `save_checkpoint` wrote; None where there is no checkpoint.

    expect: the `meta` that it must have been saved with
    device: where its tensors go. On the CPU they take no memory of the GPU beside the ones they are copied into

    A damaged file gives way, with a warning, to the checkpoint before it. No file can run code.

    Raises UserError for a file that is damaged and has no predecessor, is of another format, belongs to something
    else, or asks for code.
    """
    content = _newest(path, device)
    if content is None:
        return None
    if content.get(_MARK) != FORMAT:
        raise UserError(_other_format(path, content.get(_MARK)))
    refuse_differences(path, content["meta"], expect)
    return content["state"]


def checkpoint_meta(path: Path) -> dict[str, Any] | None:
    """What the checkpoint, or the one before it, belongs to: the `meta` it was saved with; tensors stay on the disk.

    None where there is none, or none that can be read: `load_checkpoint` says what is wrong with it.
    """
    for file in (path, _previous(path)):
        with suppress(Exception):  # a damaged file makes its reader fail in a dozen ways
            if not is_compressed(file):
                return dict(torch.load(file, map_location="cpu", weights_only=True, mmap=True)["meta"])
    return None


def is_compressed(file: Path) -> bool:
    """Whether a file is an archive with compressed parts: torch writes none, and reading one may fill all memory."""
    with suppress(Exception), zipfile.ZipFile(file) as archive:
        return any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist())
    return False


def has_checkpoint(path: Path) -> bool:
    """Whether there is a checkpoint, or one before it, to go on from."""
    return path.exists() or _previous(path).exists()


def remove_checkpoint(path: Path) -> None:
    """Delete the checkpoint and the one before it, if there are any."""
    remove(path, _previous(path))


def refuse_differences(place: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise UserError, naming each setting that differs, unless both are the same."""
    if different := ", ".join(differences(then, now)):
        raise UserError(
            f"{place} is of another run: {different}; choose another folder, or start afresh without resume"
        )


def random_state() -> dict[str, Any]:
    """The state of every global random stream: Python's, NumPy's, torch's on the CPU and on each CUDA device."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 (the global stream is what is kept)
    return {
        "python": random.getstate(),
        "numpy": (str(name), np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state_(state: Mapping[str, Any]) -> None:
    """Let every random stream go on where `random_state` was taken; devices that are not there are left out."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    for index, stream in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(stream.cpu(), index)


def _previous(path: Path) -> Path:
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def _newest(path: Path, device: torch.device | str) -> dict[str, Any] | None:
    """The content of the newest file that is whole."""
    previous = _previous(path)
    try:
        if path.exists():
            return _read(path, device)
    except DamagedError:
        if not previous.exists():
            raise
        warnings.warn(f"{path} is damaged: going on from the checkpoint before it, {previous.name}", stacklevel=4)
    return _read(previous, device) if previous.exists() else None


def _read(file: Path, device: torch.device | str) -> dict[str, Any]:
    """The file's content; torch itself does not compare its checksums."""
    if not _is_whole(file):
        raise DamagedError(_damaged(file))
    try:
        content = torch.load(file, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{file} holds more than numbers and tensors and may run code: refused; delete it") from error
    except RuntimeError as error:
        if "PytorchStreamReader" not in str(error):
            raise
        raise DamagedError(_damaged(file)) from error
    return content if isinstance(content, dict) else {}


def _is_whole(file: Path) -> bool:
    """Whether the file is an archive, and every part of it has the checksum that was written with it."""
    try:
        with zipfile.ZipFile(file) as archive:
            return not is_compressed(file) and archive.testzip() is None
    except Exception:  # a damaged archive makes its reader fail in a dozen ways
        return False


def _damaged(file: Path) -> str:
    return f"{file} is no checkpoint, or is damaged: delete it, or start afresh without resume"


def _other_format(path: Path, found: object) -> str:
    if not isinstance(found, int):
        return f"{path} is not a checkpoint of hybridlab: choose another folder, or start afresh without resume"
    age = "a newer" if found > FORMAT else "an older"
    return (
        f"{path} has the checkpoint format {found} of {age} hybridlab, this one reads {FORMAT}: "
        "go on with that version, or start afresh without resume"
    )


def differences(then: object, now: object, name: str = "") -> Iterator[str]:
    """Each leaf that differs, by its dotted name."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        for key in {**then, **now}:
            yield from differences(then.get(key), now.get(key), f"{name}.{key}" if name else str(key))
    elif then != now:
        yield f"{name} ({then!r} then, {now!r} now)"


def _refuse_foreign(value: object, name: str = "") -> None:
    """Raise TypeError for what `torch.load(weights_only=True)` would refuse, by its dotted name."""
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():  # type: ignore[attr-defined]
            _refuse_foreign(key, f"{name}.{key} (the key)")
            _refuse_foreign(item, f"{name}.{key}")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):  # type: ignore[arg-type, var-annotated]
            _refuse_foreign(item, f"{name}[{index}]")
    elif not isinstance(value, Tensor) and type(value) not in _PLAIN:
        kind = type(value)
        raise TypeError(f"{name.lstrip('.')} is a {kind.__module__}.{kind.__name__}: a checkpoint holds plain values")
