"""A notebook's parameters: what its tagged cell declares."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nbformat import NotebookNode

from hybridlab.base.errors import UserError

SCALARS = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false"}


@dataclass(frozen=True)
class Parameter:
    """One line `name: kind = default` of the parameters cell."""

    name: str
    kind: ast.expr
    default: Any


def accepts(kind: ast.expr, value: Any) -> bool:
    """Say whether `value` fits the annotation `kind`; a bool is no int, an int is a float."""
    match kind:
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return accepts(left, value) or accepts(right, value)
        case ast.Constant(value=None):
            return value is None
        case ast.Subscript(slice=item):
            return isinstance(value, list) and all(accepts(item, element) for element in value)
        case ast.Name(id="float"):
            return type(value) in (int, float)
        case ast.Name(id=name):
            return type(value).__name__ == name
    return False


def is_known(kind: ast.expr) -> bool:
    """Say whether an annotation is one of int, float, str, bool, list[...], or these with `|`."""
    match kind:
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return is_known(left) and is_known(right)
        case ast.Subscript(value=ast.Name(id="list"), slice=item):
            return is_known(item)
        case ast.Name(id=name):
            return name in SCALARS
    return isinstance(kind, ast.Constant) and kind.value is None


def wanted(kind: ast.expr) -> str:
    """Name an annotation in words, for a message."""
    match kind:
        case ast.BinOp(left=left, right=right):
            return f"{wanted(left)} or {wanted(right)}"
        case ast.Subscript(slice=item):
            return f"a list (each item {wanted(item)})"
        case ast.Name(id=name):
            return SCALARS[name]
    return "nothing"


def declared_parameters(notebook: NotebookNode, name: str) -> dict[str, Parameter]:
    """Read the cell tagged `parameters`: one-line annotated literals, in their order.

    Raises UserError where there is no such cell, or one of its lines is something else.
    """
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    if not tagged:
        raise UserError(f"{name}: no cell is tagged 'parameters': add the tag to the cell that declares them")
    try:
        lines = ast.parse(tagged[0].source).body
    except SyntaxError as error:
        raise UserError(f"{name}: line {error.lineno} of the parameters cell is not Python") from None
    parameters = [_parameter(line, name) for line in lines]
    return {parameter.name: parameter for parameter in parameters}


def defaults(declared: Mapping[str, Parameter]) -> dict[str, Any]:
    """Give each declared parameter's default."""
    return {name: parameter.default for name, parameter in declared.items()}


def _parameter(line: ast.stmt, notebook: str) -> Parameter:
    match line:
        case ast.AnnAssign(target=ast.Name(id=name), annotation=kind, value=ast.expr() as literal):
            try:
                default = ast.literal_eval(literal)
            except ValueError:
                pass
            else:
                if line.lineno == line.end_lineno and is_known(kind) and accepts(kind, default):
                    return Parameter(name, kind, default)
    raise UserError(
        f"{notebook}: line {line.lineno} of the parameters cell, `{ast.unparse(line)}`, "
        "is not a one-line 'name: type = literal' with a literal of that type "
        "(int, float, str, bool, list[...], `| None`)"
    )
