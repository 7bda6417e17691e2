"""Inputs of checkpointed blocks in host memory: every bit comes back, and memory is neither shared nor piled up."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hybridlab.base import pinned_memory as host_memory
from hybridlab.base.errors import UserError
from hybridlab.memory import CheckpointingConfig, MemoryConfig, prepare_model_
from hybridlab.memory.checkpointing import BlockInputs, checkpoint_blocks_
from hybridlab.models import GPT2, GPT2Config

HOST = CheckpointingConfig(inputs="host")


class Counted:
    """Makes places and counts them."""

    def __init__(self) -> None:
        self.places: list[Tensor] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        self.places.append(torch.full_like(tensor, torch.nan))
        return self.places[-1]


def fresh() -> GPT2:
    torch.manual_seed(0)
    return GPT2(GPT2Config.nano(n_layer=4, dropout=0.1))


def tokens(seed: int) -> Tensor:
    return torch.randint(0, 512, (4, 64), generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def backward(model: nn.Module, parts: int = 1) -> Tensor:
    """Gradients of a step in parts."""
    model.zero_grad()
    torch.manual_seed(1)
    for part in range(parts):
        model(tokens(part), tokens(part)).backward()
    return gradients(model)


@pytest.mark.parametrize("keep_last", [0, 1])
@pytest.mark.parametrize("parts", [1, 3])
def test_gradients_are_the_same_to_the_bit(keep_last: int, parts: int) -> None:
    plain, sent = fresh(), fresh()
    prepare_model_(sent, MemoryConfig(checkpointing=CheckpointingConfig(keep_last, "host")))
    assert torch.equal(backward(sent, parts), backward(plain, parts))


def test_places_are_taken_once_and_used_by_every_step() -> None:
    model, places = fresh(), Counted()
    checkpoint_blocks_(model, HOST, BlockInputs(places))
    for step in range(3):
        backward(model, parts=1 + step)
    assert len(places.places) == 4, "one for each block"
    with torch.no_grad():
        model(tokens(0), tokens(0))
    assert len(places.places) == 4, "a forward pass without backward sends nothing"


def test_two_graphs_that_wait_at_once_do_not_share_places() -> None:
    plain, sent = fresh(), fresh()
    places = Counted()
    checkpoint_blocks_(sent, HOST, BlockInputs(places))
    for model in (plain, sent):
        torch.manual_seed(1)
        first, second = (model(tokens(i), tokens(i)) for i in range(2))
        first.backward()  # the older one first: not the order in which inputs were sent
        second.backward()
    assert torch.equal(gradients(sent), gradients(plain))
    assert len(places.places) == 8


def test_a_graph_can_be_walked_twice() -> None:
    plain, sent = fresh(), fresh()
    checkpoint_blocks_(sent, HOST)
    for model in (plain, sent):
        torch.manual_seed(1)
        loss = model(tokens(0), tokens(0))
        loss.backward(retain_graph=True)
        loss.backward()
    assert torch.equal(gradients(sent), gradients(plain))


def test_a_loss_that_is_thrown_away_gives_its_places_back() -> None:
    model, places = fresh(), Counted()
    checkpoint_blocks_(model, HOST, BlockInputs(places))
    for _ in range(3):
        model(tokens(0), tokens(0))
    gc.collect()
    backward(model)
    assert len(places.places) <= 5, "the last one sent may be held until something is sent after it"


def _block(x: Tensor, mask: Tensor, small: Tensor, weight: Tensor) -> Tensor:
    return (x * mask @ weight) * small.sum()


def test_what_blocks_share_and_what_is_small_stays() -> None:
    weight = torch.randn(64, 64, requires_grad=True)
    x, small = weight * 2, torch.ones(3, requires_grad=True) * 2
    mask, places = torch.ones(64, 64), Counted()
    with BlockInputs(places).hooks():
        out = checkpoint(_block, x, mask, small, weight, use_reentrant=False)
    out.sum().backward()
    assert [place.shape for place in places.places] == [x.shape]


def test_a_host_that_is_short_is_told_and_the_model_goes_on_without(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh()
    checkpoint_blocks_(model, HOST)
    monkeypatch.setattr(host_memory, "LEFT_TO_OTHERS_BYTES", 10**18)
    with pytest.raises(UserError, match="of host memory are wanted"):
        model(tokens(0), tokens(0))
    monkeypatch.undo()
    assert torch.equal(backward(model), backward(fresh()))


def test_an_unknown_place_is_refused() -> None:
    with pytest.raises(ValueError, match="inputs 'hots' is unknown: did you mean 'host'"):
        CheckpointingConfig(inputs="hots")
