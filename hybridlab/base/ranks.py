"""Several processes that train one model: what each holds, and what they must agree on. No other file knows a group."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from hybridlab.base.device import find_device
from hybridlab.base.errors import UserError, first_line
from hybridlab.base.settings import check_bounds, check_choice

T = TypeVar("T")

BROADCAST_BYTES = 32 << 20
"""That are sent at once where ranks take what the first of them has."""

SHARDING: dict[str, Any] = {"gather": "fp32", "copies": 1, "blocks_per_group": 1, "keep_gathered": False}
"""Settings that say how ranks share a model's weights, at their defaults; `RanksConfig` explains them."""


def check_sharing(settings: Any) -> None:
    """Raise ValueError where `wrap` and the settings of `SHARDING` do not say how ranks share a model."""
    check_choice("wrap", settings.wrap, ("fsdp", "ddp"))
    check_choice("gather", settings.gather, ("fp32", "bf16"))
    check_bounds(settings, "copies", "blocks_per_group", least=1)
    if settings.wrap == "ddp" and any(getattr(settings, name) != value for name, value in SHARDING.items()):
        raise ValueError(f"{', '.join(SHARDING)} are of wrap='fsdp': with ddp each rank holds the whole model")


def check_copies(ranks: int, copies: int) -> None:
    """Raise UserError where so many ranks do not hold so many copies of a model."""
    if ranks % copies:
        raise UserError(f"{ranks} ranks do not hold {copies} copies of the model: change copies")


@dataclass(frozen=True)
class Ranks:
    """The processes that train one model together; one process is a group of its own, and communicates nothing.

    count: how many; rank: which one this is
    sharded: each holds a part of the weights (`fully_shard`); else each holds all of them
    averages: nothing averages the gradients in the backward pass (`Replica`), so that `average_` has to
    groups: the modules that `fully_shard` has wrapped; the weights of each are gathered together
    """

    count: int = 1
    rank: int = 0
    sharded: bool = False
    averages: bool = False
    groups: tuple[Any, ...] = field(default=(), compare=False, repr=False)

    @classmethod
    def of(cls, model: nn.Module) -> Ranks:
        """The ranks that train a model: all, where it is sharded, in DistributedDataParallel or a `Replica`."""
        groups = _sharded_modules(model)
        sharded = bool(groups) or any(map(is_sharded, model.parameters()))
        if not sharded and (running() == 1 or not isinstance(model, DistributedDataParallel | Replica)):
            return cls()
        return cls(running(), distributed.get_rank(), sharded, isinstance(model, Replica), groups)

    def mean(self, loss: Tensor) -> Tensor:
        """Mean over the ranks, each of which has as large a part of the batch: every rank decides by one number."""
        if self.count == 1:
            return loss
        mean = loss.clone()
        distributed.all_reduce(mean)
        return mean.div_(self.count)

    def spread(self, numbers: Tensor) -> Tensor:
        """The greatest of some numbers, those of all ranks, minus the least."""
        least, most = numbers.aminmax()
        ends = torch.stack([most, -least])
        if self.count > 1:
            distributed.all_reduce(ends, distributed.ReduceOp.MAX)
        return ends.sum()

    def total(self, part: Tensor) -> Tensor:
        """Sum of what each rank makes out of its shards (`holds`); where each has all of the weights, as it is."""
        if self.sharded:
            distributed.all_reduce(part)
        return part

    def all(self, here: bool) -> bool:
        """Whether something is so on every rank."""
        if self.count == 1:
            return here
        on_cpu = "cpu:" in distributed.get_backend_config()
        agreed = torch.tensor(int(here), device="cpu" if on_cpu else torch.cuda.current_device())
        distributed.all_reduce(agreed, distributed.ReduceOp.MIN)
        return bool(agreed)

    def holds(self, param: Tensor) -> bool:
        """Whether this rank counts a weight, or its shard of it: what several ranks hold, the first of them counts."""
        if not self.sharded:
            return True
        if not is_sharded(param):
            return self.rank == 0
        place = zip(param.device_mesh.get_coordinate(), param.placements, strict=True)  # type: ignore[attr-defined]
        return not any(at for at, placement in place if placement.is_replicate())

    def reshard_(self) -> None:
        """Give up whole weights that a forward pass has gathered: what is written to a shard would not reach them."""
        for module in self.groups:
            module.reshard()

    def take_up_trained_(self) -> None:
        """Let shards know which weights are trained now: by these `unshard` settles the format of gradients anew."""
        for module in self.groups:
            module.unshard()
            module.reshard()

    def without_reduction(self, model: nn.Module, *, last: bool) -> AbstractContextManager[object]:
        """For a part of a batch: gradients of all ranks are added up once, in the last part's backward."""
        for module in self.groups:
            module.set_requires_gradient_sync(last, recurse=False)
        if isinstance(model, DistributedDataParallel) and not last:
            return model.no_sync()
        return nullcontext()

    def average_(self, params: Sequence[Tensor]) -> None:
        """Average the gradients of all ranks, where nothing has done so in the backward pass.

        Raises UserError where a weight has none: other ranks may have it, and would average it with another weight's.
        """
        if not self.averages:
            return
        gradients = [p.grad for p in params if p.grad is not None]
        if len(gradients) < len(params):
            missing = next(tuple(p.shape) for p in params if p.grad is None)
            raise UserError(
                f"{len(params) - len(gradients)} trained weights have no gradient, the first of shape {missing}, and "
                "ranks average those of all: freeze what the loss does not depend on (requires_grad_(False))"
            )
        for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
            alike = [gradient for gradient in gradients if gradient.dtype is dtype]
            with distributed._coalescing_manager():  # one collective for all
                for gradient in alike:
                    distributed.all_reduce(gradient)
            torch._foreach_div_(alike, self.count)

    def refuse(self, features: Sequence[str]) -> None:
        """Raise UserError for features that work on whole weights in one process only."""
        if features and self != Ranks():
            ranks = f"{self.count} rank{'s' if self.count > 1 else ''}"
            raise UserError(f"on {ranks} these do not work yet: {', '.join(features)}. Leave them off")

    def refuse_alone(self) -> None:
        """Raise UserError where several processes run and nothing says that they train one model."""
        if running() > self.count:
            raise UserError(
                f"torch.distributed runs {running()} ranks, and the model is neither sharded (fully_shard) nor in "
                "DistributedDataParallel: each would decide alone about jumps. Give the trainer the wrapped model, or "
                "set max_predict_steps=0"
            )


