"""A checkpoint is whole or not there, fits or is refused, and never runs code."""

from __future__ import annotations

import os
import pickle
import random
import tracemalloc
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
import pytest
import torch

from hybridlab.base import checkpoint, files
from hybridlab.base.checkpoint import (
    checkpoint_meta,
    load_checkpoint,
    random_state,
    remove_checkpoint,
    restore_random_state_,
    save_checkpoint,
    save_tensors,
)
from hybridlab.base.errors import UserError
from tests.conftest import full_disk, names

META = {"name": "baseline", "optimizer": {"lr": 3e-4, "betas": [0.9, 0.999]}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint.pt"


def save(path: Path, number: int) -> None:
    save_checkpoint(path, {"weights": torch.full((1000,), float(number)), "number": number}, meta=META)


def load(path: Path) -> int:
    """The number that was saved; the tensor beside it must agree."""
    state = load_checkpoint(path, expect=META)
    assert state is not None
    assert torch.equal(state["weights"], torch.full((1000,), float(state["number"])))
    return state["number"]


# --- what comes back ---------------------------------------------------------------------------------------


def test_a_state_comes_back_as_it_was(path: Path) -> None:
    weights = {"float": torch.randn(3, 4), "half": torch.randn(5).bfloat16(), "empty": torch.empty(0)}
    state = {"weights": weights, "nothing": None, "nested": [(1, 2.5), {"text": "x", 3: True}], "nan": float("inf")}
    save_checkpoint(path, state, meta=META)
    loaded = load_checkpoint(path, expect=META)
    assert loaded is not None
    for name, tensor in weights.items():
        assert torch.equal(loaded["weights"].pop(name), tensor)
    assert loaded | {"weights": weights} == state


def test_a_model_and_its_optimizer_come_back(path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    save_checkpoint(path, {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, meta={})
    loaded = load_checkpoint(path, expect={})
    assert loaded is not None
    assert torch.equal(loaded["model"]["weight"], model.weight)
    assert loaded["optimizer"]["param_groups"] == optimizer.state_dict()["param_groups"]


def test_there_may_be_none(path: Path) -> None:
    assert load_checkpoint(path, expect=META) is None


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (np.float64(1.0), r"trainer\.losses\[1\] is a numpy\.float64"),
        (np.zeros(2), "numpy.ndarray"),
        (Path("x"), "a checkpoint holds plain values"),
        ({1, 2}, "builtins.set"),
    ],
)
def test_what_could_not_be_read_back_is_refused_before_it_is_written(path: Path, value: object, named: str) -> None:
    save(path, 1)
    with pytest.raises(TypeError, match=named):
        save_checkpoint(path, {"trainer": {"losses": [1.0, value]}}, meta=META)
    assert load(path) == 1
    assert names(path.parent) == {"checkpoint.pt"}


# --- random streams ----------------------------------------------------------------------------------------


def draw() -> tuple[float, ...]:
    gauss = np.random.standard_normal()  # noqa: NPY002 (an odd count leaves the stream with one in hand)
    return random.random(), random.gauss(0, 1), float(gauss), float(torch.rand(())), float(torch.randn(()))


def test_every_random_stream_goes_on_where_it_was(path: Path) -> None:
    draw()
    save_checkpoint(path, random_state(), meta={})
    expected = [draw() for _ in range(3)]
    state = load_checkpoint(path, expect={})
    assert state is not None
    restore_random_state_(state)
    assert [draw() for _ in range(3)] == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_stream_of_the_card_goes_on_too(path: Path) -> None:
    torch.rand(3, device="cuda")
    save_checkpoint(path, random_state(), meta={})
    expected = torch.rand(3, device="cuda")
    state = load_checkpoint(path, expect={}, device="cuda")
    assert state is not None
    restore_random_state_(state)
    assert torch.equal(torch.rand(3, device="cuda"), expected)


# --- what does not fit -------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_run_is_refused_by_the_names_of_what_differs(path: Path) -> None:
    save(path, 1)
    other = {"name": "baseline", "optimizer": {"lr": 1e-3, "betas": [0.9, 0.999]}, "seed": 0}
    with pytest.raises(UserError) as caught:
        load_checkpoint(path, expect=other)
    message = str(caught.value)
    assert "optimizer.lr (0.0003 then, 0.001 now), seed (None then, 0 now)" in message
    assert "name" not in message
    assert "choose another folder, or start afresh" in message
    assert "\n" not in message


@pytest.mark.parametrize(("then", "age"), [(checkpoint.FORMAT - 1, "an older"), (checkpoint.FORMAT + 1, "a newer")])
def test_another_format_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch, then: int, age: str) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT", then)
    save(path, 1)
    monkeypatch.undo()
    with pytest.raises(UserError, match=f"format {then} of {age} hybridlab, this one reads {checkpoint.FORMAT}"):
        load_checkpoint(path, expect=META)


@pytest.mark.parametrize("content", [{"weight": torch.ones(2)}, torch.ones(2), [1]])
def test_a_file_of_something_else_is_refused(path: Path, content: object) -> None:
    torch.save(content, path)
    with pytest.raises(UserError, match="is not a checkpoint of hybridlab"):
        load_checkpoint(path, expect=META)


