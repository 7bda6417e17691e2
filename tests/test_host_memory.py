"""Host memory: arenas, their views, and what is said where there is too little of it."""

from __future__ import annotations

import gc
import io
from collections.abc import Callable
from types import SimpleNamespace

import psutil
import pytest
import torch
from torch import Tensor

from hybridlab.base import pinned_memory as host_memory
from hybridlab.base.errors import UserError
from hybridlab.base.pinned_memory import ArenaPool, HostArena, arena_bytes, host_empty_like
from tests.conftest import CountedArenas

TENSORS = [torch.zeros(3, 5), torch.zeros(7, dtype=torch.bfloat16), torch.zeros(()), torch.zeros(0, 4)]


def test_an_arena_hands_out_aligned_views_that_share_nothing() -> None:
    arena = HostArena(arena_bytes(TENSORS), pinned=True)
    views = [arena.take(tensor) for tensor in TENSORS]
    for number, (view, like) in enumerate(zip(views, TENSORS, strict=True)):
        assert (view.shape, view.dtype, view.is_contiguous()) == (like.shape, like.dtype, True)
        assert view.numel() == 0 or view.data_ptr() % host_memory.ALIGNMENT_BYTES == 0
        view.fill_(number)
    assert [set(view.flatten().tolist()) for view in views] == [{0}, {1}, {2}, set()]


def test_a_view_outlives_its_arena() -> None:
    view = HostArena(arena_bytes(TENSORS), pinned=False).take(TENSORS[0])
    gc.collect()
    assert view.fill_(3).sum() == 45


def test_views_of_any_types_go_into_one_file_and_no_byte_beside_them() -> None:
    """torch.save writes whole storages, and refuses one that is seen as two types."""
    arena = HostArena(1_000_000 + arena_bytes(TENSORS), pinned=False)
    views = [arena.take(tensor).fill_(number) for number, tensor in enumerate(TENSORS)]
    file = io.BytesIO()
    torch.save(views, file)
    assert file.tell() < 10_000
    file.seek(0)
    for view, loaded in zip(views, torch.load(file, weights_only=True), strict=True):
        assert (loaded.dtype, loaded.tolist()) == (view.dtype, view.tolist())


def test_an_arena_that_is_used_up_says_so() -> None:
    arena = HostArena(256, pinned=False)
    arena.take(TENSORS[0])
    with pytest.raises(ValueError, match="the arena of 256 bytes is used up"):
        arena.take(TENSORS[0])


def test_a_host_that_is_short_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=6_000_000_000))
    with pytest.raises(UserError) as caught:
        HostArena(12_500_000_000, pinned=True)
    assert str(caught.value) == (
        "12.5 GB of host memory are wanted and 6.0 GB are available: "
        "close other programs, or keep less of the training on the host"
    )


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The driver's part in pinning, played: `refuses` and what is `locked`."""
    played = SimpleNamespace(refuses=False, locked={})

    def register(address: int, length: int, flags: int) -> int:
        if played.refuses:
            return 2
        played.locked[address] = length
        return 0

    def check(code: int) -> None:
        if code:
            raise RuntimeError(f"out of memory ({code})")

    cudart = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=lambda address: played.locked.pop(address))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(torch.cuda, "check_error", check)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: check(2))
    return played


def test_pages_are_locked_as_long_as_somebody_looks_at_them_and_no_byte_more(driver: SimpleNamespace) -> None:
    arena = HostArena(arena_bytes(TENSORS), pinned=True)
    view = arena.take(TENSORS[0])
    assert driver.locked == {view.data_ptr(): arena_bytes(TENSORS)}
    del arena
    gc.collect()
    assert len(driver.locked) == 1
    del view
    gc.collect()
    assert driver.locked == {}


