"""What an optimizer's step is given: a closure by its caller, groups and state by the optimizer around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def run_closure(closure: Callable[[], float] | None) -> float | None:
    """The loss of a step's closure, computed with gradients; None where none was given."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def lend_(method: Optimizer, groups: list[dict[str, Any]], state: Mapping[Tensor, Any]) -> None:
    """Let another optimizer work on groups and state that stay the lender's.

    groups: `method` sees these alone; state: by parameter, where it reads and keeps its moments
    """
    method.param_groups, method.state = groups, state  # type: ignore[assignment]


def step_with_(method: Optimizer, groups: list[dict[str, Any]], state: Mapping[Tensor, Any]) -> None:
    """One step of another optimizer, on what it is lent (`lend_`)."""
    lend_(method, groups, state)
    method.step()


def keep_formats_(optimizer: Optimizer, loaded: Mapping[str, Any]) -> None:
    """Give a state that was just loaded its own number formats back: torch gives it those of the weights.

    loaded: what `load_state_dict` took
    """
    groups = zip(loaded["param_groups"], optimizer.param_groups, strict=True)
    for number, param in ((n, p) for saved, own in groups for n, p in zip(saved["params"], own["params"], strict=True)):
        for name, value in loaded["state"].get(number, {}).items():
            if isinstance(value, Tensor) and value.dtype != optimizer.state[param][name].dtype:
                optimizer.state[param][name] = value.to(param.device)
