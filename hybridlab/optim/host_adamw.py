"""AdamW whose gradients, moments and float32 weights live in host memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from hybridlab.base.device import wait_for
from hybridlab.base.pinned_memory import CopyStream, host_empty_like
from hybridlab.base.weak_hook import weak_hook
from hybridlab.optim.stepping import run_closure, step_with_
from hybridlab.weights.path import MOMENTS

LEAVING_BYTES = 128_000_000
"""Gradients that may be on their way at a time: beyond it the backward pass waits for the bus."""


class HostAdamW(Optimizer):
    """torch's fused AdamW, stepping on the host; the GPU has only the weights.

        backward   each gradient leaves for the host as soon as it is complete, and is freed; further ones are added
        step       AdamW moves the float32 master weights; each goes back to the GPU while the next is moved

    Weights on the GPU are float32, or of a narrower type: then the masters, rounded. Step by step it equals
    `torch.optim.AdamW(fused=True)` on the same device. Host memory: 16 bytes per parameter, half of it page-locked.

    groups: parameters or groups of them, as for AdamW; move the model to its device first
    lr, betas, eps, weight_decay: as of AdamW; those given in a group count first

    Gradients are not at `param.grad`: `clip_` limits their norm. `state[param]` holds AdamW's moments, on the host, and
    the master weight where the GPU's is narrower.

    Raises UserError where host memory is short or cannot be pinned; nothing has been changed then.
    """

    def __init__(
        self,
        groups: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        self._adamw = AdamW(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(self._adamw.param_groups, self._adamw.defaults)
        params: list[Tensor] = [param for group in self.param_groups for param in group["params"]]
        alike = [torch.empty(param.shape, device="meta") for param in params]
        masters, gradients = (host_empty_like(alike, pinned=True) for _ in range(2))
        moments = iter(host_empty_like([like for like in alike for _ in MOMENTS], pinned=False))
        self._masters = {p: master.copy_(p.detach()) for p, master in zip(params, masters, strict=True)}
        self._gradients = dict(zip(params, gradients, strict=True))
        self._places = {p: {name: next(moments) for name in MOMENTS} for p in params}
        for param, places in self._places.items():
            places["step"] = torch.zeros(())
            if param.dtype != torch.float32:
                places["master"] = self._masters[param]
        self._stream = CopyStream(params[0].device)
        self._leaving: deque[tuple[tuple[Tensor, Tensor], torch.cuda.Event | None]] = deque()
        self._discards_gradients = self._have_weights_moved = False
        for param in params:
            param.register_post_accumulate_grad_hook(weak_hook(self._send_gradient))  # type: ignore[no-untyped-call]

    # --- backward ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _send_gradient(self, param: Tensor) -> None:
        """Copy a complete gradient to the host beside the backward pass, or add it to the one that is there.

        A gradient stays alive until the computation has been told to wait for its copy. `record_stream` would not do:
        the host runs far ahead of the GPU, and none of the memory would be free again by the time it is wanted.
        """
        gradient, param.grad = param.grad, None
        if self._discards_gradients or gradient is None:
            return
        host, master = self._gradients[param], self._masters[param]
        gradient = gradient.to(host.dtype)
        total = gradient if master.grad is None else torch.empty_like(gradient)
        with self._stream.copying():
            if total is not gradient:
                total.copy_(host, non_blocking=True).add_(gradient)
            host.copy_(total, non_blocking=True)
        master.grad = host
        self._leaving.append(((gradient, total), self._stream.record_event()))
        self._free_sent(LEAVING_BYTES)

    def _free_sent(self, limit_bytes: int) -> None:
        """Free the oldest gradients, while more than this are on their way."""
        while sum(total.nbytes for (_, total), _ in self._leaving) > limit_bytes:
            self._stream.wait_event(self._leaving[0][1])
            self._leaving.popleft()

    @contextmanager
    def no_step(self) -> Iterator[None]:
        """Inside, gradients are thrown away and nothing steps: for passes that only compile or measure."""
        self._discards_gradients = True
        try:
            yield
        finally:
            self._discards_gradients = False

    # --- gradients on the host ---------------------------------------------------------------------------

    def clip_(self, max_norm: float | None) -> Tensor:
        """Scale all gradients so that their norm is at most `max_norm`, where one is given; return what it was."""
        self._wait()
        norm = nn.utils.get_total_norm([m.grad for m in self._masters.values() if m.grad is not None])
        if max_norm is not None and not max_norm / (norm + 1e-6) >= 1.0:  # as torch does, but not times one
            nn.utils.clip_grads_with_norm_(list(self._masters.values()), max_norm, norm)
        return norm

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        super().zero_grad(set_to_none=True)
        self._free_sent(0)
        for master in self._masters.values():
            master.grad = None

    def _wait(self) -> None:
        """Until host memory holds what was sent there, and the GPU has what it was sent."""
        wait_for(self._stream.device)
        self._leaving.clear()

    # --- weights -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move the weights of all parameters that have a gradient."""
        loss = run_closure(closure)
        self._wait()
        self._follow_weights_()
        for group in self.param_groups:
            for param in group["params"]:
                if self._masters[param].grad is not None:
                    self._step_(param, group)
        return loss

    def _step_(self, param: Tensor, group: dict[str, Any]) -> None:
        """Let AdamW step one parameter's master, and send that to the GPU."""
        master = self._masters[param]
        group = group | {"params": [master], "fused": True, "foreach": False}
        step_with_(self._adamw, [group], {master: self._state_in_place(param)})
        param.copy_(master, non_blocking=True)

    def weights_moved(self) -> None:
        """Somebody moved the weights on the GPU: the masters follow before the next step."""
        self._have_weights_moved = True

    def _follow_weights_(self) -> None:
        """Float32 masters take the weights; others move as far as the GPU's weights moved, and keep what is finer."""
        if not self._have_weights_moved:
            return
        for param, master in self._masters.items():
            if param.dtype == master.dtype:
                master.copy_(param.detach(), non_blocking=True)
            else:
                master.add_(param.detach().cpu().to(master.dtype) - master.to(param.dtype).to(master.dtype))
        self._wait()
        self._have_weights_moved = False

    # --- state -------------------------------------------------------------------------------------------

    def _state_in_place(self, param: Tensor) -> dict[str, Any]:
        """The parameter's state, in the memory reserved for it: begun, or copied there from where it was put."""
        state, places = self.state[param], self._places[param]
        if not state:
            for name in ("step", *MOMENTS):
                places[name].zero_()
        for name, place in places.items():
            if state.setdefault(name, place) is not place:
                state[name] = place.copy_(state[name])
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with a saved state, also one of AdamW itself; load the model's weights before the next step."""
        self._wait()
        twin = AdamW([group | {"params": [self._masters[p] for p in group["params"]]} for group in self.param_groups])
        twin.load_state_dict(state_dict)  # the masters are float32 on the host, and so is what it loads
        for group, loaded in zip(self.param_groups, twin.param_groups, strict=True):
            group.update(loaded | {"params": group["params"]})
        for param, master in self._masters.items():
            self.state[param] = dict(twin.state[master])
            self._state_in_place(param)
        self.weights_moved()