class Replica(nn.Module):
    """A model of which each rank holds all; the trainer averages the gradients when they are all there.

    For passes that are CUDA graphs, which what ranks say to each other stays out of. DistributedDataParallel averages
    beside the backward pass. As there, weights and buffers begin as the first rank's, and every weight that is trained
    needs a gradient in each step.

    module: of the same shape on all ranks
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        if running() > 1:
            take_first_([t.detach() for t in chain(module.parameters(), module.buffers())])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns."""
        return self.module(*args, **kwargs)


def take_first_(tensors: Sequence[Tensor]) -> None:
    """Write the first rank's numbers into tensors that each rank has."""
    if tensors:
        everyone = distributed.distributed_c10d._get_default_group()
        distributed._broadcast_coalesced(everyone, list(tensors), BROADCAST_BYTES, 0)


@contextmanager
def group(device: str, timeout_s: int) -> Iterator[None]:
    """Inside, the processes that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT name are one group, by gloo or NCCL.

    Without these variables this process is the only one. On a GPU it takes the one that LOCAL_RANK counts.
    device: "auto", "cuda" or "cpu"

    Raises UserError where variables are missing, for a GPU that is not there, and where the others cannot be reached.
    """
    _take_gpu(device)
    here: dict[str, Any] = {}
    if "RANK" not in os.environ:
        here = {"store": distributed.HashStore(), "rank": 0, "world_size": 1}  # type: ignore[attr-defined]
    on_gpu = device != "cpu" and torch.cuda.is_available()
    try:
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            timeout=timedelta(seconds=timeout_s),
            **here,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(f"the ranks do not find each other: {first_line(error)}; start them by torchrun") from error
    failed = True
    try:
        yield
        failed = False
    finally:
        if running() == 1 or not failed:  # ranks that one has left may wait for it there
            distributed.destroy_process_group()


