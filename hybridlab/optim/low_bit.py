"""AdamW with moments in few bits: torchao's, stepped in few calls."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
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
from hybridlab.optim.stepping import keep_formats_
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
    weights: str = "fp32",
) -> Optimizer:
    """AdamW by torchao with its moments in "int8", "fp8" or "int4", one scale per block of 256 (int4: 128) values.

    The update and the formats are torchao's own. It compiles and calls that update parameter by parameter, which at
    GPT-2 XL's 580 parameters costs more than the training step itself; here a bucket's parameters go in one call, each
    in rows of the numbers that share a scale, so that one kernel reads and writes it once. On a CPU the update runs
    uncompiled, so that no C++ compiler is needed; and on a GPU too, slower, once a scheduler has changed the betas, as
    torchao takes these as numbers and would compile for each. Biases and norms, most of the parameters and a
    thousandth of the numbers, keep float32 moments and go through torch's own AdamW, all together.

    buckets: parameters that one call steps; equal ones, such as a model's blocks, are compiled once
    weights: how no small update of bf16 weights is lost: "bf16" rounds stochastically; "24bit" keeps 8 further bits of
        each in the state, as "rest", so that the method sees and moves weights of 24 bits

    Raises UserError where torchao is not installed, and for a GPU where nothing can compile.

    Source: Dettmers et al. 2021 (arXiv 2110.02861); https://github.com/pytorch/ao/tree/main/torchao/optim.
    """
    optim = torchao_optim(wanted_by := f"optimizer_state={state!r}")
    if any(p.is_cuda for bucket in buckets for p in bucket):
        require_compiler("cuda", wanted_by)
    method = type("LowBitAdamW", (InFewCalls, getattr(optim, CLASSES[state])), {})
    optimizer: Any = method(groups, lr=lr, betas=betas, eps=eps, bf16_stochastic_round=weights == "bf16")
    optimizer.keeps_rest = weights == "24bit"
    optimizer.bucket_of, optimizer.numbers = {p: i for i, bucket in enumerate(buckets) for p in bucket}, {}
    return optimizer


MOST_AT_ONCE, MOST_PIECES = 12 * 2**20, 64
"""The most numbers of a matrix in one call, since 4 bits by torchao take 24 further bytes for each; the most pieces."""

PAIR = torch.int32
"""Two neighbouring bf16 numbers of a matrix as one: the first in its lower half."""

Owned = tuple[nn.Parameter, ParamGroup]
"""A parameter, and the group that has its settings."""

Settings = tuple[Tensor | float, ...]
"""Learning rate, both betas, weight decay, eps."""


class InFewCalls(Optimizer):
    """Replaces torchao's step by one that hands many parameters to each call of the compiled update.

    The steps of matrices may be captured in a CUDA graph: what changes from step to step is read from tensors that stay
    where they are, and `advance_` writes the next step's numbers there.

    numbers: those tensors, each with the number that it holds
    """

    bucket_of: dict[Tensor, int]
    numbers: dict[Hashable, tuple[float, Tensor]]
    _new_buffer: Callable[[Tensor, bool], Tensor]
    bf16_stochastic_round: bool
    keeps_rest: bool

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add a group, and remember what the update is compiled with."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["first_betas"], group["first_decay"] = tuple(group["betas"]), group["weight_decay"]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with a saved state."""
        super().load_state_dict(state_dict)
        keep_formats_(self, state_dict)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Step every parameter that has a gradient."""
        for group in self.param_groups:
            vectors = [p for p in group["params"] if p.grad is not None and p.ndim < 2]
            for dtype in {p.dtype for p in vectors}:
                self._step_vectors_([p for p in vectors if p.dtype is dtype], group)
        with torch._dynamo.utils.disable_cache_limit():  # a handful of shapes, each compiled once
            for members in self._calls():
                if stepping := [(p, group) for p, group in members if p.grad is not None]:
                    self._step_together_(stepping)

    @torch.no_grad()
    def make_state_(self) -> None:
        """Make the state of all that is trained, so that it does not come to lie among what passes take."""
        for p in (p for group in self.param_groups for p in group["params"] if p.requires_grad):
            self._state_of(p)

    @torch.no_grad()
    def compile_steps_(self) -> None:
        """Compile the updates of steps inside backward, on zeros; nothing is trained."""
        kinds, numbers = {}, dict(self.numbers)
        for call in self._calls():
            kinds[tuple((p.shape, p.dtype, id(group)) for p, group in call)] = call
        for call in kinds.values():
            zeros = [(nn.Parameter(torch.zeros_like(p)), group) for p, group in call if _is_compiled_for(p)]
            for p, _ in zeros:
                p.grad = torch.zeros_like(p)
            if zeros:
                with torch._dynamo.utils.disable_cache_limit():
                    self._step_together_(zeros)
            for p, _ in zeros:
                del self.state[p]
        self.numbers = numbers

    def advance_(self) -> None:
        """Count a step of every matrix, and write the numbers that its captured step reads."""
        for members in self._calls():
            self._count_(members)
            self._numbers_of(members)

    @property
    def replays_as(self) -> Hashable:
        """What captured steps depend on, beside the numbers; None where steps cannot be captured."""
        steps = ([self.state[p]["step"].item() for p, _ in call if self.state.get(p)] for call in self._calls())
        counts = [set(of_call) - {0} for of_call in steps]  # 0: made, and not stepped yet
        if any(map(_is_cycled, self.param_groups)) or any(len(count) > 1 for count in counts):
            return None
        moments = [m for p, state in self.state.items() if p.ndim > 1 for m in state.values() if m.ndim]
        places = tuple(part.data_ptr() for moment in moments for part in _parts(moment).values())
        return places, tuple((group["betas"], group["weight_decay"], group["eps"]) for group in self.param_groups)

    def _calls(self) -> Iterator[list[Owned]]:
        """The matrices, bucket by bucket, as one call steps them."""
        calls: dict[int, list[Owned]] = defaultdict(list)
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim > 1:
                    calls[self.bucket_of[p]].append((p, group))
        yield from calls.values()

    def _step_together_(self, members: list[Owned]) -> None:
        states = [self._state_of(p) for p, _ in members]
        if len({float(state["step"]) for state in states}) > 1:  # one of them missed a step
            for member in members:
                self._step_together_([member])
            return
        if not _is_captured(members[0][0]):  # which takes no step
            self._count_(members)
        compiled = _is_compiled_for(members[0][0]) and not any(_is_cycled(group) for _, group in members)
        update = _update(compiled)
        step, settings = self._numbers_of(members)
        taken = [_taken(p, state) for (p, _), state in zip(members, states, strict=True)]
        for calls in _at_once(list(zip(taken, settings, strict=True)), compiled):
            update([member for member, _ in calls], step, [its for _, its in calls], self.bf16_stochastic_round)

    def _count_(self, members: list[Owned]) -> None:
        for p, _ in members:
            self.state[p]["step"] += 1

    def _numbers_of(self, members: list[Owned]) -> tuple[Tensor, list[Settings]]:
        """What a call of the update takes of these: how often they were stepped, and each one's settings."""
        first, of_group = members[0][0], {id(group): i for i, group in enumerate(self.param_groups)}
        step = self._kept((first,), float(self.state[first]["step"]))
        rates = [self._kept((first, of_group[id(group)]), float(group["lr"])) for _, group in members]
        return step, [(rate, *_fixed(group)) for rate, (_, group) in zip(rates, members, strict=True)]

    def _kept(self, name: tuple[Any, ...], number: float) -> Tensor:
        """A number in its tensor; while a step is captured, the tensor as it was last written."""
        held, place = self.numbers.get(name) or (None, torch.empty((), device=name[0].device))
        if held != number and not _is_captured(place):
            self.numbers[name] = number, place.fill_(number)
        return place

    def _step_vectors_(self, params: list[nn.Parameter], group: ParamGroup) -> None:
        """By torch's own AdamW in float32, and then rounded as the matrices are. params: of one format"""
        if not params:
            return
        if params[0].dtype is torch.float32:
            self._step_exact_([p.detach() for p in params], params, group)
            return
        rests = [self.state[p]["rest"] for p in params if "rest" in self._state_of(p)]
        rounded = torch.cat([p.detach().flatten() for p in params])
        rest = torch.cat([rest.flatten() for rest in rests]) if rests else None
        exact = rounded.float() if rest is None else joined(rounded, rest)
        self._step_exact_(views(exact, params), params, group)
        if rest is not None:
            split_(exact, rounded, rest)
            torch._foreach_copy_(rests, views(rest, rests))
        elif self.bf16_stochastic_round and rounded.dtype is torch.bfloat16:
            rounded = torchao_optim("stochastic rounding").quant_utils._fp32_to_bf16_sr(exact)
        else:
            rounded.copy_(exact)
        torch._foreach_copy_(list(params), views(rounded, params))

    def _step_exact_(self, values: list[Tensor], params: list[nn.Parameter], group: ParamGroup) -> None:
        """Let torch's AdamW move float32 values, by their parameters' gradients and states."""
        states, (beta1, beta2) = [self._state_of(p) for p in params], group["betas"]
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

    def _state_of(self, param: Tensor) -> dict[str, Any]:
        """The parameter's state: torchao's own form of a moment, or float32."""
        state: dict[str, Any] = self.state[param]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = self._new_moment(param, True), self._new_moment(param, False)
            if self.keeps_rest and param.dtype is torch.bfloat16:
                state["rest"] = torch.zeros_like(param, dtype=torch.int8)
        return state

    def _new_moment(self, param: Tensor, signed: bool) -> Tensor:
        """In few bits, or float32 for a vector, and for a matrix too small or odd for blocks of one scale.

        torchao gives such a matrix moments in its own format, and in bf16 a second moment would never shrink.
        """
        moment = self._new_buffer(param, signed) if param.ndim > 1 else param
        return moment if is_traceable_wrapper_subclass(moment) else torch.zeros_like(param, dtype=torch.float32)