def test_a_driver_that_refuses_is_told_in_one_line(driver: SimpleNamespace) -> None:
    driver.refuses = True
    with pytest.raises(UserError) as caught:
        HostArena(2**20, pinned=True)
    assert str(caught.value) == (
        "the driver refuses to pin 0.0 GB of host memory (out of memory (2)): "
        "keep less of the training on the host, or keep it in unpinned memory"
    )
    assert HostArena(2**20, pinned=False).take(TENSORS[0]).shape == (3, 5)


# --- memory that is used again -------------------------------------------------------------------------------


def test_room_for_many_is_one_arena(arenas: CountedArenas) -> None:
    room = host_empty_like([tensor.to("meta") for tensor in TENSORS], pinned=True)
    assert arenas.taken_bytes == [arena_bytes(TENSORS)]
    assert [(r.device.type, r.shape, r.dtype) for r in room] == [("cpu", t.shape, t.dtype) for t in TENSORS]


def test_a_pool_takes_its_memory_once_while_nobody_holds_it(arenas: CountedArenas) -> None:
    pool = ArenaPool()
    places = set()
    for _ in range(4):
        places.add(pool.empty_like(TENSORS)[0].data_ptr())
    assert (len(places), arenas.taken_bytes) == (1, [arena_bytes(TENSORS)])


HOLDERS: list[Callable[[Tensor], object]] = [
    lambda t: t,
    lambda t: t[1:, 2],
    lambda t: t.detach().flatten(),
    lambda t: t.untyped_storage(),
    lambda t: t.numpy(),
    lambda t: {"state": [torch.nn.Parameter(t)]},
]


@pytest.mark.parametrize("holder", HOLDERS)
def test_what_anybody_holds_is_not_used_again(holder: Callable[[Tensor], object], arenas: CountedArenas) -> None:
    pool = ArenaPool()
    first = pool.empty_like(TENSORS)[0].fill_(7)
    held, place = holder(first), first.data_ptr()
    del first
    second = pool.empty_like(TENSORS)[0]
    assert second.data_ptr() != place
    del held
    gc.collect()
    third = pool.empty_like(TENSORS)[0]
    assert third.data_ptr() == place
    assert len(arenas.taken_bytes) == 2


def test_rooms_of_one_size_that_are_held_at_once_share_nothing() -> None:
    pool = ArenaPool()
    rooms = [pool.empty_like(TENSORS[:1]) for _ in range(3)]
    for number, (view,) in enumerate(rooms):
        view.fill_(number)
    assert [set(view.flatten().tolist()) for (view,) in rooms] == [{0}, {1}, {2}]


def test_a_pool_lets_go_of_what_fits_no_more_before_it_asks_for_more(driver: SimpleNamespace) -> None:
    """Played without a GPU, a pool would pin nothing: so its tensors say that they lie on one."""

    class OnCard(Tensor):
        is_cuda = True

    def on_card(size: int) -> list[Tensor]:
        return [torch.zeros(size).as_subclass(OnCard)]

    pool = ArenaPool()
    held = pool.empty_like(on_card(100))
    pool.empty_like(on_card(200))
    assert sorted(driver.locked.values()) == [512, 1024]
    assert pool.empty_like(on_card(300))[0].numel() == 300
    assert sorted(driver.locked.values()) == [512, 1280]
    ordinary = pool.empty_like([torch.zeros(100)])
    assert sorted(driver.locked.values()) == [512], "ordinary memory is asked for, and what is pinned is not given"
    assert held[0].data_ptr() != ordinary[0].data_ptr()


def test_a_pool_that_is_refused_goes_on_later(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = ArenaPool()
    held = pool.empty_like(TENSORS)[0].fill_(5)
    with monkeypatch.context() as patch:
        patch.setattr(host_memory, "LEFT_TO_OTHERS_BYTES", 1 << 60)
        with pytest.raises(UserError, match="host memory are wanted"):
            pool.empty_like(TENSORS)
    assert pool.empty_like(TENSORS)[0].fill_(6).sum() == 90
    assert held.sum() == 75