def test_a_compressed_archive_is_refused_and_not_unpacked(path: Path) -> None:
    save(path.with_name("plain.pt"), 1)
    with ZipFile(path.with_name("plain.pt")) as plain, ZipFile(path, "w", ZIP_DEFLATED) as packed:
        for part in plain.namelist():
            packed.writestr(part, plain.read(part))
        packed.writestr("checkpoint/data/9", bytes(50_000_000))
    tracemalloc.start()
    assert checkpoint_meta(path) is None
    with pytest.raises(UserError, match="is no checkpoint, or is damaged: delete it"):
        load_checkpoint(path, expect=META)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


class Stranger:
    """Makes a folder when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.proof),)


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("torch_file", [True, False])
def test_a_stranger_s_file_runs_no_code(path: Path, torch_file: bool, wrapped: bool) -> None:
    """An intact checkpoint before it is no excuse: the file is refused, not passed over."""
    proof = path.parent / "it ran"
    content = {"hybridlab_checkpoint": 1, "meta": META, "state": Stranger(proof)} if wrapped else Stranger(proof)
    if torch_file:
        save(path, 1)
        save(path, 2)
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(UserError) as caught:
        load_checkpoint(path, expect=META)
    assert not proof.exists()
    assert ("may run code: refused" if torch_file else "is no checkpoint") in str(caught.value)
    assert "\n" not in str(caught.value)


# --- what goes wrong on the disk ---------------------------------------------------------------------------


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    match how:
        case "empty":
            content.clear()
        case "cut":
            del content[len(content) // 2 :]
        case "last byte":
            del content[-1]
        case "a bit of the weights":
            content[content.index(torch.full((100,), 2.0).numpy().tobytes()) + 100] ^= 1
        case "zeros":
            content[:] = bytes(len(content))
    path.write_bytes(content)


DAMAGES = ["empty", "cut", "last byte", "a bit of the weights", "zeros"]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(path: Path, how: str) -> None:
    save(path, 1)
    save(path, 2)
    assert load(path) == 2
    damage(path, how)
    with pytest.warns(UserWarning, match=r"checkpoint\.pt is damaged: going on from the checkpoint before it"):
        assert load(path) == 1
    save(path, 3)
    assert load(path) == 3


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_without_another_is_refused_in_one_line(path: Path, how: str) -> None:
    save(path, 2)
    damage(path, how)
    with pytest.raises(UserError, match=r"checkpoint\.pt is no checkpoint, or is damaged: delete it") as caught:
        load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("room_bytes", [0, 100, 2000, 5000])
def test_a_full_disk_is_told_in_one_line_and_costs_nothing(path: Path, room_bytes: int) -> None:
    save(path, 1)
    save(path, 2)
    with full_disk(room_bytes), pytest.raises(UserError) as caught:
        save(path, 3)
    assert str(caught.value) == (
        f"cannot write in the folder {path.parent}: File too large; make room there or choose another folder"
    )
    assert names(path.parent) == {"checkpoint.pt", "checkpoint.previous.pt"}
    assert load(path) == 2
    path.unlink()
    assert load(path) == 1


def test_weights_that_find_no_room_say_what_the_disk_said(path: Path) -> None:
    with full_disk(100_000), pytest.raises(OSError, match="File too large"):
        save_tensors({"weights": torch.zeros(100_000)}, path)


def test_a_folder_that_cannot_be_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write in the folder .*file"):
        save(tmp_path / "file" / "checkpoint.pt", 1)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", range(1, 7))
def test_killed_at_any_moment_of_writing_the_old_state_or_the_new_one_is_there(
    path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """Every call by which `replaced` and `torch.save` change the disk is once the last; a kill runs no cleanup."""
    save(path, 1)
    save(path, 2)
    calls = 0

    def counted(call: Any) -> Any:
        def dies(*args: Any, **settings: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == moment:
                raise Killed
            return call(*args, **settings)

        return dies

    for name in ("fsync", "replace"):
        monkeypatch.setattr(files.os, name, counted(getattr(os, name)))
    monkeypatch.setattr(checkpoint.torch, "save", counted(torch.save))
    monkeypatch.setattr(files.Path, "unlink", lambda *args, **settings: None)
    if moment > 5:
        save(path, 3)
        expected = 3
    else:
        with pytest.raises(Killed):
            save(path, 3)
        expected = 3 if moment == 5 else 2
    monkeypatch.undo()
    assert load(path) == expected
    save(path, 4)
    assert load(path) == 4
    assert names(path.parent) == {"checkpoint.pt", "checkpoint.previous.pt"}


def test_what_a_checkpoint_belongs_to_is_read_without_its_tensors(path: Path) -> None:
    assert checkpoint_meta(path) is None
    save_checkpoint(path, {}, meta={"name": "the one before"})
    save(path, 1)
    assert checkpoint_meta(path) == META
    path.write_bytes(path.read_bytes()[:-1000])
    assert checkpoint_meta(path) == {"name": "the one before"}
    path.with_name("checkpoint.previous.pt").write_bytes(b"no checkpoint")
    assert checkpoint_meta(path) is None


def test_remove_leaves_nothing(path: Path) -> None:
    save(path, 1)
    save(path, 2)
    path.with_name("checkpoint.pt.tmp").touch()  # a process was killed while it wrote
    remove_checkpoint(path)
    remove_checkpoint(path)
    assert names(path.parent) == set()
