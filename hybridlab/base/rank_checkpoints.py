"""Checkpoints that several processes write and read together, whatever number of them wrote."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map_with_path, tree_unflatten

from hybridlab.base.checkpoint import DamagedError, disk_errors, load_checkpoint, save_checkpoint
from hybridlab.base.errors import UserError, first_line
from hybridlab.base.files import names_to_disk, writing_to
from hybridlab.base.ranks import from_each, from_first, is_first, is_sharded, local, running, spread

REST = "rest.pt"
"""Of a checkpoint: all that every rank has alike, and the places of what is spread over them."""

PLACE = "spread over ranks"
"""The key of what stands in `REST` for a tensor that is spread: its shape, type and placements."""

KEPT = 2


class RankCheckpoints:
    """The checkpoints of a training on several ranks, each in a folder of its own, named by its step.

        40.part     while it is written
        40          when all ranks have written it; the newest is gone on from, and one more is kept

    Tensors that are spread over ranks are written by torch.distributed.checkpoint, each part by a rank that has it, and
    may be read by another number of ranks. All else is alike on every rank, and the first one writes it.

    folder: on a disk that all ranks see
    asynchronous: `save` returns when the tensors are copied to host memory; they are written beside the training

    torch reads the list of its files by `pickle`, which may run code: go on from checkpoints that you trust.
    """

    def __init__(self, folder: Path, *, asynchronous: bool = False) -> None:
        self._folder, self._asynchronous = folder, asynchronous
        self._written: Future[None] | None = None

    def save(self, step: int, state: Mapping[str, Any], *, meta: Mapping[str, Any]) -> None:
        """Write a checkpoint as a whole, or none; every rank calls it, at the same step.

        Raises UserError on every rank where one of them cannot write; the earlier checkpoints are then as they were.
        """
        self.wait()
        beside, (parts, rest) = self._folder / f"{step}.part", _split(state)
        from_first(partial(self._begin, beside, rest, meta))
        if self._asynchronous:
            parts = {name: spread(local(part).to("cpu", copy=True), like=part) for name, part in parts.items()}
        self._written = self._beside.submit(self._write, beside, parts, self._own_group)
        if not self._asynchronous and (error := self._failure()):
            raise error

    def wait(self) -> None:
        """Return when what is written beside the training is on the disk; a warning says where it is not."""
        if error := self._failure():
            warnings.warn(f"{error}; the checkpoint before stays", stacklevel=2)

    def _failure(self) -> Exception | None:
        """What kept a rank from writing its part, once all have ended; None where all is written."""
        written, self._written = self._written, None
        mine = written.exception() if written else None
        ends = from_each((mine, mine and mine.__cause__)) if written else []
        for error, cause in ends:
            if isinstance(error, Exception):
                error.__cause__ = cause
                return error
        return None

    def load(self, model: nn.Module, *, expect: Mapping[str, Any]) -> dict[str, Any] | None:
        """The state of the newest checkpoint, its parts as the model is spread now; None where there is none.

        A damaged one gives way, with a warning, to the one before. Raises UserError as `load_checkpoint` does.
        """
        for step in (steps := from_first(self._steps)):
            try:
                return self._read(self._folder / str(step), model, expect)
            except DamagedError as error:
                follows = "looking for the one before" if step != steps[-1] else "it is the last: training begins anew"
                warnings.warn(f"{error}: {follows}", stacklevel=2)
        return None

    def remove(self) -> None:
        """Delete all of them; the first rank does."""
        self.wait()
        from_first(partial(shutil.rmtree, self._folder, ignore_errors=True))

    # --- writing -----------------------------------------------------------------------------------------

    def _begin(self, beside: Path, rest: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """The first rank makes the folder, and writes what all ranks have alike."""
        for left in self._folder.glob("*.part"):
            shutil.rmtree(left, ignore_errors=True)
        save_checkpoint(beside / REST, rest, meta=meta)

    def _write(self, beside: Path, parts: dict[str, Tensor], group: Any) -> None:
        """In a thread: each rank writes its part; torch's save ends on the first one when it has on all."""
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        writer = FileSystemWriter(beside)
        writer.write_data = disk_errors()(writer.write_data)  # type: ignore[method-assign]
        try:
            if parts:
                save(parts, storage_writer=writer, process_group=group)
            if is_first():
                self._end(beside)
        except CheckpointException as error:  # none of Exception
            if is_first():
                shutil.rmtree(beside, ignore_errors=True)  # the record needs the room
            cause = _cause(error)
            with writing_to(self._folder):
                raise cause if isinstance(cause, OSError) else OSError(first_line(cause)) from error

    def _end(self, beside: Path) -> None:
        """The first rank gives a whole checkpoint its name, and deletes those before the last ones."""
        whole = beside.with_suffix("")
        with writing_to(self._folder):
            shutil.rmtree(whole, ignore_errors=True)
            os.replace(beside, whole)
            names_to_disk(self._folder)
        for step in self._steps()[KEPT:]:
            shutil.rmtree(self._folder / str(step), ignore_errors=True)

    @cached_property
    def _own_group(self) -> Any:
        """Ranks that write beside the training speak of it in a group of their own."""
        return distributed.new_group(backend="gloo") if running() > 1 else None

    @cached_property
    def _beside(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, "checkpoint")

    # --- reading -----------------------------------------------------------------------------------------

    @classmethod
    def newest_file(cls, folder: Path) -> Path | None:
        """Where the newest one says what it belongs to (`checkpoint_meta`); None where there is none."""
        return next((folder / str(step) / REST for step in cls(folder)._steps()), None)

    def _steps(self) -> list[int]:
        """Of the whole checkpoints, the newest first."""
        return sorted((int(path.name) for path in self._folder.glob("*") if path.name.isdigit()), reverse=True)

    def _read(self, folder: Path, model: nn.Module, expect: Mapping[str, Any]) -> dict[str, Any]:
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.state_dict_loader import load

        rest = load_checkpoint(folder / REST, expect=expect)
        if rest is None:
            raise DamagedError(f"{folder} lacks its {REST}")
        parts: dict[str, Tensor] = {}
        state = tree_map_with_path(partial(_in_place, parts, model), rest, is_leaf=_is_place)
        try:
            if parts:
                load(parts, checkpoint_id=folder)
        except CheckpointException as error:
            raise DamagedError(f"{folder} is damaged: {first_line(_cause(error))}") from error
        return state


