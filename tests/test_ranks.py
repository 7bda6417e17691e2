"""Several ranks train as one process does: sharded by FSDP2, replicated by DDP, on the CPU."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed import HashStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from hybridlab import DepthSchedule, HybridTrainer, HybridTrainerConfig
from hybridlab.base.errors import UserError
from hybridlab.base.rank_checkpoints import RankCheckpoints
from hybridlab.base.ranks import Ranks, is_sharded, whole
from hybridlab.memory import MemoryConfig, optimizer_for
from hybridlab.models import GPT2, GPT2Config
from hybridlab.optim import OptimizerConfig, build_optimizer
from hybridlab.study.ranks import RanksConfig
from tests.conftest import full_disk, gradient_step
from tests.rank_cases import BY_WRAP, CASES, CHAINS, FULL, GROWING, KILLED, Training, main, train, train_chain

TRAININGS = [(wrap, name) for wrap, names in BY_WRAP.items() for name in names]
FEW = ("gated", "grown and jumping", "averaged")
alone = cache(partial(train, "one process"))


def as_rank(variables: dict[str, str], folder: Path, *names: str) -> None:
    os.environ |= variables
    main(folder, *names)


def trained_on(ranks: int, folder: Path, *names: str, killed: bool = False) -> Path:
    """Train the cases on so many ranks: processes with the variables that torchrun sets.

    They are copies of one that has imported what they need and has not been a rank: gloo does not survive a fork.
    """
    folder.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as free:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(ranks)}
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.rank_cases"])
    variables = (place | {"RANK": str(rank)} for rank in range(ranks))
    processes = [server.Process(target=as_rank, args=(each, folder, *names)) for each in variables]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=150)
    codes = [process.exitcode for process in processes]
    assert codes == ([1] * (ranks - 1) + [-signal.SIGKILL] if killed else [0] * ranks)
    return folder


@contextmanager
def as_only_rank() -> Iterator[None]:
    """This process, as the only rank of a group."""
    distributed.init_process_group("gloo", rank=0, world_size=1, store=HashStore())
    try:
        yield
    finally:
        distributed.destroy_process_group()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def on_one(place: Path) -> list[Mapping[str, Any]]:
    """The parts of the chains on one rank, of which the last is not trained yet."""
    with as_only_rank():
        return [train_chain(place / "chain", 0)]


@pytest.fixture(scope="module")
def on_two(place: Path, on_one: object) -> Path:
    return trained_on(2, place / "two")


@pytest.fixture(scope="module")
def on_three(place: Path, on_two: object) -> Path:
    return trained_on(3, place / "three", "grown and jumping", "killed", killed=True)


def refuse_differences(folder: Path, ranks: int, wrap: str, name: str) -> None:
    """Every rank ended alike to the bit, and as one process did."""
    first, *others = (torch.load(folder / f"{wrap}, {name}, {rank}.pt") for rank in range(ranks))
    for other in others:
        assert other["did"] == first["did"]
        assert are_equal(other["weights"], first["weights"])
    refuse_other(first, name)


def are_equal(weights: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    """To the bit."""
    return all(torch.equal(others[key], value) for key, value in weights.items())


def refuse_other(first: Mapping[str, Any], name: str) -> None:
    """It is what one process trained."""
    assert first["did"] == alone(name)["did"]
    torch.testing.assert_close(first["losses"], alone(name)["losses"], atol=2e-6, rtol=0, equal_nan=True)
    torch.testing.assert_close(first["weights"], alone(name)["weights"], atol=1e-6, rtol=0)


@pytest.mark.slow
def test_two_ranks_train_as_one_process_does(on_two: Path, subtests: pytest.Subtests) -> None:
    """One test, so that no two workers train all of them."""
    for wrap, name in TRAININGS:
        with subtests.test(wrap=wrap, name=name):
            refuse_differences(on_two, 2, wrap, name)


@pytest.mark.slow
def test_three_ranks_with_uneven_shards_train_as_one_process_does(on_three: Path) -> None:
    refuse_differences(on_three, 3, "sharded", "grown and jumping")


@pytest.mark.parametrize("name", FEW)
def test_one_rank_with_shards_trains_as_one_process_does(name: str) -> None:
    with as_only_rank():
        refuse_other(train("sharded", name), name)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_steps_on_shards_as_torchs_own_does_to_the_bit(name: str) -> None:
    with as_only_rank():
        nets = [fully_shard(nn.Linear(7, 5)) for _ in range(2)]
        nets[1].load_state_dict(nets[0].state_dict())
        config = OptimizerConfig(name, weight_decay=0.0)
        torchs = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
        optimizers = [build_optimizer(nets[0], config), torchs(nets[1].parameters(), config.lr, weight_decay=0.0)]
        for _ in range(3):
            for net, optimizer in zip(nets, optimizers, strict=True):
                gradient_step(optimizer, net(torch.ones(2, 7)).square().sum())
        assert are_equal(*({key: whole(p) for key, p in net.named_parameters()} for net in nets))
        state = optimizers[0].state_dict()["state"].values()
        assert all(is_sharded(each[moment]) for each in state for moment in ("exp_avg", "exp_avg_sq"))


class OnSpread(TorchDispatchMode):
    """Operations on tensors that are spread over ranks: each is work for the host before it starts on the part here."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            self.operations.append(str(func))
        return func(*args, **kwargs or {})


