"""A notebook's parameters: those that its tagged cell declares, and the values given for them."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

import yaml

from hybridlab.base.errors import UserError, nearest
from hybridlab.base.settings import fits
from hybridlab.batch.yaml_files import Given, as_written, is_misread

TYPES = {"int": int, "float": float, "str": str, "bool": bool, "list": list}
WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "nothing"}


@dataclass(frozen=True)
class Parameter:
    """One line `name: kind = default` of the parameters cell; its kind is a type of `TYPES`, or several with `|`."""

    name: str
    kind: Any
    default: Any

    def accepts(self, value: Any) -> bool:
        """Whether a value is of the parameter's type; a bool is no int, an int is a float."""
        return fits(value, self.kind)


def declared_parameters(notebook: Mapping[str, Any], name: str) -> dict[str, Parameter]:
    """Read the cell tagged `parameters`: one-line annotated literals, in their order.

    Raises UserError where there is no such cell, or one of its lines is something else.
    """
    tagged = [cell for cell in notebook["cells"] if "parameters" in cell.get("metadata", {}).get("tags", [])]
    if not tagged:
        raise UserError(f"{name}: no cell is tagged 'parameters': add the tag to the cell that declares them")
    try:
        lines = ast.parse("".join(tagged[0]["source"])).body
    except SyntaxError as error:
        how = "write one 'name: type = value' per line"
        raise UserError(f"{name}: line {error.lineno} of the parameters cell is not Python: {how}") from None
    parameters = [_parameter(line, name) for line in lines]
    return {parameter.name: parameter for parameter in parameters}


def defaults(declared: Mapping[str, Parameter]) -> dict[str, Any]:
    """Give each declared parameter's default."""
    return {name: parameter.default for name, parameter in declared.items()}


def _in_words(kind: Any) -> str:
    """A type in words. Raises KeyError for one that no parameter has."""
    inner = get_args(kind)
    if get_origin(kind) is UnionType:
        return " or ".join(map(_in_words, inner))
    if not inner:
        return WORDS[kind]
    (item,) = inner
    return f"a list (each item {_in_words(item)})"


def _parameter(line: ast.stmt, notebook: str) -> Parameter:
    match line:
        case ast.AnnAssign(target=ast.Name(id=name), annotation=kind, value=ast.expr() as literal):
            with suppress(ValueError, NameError, TypeError, KeyError, AttributeError):
                found = Parameter(name, eval(ast.unparse(kind), {"__builtins__": {}}, TYPES), ast.literal_eval(literal))
                if line.lineno == line.end_lineno and _in_words(found.kind) and found.accepts(found.default):
                    return found
    raise UserError(
        f"{notebook}: line {line.lineno} of the parameters cell, `{ast.unparse(line)}`, "
        "is not a one-line 'name: type = literal' with a literal of that type "
        "(int, float, str, bool, list[...], `| None`)"
    )


def value_on_command_line(name: str, raw: str, declared: Mapping[str, Parameter]) -> Given:
    """Read a `-p NAME VALUE`, where the declared type decides what the text means."""
    if name in declared:
        for reading in _readings(raw):
            if declared[name].accepts(reading):
                return Given(name, reading, raw, "after -p")
    return Given(name, raw, raw, "after -p")


def from_options(output: Path, resume: bool, declared: Mapping[str, Parameter], root: Path) -> list[Given]:
    """Set the parameters `results` and `resume`, where a notebook has them, to what -o and --resume ask for.

    output: the executed copy; root: the project's folder, from which a folder inside it is named
    """
    folder = output.parent.resolve()
    name = (folder.relative_to(root) if folder.is_relative_to(root) else folder).as_posix()
    asked = [Given("results", name, name, "from -o"), *([Given("resume", True, "true", "from --resume")] * resume)]
    return [item for item in asked if item.name in declared and declared[item.name].accepts(item.value)]


def _readings(raw: str) -> Iterable[Any]:
    """Offer what a text may mean: what YAML makes of it, a number, the text itself; nothing written is no null."""
    with suppress(yaml.YAMLError):
        node, value = yaml.compose(raw, yaml.SafeLoader), yaml.safe_load(raw)
        if node and not isinstance(value, str) and not is_misread(as_written(node), value):
            yield value
    if (number := _as_number(raw)) is not None:
        yield number
    yield raw


def checked_values(given: Iterable[Given], declared: Mapping[str, Parameter], name: str) -> dict[str, Any]:
    """Hold given values against the declared parameters; the last one given for a name counts.

    Raises UserError for a parameter that is unknown (the message names the nearest) or of the wrong type.
    """
    values = {}
    for item in given:
        if item.name not in declared:
            hint = nearest(item.name, declared) if declared else "it has none"
            raise UserError(f"'{item.name}' {item.place} is no parameter of {name}: {hint}")
        parameter = declared[item.name]
        if not parameter.accepts(item.value) or is_misread(item.raw, item.value):
            raise UserError(_wrong_type(item, parameter))
        values[item.name] = item.value
    return values


def _wrong_type(item: Given, parameter: Parameter) -> str:
    scalar = not isinstance(item.value, str | list | dict | None)
    if isinstance(item.value, float) and not math.isfinite(item.value):
        said = f"{item.raw} is no finite number"
    elif is_misread(item.raw, item.value) or (scalar and item.raw not in (str(item.value), str(item.value).lower())):
        said = f"YAML reads {item.raw} as {item.value!r}"
    else:
        said = f"{item.value!r} is {_described(item.value)}"
    return f"{item.name}: {said}, {_in_words(parameter.kind)} is wanted: {_fix(item, parameter)} {item.place}"


def _described(value: Any) -> str:
    kinds = WORDS | {float: "a number with a fraction", list: "a list", dict: "a mapping", NoneType: "empty"}
    return kinds.get(type(value), f"a {type(value).__name__}")


def _fix(item: Given, parameter: Parameter) -> str:
    number = _as_number(item.value) if isinstance(item.value, str) else item.value
    if str(item.value) in ("nan", "inf", "-inf"):
        return f"write for example {json.dumps(parameter.default)}"
    if is_misread(item.raw, item.value) and parameter.accepts(item.value):
        return f"write {item.raw.lstrip('0')}, or {item.value}" if str(item.raw).isdigit() else f"write {item.value}"
    written = isinstance(item.raw, str) and item.raw and not isinstance(item.value, list | dict)
    if written and parameter.accepts(item.raw):
        return f"write '{item.raw}' in quotes"
    if isinstance(number, float) and abs(number) < 2**53 and number.is_integer() and parameter.accepts(int(number)):
        return f"write {int(number)}"
    if isinstance(item.value, str) and number is not None and parameter.accepts(number):
        return f"write {_yaml_number(item.value)}"
    return f"write for example {json.dumps(parameter.default)}"


def _as_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _yaml_number(text: str) -> str:
    """Write a number so that YAML 1.1 reads a number: 1e-4 becomes 1.0e-4, 1e4 becomes 1.0e+4."""
    mantissa, mark, exponent = text.strip().lower().partition("e")
    mantissa += "" if "." in mantissa else ".0"
    sign = "" if not mark or exponent.startswith(("+", "-")) else "+"
    return f"{mantissa}{mark}{sign}{exponent}"
