"""``molehill card``: what a run folder can say to others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from molehill.extras import needs
from molehill.terminal import Json, explained, print_json

EXTRA = "simulation"


def card(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Where to write; nothing is written over.", show_default="RUN/card"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a model card, a data card (counts only) and a privacy report in plain words, all from the run folder."""
    with explained(as_json):
        with needs(EXTRA):
            from molehill_simulation.card import write_cards

        made = write_cards(run, out)
        if as_json:
            print_json({"written": [str(path) for path in made]})
            return
        for path in made:
            typer.echo(str(path))
        typer.echo("The last two name the owners: read them before you pass them on.")
