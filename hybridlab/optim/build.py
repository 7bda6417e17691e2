"""Optimizers and learning-rate schedules, each named by one word in a parameter file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from hybridlab.base.ranks import is_sharded, local
from hybridlab.base.settings import check_bounds, check_choice, check_types
from hybridlab.optim.averaging import PrimalAveraging
from hybridlab.optim.muon import COEFFICIENTS, Muon
from hybridlab.optim.stepping import run_closure, step_with_

OPTIMIZERS = ("adamw", "adam", "muon", "sgd")
SCHEDULES = ("constant", "wsd", "cosine")
OUTPUT_HEADS = ("head", "lm_head", "classifier", "score")
LARGEST_LR = 1000

TUNED: dict[str, dict[str, float]] = {
    "adamw": {"lr": 3e-4, "embedding_multiple": 4.0},
    "muon": {"lr": 1.2e-3},
}
"""The best rates found by bracketing for GPT-2 Small, 4 million tokens in 1000 steps; none at an edge. Adam, whose own
rate was not bracketed, and SGD train at `OptimizerConfig`'s default."""

ParamGroup = dict[str, Any]


@dataclass(frozen=True)
class OptimizerConfig:
    """Which optimizer, and its settings.

    name: adamw, adam, muon (for hidden matrices, with AdamW for the rest) or sgd
    lr: learning rate of the matrices, before the schedule
    embedding_multiple, vector_multiple: of `lr`, what embeddings (and a head that is tied to one) and vectors train at
    betas: Adam's decay rates of the first and second moment
    eps: added to Adam's denominator
    weight_decay: of parameters of two or more dimensions; norms and biases are not decayed. None is 0.1, and 0 with
        adam, which would mix it into its moments
    momentum: of muon and sgd
    coefficients: of muon's Newton-Schulz iteration, "torch" or "polar_express"
    average_decay: above 0, the mean of the weights is trained beside them, and evaluated in their place
        (`hybridlab.optim.averaging`): what it keeps of itself at each step; average_share: its share where gradients
        are taken. It is a momentum of its own: take the method's, betas[0] or `momentum`, near 0 with it

    Raises TypeError and ValueError for a setting that makes no optimizer; the message says what would.
    """

    name: str = "adamw"
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float | None = None
    momentum: float = 0.95
    embedding_multiple: float = 1.0
    vector_multiple: float = 1.0
    coefficients: str = "torch"
    average_decay: float = 0.0
    average_share: float = 0.7

    def __post_init__(self) -> None:
        if isinstance(self.betas, list):
            object.__setattr__(self, "betas", tuple(self.betas))
        check_types(self)
        check_choice("optimizer", self.name, OPTIMIZERS)
        check_choice("coefficients", self.coefficients, tuple(COEFFICIENTS))
        check_bounds(self, "lr", "embedding_multiple", "vector_multiple", above=0, most=LARGEST_LR)
        check_bounds(self, "eps", above=0)
        check_bounds(self, "weight_decay", least=0)
        check_bounds(self, "betas", "momentum", "average_decay", least=0, below=1)
        check_bounds(self, "average_share", least=0, most=1)
        if self.name == "adam" and self.weight_decay:
            raise ValueError("adam mixes weight decay into its moments: use weight_decay=0.0 or name='adamw'")

    @property
    def decay(self) -> float:
        """`weight_decay`, or what None means."""
        meant = 0.0 if self.name == "adam" else 0.1
        return meant if self.weight_decay is None else self.weight_decay

    @classmethod
    def tuned(cls, name: str = "adamw", **changes: Any) -> OptimizerConfig:
        """The best settings found of a method: AdamW at 3e-4, its embedding at 4 times that; Muon, all at 1.2e-3.

        A rate of your own is that of the matrices; the embedding keeps its multiple of it, unless you give that too.
        """
        return cls(name=name, **TUNED.get(name, {}) | changes)

    @classmethod
    def vanilla(cls, **changes: Any) -> OptimizerConfig:
        """The plan's own baseline: Adam at 6e-4 without decay (its schedule is constant)."""
        return replace(cls(name="adam", lr=6e-4, weight_decay=0.0), **changes)

    def with_momentum(self, momentum: float) -> OptimizerConfig:
        """The same with another beta1 of adamw and adam, or another `momentum` of muon and sgd."""
        changed = {"betas": (momentum, self.betas[1])} if self.name.startswith("adam") else {"momentum": momentum}
        return replace(self, **changed)


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """The optimizer that config names, over the model's trainable parameters.

    Move the model to its device first: on CUDA, Adam, AdamW and SGD take their fused form.

    Raises ValueError where nothing in the model is trainable, or muon finds no hidden matrix in it.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("the model has no trainable parameter: set requires_grad on some")
    return with_average(_build(model, config, parameters), config)


def with_average(method: Optimizer, config: OptimizerConfig) -> Optimizer:
    """The method, with the mean of the weights beside it where `config` asks for one."""
    return PrimalAveraging(method, config.average_decay, config.average_share) if config.average_decay else method


def _build(model: nn.Module, config: OptimizerConfig, parameters: list[nn.Parameter]) -> Optimizer:
    if config.name == "muon":
        return build_muon(model, config, lambda groups: _adamw(groups, config))
    groups = rate_groups(model, config, parameters)
    match config.name:
        case "adamw":
            return _adamw(groups, config)
        case "adam":
            method = ShardedAdam if _are_sharded(groups) else Adam
            return method(groups, betas=config.betas, eps=config.eps, fused=_fused(groups))
        case _:
            return SGD(groups, momentum=config.momentum, fused=_fused(groups))


def _adamw(groups: list[ParamGroup], config: OptimizerConfig) -> AdamW:
    method = ShardedAdamW if _are_sharded(groups) else AdamW
    return method(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=_fused(groups))


class ShardedAdam(Adam):
    """Adam of weights that are spread over ranks: it computes with this rank's part of each, and so does what it did.

    Its state is spread as the weights are. Torch's own takes each of its tensors apart by itself in every step.
    """

    def _init_group(self, group: ParamGroup, *lists: list[Any]) -> bool:
        is_complex: bool = super()._init_group(group, *lists)  # type: ignore[misc, no-untyped-call]
        for tensors in lists:
            tensors[:] = map(local, tensors)
        return is_complex


class ShardedAdamW(ShardedAdam, AdamW):
    """AdamW of weights that are spread over ranks, as `ShardedAdam`."""


def _are_sharded(groups: list[ParamGroup]) -> bool:
    return all(is_sharded(p) for group in groups for p in group["params"])


def _fused(groups: list[ParamGroup]) -> bool | None:
    return True if all(p.is_cuda for group in groups for p in group["params"]) else None


def build_muon(
    model: nn.Module,
    config: OptimizerConfig,
    adamw: Callable[[list[ParamGroup]], Optimizer],
    new_buffer: Callable[[Tensor], Tensor] | None = None,
) -> Optimizer:
    """Muon for the hidden matrices, and what `adamw` makes of the groups of all others.

    new_buffer: makes the momentum of a matrix; None is of the matrix's own format

    Raises ValueError where the model has no hidden matrix.
    """
    hidden = hidden_matrices(model)
    if not hidden:
        raise ValueError("muon needs hidden matrices and the model has none: use name='adamw'")
    muon = Muon(hidden, config.lr, config.decay, config.momentum, config.coefficients, new_buffer)
    chosen = set(hidden)
    rest = [p for p in model.parameters() if p.requires_grad and p not in chosen]
    return MuonWithAdamW(muon, adamw(rate_groups(model, config, rest))) if rest else muon


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The trainable two-dimensional weights that are neither an embedding nor the output head.

    A head tied to an embedding is known as that; an untied one by its name: head, lm_head, classifier
    or score.
    """
    embeddings = _embeddings(model)
    return [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and parameter.ndim == 2
        and id(parameter) not in embeddings
        and not set(name.split(".")) & set(OUTPUT_HEADS)
    ]