def _fixed(group: ParamGroup) -> Settings:
    """Both betas, weight decay and eps; a decay that has changed in a tensor, as each new number compiles anew."""
    decay: float = group["weight_decay"]
    changed = decay != group.get("first_decay", decay)
    return (*group["betas"], torch.as_tensor(decay) if changed else decay, group["eps"])


def _is_cycled(group: ParamGroup) -> bool:
    """Whether a scheduler has changed the betas since the update was first compiled."""
    return tuple(group["betas"]) != tuple(group.get("first_betas") or group["betas"])


def _is_compiled_for(p: Tensor) -> bool:
    return p.is_cuda


def _is_captured(tensor: Tensor) -> bool:
    """Whether what is done with it goes into a CUDA graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


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

    def piece(self, i: int, count: int, shape: torch.Size) -> StoredState:
        """One of so many equal pieces; shape: of the whole."""
        parts = {name: part if name == "qmap" else part.chunk(count)[i] for name, part in self.parts.items()}
        its = torch.Size((shape[0] // count, *shape[1:]))
        return StoredState(parts, self.kind, tuple(its if told == shape else told for told in self.context))


class Member(NamedTuple):
    """What the update works on, of one parameter."""

    param: Tensor
    gradient: Tensor
    mean: StoredState
    square: StoredState
    rest: Tensor | None

    @property
    def in_pairs(self) -> bool:
        """Whether the numbers are taken two by two, as their codes are kept."""
        return self.param.dtype is PAIR

    def paired(self, rest: Tensor) -> Member:
        """The same memory, two numbers of a row as one; rest: the parameter's."""
        mean, square = (
            moment._replace(parts=moment.parts | {"codes": moment.parts["codes"].view(len(self.param), -1)})
            for moment in (self.mean, self.square)
        )
        return Member(self.param.view(PAIR), self.gradient.view(PAIR), mean, square, rest.view(torch.int16))


