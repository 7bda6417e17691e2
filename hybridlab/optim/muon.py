"""Muon, stepping all matrices of one shape together."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hybridlab.base.compiler import require_compiler
from hybridlab.base.errors import UserError
from hybridlab.base.ranks import in_shares, is_sharded, local, own_of, spread, whole
from hybridlab.optim.stepping import run_closure

Quintic = tuple[float, float, float]

TORCHS: tuple[Quintic, ...] = ((3.4445, -4.7750, 2.0315),) * 5
"""`torch.optim.Muon`'s coefficients, those of Keller Jordan."""

_BEST = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
POLAR_EXPRESS: tuple[Quintic, ...] = tuple((a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in _BEST)
"""The best polynomial for each step in turn, for singular values from 0.001 to 1, with 1 % to spare for rounding.

Source: Amsel et al. 2025 (arXiv 2505.16932), Algorithm 1.
"""

COEFFICIENTS = {"torch": TORCHS, "polar_express": POLAR_EXPRESS}

RESTART = 3
"""Steps of the Newton-Schulz iteration that wide matrices take in Gram form before the Gram matrix is made anew."""

EPS = 1e-7

SETTINGS = ("lr", "weight_decay", "momentum")
"""Numbers of a group that may change between steps."""

STACKED_NUMBERS = 2**26
"""Of the matrices that are stepped together: their copies in 16 bits, a few at a time, take 128 MiB each."""


class Muon(Optimizer):
    """Momentum whose matrices are made orthogonal, many of one shape at a time.

        m <- momentum m + (1 - momentum) g
        u  = orthogonal((1 - momentum) g + momentum m)
        w <- (1 - lr weight_decay) w - lr 0.2 sqrt(max(rows, columns)) u

    The last scale gives an update about the size of AdamW's. `state[p]["momentum_buffer"]` is the parameter's own m;
    matrices are stacked for the length of a step. Tall ones are turned, so that they go with the wide. On a GPU with a
    compiler the update is compiled, once for each stack; memory of a step: some 3 to 7 copies in 16 bits
    of `STACKED_NUMBERS`.

    params: matrices, or groups of them; lr may be a tensor
    coefficients: "torch" or "polar_express", of the Newton-Schulz iteration
    new_buffer: makes a momentum of low-bit format for a parameter; None is the parameter's own format

    Where `cuda_graphs` is set, the update of a stack on a GPU is captured after its first step, and replayed while the
    addresses of weights, gradients and momentum stay as they were: set it where a CUDA graph writes the gradients. With
    other addresses it is captured anew.

    Of a model under `fully_shard` each rank keeps its part of the momentum; the matrices are gathered for a step, and
    each rank makes its share of them orthogonal.

    Raises ValueError for a parameter that is no matrix.

    Source: https://kellerjordan.github.io/posts/muon/; the scale, https://arxiv.org/abs/2502.16982.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.2e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        coefficients: str = "torch",
        new_buffer: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "coefficients": coefficients}
        super().__init__(params, defaults)
        self.new_buffer = new_buffer or torch.zeros_like
        self.cuda_graphs = False
        self._captured: dict[int, _CapturedUpdate] = {}
        if wrong := [tuple(p.shape) for group in self.param_groups for p in group["params"] if p.ndim != 2]:
            raise ValueError(f"Muon steps matrices, and one parameter is {wrong[0]}: give it to AdamW")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step every matrix that has a gradient."""
        loss = run_closure(closure)
        for group in self.param_groups:
            for params in stacks([p for p in group["params"] if p.grad is not None]):
                weights, gradients = [p.detach() for p in params], [p.grad for p in params if p.grad is not None]
                self._step_stack_(weights, gradients, [self._momentum_of(p) for p in params], group)
        return loss

    @torch.no_grad()
    def warm_up_(self, groups: list[dict[str, Any]]) -> None:
        """Compile what a step of these groups will need, on zeros, where steps are compiled; nothing is trained."""
        for group in groups:
            for params in stacks([p for p in group["params"] if p.requires_grad and _is_compiled_for(p)]):
                # Two lists of tensors: what is compiled for one list in both places is compiled anew for two.
                weights, gradients = ([torch.zeros_like(p) for p in params] for _ in range(2))
                self._step_together_(weights, gradients, [self.new_buffer(p) for p in params], group)

    def _step_stack_(
        self, weights: list[Tensor], gradients: list[Tensor], buffers: list[Tensor], group: dict[str, Any]
    ) -> None:
        if not (self.cuda_graphs and weights[0].is_cuda and self.new_buffer is torch.zeros_like):
            self._step_together_(weights, gradients, buffers, group)
            return
        place = tuple(tensor.data_ptr() for tensor in (*weights, *gradients, *buffers))
        captured = self._captured.get(place[0])
        if captured and captured.place == place:
            captured.replay(group)
            return
        self._step_together_(weights, gradients, buffers, group)
        update = partial(self._step_together_, weights, gradients, buffers)
        pool = next((other.graph.pool() for other in self._captured.values()), None)
        self._captured[place[0]] = _CapturedUpdate(place, update, group, weights[0], pool)

    def _step_together_(
        self, weights: list[Tensor], gradients: list[Tensor], buffers: list[Tensor], group: dict[str, Any]
    ) -> None:
        settings = (_scalar(group[name], weights[0]) for name in SETTINGS)
        low_bit = is_traceable_wrapper_subclass(local(buffers[0]))  # compiled code would not see it
        update = _update(compiled=_is_compiled_for(weights[0]))
        with torch._dynamo.utils.disable_cache_limit():  # a handful of stacks, each compiled once
            update(weights, gradients, buffers, *settings, COEFFICIENTS[group["coefficients"]], low_bit)

    def __getstate__(self) -> dict[str, Any]:
        graphs = {"cuda_graphs": self.cuda_graphs, "_captured": {}}
        return super().__getstate__() | {"new_buffer": self.new_buffer} | graphs

    def _momentum_of(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = self.new_buffer(p)
        buffer: Tensor = state["momentum_buffer"]
        return buffer


class _CapturedUpdate:
    """The update of a stack as a CUDA graph.

    place: addresses of all its tensors; pool: of memory, shared with other graphs that are never replayed at once
    """

    def __init__(
        self, place: tuple[int, ...], update: Callable[[dict[str, Any]], None], group: Any, like: Tensor, pool: Any
    ) -> None:
        self.place, self.graph = place, torch.cuda.CUDAGraph()
        self._settings = {name: _scalar(group[name], like).clone() for name in SETTINGS}
        with torch.cuda.graph(self.graph, pool=pool):
            update(group | self._settings)

    def replay(self, group: dict[str, Any]) -> None:
        """Step once more, at the group's settings."""
        for name, mine in self._settings.items():
            value = group[name]
            mine.copy_(value) if isinstance(value, Tensor) else mine.fill_(value)
        self.graph.replay()


def stacks(params: list[Tensor]) -> Iterator[list[Tensor]]:
    """The matrices by shape, turned or not, device and format, in stacks of at most `STACKED_NUMBERS`."""
    alike: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
    for p in params:
        if p.numel():
            alike[(*sorted(p.shape), p.device, p.dtype)].append(p)
    for members in alike.values():
        count = max(1, STACKED_NUMBERS // members[0].numel())
        yield from (members[i : i + count] for i in range(0, len(members), count))


def orthogonalize(
    stack: Float[Tensor, "matrix rows columns"], coefficients: tuple[Quintic, ...]
) -> Float[Tensor, "matrix rows columns"]:
    """The nearest orthogonal matrices, about, of matrices of norm 1: all singular values come near 1.

        for each (a, b, c):    R = X X^T;  X <- (a + b R + c R^2) X

    Wide matrices take `RESTART` steps at once in the space of R, whose side is their shorter one:

        Q = 1;  for each (a, b, c):    Z = a + b R + c R^2;  Q <- Z Q;  R <- Z R Z
        X <- Q X

    Rounding makes small singular values of R negative, and more steps at once would let them grow.

    Source: the Gram form, https://github.com/Dao-AILab/gram-newton-schulz.
    """
    rows, columns = stack.shape[-2:]
    together = RESTART if columns > 1.5 * rows else 1  # else the steps one by one take fewer products
    for first in range(0, len(coefficients), together):
        stack = torch.bmm(_product(torch.bmm(stack, stack.mT), coefficients[first : first + together]), stack)
    return stack


def _product(gram: Tensor, steps: tuple[Quintic, ...]) -> Tensor:
    """Q of `orthogonalize`, of these steps."""
    product = None
    for left, (a, b, c) in zip(reversed(range(len(steps))), steps, strict=True):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        product = factor if product is None else torch.bmm(factor, product)
        if left:
            gram = torch.bmm(torch.bmm(factor, gram), factor)
    assert product is not None
    return product


def _unit(matrix: Tensor) -> Tensor:
    """Of norm 1, no taller than wide, in 16 bits: float16 is finer, but slow on a CPU. Float64 stays."""
    unit = _turned(matrix, matrix) / matrix.norm().clamp(min=EPS)
    return unit if unit.dtype == torch.float64 else unit.to(torch.float16 if unit.is_cuda else torch.bfloat16)


def _turned(matrix: Tensor, like: Tensor) -> Tensor:
    """A matrix between its own form and the wide one; `like` has the own form."""
    return matrix.mT if like.shape[0] > like.shape[1] else matrix


def _update_all(
    weights: list[Tensor],
    gradients: list[Tensor],
    buffers: list[Tensor],
    lr: Tensor,
    decay: Tensor,
    momentum: Tensor,
    coefficients: tuple[Quintic, ...],
    low_bit: bool,
) -> None:
    """Step matrices of one shape together; of those that are spread over ranks, each rank moves its part."""
    sources = zip(gradients, buffers, strict=True)
    stack = torch.stack([_unit(_averaged_(*source, momentum, low_bit)) for source in sources])
    updates = in_shares(stack, weights[0], partial(orthogonalize, coefficients=coefficients))
    for weight, update in zip(weights, updates, strict=True):
        own, step = local(weight), lr * (0.2 * math.sqrt(max(weight.shape)))
        own.copy_(own * (1 - lr * decay) - step * own_of(_turned(update, weight), weight).to(weight.dtype))


def _averaged_(gradient: Tensor, buffer: Tensor, momentum: Tensor, low_bit: bool) -> Tensor:
    """Nesterov's direction, of the whole matrix; the buffer takes up the gradient."""
    kept = local(buffer)
    wide, momentum = local(gradient).to(kept.dtype), momentum.to(kept.dtype)
    mean = wide.lerp(kept.dequantize() if low_bit else kept, momentum)
    kept.copy_(mean)
    return whole(spread(wide.lerp(mean, momentum), like=buffer))


def _scalar(value: float | Tensor, like: Tensor) -> Tensor:
    """A number as a tensor beside the parameter, so that what is compiled or captured around it sees it change."""
    if isinstance(value, Tensor):
        return value.to(like.device)
    return torch.full((), value, device=like.device)


def _is_compiled_for(p: Tensor) -> bool:
    return p.is_cuda and not is_sharded(p) and _can_compile(p.device.type)


@lru_cache
def _can_compile(device_type: str) -> bool:
    try:
        require_compiler(device_type, "Muon")
    except UserError:
        return False
    return True


@lru_cache
def _update(compiled: bool) -> Callable[..., None]:
    return torch.compile(_update_all, fullgraph=True, dynamic=False) if compiled else _update_all
