"""``molehill audit``: the log of who took part in a run, and what became of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from molehill.terminal import Json, explained, print_json

app = typer.Typer(help="The audit log of a run.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keep ``verify`` a command of its own while there is no other."""


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(help="audit.jsonl of a run folder.")],
    head: Annotated[
        str | None,
        typer.Option(metavar="HASH", help="A hash noted earlier, which the log must still hold.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check that no line was changed, removed or reordered; a bad one is named, and the exit code is 3."""
    with explained(as_json):
        from molehill_server import audit

        verdict = audit.verify(file, head)
        if as_json:
            print_json({"entries": verdict.entries, "head": verdict.head})
        else:
            typer.echo(f"{file}: {verdict.entries} entries, all whole; the last one has the hash {verdict.head}")
