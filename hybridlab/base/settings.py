"""Refuses settings that cannot be meant; each message names the setting, its value and what would do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from itertools import repeat
from types import UnionType
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin, get_type_hints

import numpy as np

from hybridlab.base.errors import UserError, nearest

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


T = TypeVar("T")

LARGEST = 1e18
"""Of any setting: torch takes whole numbers up to 2**63, and float32 what is below 3.4e38."""


def check_types(settings: DataclassInstance) -> None:
    """Hold every field against its annotation; a bool is no int, an int is a float.

    numpy's scalars become plain numbers in place, since a checkpoint holds no others. Raises TypeError.
    """
    kinds = _kinds(type(settings))
    for field in fields(settings):
        value = _plain(getattr(settings, field.name))
        object.__setattr__(settings, field.name, value)
        if not fits(value, kinds[field.name]):
            is_text = isinstance(value, str) and "float" in str(field.type)
            hint = " (YAML reads 1e-4 as text: write 1.0e-4)" if is_text else ""
            raise TypeError(f"{field.name} is {value!r}: {field.type} is wanted{hint}")


def check_bounds(settings: DataclassInstance, *names: str, **bounds: float) -> None:
    """Hold fields of numbers, or of tuples of them, between bounds as `broken_bound` takes them; None passes.

    Raises ValueError.
    """
    for name in names:
        value = getattr(settings, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and (said := broken_bound(number, **bounds)):
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
    """Say what a number outside of its bounds must be, as "at least 1"; None where it is inside.

    Whatever the bounds, NaN, the infinities and what is above LARGEST are outside: no setting means anything by them.
    """
    most = min(most, LARGEST if number > LARGEST else math.inf)
    if least <= number <= most and above < number < below:
        return None
    bounds = {"at least": least, "above": above, "at most": most, "below": below}
    said = [f"{word} {bound:g}" for word, bound in bounds.items() if math.isfinite(bound)]
    return " and ".join(said if abs(number) < math.inf else ["finite", *said])


def check_choice(what: str, name: str, known: Iterable[str]) -> None:
    """Raise ValueError for a name that is not among the known ones; `what` says of what it is a name."""
    if name not in known:
        raise ValueError(f"{what} {name!r} is unknown: {nearest(name, known)}")


_kinds = cache(get_type_hints)


def settings_from(kind: type[T], values: Mapping[str, Any], place: str) -> T:
    """Settings of a class from a mapping, as a YAML file has them: mappings become settings too, and lists tuples.

    place: where the values stand, for messages

    Raises UserError, in one line, for a setting that is unknown, missing or wrong.
    """
    known = [field for field in fields(kind) if field.init]  # type: ignore[arg-type]
    names = [field.name for field in known]
    for name in values:
        if name not in names:
            raise UserError(f"{place}: there is no setting {name!r}: {nearest(name, names)}")
    for field in known:
        if field.name not in values and field.default is MISSING and field.default_factory is MISSING:
            raise UserError(f"{place}: {field.name} is missing: write it down")
    kinds = get_type_hints(kind)
    given = {name: _of_kind(kinds[name], value, f"{place}: {name}") for name, value in values.items()}
    try:
        return kind(**given)
    except (TypeError, ValueError) as error:
        raise UserError(f"{place}: {error}") from None


def _of_kind(kind: Any, value: Any, place: str) -> Any:
    kinds = get_args(kind) if get_origin(kind) is UnionType else (kind,)
    settings: Any = next((one for one in kinds if is_dataclass(one)), None)
    if settings and isinstance(value, Mapping):
        return settings_from(settings, value, place)
    if isinstance(value, list) and any(get_origin(one) is tuple for one in kinds):
        return tuple(tuple(item) if isinstance(item, list) else item for item in value)
    return value


def _plain(value: Any) -> Any:
    """The value with numpy's scalars as Python's, inside a tuple too; the value itself where there are none."""
    if type(value) is tuple:
        return tuple(map(_plain, value))
    return value.item() if isinstance(value, np.generic) else value


def fits(value: object, kind: Any) -> bool:
    """Whether a value is of a type; a bool is no int, an int is a float."""
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
            and all(map(fits, value, repeat(inner[0]) if any_length else inner))
        )
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)