def _embeddings(model: nn.Module) -> set[int]:
    return {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}


def rate_groups(model: nn.Module, config: OptimizerConfig, parameters: Iterable[nn.Parameter]) -> list[ParamGroup]:
    """Groups, each with its rate and decay: matrices, vectors, and embeddings that have a rate of their own."""
    at_own_rate, parameters = _embeddings(model) if config.embedding_multiple != 1 else set(), list(parameters)
    groups = []
    for is_own, multiple in ((False, 1.0), (True, config.embedding_multiple)):
        part = [p for p in parameters if (id(p) in at_own_rate) is is_own]
        for group in decay_groups(part, config.decay):
            vectors = group["params"][0].ndim < 2
            groups.append(group | {"lr": config.lr * (config.vector_multiple if vectors else multiple)})
    return groups


def decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[ParamGroup]:
    """Two optimizer groups: matrices, which decay, and vectors, which do not."""
    given = list(parameters)
    matrices, vectors = ([p for p in given if (p.ndim > 1) is are_matrices] for are_matrices in (True, False))
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _with_cycled_beta1(group: ParamGroup) -> ParamGroup:
    """The group; one of AdamW's to which a scheduler gave a "momentum" takes it as its beta1."""
    return group | {"betas": (group["momentum"], group["betas"][1])} if {"betas", "momentum"} <= set(group) else group