def _taken(param: nn.Parameter, state: dict[str, Any]) -> Member:
    """All of a parameter, in rows of the numbers that share a scale, where they lie in order and have one.

    In the parameter's own shape, the scales would take a pass of their own before the codes can be written; and so
    would codes that share a byte, where their numbers are taken one by one.
    """
    mean, square, rest = state["exp_avg"], state["exp_avg_sq"], state.get("rest")
    weights, gradient, shape = param.detach(), param.grad, param.shape
    assert gradient is not None
    block = getattr(mean, "block_size", None)
    if block is None or not (weights.is_contiguous() and gradient.is_contiguous()):
        return Member(weights, gradient, _moment(mean, shape, shape), _moment(square, shape, shape), rest)
    rows = torch.Size((weights.numel() // block, block))
    moments = _moment(mean, shape, rows), _moment(square, shape, rows)
    member = Member(weights.view(rows), gradient.view(rows), *moments, None if rest is None else rest.view(rows))
    if rest is None or mean.codes.numel() == param.numel() or gradient.dtype is not weights.dtype:
        return member
    if any(t.storage_offset() % 2 for t in (weights, gradient, rest)):  # in the middle of a pair of something larger
        return member
    return member.paired(rest.view(rows))


def _at_once(given: list[tuple[Member, Settings]], compiled: bool) -> Iterator[list[tuple[Member, Settings]]]:
    """What one call of the update takes: all small matrices, or a piece of a large one, such as the embedding.

    compiled: whether pairs take no further memory, as one kernel steps them
    """
    large = [member.param.numel() > MOST_AT_ONCE and not (compiled and member.in_pairs) for member, _ in given]
    if small := [pair for pair, is_large in zip(given, large, strict=True) if not is_large]:
        yield small
    for member, its in (pair for pair, is_large in zip(given, large, strict=True) if is_large):
        yield from ([(piece, its)] for piece in _pieces(member))


def _pieces(member: Member) -> Iterator[Member]:
    """A matrix in equal pieces, each of some rows that share a scale; whole where its moments are plain tensors."""
    least, scales = -(-member.param.numel() // MOST_AT_ONCE), member.mean.parts.get("scale")
    if scales is None:
        yield member
        return
    count = next((n for n in range(least, MOST_PIECES) if len(member.param) % n == len(scales) % n == 0), 1)
    for i in range(count):
        yield Member(
            member.param.chunk(count)[i],
            member.gradient.chunk(count)[i],
            member.mean.piece(i, count, member.param.shape),
            member.square.piece(i, count, member.param.shape),
            None if member.rest is None else member.rest.chunk(count)[i],
        )


def _moment(tensor: Tensor, shape: torch.Size, rows: torch.Size) -> StoredState:
    """Taken apart; whatever has the parameter's shape, or tells it, takes on that of `rows`."""
    parts = _parts(tensor)
    if not is_traceable_wrapper_subclass(tensor):
        return StoredState(parts)
    parts = {name: part.view(rows) if part.shape == shape else part for name, part in parts.items()}
    context = tensor.__tensor_flatten__()[1]
    return StoredState(parts, type(tensor), tuple(rows if told == shape else told for told in context))


def _parts(tensor: Tensor) -> dict[str, Tensor]:
    """The plain tensors that a moment is made of."""
    if not is_traceable_wrapper_subclass(tensor):
        return {"itself": tensor}
    return {name: getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]}


def joined(weight: Tensor, rest: Tensor) -> Tensor:
    """The float32 values of bf16 weights and their 8 further bits, which `split_` took apart."""
    return _of_bits(weight.view(torch.int16).int(), rest)


def split_(value: Tensor, weight: Tensor, rest: Tensor) -> None:
    """Round float32 values to 24 bits: to bf16, and the difference, in 2^-8 of the last place of that.

    value: float32; weight: bf16; rest: int8; all of one shape
    """
    weight.copy_(value)
    rest.copy_(_rest(value, weight.view(torch.int16).int()))


def _of_bits(weight: Tensor, rest: Tensor | None = None) -> Tensor:
    """The float32 values of the lowest 16 bits of int32 numbers, and of 8 further bits.

    A negative rest stays out of a zero, which somebody else has written, as a growth may: the bits would be NaN's.
    """
    bits = weight << 16
    if rest is not None:
        bits = bits + (torch.maximum(rest.int(), -128 * (weight & 0x7FFF)) << 8)  # no limit to any other weight's
    return bits.view(torch.float32)


def _rest(value: Tensor, weight: Tensor) -> Tensor:
    """What bf16 weights, as int32 bits, leave of float32 values, in 2^-8 of the last place; -128 to 127."""
    return ((value.view(torch.int32) - (weight << 16) + 128) >> 8).clamp(-128, 127)


def _step_pairs_(optim: Any, member: Member, step: Tensor, its: Settings) -> None:
    """The update of both numbers of each pair, so that a kernel has both codes of a byte at hand.

    optim: torchao's package
    """
    assert member.rest is not None
    update, quant_utils = optim.adam.single_param_adam, optim.quant_utils
    moments = [_opened(moment, quant_utils) for moment in (member.mean, member.square)]
    weights, rests = [], []
    for half, mean, square in zip((0, 1), *moments, strict=True):
        rest = member.rest.int() << 24 - 8 * half >> 24  # the lower 8 bits, or the upper, with their sign
        value, gradient = _of_bits(member.param >> 16 * half, rest), _of_bits(member.gradient >> 16 * half)
        update(value, gradient, step, mean, square, None, *its, True, False)
        weights.append(value.bfloat16().view(torch.int16).int())
        rests.append(_rest(value, weights[-1]))
    member.param.copy_((weights[1] << 16) | (weights[0] & 0xFFFF))
    member.rest.copy_((rests[1] << 8) | (rests[0] & 0xFF))
    for moment, halves in zip((member.mean, member.square), moments, strict=True):
        scale = torch.maximum(*map(torch.abs, halves)).amax(-1).clip(1e-12)
        first, second = (
            quant_utils.quantize_4bit_with_qmap(half / scale[:, None], moment.parts["qmap"]) for half in halves
        )
        moment.parts["scale"].copy_(scale)
        moment.parts["codes"].copy_((first << 4) | second)


def _opened(moment: StoredState, quant_utils: Any) -> list[Tensor]:
    """The float32 values of the first of each pair, and of the second."""
    codes, scale, qmap = (moment.parts[name] for name in ("codes", "scale", "qmap"))
    return [quant_utils.dequant_with_qmap(half, qmap, scale) for half in (codes >> 4, codes & 0b1111)]


@lru_cache
def _update(compiled: bool) -> Callable[..., None]:
    """The update of one parameter that torchao has, for a list of them."""
    optim = torchao_optim("a low-bit state")
    update = optim.adam.single_param_adam

    def update_all(
        members: list[Member],
        step: Tensor,
        settings: list[Settings],
        stochastic_rounding: bool,
    ) -> None:
        for member, its in zip(members, settings, strict=True):
            if member.in_pairs:
                _step_pairs_(optim, member, step, its)
                continue
            p, gradient, mean, square, rest = member
            rounded = stochastic_rounding and p.dtype is torch.bfloat16
            value = p if rest is None else joined(p, rest)
            update(value, gradient, step, mean.tensor(), square.tensor(), None, *its, True, rounded)
            if rest is not None:
                split_(value, p, rest)

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
