"""What was measured before, with the same parameters, beside what is measured now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hybridlab.results.claims import VOLATILE_UNITS

Entry = Mapping[str, Any]

MOST = 8
"""Earlier measurements that an entry keeps, the latest ones."""

ORIGIN = ("git_commit", "device", "host")
"""What tells two measurements apart; of equal ones the later stays alone."""


def repeats_of(before: Entry | None, entry: Entry) -> list[dict[str, Any]]:
    """What a new entry keeps of the one that it replaces, and of those that this one kept, the earliest first.

    Each has its origin, its torch and its figures, claim and quantity by name: times and memory, and of those that
    repeat the ones that differ from the new entry's. An entry with other parameters asked something else, and is
    dropped; a parameter that only one of them has counts as equal.
    """
    if before is None:
        return []
    old, new = before["parameters"], entry["parameters"]
    if any(old[name] != new[name] for name in old.keys() & new.keys()):
        return []
    own = {name: figure for name, figure, _ in _figures(entry)}
    earlier = {_origin(repeat): repeat for repeat in [*before.get("repeats", ()), _repeat(before, own)]}
    earlier.pop(_origin(entry), None)
    return [repeat for repeat in earlier.values() if repeat["figures"]][-MOST:]


def _repeat(entry: Entry, other: Mapping[str, Any]) -> dict[str, Any]:
    """What an entry measured otherwise than another one."""
    origin = {name: entry[name] for name in ORIGIN if name in entry}
    torch = {"torch": entry["versions"]["torch"]} if "versions" in entry else {}
    figures = {
        name: figure
        for name, figure, volatile in _figures(entry)
        if name in other and (volatile or other[name] != figure)
    }
    return origin | torch | {"figures": figures}


def _figures(entry: Entry) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """Name, figure and whether it may differ between two equal runs."""
    for claim in entry["claims"]:
        for quantity in claim["quantities"]:
            figure = {end: quantity.get(end) for end in ("value", "low", "high")}
            yield f"{claim['id']}.{quantity['name']}", figure, quantity["unit"] in VOLATILE_UNITS


def _origin(measured: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(measured.get(name) for name in ORIGIN)