def test_a_step_computes_with_parts_alone() -> None:
    with as_only_rank():
        net = fully_shard(nn.Linear(7, 5))
        optimizer = build_optimizer(net, OptimizerConfig())
        trainer = HybridTrainer(net, optimizer, HybridTrainerConfig.plain(clip_norm=1e-3))
        trainer.step(lambda: net(torch.ones(2, 7)).square().sum())  # makes the optimizer's state
        with OnSpread() as seen:
            trainer.step(lambda: net(torch.ones(2, 7)).square().sum())
    assert not seen.operations


@pytest.mark.parametrize("ranks", [RanksConfig(), RanksConfig(blocks_per_group=2, keep_gathered=True)])
def test_passes_that_leave_weights_gathered_change_nothing_that_is_trained(ranks: RanksConfig) -> None:
    """Before a trainer is built, and at each depth that it shows."""
    tokens = torch.zeros(1, 8, dtype=torch.long)
    with as_only_rank():
        net: Any = ranks.wrapped(GPT2(GPT2Config.nano()))
        optimizer = build_optimizer(net, OptimizerConfig())
        with torch.no_grad():
            net(tokens)
        trainer = HybridTrainer(net, optimizer, HybridTrainerConfig.plain(depth=GROWING))
        for _ in trainer.stages_():
            with torch.no_grad():
                net(tokens)
        trained = {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
        assert [{id(p) in trained for p in block.parameters()} for block in net.h] == [{True}, {False}]
        trainer.step(lambda: net(tokens, tokens))
        assert all((p in optimizer.state) is (id(p) in trained) for p in net.parameters())


@pytest.mark.slow
def test_from_a_checkpoint_as_many_ranks_go_on_to_the_bit(on_two: Path) -> None:
    """The second one was written beside the training."""
    for name, rank in product(("resumed", "resumed in a jump"), range(2)):
        without, resumed = (torch.load(on_two / f"sharded, {which}, {rank}.pt") for which in ("linear", name))
        assert are_equal(without["weights"], resumed["weights"]), (name, rank)


@pytest.mark.slow
def test_ranks_go_on_from_another_number_of_them(place: Path, on_one: Any, on_two: Path, on_three: Path) -> None:
    """One, two, three, one: within a jump, while one may be rolled back, and while a growth may."""
    parts = [*on_one, torch.load(on_two / "chain, 1.pt"), torch.load(on_three / "chain, 2.pt")]
    with as_only_rank():
        parts.append(train_chain(place / "chain", 3))
    for name in CHAINS:
        did = [step for part in parts for step in part[name]["did"]]
        losses = torch.cat([part[name]["losses"] for part in parts])
        refuse_other({"did": did, "losses": losses, "weights": parts[-1][name]["weights"]}, name)


@pytest.mark.slow
def test_a_rank_that_is_killed_while_it_writes_leaves_the_last_checkpoint_whole(on_three: Path) -> None:
    """The others end too, and one rank goes on."""
    folder = on_three / "sharded, killed"
    assert {path.name for path in folder.iterdir()} == {"8", "14.part"}
    with as_only_rank():
        training, step = Training.loaded(RankCheckpoints(folder), "sharded", KILLED["killed"])
        assert (step, training.trainer.statistics().nominal_steps) == (8, 8)
        training.save(RankCheckpoints(folder), 14)
    assert {path.name for path in folder.iterdir()} == {"8", "14"}


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path) -> None:
    checkpoints = RankCheckpoints(tmp_path, asynchronous=True)
    with as_only_rank():
        training = Training.of("sharded", CASES["linear"])
        for step in (1, 2, 3):
            training.save(checkpoints, step)
        checkpoints.wait()
        next((tmp_path / "3").glob("*.distcp")).unlink()
        with pytest.warns(UserWarning, match=r"3 is damaged: .*: looking for the one before"):
            assert Training.loaded(checkpoints, "sharded", CASES["linear"])[1] == 2
        (tmp_path / "2" / "rest.pt").write_bytes(b"")
        with pytest.warns(UserWarning, match=r"rest.pt is no checkpoint.*: it is the last: training begins"):
            assert Training.loaded(checkpoints, "sharded", CASES["linear"])[1] == 0


