"""Optimizers and learning-rate schedules, each named by one word in a parameter file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Muon, Optimizer

from hybridlab.base.settings import check_bounds, check_choice, check_types

OPTIMIZERS = ("adamw", "adam", "muon", "sgd")
SCHEDULES = ("constant", "wsd", "cosine")
OUTPUT_HEADS = ("head", "lm_head", "classifier", "score")
COMPANION_LR = 3e-4  # AdamW's, beside Muon
LARGEST_LR = 1000

ParamGroup = dict[str, Any]


@dataclass(frozen=True)
class OptimizerConfig:
    """Which optimizer, and its settings.

    name: adamw, adam, muon (for hidden matrices, with AdamW for the rest) or sgd
    lr: base learning rate; with muon, of the hidden matrices
    betas: Adam's decay rates of the first and second moment
    eps: added to Adam's denominator
    weight_decay: of parameters of two or more dimensions; norms and biases are not decayed. None is 0.1, and 0 with
        adam, which would mix it into its moments
    momentum: of muon and sgd
    adamw_lr: with muon, the learning rate of everything else; None is 3e-4

    Raises TypeError and ValueError for a setting that makes no optimizer; the message says what would.
    """

    name: str = "adamw"
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float | None = None
    momentum: float = 0.95
    adamw_lr: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.betas, list):
            object.__setattr__(self, "betas", tuple(self.betas))
        check_types(self)
        check_choice("optimizer", self.name, OPTIMIZERS)
        check_bounds(self, "lr", "adamw_lr", above=0, most=LARGEST_LR)
        check_bounds(self, "eps", above=0)
        check_bounds(self, "weight_decay", least=0)
        check_bounds(self, "betas", "momentum", least=0, below=1)
        if self.name == "adam" and self.weight_decay:
            raise ValueError("adam mixes weight decay into its moments: use weight_decay=0.0 or name='adamw'")
        if self.adamw_lr is not None and self.name != "muon":
            raise ValueError(f"adamw_lr goes with name='muon': for {self.name!r}, set lr")

    @property
    def decay(self) -> float:
        """`weight_decay`, or what None means."""
        meant = 0.0 if self.name == "adam" else 0.1
        return meant if self.weight_decay is None else self.weight_decay

    @classmethod
    def tuned(cls, **changes: Any) -> OptimizerConfig:
        """The best AdamW found for GPT-2 Small on 15 million tokens: 3e-4, beta2 0.999, decay 0.1."""
        return replace(cls(weight_decay=0.1), **changes)

    @classmethod
    def vanilla(cls, **changes: Any) -> OptimizerConfig:
        """The plan's own baseline: Adam at 6e-4 without decay (its schedule is constant)."""
        return replace(cls(name="adam", lr=6e-4, weight_decay=0.0), **changes)


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """The optimizer that config names, over the model's trainable parameters.

    Move the model to its device first: on CUDA, Adam, AdamW and SGD take their fused form.

    Raises ValueError where nothing in the model is trainable, or muon finds no hidden matrix in it.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("the model has no trainable parameter: set requires_grad on some")
    groups = decay_groups(parameters, config.decay)
    fused = True if all(parameter.is_cuda for parameter in parameters) else None
    match config.name:
        case "adamw":
            return AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)
        case "adam":
            return Adam(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)
        case "sgd":
            return SGD(groups, lr=config.lr, momentum=config.momentum, fused=fused)
        case _:
            return _build_muon(model, config, fused)


def _build_muon(model: nn.Module, config: OptimizerConfig, fused: bool | None) -> Optimizer:
    hidden = hidden_matrices(model)
    if not hidden:
        raise ValueError("muon needs hidden matrices and the model has none: use name='adamw'")
    muon = Muon(
        hidden,
        lr=config.lr,
        weight_decay=config.decay,
        momentum=config.momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    chosen = set(hidden)
    rest = [p for p in model.parameters() if p.requires_grad and p not in chosen]
    if not rest:
        return muon
    groups, lr = decay_groups(rest, config.decay), config.adamw_lr or COMPANION_LR
    return MuonWithAdamW(muon, AdamW(groups, lr=lr, betas=config.betas, eps=config.eps, fused=fused))


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The trainable two-dimensional weights that are neither an embedding nor the output head.

    A head tied to an embedding is known as that; an untied one by its name: head, lm_head, classifier
    or score.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and parameter.ndim == 2
        and id(parameter) not in embeddings
        and not set(name.split(".")) & set(OUTPUT_HEADS)
    ]


def decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[ParamGroup]:
    """Two optimizer groups: matrices, which decay, and vectors, which do not."""
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in parameters:
        (matrices if parameter.ndim >= 2 else vectors).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def step_with_(method: Optimizer, groups: list[ParamGroup], state: Mapping[Tensor, Any]) -> None:
    """One step of another optimizer, on groups and state that it is lent: they stay the lender's.

    groups: a step of `method` sees these alone; state: by parameter, where it reads and keeps its moments
    """
    method.param_groups, method.state = groups, state  # type: ignore[assignment]
    method.step()


def _with_cycled_beta1(group: ParamGroup) -> ParamGroup:
    """The group; one of AdamW's to which a scheduler gave a "momentum" takes it as its beta1."""
    return group | {"betas": (group["momentum"], group["betas"][1])} if {"betas", "momentum"} <= set(group) else group


class MuonWithAdamW(Optimizer):
    """Muon for some parameters and AdamW for the others, as one optimizer.

    The groups and the state are this object's (`step_with_`), so that whoever reads, replaces, saves or restores them
    sees one ordinary optimizer. Muon's learning rate is scaled by 0.2 sqrt(max(rows, columns)), so that an update has
    about the size of AdamW's. A scheduler that cycles the momentum, such as OneCycleLR, gives each group a "momentum":
    for AdamW's groups, beta1.

    Source: https://kellerjordan.github.io/posts/muon/; the scale, https://arxiv.org/abs/2502.16982.
    """

    def __init__(self, muon: Muon, adamw: AdamW) -> None:
        self.methods: dict[str, Optimizer] = {"muon": muon, "adamw": adamw}
        groups = [group | {"method": name} for name, method in self.methods.items() for group in method.param_groups]
        super().__init__(groups, defaults={})
        self.defaults = {"momentum": muon.defaults["momentum"]}  # what a scheduler looks at; the groups have it all

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of each method on its own groups."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for name, method in self.methods.items():
            groups = [group for group in self.param_groups if group["method"] == name]
            step_with_(method, [_with_cycled_beta1(group) for group in groups], self.state)
        return loss

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
