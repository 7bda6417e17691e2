"""Refuses settings that cannot be meant; each message names the setting, its value and what would do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import cache
from types import UnionType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

import numpy as np

from hybridlab.base.errors import nearest

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def check_types(settings: DataclassInstance) -> None:
    """Hold every field against its annotation; a bool is no int, an int is a float.

    numpy's scalars become plain numbers in place, since a checkpoint holds no others.
    Raises TypeError, and ValueError for NaN and the infinities.
    """
    kinds = _kinds(type(settings))
    for field in fields(settings):
        given = getattr(settings, field.name)
        value = _plain(given)
        if value is not given:
            object.__setattr__(settings, field.name, value)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{field.name} is {number}: it must be finite")
        if not fits(value, kinds[field.name]):
            is_text = isinstance(value, str) and "float" in str(field.type)
            hint = " (YAML reads 1e-4 as text: write 1.0e-4)" if is_text else ""
            raise TypeError(f"{field.name} is {value!r}: {field.type} is wanted{hint}")


def check_bounds(
    settings: DataclassInstance,
    *names: str,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
) -> None:
    """Hold fields of numbers, or of tuples of them, between bounds; None passes. Raises ValueError.

    Whatever the bounds, NaN and the infinities are refused: no setting means anything by them.
    """
    for name in names:
        value = getattr(settings, name)
        for number in value if isinstance(value, tuple) else (value,):
            said = None if number is None else broken_bound(number, least=least, above=above, most=most, below=below)
            if said:
                off = ", or None" if "None" in str(settings.__dataclass_fields__[name].type) else ""
                raise ValueError(f"{name} is {number}: it must be {said}{off}")


def broken_bound(
    number: float,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
) -> str | None:
    """Say what a number outside of its bounds must be, as "at least 1"; None where it is inside and finite."""
    if least <= number <= most and above < number < below:
        return None
    bounds = {"at least": least, "above": above, "at most": most, "below": below}
    said = [f"{word} {bound:g}" for word, bound in bounds.items() if math.isfinite(bound)]
    return " and ".join(said if math.isfinite(number) else ["finite", *said])


def check_choice(what: str, name: str, known: Iterable[str]) -> None:
    """Raise ValueError for a name that is not among the known ones; `what` says of what it is a name."""
    if name not in known:
        raise ValueError(f"{what} {name!r} is unknown: {nearest(name, known)}")


_kinds = cache(get_type_hints)


def _plain(value: Any) -> Any:
    """The value with numpy's scalars as Python's, inside a tuple too; the value itself where there are none."""
    if isinstance(value, np.generic):
        return value.item()
    if type(value) is tuple and any(isinstance(item, np.generic) for item in value):
        return tuple(_plain(item) for item in value)
    return value


def fits(value: object, kind: Any) -> bool:
    """Whether a value is of a type; a bool is no int, an int is a float, the items of a tuple are all of one type."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return any(fits(value, one) for one in inner)
    if origin is Mapping:
        return isinstance(value, Mapping) and all(fits(item, inner[1]) for item in value.values())
    if origin in (list, tuple):
        any_length = origin is list or inner[-1] is ...
        return (
            isinstance(value, origin)
            and (any_length or len(value) == len(inner))
            and all(fits(item, inner[0]) for item in value)
        )
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)