def test_a_checkpoint_that_finds_no_room_leaves_none_taken(tmp_path: Path) -> None:
    with as_only_rank():
        training = Training.of("sharded", CASES["linear"])
        with full_disk(10_000), pytest.raises(UserError, match=FULL):
            training.save(RankCheckpoints(tmp_path), 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_cases_do_what_they_are_named_for() -> None:
    did: Mapping[str, Any] = {name: alone(name)["did"] for name in CASES}
    assert all(any(phase == "predict" for phase, *_ in did[name]) for name in CASES if "plain" not in name != "grown")
    assert [depth for _, depth, *_ in did["grown"]] == [1] * 12 + [2] * 18
    assert any(rolled_back for _, _, rolled_back, _ in did["rolled back"])


# --- one process that is one of two ------------------------------------------------------------------------


@pytest.fixture
def one_of_two() -> Any:
    distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    distributed.destroy_process_group()


def trainer_of(model: nn.Module, optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW, **settings: Any) -> None:
    HybridTrainer(model, optimizer(model.parameters(), lr=0.1), HybridTrainerConfig(**settings))


def test_ranks_that_train_apart_do_not_predict(one_of_two: None) -> None:
    with pytest.raises(UserError, match=r"neither sharded .* nor in DistributedDataParallel"):
        trainer_of(nn.Linear(2, 2))
    trainer_of(nn.Linear(2, 2), max_predict_steps=0)
    assert Ranks.of(nn.Linear(2, 2)) == Ranks()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"memory": MemoryConfig.conservative(), "path_device": "host"}, "memory.predict_aware"),
        ({"memory": MemoryConfig(optimizer_state="int8")}, "memory.optimizer_state='int8'"),
        ({"depth": DepthSchedule(((0, 1), (3, 2)))}, "a depth schedule in DistributedDataParallel"),
    ],
)
def test_what_ranks_cannot_do_is_refused_by_name(one_of_two: None, settings: Any, named: str) -> None:
    blocks = nn.Sequential(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]))
    with pytest.raises(UserError, match="on 2 ranks these do not work yet") as refused:
        trainer_of(nn.parallel.DistributedDataParallel(blocks), **settings)
    assert named in str(refused.value)


@pytest.mark.parametrize(
    ("method", "memory", "named"),
    [
        ("muon", MemoryConfig(optimizer_state="int8"), "memory.optimizer_state='int8'"),
        ("adamw", MemoryConfig(state_on_host=True), "memory.state_on_host"),
    ],
)
def test_an_optimizer_of_whole_weights_is_refused_on_shards(
    one_of_two: None, method: str, memory: MemoryConfig, named: str
) -> None:
    """Also in a loop without a trainer."""
    model = fully_shard(nn.Linear(2, 2, bias=False), mesh=init_device_mesh("cpu", (2,)))
    with pytest.raises(UserError, match=f"on 2 ranks these do not work yet: {named}"):
        optimizer_for(model, OptimizerConfig(method), memory)


class MuonOfSomeone(torch.optim.SGD):
    """By its name a method that needs whole matrices."""


@pytest.mark.parametrize(("ranks", "method"), [(1, torch.optim.Muon), (2, torch.optim.Muon), (2, MuonOfSomeone)])
def test_another_muon_than_the_librarys_is_refused_on_shards(ranks: int, method: type[torch.optim.Optimizer]) -> None:
    distributed.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        model = fully_shard(nn.Linear(2, 2, bias=False), mesh=init_device_mesh("cpu", (ranks,)))
        with pytest.raises(UserError, match=r"torch\.optim\.Muon on shards"):
            trainer_of(model, method)
    finally:
        distributed.destroy_process_group()
