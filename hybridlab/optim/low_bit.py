"""AdamW with moments in few bits: torchao's, stepped in few calls."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hybridlab.base.compiler import require_compiler
from hybridlab.base.errors import UserError
from hybridlab.base.lazy import quiet_imports
from hybridlab.optim.build import ParamGroup
from hybridlab.weights.motion import views

CLASSES = {"int8": "AdamW8bit", "fp8": "AdamWFp8", "int4": "AdamW4bit"}


def low_bit_adamw(
    groups: list[ParamGroup],
    buckets: Sequence[Sequence[Tensor]],
    *,
    state: str,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    stochastic_rounding: bool = False,
) -> Optimizer:
    """AdamW by torchao with its moments in "int8", "fp8" or "int4", one scale per block of 256 (int4: 128) values.

    The update and the formats are torchao's own. It compiles and calls that update parameter by parameter, which at
    GPT-2 XL's 580 parameters costs more than the training step itself; here a bucket's parameters go in one call, each
    in rows of the numbers that share a scale, so that one kernel reads and writes it once. On a CPU the update runs
    uncompiled, so that no C++ compiler is needed; and on a GPU too, slower, once a scheduler has changed the betas, as
    torchao takes these as numbers and would compile for each. Biases and norms, most of the parameters and a
    thousandth of the numbers, keep float32 moments and go through torch's own AdamW, all together.

    buckets: parameters that one call steps; equal ones, such as a model's blocks, are compiled once
    stochastic_rounding: of bf16 weights, so that small updates are not lost

    Raises UserError where torchao is not installed, and for a GPU where nothing can compile.

    Source: Dettmers et al. 2021 (arXiv 2110.02861); https://github.com/pytorch/ao/tree/main/torchao/optim.
    """
    optim = torchao_optim(wanted_by := f"optimizer_state={state!r}")
    if any(p.is_cuda for bucket in buckets for p in bucket):
        require_compiler("cuda", wanted_by)
    method = type("LowBitAdamW", (InFewCalls, getattr(optim, CLASSES[state])), {})
    optimizer: Any = method(groups, lr=lr, betas=betas, eps=eps, bf16_stochastic_round=stochastic_rounding)
    optimizer.bucket_of = {p: i for i, bucket in enumerate(buckets) for p in bucket}
    return optimizer


Owned = tuple[nn.Parameter, ParamGroup]
"""A parameter, and the group that has its settings."""


class InFewCalls(Optimizer):
    """Replaces torchao's step by one that hands many parameters to each call of the compiled update."""

    bucket_of: dict[Tensor, int]
    _new_buffer: Callable[[Tensor, bool], Tensor]
    bf16_stochastic_round: bool

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add a group, and remember what the update is compiled with."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["first_betas"], group["first_decay"] = tuple(group["betas"]), group["weight_decay"]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Step every parameter that has a gradient."""
        calls: dict[int, list[Owned]] = defaultdict(list)
        for group in self.param_groups:
            stepping = [p for p in group["params"] if p.grad is not None]
            self._step_vectors_([p for p in stepping if p.ndim < 2], group)
            for p in stepping:
                if p.ndim > 1:
                    calls[self.bucket_of[p]].append((p, group))
        with torch._dynamo.utils.disable_cache_limit():  # a handful of shapes, each compiled once
            for members in calls.values():
                self._step_together_(members)

    def _step_together_(self, members: list[Owned]) -> None:
        states = [self._state_of(p) for p, _ in members]
        if len({float(state["step"]) for state in states}) > 1:  # one of them missed a step
            for member in members:
                self._step_together_([member])
            return
        for state in states:
            state["step"] += 1
        cycled = any(tuple(g["betas"]) != tuple(g.get("first_betas") or g["betas"]) for _, g in members)
        _update(compiled=members[0][0].is_cuda and not cycled)(
            [_taken(p, state["exp_avg"], state["exp_avg_sq"]) for (p, _), state in zip(members, states, strict=True)],
            states[0]["step"],
            [_settings(group) for _, group in members],
            self.bf16_stochastic_round,
        )

    def _step_vectors_(self, params: list[nn.Parameter], group: ParamGroup) -> None:
        """By torch's own AdamW in float32, and then rounded as the matrices are."""
        if not params:
            return
        states, (beta1, beta2) = [self._state_of(p) for p in params], group["betas"]
        values = [p.detach().float() for p in params]  # where they are float32, the parameters' own memory
        adamw(
            values,
            [p.grad.float() for p in params if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            max_exp_avg_sqs=[],
            state_steps=[state["step"] for state in states],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=float(group["lr"]),
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for dtype in {p.dtype for p in params} - {torch.float32}:
            low = [(p, value) for p, value in zip(params, values, strict=True) if p.dtype is dtype]
            _copy_(low, stochastic_rounding=self.bf16_stochastic_round and dtype is torch.bfloat16)

    def _state_of(self, param: Tensor) -> dict[str, Any]:
        """The parameter's state: torchao's own form, and float32 for what is no matrix."""
        state: dict[str, Any] = self.state[param]
        if not state:
            new = self._new_buffer if param.ndim > 1 else _float32_zeros
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = new(param, True), new(param, False)
        return state


def _settings(group: ParamGroup) -> tuple[Tensor | float, ...]:
    """Learning rate, both betas, weight decay, eps: in tensors what may change, as each new number compiles anew."""
    decay: float = group["weight_decay"]
    changed = decay != group.get("first_decay", decay)
    rate = torch.as_tensor(group["lr"], dtype=torch.float32)
    return (rate, *group["betas"], torch.as_tensor(decay) if changed else decay, group["eps"])


class StoredState(NamedTuple):
    """A moment in plain tensors, which compiled code takes at a fraction of a wrapper's cost.

    kind, context: the wrapper's class, and what it is made with beside the parts; None for a plain tensor
    """

    parts: dict[str, Tensor]
    kind: Any = None
    context: Any = None

    def tensor(self) -> Tensor:
        """The moment, in this memory."""
        if self.kind is None:
            return self.parts["itself"]
        whole: Tensor = self.kind.__tensor_unflatten__(self.parts, self.context)
        return whole


class Member(NamedTuple):
    """What the update works on, of one parameter."""

    param: Tensor
    gradient: Tensor
    mean: StoredState
    square: StoredState


def _taken(param: nn.Parameter, mean: Tensor, square: Tensor) -> Member:
    """All of a parameter, in rows of the numbers that share a scale, where they lie in order and have one.

    In the parameter's own shape, the scales would take a pass of their own before the codes can be written.
    """
    weights, gradient, shape = param.detach(), param.grad, param.shape
    assert gradient is not None
    block = getattr(mean, "block_size", None)
    if block is None or not (weights.is_contiguous() and gradient.is_contiguous()):
        return Member(weights, gradient, _moment(mean, shape, shape), _moment(square, shape, shape))
    rows = torch.Size((weights.numel() // block, block))
    return Member(weights.view(rows), gradient.view(rows), _moment(mean, shape, rows), _moment(square, shape, rows))


def _moment(tensor: Tensor, shape: torch.Size, rows: torch.Size) -> StoredState:
    """Taken apart; whatever has the parameter's shape, or tells it, takes on that of `rows`."""
    if not is_traceable_wrapper_subclass(tensor):
        return StoredState({"itself": tensor})
    names, context = tensor.__tensor_flatten__()
    parts = {name: getattr(tensor, name) for name in names}
    parts = {name: part.view(rows) if part.shape == shape else part for name, part in parts.items()}
    return StoredState(parts, type(tensor), tuple(rows if told == shape else told for told in context))


def _float32_zeros(like: Tensor, _: bool) -> Tensor:
    return torch.zeros_like(like, dtype=torch.float32)


def _copy_(pairs: Sequence[tuple[Tensor, Tensor]], *, stochastic_rounding: bool) -> None:
    """Into each parameter its float32 values, all in a few calls."""
    params = [param for param, _ in pairs]
    flat = torch.cat([value.flatten() for _, value in pairs])
    if stochastic_rounding:
        flat = torchao_optim("stochastic rounding").quant_utils._fp32_to_bf16_sr(flat)
    torch._foreach_copy_(params, views(flat, params))


@lru_cache
def _update(compiled: bool) -> Callable[..., None]:
    """The update of one parameter that torchao has, for a list of them."""
    update = torchao_optim("a low-bit state").adam.single_param_adam

    def update_all(
        members: list[Member],
        step: Tensor,
        settings: list[tuple[Tensor | float, ...]],
        stochastic_rounding: bool,
    ) -> None:
        for (p, g, mean, square), (lr, beta1, beta2, decay, eps) in zip(members, settings, strict=True):
            rounded = stochastic_rounding and p.dtype is torch.bfloat16
            update(p, g, step, mean.tensor(), square.tensor(), None, lr, beta1, beta2, decay, eps, True, rounded)

    return torch.compile(update_all, fullgraph=True, dynamic=False) if compiled else update_all


@lru_cache
def torchao_optim(wanted_by: str) -> ModuleType:
    """The package `torchao.optim`.

    wanted_by: the setting that needs it, for the message

    Raises UserError where torchao is not installed.
    """
    try:
        with quiet_imports():
            import torchao.optim
    except ImportError as error:
        raise UserError(f"{wanted_by} needs torchao: .venv/bin/pip install torchao") from error
    return torchao.optim