class MuonWithAdamW(Optimizer):
    """Muon for some parameters and AdamW for the others, as one optimizer.

    The groups and the state are this object's (`step_with_`), so that whoever reads, replaces, saves or restores them
    sees one ordinary optimizer. A scheduler that cycles the momentum, such as OneCycleLR, gives each group a
    "momentum": for AdamW's groups, beta1.
    """

    def __init__(self, muon: Muon, adamw: Optimizer) -> None:
        self.methods: dict[str, Any] = {"muon": muon, "adamw": adamw}
        groups = [group | {"method": name} for name, method in self.methods.items() for group in method.param_groups]
        super().__init__(groups, defaults={})
        self.defaults = {"momentum": muon.defaults["momentum"]}  # what a scheduler looks at; the groups have it all

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of each method on its own groups."""
        loss = run_closure(closure)
        for name, method in self.methods.items():
            groups = [group for group in self.param_groups if group["method"] == name]
            step_with_(method, [_with_cycled_beta1(group) for group in groups], self.state)
        return loss

    def use_cuda_graphs(self, wanted: bool) -> None:
        """Whether Muon's updates are replayed as CUDA graphs."""
        self.methods["muon"].cuda_graphs = wanted

    def warm_up_(self) -> None:
        """Compile what Muon's steps will need; nothing is trained."""
        self.methods["muon"].warm_up_([group for group in self.param_groups if group["method"] == "muon"])

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"methods": self.methods}


@dataclass(frozen=True)
class Schedule:
    """The learning rate at each step, as a multiple of the base rate.

        m(s) = min(1, (s + 1) / warmup_steps, fall(s))

    fall goes from 1 to final_fraction:

        constant   never
        wsd        linearly over the last decay_fraction of total_steps (warmup, stable, decay)
        cosine     along half a cosine from the end of the warmup to total_steps

    name: constant, wsd or cosine
    warmup_steps: steps of linear warmup; 0 for none
    total_steps: length of the run; later steps keep the last value
    decay_fraction: share of total_steps in which wsd decays
    final_fraction: multiple of the base rate at total_steps

    Raises TypeError and ValueError for a setting that makes no schedule; the message says what would.
    """

    name: str = "wsd"
    warmup_steps: int = 100
    total_steps: int = 1000
    decay_fraction: float = 0.3
    final_fraction: float = 0.0

    def __post_init__(self) -> None:
        check_types(self)
        check_choice("schedule", self.name, SCHEDULES)
        check_bounds(self, "warmup_steps", least=0)
        check_bounds(self, "total_steps", least=1)
        check_bounds(self, "decay_fraction", above=0, most=1)
        check_bounds(self, "final_fraction", least=0, most=1)
        if self.warmup_steps > self.total_steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} is longer than total_steps={self.total_steps}: "
                f"use {self.total_steps // 3} or less"
            )

    def __call__(self, step: int | float) -> float:
        """The multiplier at a step, counted from 0; a fraction of a step is allowed."""
        warmup = (step + 1) / self.warmup_steps if self.warmup_steps else 1.0
        return min(1.0, warmup, self._fall(step))

    def _fall(self, step: int | float) -> float:
        left = max(0.0, self.total_steps - step)
        match self.name:
            case "wsd":
                share = min(1.0, left / (self.decay_fraction * self.total_steps))
            case "cosine":
                share = min(1.0, left / max(1, self.total_steps - self.warmup_steps))
                share = 0.5 - 0.5 * math.cos(math.pi * share)
            case _:
                return 1.0
        return self.final_fraction + (1.0 - self.final_fraction) * share

    def fitted_to(self, total_steps: int) -> Schedule:
        """The same shape for a run of another length; the warmup stays, but at most a third of it."""
        return replace(self, total_steps=total_steps, warmup_steps=min(self.warmup_steps, max(0, total_steps // 3)))


def set_lr_(optimizer: Optimizer, multiplier: float) -> None:
    """Set each group's learning rate to multiplier times the one it started with.

    The first call remembers each group's rate as its `initial_lr`. A rate kept in a tensor is filled in place, so that
    what was compiled or captured around it sees the change.

    Raises ValueError where a group has no learning rate: such an optimizer sets its own.
    """
    for group in optimizer.param_groups:
        if group.get("lr") is None:
            raise ValueError(f"{type(optimizer).__name__} sets its own learning rate (lr=None): no schedule can")
        lr = multiplier * group.setdefault("initial_lr", float(group["lr"]))
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
