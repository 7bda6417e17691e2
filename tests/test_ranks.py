"""Several ranks train as one process does: sharded by FSDP2, replicated by DDP, on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from hybridlab import DepthSchedule, HybridTrainer, HybridTrainerConfig
from hybridlab.base.errors import UserError
from hybridlab.base.ranks import Ranks
from hybridlab.memory import MemoryConfig
from tests.rank_cases import BY_WRAP, CASES, train

ROOT = Path(__file__).parents[1]
TRAININGS = [(wrap, name) for wrap, names in BY_WRAP.items() for name in names]
FEW = ("gated", "grown and jumping")
alone = cache(partial(train, "one process"))


def trained_on(ranks: int, folder: Path, *names: str) -> Path:
    """Train the cases on so many ranks, as torchrun starts them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(ROOT / "tests" / "rank_cases.py"), str(folder), *names],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_on(2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def on_three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_on(3, tmp_path_factory.mktemp("three"), *FEW)


def refuse_differences(folder: Path, ranks: int, wrap: str, name: str) -> None:
    """Every rank ended alike to the bit, and as one process did."""
    first, *others = (torch.load(folder / f"{wrap}, {name}, {rank}.pt") for rank in range(ranks))
    for other in others:
        assert other["did"] == first["did"]
        assert all(torch.equal(other["weights"][key], value) for key, value in first["weights"].items())
    assert first["did"] == alone(name)["did"]
    torch.testing.assert_close(first["losses"], alone(name)["losses"], atol=2e-6, rtol=0, equal_nan=True)
    torch.testing.assert_close(first["weights"], alone(name)["weights"], atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(("wrap", "name"), TRAININGS)
def test_two_ranks_train_as_one_process_does(on_two: Path, wrap: str, name: str) -> None:
    refuse_differences(on_two, 2, wrap, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", FEW)
def test_three_ranks_with_uneven_shards_train_as_one_process_does(on_three: Path, name: str) -> None:
    refuse_differences(on_three, 3, "sharded", name)


@pytest.mark.slow
def test_one_rank_with_shards_trains_as_one_process_does(tmp_path: Path) -> None:
    trained_on(1, tmp_path, *FEW)
    for name in FEW:
        refuse_differences(tmp_path, 1, "sharded", name)


@pytest.mark.slow
def test_the_cases_do_what_they_are_named_for() -> None:
    did: Mapping[str, Any] = {name: alone(name)["did"] for name in CASES}
    assert all(any(phase == "predict" for phase, *_ in did[name]) for name in CASES if "plain" not in name != "grown")
    assert [depth for _, depth, *_ in did["grown"]] == [1] * 12 + [2] * 24
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