def _take_gpu(device: str) -> None:
    """Let each process of a host compute on a GPU of its own."""
    if find_device(device).type != "cuda":
        return
    number = int(os.environ.get("LOCAL_RANK") or int(os.environ.get("RANK", 0)) % torch.cuda.device_count())
    if number >= torch.cuda.device_count():
        raise UserError(
            f"there is no GPU for local rank {number}: torch sees {torch.cuda.device_count()}, start as many processes"
        )
    torch.cuda.set_device(number)


def is_first_to_tell() -> bool:
    """Whether no other rank has said yet why the run ends; before they are a group, the first of each host says it."""
    if not _is_initialized():
        return os.environ.get("LOCAL_RANK", "0") == "0"
    with suppress(Exception):  # where the store has gone with its rank, everyone speaks
        return distributed.distributed_c10d._get_default_store().add("hybridlab told", 1) == 1
    return True


def is_of_lost_rank(error: BaseException) -> bool:
    """Whether an error says that another rank does not answer any more."""
    return isinstance(error, distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def running() -> int:
    """How many processes `torch.distributed` runs; 1 without it."""
    return distributed.get_world_size() if _is_initialized() else 1


def rank() -> int:
    """Which of the running processes this is."""
    return distributed.get_rank() if _is_initialized() else 0


def is_first() -> bool:
    """Whether this process is the one that writes records and results."""
    return rank() == 0


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is spread over ranks. Without a process group none is, and nothing is imported to see it."""
    if not _is_initialized():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local(tensor: Any) -> Any:
    """The part of a tensor that lies on this rank; a plain one is its own."""
    return getattr(tensor, "_local_tensor", tensor)


def spread(part: Tensor, like: Tensor) -> Tensor:
    """What a rank has of a tensor that is spread over ranks as another is; it shares the part's memory, wherever it is.

    like: a tensor that is not spread gives the part itself
    """
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor(part, like._spec, requires_grad=False)  # type: ignore[attr-defined, no-untyped-call]


def from_first(make: Callable[[], T]) -> T:
    """What the first rank makes, on every rank, or the error that it raised; the others make nothing."""
    if running() == 1:
        return make()
    made: list[Any] = [_made(make) if is_first() else None]
    distributed.broadcast_object_list(made)
    value, error, cause = made[0]
    if error is not None:
        raise error from cause
    return value


def _made(make: Callable[[], T]) -> tuple[T | None, Exception | None, BaseException | None]:
    """What was made, or the error, with its cause, which `pickle` would leave behind."""
    try:
        return make(), None, None
    except Exception as error:
        return None, error, error.__cause__


def from_each(value: T) -> list[T]:
    """What each rank has, in their order."""
    if running() == 1:
        return [value]
    values: list[Any] = [None] * running()
    distributed.all_gather_object(values, value)
    return values


def whole(tensor: Tensor) -> Tensor:
    """A tensor that is spread over ranks, put together on each."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined, no-any-return]


def own_of(tensor: Tensor, like: Tensor) -> Tensor:
    """The part of a tensor that every rank has whole, cut as another tensor is; the reverse of `whole`.

    like: a tensor that is not spread gives the whole
    """
    if not is_sharded(like):
        return tensor
    return local(_cut(tensor, like, like.placements))  # type: ignore[attr-defined, no-any-return]


def in_shares(stack: Tensor, like: Tensor, work: Callable[[Tensor], Tensor]) -> Tensor:
    """What `work` makes, item by item, of a stack that every rank has; each rank does its share of the items.

    like: a tensor that is spread over the ranks; with another, each does all of them
    """
    if not is_sharded(like):
        return work(stack)
    from torch.distributed.tensor import Shard

    shares = _cut(stack, like, [Shard(0)] * like.device_mesh.ndim)  # type: ignore[attr-defined]
    return whole(spread(work(local(shares)), shares))


def _cut(tensor: Tensor, like: Tensor, placements: Sequence[Any]) -> Tensor:
    """A whole tensor, spread over the ranks that another one is spread over; nothing is sent."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh  # type: ignore[attr-defined]
    everywhere = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=placements)


def _sharded_modules(model: nn.Module) -> tuple[Any, ...]:
    if not _is_initialized():
        return ()
    from torch.distributed.fsdp import FSDPModule

    return tuple(module for module in model.modules() if isinstance(module, FSDPModule))


def _is_initialized() -> bool:
    return distributed.is_available() and distributed.is_initialized()
