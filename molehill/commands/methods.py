"""``molehill methods``: what a configuration can name."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from molehill.errors import ConfigError
from molehill.terminal import Json, explained, print_json, say

if TYPE_CHECKING:
    from molehill.registry import Method

EXTRA = "simulation"  # methods live in all parts

_KEYS = ("name", "axis", "paper", "url", "seeds", "summary")


def methods(
    axis: Annotated[str | None, typer.Argument(metavar="AXIS", help="Of this axis only.", show_default=False)] = None,
    search: Annotated[
        str | None, typer.Option(metavar="TEXT", help="That have this in name, text or paper.", show_default=False)
    ] = None,
    seeds: Annotated[bool, typer.Option("--seeds", help="With the codes of the project's list of systems.")] = False,
    as_json: Json = False,
) -> None:
    """List the methods that a configuration can name, by axis: what they do, and the paper they are from."""
    with explained(as_json):
        from molehill import registry

        if axis is not None and axis not in registry.axes():
            near = difflib.get_close_matches(axis, registry.axes(), n=3) or registry.axes()
            raise ConfigError(f"unknown axis {axis!r}", mend=f"Did you mean {', '.join(near)}?")
        found = [method for method in registry.methods(axis) if search is None or _has(method, search)]
        if as_json:
            print_json([{key: getattr(method, key) for key in _KEYS} for method in found])
            return
        if not found:
            say(Text("no method is like that"))
        console = Console()
        if not console.is_terminal:
            console.width = 160
        width = max((len(method.name) for method in found), default=0)
        for name, group in groupby(found, lambda method: method.axis):
            console.print(Text.assemble((name, "bold"), "  ", (_plain(registry.meaning(name)), "dim")))
            console.print(_table(list(group), width, seeds=seeds))
            console.print()


def _has(method: Method, search: str) -> bool:
    told = " ".join((method.axis, method.name, method.summary, method.paper, *method.seeds))
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
