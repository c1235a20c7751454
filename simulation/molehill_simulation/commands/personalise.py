"""``molehill personalise``: an owner that comes after the last round makes its personal model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from molehill.extras import needs
from molehill.terminal import INTERRUPTED, Json, explained, print_json, show_table
from molehill.words import counted
from molehill_simulation.commands.asking import EXTRA, Base

if TYPE_CHECKING:
    from molehill_simulation.newcomer import Newcomer

__all__ = ["EXTRA", "personalise"]


def personalise(
    run: Annotated[Path, typer.Argument(metavar="RUN|ADAPTER", help="Folder of a finished run, or the adapter in it.")],
    data: Annotated[
        Path, typer.Option("--data", metavar="FILE", help="The owner's rows, with the columns of the run's.")
    ],
    name: Annotated[str, typer.Option("--name", help="What the owner is called, for --as.")] = "newcomer",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder to write.", show_default="RUN-NAME")
    ] = None,
    candidate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="What may be made, the preferred first; repeatable. See: molehill methods candidate.",
            show_default="as in the run, or all",
        ),
    ] = None,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Make the personal model of an owner that took no part in a run, of its final model and the owner's rows.

    It is written as a folder that generate, chat, expert and export take, with --as or --gate NAME. The run is left as
    it is.
    """
    with explained(as_json):
        try:
            with needs(EXTRA), Console(stderr=True, quiet=as_json).status("Making the personal model"):
                from molehill_simulation.newcomer import personalise as make

                made = make(run, data, name, out, candidates=candidate or (), base=base)
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        if as_json:
            print_json(made.as_dict())
            return
        show_table(*_told(made))


def _told(made: Newcomer) -> list[Table | Text]:
    """A table of the three models, and below it what was chosen and gained."""
    from molehill_simulation.figures import Gain

    measures = [each for each in made.measures if each.tabled]
    title = f"{made.name}, on {counted(made.n_test, 'held-out row')}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, collapse_padding=True)
    table.add_column("model")
    for measure in measures:
        table.add_column(measure.title, justify="right")
    for stage, scores in made.stages.items():
        found = scores.model_dump()
        cells = []
        for measure in measures:
            ends = measure.within(found)
            between = f" ({' to '.join(map(measure.write, ends))})" if ends else ""
            cells.append(f"{measure.write(measure.of(found))}{between}")
        table.add_row(stage, *cells)
    gained = [
        f"{measure.title} {Gain(value=gain.value, interval=gain.interval).told(measure)}"
        for measure in measures
        if (gain := made.gains.get(measure.name)) is not None
    ]
    lines = [f"personalised over global, on the same rows: {'; '.join(gained)} (in brackets: 95%)"] if gained else []
    lines += [f"{made.chosen}: {made.why}", *([made.cut] if made.cut else [])]
    lines.append(f"written: {made.out}; ask it with --as {made.name}, export it with --gate {made.name}")
    return [table, *map(Text, lines)]
