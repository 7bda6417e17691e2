"""Tables, links and templates as documents write them."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined

from hybridlab.base.errors import printable
from hybridlab.report.evidence import MAIN


class Markdown(str):
    """Text of ours that may hold marks, links and tables; any other is escaped where a document shows it."""

    __slots__ = ()


BY_OTHER_MEANS = ("holds, but by other means", "cannot hold, but by other means it does")
VERDICTS = {verdict: Markdown(f"**{verdict}**") for verdict in ("holds", "fails", "cannot hold", *BY_OTHER_MEANS)}
VERDICTS |= {"predicted nothing": Markdown("*predicted nothing*")}


def escaped(value: Any) -> str:
    """What a document shows of a value: on one line, where no sign of it marks, links, tags or ends a cell."""
    if isinstance(value, Markdown):
        return value
    line = html.escape(printable(" ".join(str(value).split())), quote=False)
    return re.sub(r"[\\`*|]|(?<=\])(?=[(\[])", r"\\\g<0>", line)


def render(template: str, **context: Any) -> Markdown:
    """Fill in a file of `templates/`; all that is no `Markdown` is escaped.

    There, `rows | table` is a Markdown table, or "Not run yet."; `pictures | beginning("vram")` shows the pictures
    whose names begin so, or nothing. Of several empty lines one stays.

    Raises jinja2's UndefinedError for a name that `context` lacks.
    """
    how: dict[str, Any] = {"undefined": StrictUndefined, "trim_blocks": True, "keep_trailing_newline": True}
    environment = Environment(loader=PackageLoader("hybridlab.report"), finalize=escaped, **how)
    environment.filters |= {"table": markdown_table, "beginning": _pictures_beginning}
    return Markdown(re.sub(r"\n{3,}", "\n\n", environment.get_template(template).render(context)))


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> Markdown:
    """Records as a table, a column for each key; None is a dash; texts stand left, numbers right."""
    if not rows:
        return Markdown("Not run yet.")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    heads = [escaped(column) for column in columns]
    cells = [["–" if (cell := row.get(column)) is None else escaped(cell) for column in columns] for row in rows]
    sides = ["---" if any(isinstance(row.get(column), str) for row in rows) else "---:" for column in columns]
    return Markdown("\n".join(f"| {' | '.join(line)} |" for line in [heads, sides, *cells]))


def verdict_word(verdict: str) -> str:
    """A verdict as documents set it: what decides stands out."""
    return VERDICTS.get(verdict, verdict)


def notebook_link(notebook: str, profile: str = MAIN, *, docs: str = "../", short: bool = False) -> Markdown:
    """A link to an executed notebook; docs: the way from the document to the project's root; short: by its number."""
    file = quote(f"{docs}executed/{profile}/{notebook}.ipynb")
    return Markdown(f"[{notebook[:2] if short else notebook}]({file})")


def _pictures_beginning(pictures: Mapping[str, str], name: str) -> Markdown:
    """pictures: file name below docs/images -> its title"""
    shown = [f"![{escaped(title)}](images/{file})" for file, title in pictures.items() if file.startswith(name)]
    return Markdown("\n\n".join(shown))
