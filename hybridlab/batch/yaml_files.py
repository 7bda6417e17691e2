"""Values in YAML files, each with what it was written as, so that what YAML 1.1 misreads can be told."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hybridlab.base.errors import UserError
from hybridlab.base.files import PARAMS
from hybridlab.base.text_file import reading

PLAIN = r"[-+]?((0|[1-9]\d*)(\.\d*)?|\.\d+)([eE][-+]?\d+)?"


@dataclass(frozen=True)
class Given:
    """A value given for a parameter: as read, as written (`raw`, a text or a list of such), and where."""

    name: str
    value: Any
    raw: Any
    place: str


def values_in_file(path: Path) -> list[Given]:
    """Read a YAML mapping of parameters, keeping each value as it was written.

    Raises UserError where the file is missing, unreadable, not a mapping, or gives a key twice, also in a mapping
    inside, and for an alias: a few lines of them can stand for a list that fills all memory.
    """
    with reading(path, "parameter file", PARAMS, "not a text file in UTF-8: a YAML file is wanted"):
        text = path.read_text(encoding="utf-8")
    try:
        events = yaml.parse(text, yaml.SafeLoader)
        if any(isinstance(event, yaml.AliasEvent) or getattr(event, "value", "") == "<<" for event in events):
            raise UserError(f"{path}: aliases and merges (*name, <<) are not read: write the values themselves")
        root, values = yaml.compose(text, yaml.SafeLoader), yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path}{_yaml_problem(error)}") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply: write one 'name: value' per line") from None
    if root is None:
        return []
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a mapping: write one 'name: value' per line")
    for name in _given_twice(root):
        raise UserError(f"{path}: '{name}' is given twice: keep one line")
    for key, _ in root.value:
        if (name := key.value) not in values:
            raise UserError(f"{path}: YAML reads the key {name} as {yaml.safe_load(name)!r}: write '{name}' in quotes")
    return [Given(key.value, values[key.value], as_written(node), f"in {path}") for key, node in root.value]


def settings_in_file(path: Path) -> dict[str, Any]:
    """Read a YAML mapping of settings, which may be mappings themselves.

    Raises UserError as `values_in_file` does, and for a number that YAML makes of what is no plain decimal.
    """
    given = values_in_file(path)
    for item in given:
        for said in _misread(item.raw, item.value, item.name):
            raise UserError(f"{path}: {said}: write a plain decimal, or the text in quotes")
    return {item.name: item.value for item in given}


def _misread(raw: Any, value: Any, place: str = "") -> Iterator[str]:
    """Tell of each number that YAML 1.1 made of what is no plain decimal: 12:30, 0200, 0x10, 1_000, .nan."""
    if isinstance(raw, dict) and isinstance(value, dict):
        for (name, written), inner in zip(raw.items(), value.values(), strict=False):
            yield from _misread(written, inner, f"{place}: {name}")
    elif isinstance(raw, list) and isinstance(value, list):
        for written, inner in zip(raw, value, strict=True):
            yield from _misread(written, inner, place)
    elif type(value) in (int, float) and not re.fullmatch(PLAIN, raw):
        yield f"{place}: YAML reads {raw} as {value!r}"


def _given_twice(node: yaml.Node) -> Iterator[str]:
    """The keys that a mapping, or one inside it, gives twice."""
    inside = node.value if isinstance(node, yaml.SequenceNode) else []
    if isinstance(node, yaml.MappingNode):
        names, inside = [key.value for key, _ in node.value], [value for _, value in node.value]
        yield from (name for name in names if names.count(name) > 1)
    for inner in inside:
        yield from _given_twice(inner)


def _yaml_problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    line = f", line {mark.line + 1}" if mark else ""
    said = getattr(error, "problem", None) or "unreadable"
    return f"{line}: not valid YAML: {'a tab: write spaces in its place' if repr(chr(9)) in said else said}"


def as_written(node: yaml.Node | None) -> Any:
    """What a YAML node was written as: a text, or a list or a mapping of what its items were."""
    if isinstance(node, yaml.SequenceNode):
        return [as_written(item) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        return {key.value: as_written(value) for key, value in node.value}
    return str(node.value) if node else ""


def is_misread(raw: Any, value: Any) -> bool:
    """Whether YAML made a number, or one inside, of what is no plain decimal."""
    return any(_misread(raw, value))
