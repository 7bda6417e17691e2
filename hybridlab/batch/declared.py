"""A notebook's parameters: what its tagged cell declares."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from hybridlab.base.errors import UserError
from hybridlab.base.settings import fits

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

    def wanted(self) -> str:
        """The parameter's type in words, for a message."""
        return _in_words(self.kind)


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
        raise UserError(f"{name}: line {error.lineno} of the parameters cell is not Python") from None
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
                if line.lineno == line.end_lineno and found.wanted() and found.accepts(found.default):
                    return found
    raise UserError(
        f"{notebook}: line {line.lineno} of the parameters cell, `{ast.unparse(line)}`, "
        "is not a one-line 'name: type = literal' with a literal of that type "
        "(int, float, str, bool, list[...], `| None`)"
    )
