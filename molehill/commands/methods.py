"""``molehill methods``: what a configuration can name."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from molehill.errors import ConfigError
from molehill.terminal import Json, explained, print_json, say, show_table

if TYPE_CHECKING:
    from molehill.registry import Method

EXTRA = "simulation"  # methods live in all parts

_KEYS = ("name", "axis", "paper", "url", "seeds", "summary")


def methods(
    axis: Annotated[str | None, typer.Argument(metavar="AXIS", help="Of this axis only.", show_default=False)] = None,
    search: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="That have this in axis, name, text or paper.", show_default=False),
    ] = None,
    seeds: Annotated[
        bool, typer.Option("--seeds", help="Show the codes of the project's list of systems, and search in them.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List the methods that a configuration can name, by axis: what they do, and the paper they are from."""
    with explained(as_json):
        from molehill import registry

        if axis is not None and axis not in registry.axes():
            raise ConfigError(f"unknown axis {axis!r}", mend=f"Did you mean {', '.join(_near(axis))}?")
        found = [method for method in registry.methods(axis) if search is None or _has(method, search, seeds=seeds)]
        if as_json:
            print_json([{key: getattr(method, key) for key in _KEYS} for method in found])
            return
        if not found:
            say(Text("no method is like that"))
        width = max((len(method.name) for method in found), default=0)
        parts: list[Table | Text] = []
        for name, group in groupby(found, lambda method: method.axis):
            parts.append(Text.assemble((name, "bold"), "  ", (_plain(registry.meaning(name)), "dim")))
            parts += _table(list(group), width, seeds=seeds), Text()
        show_table(*parts)


def _near(word: str) -> list[str]:
    """The axes that somebody may mean by a word: by their names, and by what else the field calls them."""
    from molehill import registry

    known: dict[str, list[str]] = {}
    for axis in registry.axes():
        for name in (axis, *registry.words(axis)):
            known.setdefault(name, []).append(axis)
    nearest = difflib.get_close_matches(word.casefold(), known, n=1)
    return known[nearest[0]] if nearest else registry.axes()


def _has(method: Method, search: str, *, seeds: bool) -> bool:
    told = " ".join((method.axis, method.name, method.summary, method.paper, *(method.seeds if seeds else ())))
    return search.casefold() in told.casefold()


def _table(found: Sequence[Method], width: int, *, seeds: bool) -> Table:
    """One line for each: name, what it does, paper; the name is as wide as ``width`` characters."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0), expand=True)
    table.add_column(width=width + 2, no_wrap=True)
    table.add_column(ratio=3)
    table.add_column(ratio=2, style="dim", overflow="fold")
    if seeds:
        table.add_column(ratio=1, style="dim")
    for method in found:
        cells = [f"  {method.name}", _plain(method.summary), method.paper]
        table.add_row(*map(Text, [*cells, " ".join(method.seeds)] if seeds else cells))
    return table


def _plain(docstring: str) -> str:
    return docstring.replace("`", "")
