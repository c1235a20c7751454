"""``molehill probe``: what the experts of a run or an adapter do with rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from molehill.extras import needs
from molehill.terminal import Json, explained, print_json, show_table

EXTRA = "simulation"


def probe(
    source: Annotated[
        Path, typer.Argument(metavar="RUN_OR_ADAPTER", help="Folder of a finished run, an adapter, or a LoRA of peft.")
    ],
    names: Annotated[
        list[str] | None,
        typer.Option(
            "--probe", metavar="NAME", help="A diagnostic; may be repeated.", show_default="those of the run, or all"
        ),
    ] = None,
    rows: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Rows to read.", show_default="those a simulation held out")
    ] = None,
    gate: Annotated[
        str, typer.Option(metavar="CLIENT|global", help="Whose gate; of a simulation, on whose rows.")
    ] = "global",
    base: Annotated[str | None, typer.Option(help="Where the base model is now.", show_default="as in the run")] = None,
    state: Annotated[
        Path | None, typer.Option(metavar="DIR", help="--state of a lab machine, for its own gate.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Look at the routes of a run or an adapter: which experts its tokens go to, site by site.

    The tables show each figure over the sites; --json has all of them.
    """
    with explained(as_json):
        with needs(EXTRA):
            from molehill_export.probe import look
            from molehill_simulation.source import open_source

        console = Console(stderr=True, quiet=as_json)
        with console.status("Reading the rows"):
            found = look(open_source(source, base, state), names or (), gate, rows)
        if as_json:
            print_json({"gate": gate, "rows": found.rows, "probes": found.figures})
            return
        for name, figures in found.figures.items():
            show_table(_table(f"{name}, {found.rows} rows", figures))


def _table(title: str, figures: Mapping[str, float]) -> Table:
    """Every figure with its mean and its extremes over the sites."""
    by_figure: dict[str, dict[str, float]] = {}
    for key, value in figures.items():
        site, _, figure = key.partition("/")
        by_figure.setdefault(figure, {})[site] = value
    table = Table(box=None, title=Text(title, "bold"), title_justify="left", pad_edge=False)
    table.add_column("figure")
    for column in ("mean", "lowest", "highest"):
        table.add_column(column, justify="right")
    table.add_column("where", style="dim", overflow="fold")
    for figure, values in by_figure.items():
        lowest, highest = min(values.values()), max(values.values())
        where = max(values, key=lambda site: values[site])
        shown = (sum(values.values()) / len(values), lowest, highest)
        table.add_row(Text(figure), *(f"{value:.3f}" for value in shown), Text(where))
    return table
