"""The optimizer's step, taken inside the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from hybridlab.base.errors import UserError
from hybridlab.base.weak_hook import weak_hook
from hybridlab.optim.stepping import keep_formats_, lend_, step_with_

LEAST_SHARE = 1e-3
"""Of the squared norm: a bucket that had less of it, such as an idle layer, tells nothing about the others."""


class StepInBackward(Optimizer):
    """Steps a bucket of matrices as soon as its gradients are there, and frees these: they never all exist at once.

    Biases and norms, most of the parameters and a thousandth of the numbers, step all together at the end: what the
    host has to do beside each block is little.

    One ordinary optimizer to whoever looks at it: groups and state are this object's, and are lent to `method` for each
    bucket (`step_with_`). The norm of all gradients is known only when the backward pass has ended, so clipping goes by
    an estimate: what has arrived so far, and the share of the whole that it had in the steps before.

        norm_b  = sqrt(scale (1 - idle share) + idle)        of the buckets a up to and with b
        scale   = sum of |g_a|^2 / sum of share_a            over those that tell about the rest
        idle    = sum of |g_a|^2, idle share = sum of share_a    over those that had less than `LEAST_SHARE`
        g_b     = g_b min(1, clip_norm / norm_b)
        share_a = (share_a + |g_a|^2 / |g|^2) / 2            after each step

    It is exact for the last bucket, and for all where the shares stay as they were, however much the norm changes. A
    bucket that was idle, lately or in the step before, counts as itself; where only such ones have arrived, scale is
    the squared norm of the step before. The first step takes its shares from a pass under `no_step`, or else from the
    buckets' sizes.

    method: an optimizer that treats its parameters one by one, such as AdamW, SGD or Muon
    buckets: parameters whose gradients arrive together, such as a block's (`hybridlab.memory.checkpointing.buckets_of`)
    clip_norm: None leaves gradients alone

    Source: https://docs.pytorch.org/tutorials/intermediate/optimizer_step_in_backward_tutorial.html; the estimate is
    ours: the norm of the step before, the usual stand-in, misses the very jumps that clipping is for.
    """

    def __init__(
        self, method: Optimizer, buckets: Sequence[Sequence[nn.Parameter]], clip_norm: float | None = None
    ) -> None:
        super().__init__(method.param_groups, defaults={})
        self.defaults = method.defaults  # what a scheduler looks at; the groups have it all
        self.method, self._clip = method, clip_norm
        self._buckets = [list(bucket) for bucket in buckets]
        self._matrices = [self._by_group({p for p in bucket if p.ndim > 1}) for bucket in self._buckets]
        self._vectors = self._by_group({p for bucket in self._buckets for p in bucket if p.ndim < 2})
        self._arrived = [0] * len(self._buckets)
        self._stepped: list[int] = []
        self._discards_gradients = False
        sizes = torch.tensor([sum(p.numel() for p in bucket) for bucket in self._buckets], dtype=torch.float32)
        self._squares = torch.zeros_like(sizes, device=self._buckets[0][0].device)
        self.param_groups[0].setdefault("clip_shares", (sizes / sizes.sum()).to(self._squares.device))
        self.param_groups[0].setdefault("clip_squares", torch.zeros_like(self._squares))
        self._known, self._tells = self._squares.new_zeros(2, 2), self._squares.new_zeros(2, len(self._buckets))
        self._forget_arrivals()
        for i, bucket in enumerate(self._buckets):
            for param in bucket:
                param.register_post_accumulate_grad_hook(weak_hook(self._arrive, i))  # type: ignore[no-untyped-call]

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Close the step: what has waited steps now, and the next step's clipping is known."""
        self.clip_(None)
        self._step_(self._vectors)
        self._learn_shares_(weight=0.5)

    def register_step_pre_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """Call `hook` before anything steps: before each bucket's step, as all of them together are this one's."""
        return self.method.register_step_pre_hook(hook)

    def clip_(self, limit: float | None) -> Tensor:
        """Norm of all gradients since `zero_grad`, before clipping; no other limit than the constructor's is possible.

        Raises UserError for a limit.
        """
        if limit is not None:
            raise UserError("a step in the backward pass clips while gradients arrive: use clip_in_backward")
        for i, arrived in enumerate(self._arrived):
            if arrived:
                self._step_bucket_(i)
        return self._squares.sum().sqrt()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Begin a new step."""
        self._arrived, self._stepped = [0] * len(self._buckets), []
        if not self._discards_gradients:
            self._squares.zero_()
        self._forget_arrivals()
        super().zero_grad(set_to_none)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with a saved state."""
        super().load_state_dict(state_dict)
        keep_formats_(self, state_dict)
        settings = self.param_groups[0]
        for name in ("clip_shares", "clip_squares"):
            settings[name] = settings.get(name, torch.zeros_like(self._squares)).to(self._squares.device)
        self._forget_arrivals()

    def make_state_(self) -> None:
        """Make the state of all that is trained now, where the method can; else each bucket's first step makes it."""
        if hasattr(self.method, "make_state_"):
            lend_(self.method, self.param_groups, self.state)
            self.method.make_state_()

    def compile_steps_(self) -> None:
        """Compile what steps will need, where the method is compiled; nothing is trained."""
        if hasattr(self.method, "compile_steps_"):
            lend_(self.method, self.param_groups, self.state)
            self.method.compile_steps_()

    @property
    def replays_as(self) -> Hashable:
        """What a captured backward pass depends on, beside the model; None where it has to run as it is."""
        if self._discards_gradients or not hasattr(self.method, "advance_"):
            return None
        method: Any = self.method
        lend_(method, self.param_groups, self.state)
        shares = (self.param_groups[0][name].data_ptr() for name in ("clip_shares", "clip_squares"))
        return (key, *shares) if (key := method.replays_as) else None

    def captured(self) -> list[int]:
        """The buckets whose steps the pass took that has just been captured, for `advance_`.

        Raises ValueError where a bucket waits for a gradient: it would step at the end, outside of the graph.
        """
        stepped = [p for i in self._stepped for members in self._matrices[i] for p in members]
        if any(self._arrived) or not all(self.state[p]["step"] for p in stepped):  # which had no gradient before
            raise ValueError("a block has parameters without a gradient")
        return self._stepped

    def advance_(self, buckets: list[int]) -> None:
        """What the host does for these buckets' steps before the graph replays them."""
        method: Any = self.method
        for i in buckets:
            lend_(method, self._with(self._matrices[i]), self.state)
            method.advance_()

    @contextmanager
    def no_step(self) -> Iterator[None]:
        """Inside, gradients are thrown away and nothing steps; of them, the shares are kept for clipping."""
        self._discards_gradients = True
        self._squares.zero_()
        try:
            yield
        finally:
            self._discards_gradients = False
            self._learn_shares_(weight=1.0)
            self._squares.zero_()

    def _arrive(self, i: int, param: Tensor) -> None:
        """A gradient is there; the last of its bucket sets off the step."""
        if self._discards_gradients:
            self._squares[i] += param.grad.square().sum()  # type: ignore[union-attr]
            param.grad = None
            return
        self._arrived[i] += 1
        if self._arrived[i] == len(self._buckets[i]):
            self._step_bucket_(i)

    @torch.no_grad()
    def _step_bucket_(self, i: int) -> None:
        self._arrived[i] = 0
        self._stepped.append(i)
        gradients = [p.grad for p in self._buckets[i] if p.grad is not None]
        self._note_(i, gradients)
        if self._clip is not None:
            torch._foreach_mul_(gradients, (self._clip / self._estimated_norm()).clamp(max=1.0))
        self._step_(self._matrices[i])

    def _note_(self, i: int, gradients: list[Tensor]) -> None:
        """Take a bucket's squared norm into account, in few operations, as the host pays for each of them."""
        norms = torch.stack(torch._foreach_norm(gradients)).float()
        torch.dot(norms, norms, out=self._squares[i])
        square_and_share = torch.stack((self._squares[i], self.param_groups[0]["clip_shares"][i]))
        self._known.addcmul_(self._tells[:, i, None], square_and_share)

    def _forget_arrivals(self) -> None:
        """Nothing is known of the coming step; of the buckets, who will tell about the rest: neither share was small.

        _known: [tells or idle, square and share], sums over what has arrived; _tells: [tells or idle, bucket], 0 or 1
        """
        shares, before = (self.param_groups[0][name] for name in ("clip_shares", "clip_squares"))
        tells = (shares >= LEAST_SHARE) & (before >= LEAST_SHARE * before.sum())
        self._known.zero_()
        self._tells.copy_(torch.stack((tells, ~tells)))

    def _estimated_norm(self) -> Tensor:
        """Norm of all gradients, from those that have arrived."""
        (square, share), (idle, idle_share) = self._known
        scale = torch.where(share > 0, square / share, self.param_groups[0]["clip_squares"].sum())
        return (idle + scale * (1.0 - idle_share).clamp(min=0.0)).sqrt()

    def _learn_shares_(self, weight: float) -> None:
        """Take in how the squared norm was shared out among the buckets; all zero, NaN and infinite teach nothing."""
        whole, before = self._squares.sum(), self.param_groups[0]["clip_shares"]
        shares, teaches = torch.lerp(before, self._squares / whole, weight), (whole > 0) & whole.isfinite()
        for name, new in (("clip_shares", shares), ("clip_squares", self._squares)):
            self.param_groups[0][name].copy_(torch.where(teaches, new, self.param_groups[0][name]))

    def _by_group(self, chosen: set[nn.Parameter]) -> list[list[nn.Parameter]]:
        """The chosen parameters, one list per group."""
        return [[p for p in group["params"] if p in chosen] for group in self.param_groups]

    def _step_(self, chosen: list[list[nn.Parameter]]) -> None:
        """Let the method see these alone, with this object's settings and state, and step them."""
        if not any(chosen):
            return
        step_with_(self.method, self._with(chosen), self.state)
        for p in (p for members in chosen for p in members):
            p.grad = None

    def _with(self, chosen: list[list[nn.Parameter]]) -> list[dict[str, Any]]:
        """The groups, with these parameters alone."""
        groups = zip(self.param_groups, chosen, strict=True)
        return [group | {"params": members} for group, members in groups if members]
