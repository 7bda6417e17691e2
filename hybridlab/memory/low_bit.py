"""AdamW with moments in few bits: torchao's, stepped in few calls."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hybridlab.memory.ao import torchao_optim
from hybridlab.optimizers import ParamGroup

CLASSES = {"int8": "AdamW8bit", "fp8": "AdamWFp8", "int4": "AdamW4bit"}

Member = tuple[Tensor, ParamGroup]


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
    """AdamW by torchao with its moments in "int8", "fp8" or "int4", a scale a block of 256 (int4: 128) values.

    The update and the formats are torchao's own. It compiles and calls that update parameter by parameter, which at
    GPT-2 XL's 580 parameters costs more than the training step itself; here a bucket's parameters go in one call. On a
    CPU the update runs uncompiled, so that no C++ compiler is needed.

    buckets: parameters that one call steps; equal ones, such as a model's blocks, are compiled once
    stochastic_rounding: of bf16 weights, so that small updates are not lost

    Raises UserError where torchao is not installed.

    Source: Dettmers et al. 2021 (arXiv 2110.02861); https://github.com/pytorch/ao/tree/main/torchao/optim.
    """
    optim = torchao_optim(f"optimizer_state={state!r}")
    method = type("LowBitAdamW", (InFewCalls, getattr(optim, CLASSES[state])), {})
    optimizer: Any = method(groups, lr=lr, betas=betas, eps=eps, bf16_stochastic_round=stochastic_rounding)
    optimizer.bucket_of = {p: i for i, bucket in enumerate(buckets) for p in bucket}
    return optimizer


class InFewCalls(Optimizer):
    """Replaces torchao's step by one that hands many parameters to each call of the compiled update."""

    bucket_of: dict[Tensor, int]
    _new_buffer: Callable[[Tensor, bool], Tensor]
    bf16_stochastic_round: bool

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Step every parameter that has a gradient."""
        calls: dict[int, list[Member]] = defaultdict(list)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    calls[self.bucket_of[p]].append((p, group))
        with torch._dynamo.utils.disable_cache_limit():  # a handful of shapes, each compiled once
            for members in calls.values():
                self._step_together_(members)

    def _step_together_(self, members: list[Member]) -> None:
        states = [self._state_of(p) for p, _ in members]
        if len({float(state["step"]) for state in states}) > 1:  # one of them missed a step
            for member in members:
                self._step_together_([member])
            return
        for state in states:
            state["step"] += 1
        _update(compiled=members[0][0].is_cuda)(
            [p.detach() for p, _ in members],
            [p.grad for p, _ in members],
            states[0]["step"],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [(g["lr"], *g["betas"], g["weight_decay"], g["eps"]) for _, g in members],
            self.bf16_stochastic_round,
        )

    def _state_of(self, param: Tensor) -> dict[str, Any]:
        """The parameter's state, in torchao's own form."""
        state: dict[str, Any] = self.state[param]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = self._new_buffer(param, True)
            state["exp_avg_sq"] = self._new_buffer(param, False)
        return state


@lru_cache
def _update(compiled: bool) -> Callable[..., None]:
    """The update of one parameter that torchao has, for a list of them."""
    update = torchao_optim("a low-bit state").adam.single_param_adam

    def update_all(
        params: list[Tensor],
        gradients: list[Tensor],
        step: Tensor,
        means: list[Tensor],
        squares: list[Tensor],
        settings: list[tuple[Tensor, float, float, float, float]],
        stochastic_rounding: bool,
    ) -> None:
        for p, g, mean, square, (lr, beta1, beta2, decay, eps) in zip(
            params, gradients, means, squares, settings, strict=True
        ):
            rounded = stochastic_rounding and p.dtype is torch.bfloat16
            update(p, g, step, mean, square, None, lr, beta1, beta2, decay, eps, True, rounded)

    return torch.compile(update_all, fullgraph=True, dynamic=False) if compiled else update_all