def _split(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What is spread over ranks, by its place in the state; and the state with their places in their stead."""
    leaves, form = tree_flatten_with_path(state)
    parts = {keystr(path): leaf for path, leaf in leaves if isinstance(leaf, Tensor) and is_sharded(leaf)}
    return parts, tree_unflatten([_place(leaf) if keystr(path) in parts else leaf for path, leaf in leaves], form)


def _place(tensor: Any) -> dict[str, Any]:
    """Along each dimension of the mesh, the tensor's dimension that is cut; None where each rank has all."""
    cut = [None if placement.is_replicate() else placement.dim for placement in tensor.placements]
    return {PLACE: [list(tensor.shape), tensor.dtype, cut]}


def _is_place(value: Any) -> bool:
    return isinstance(value, dict) and PLACE in value


def _in_place(parts: dict[str, Tensor], model: nn.Module, path: Any, value: Any) -> Any:
    """An empty tensor for what was spread, in host memory and noted in `parts`; other values as they are."""
    if not _is_place(value):
        return value
    from torch.distributed import tensor
    from torch.distributed.tensor import Replicate, Shard

    shape, dtype, cut = value[PLACE]
    mesh = next((p.device_mesh for p in model.parameters() if is_sharded(p)), None)  # type: ignore[attr-defined]
    if mesh is None or mesh.ndim != len(cut):
        raise UserError(f"this checkpoint is of a model that is sharded along {len(cut)} dimensions: shard it so")
    placements = [Replicate() if dim is None else Shard(dim) for dim in cut]
    like = tensor.empty(*shape, dtype=dtype, device_mesh=mesh, placements=placements)
    parts[keystr(path)] = spread(torch.empty_like(like.to_local(), device="cpu"), like=like)
    return parts[keystr(path)]


def _cause(error: BaseException) -> BaseException:
    """What went wrong on the first of the ranks where something did."""
    failures = getattr(error, "failures", None)
    return next(iter(failures.values()))[0] if failures else error
