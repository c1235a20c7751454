"""``molehill init``: a first configuration for rows that somebody has."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from click import IntRange

from molehill import files
from molehill.errors import ConfigError
from molehill.extras import needs
from molehill.terminal import explained

EXTRA = "simulation"


def init(
    rows: Annotated[str, typer.Argument(metavar="ROWS", help="File, datasets folder or hub id of your rows.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The configuration to write.")] = Path("run.toml"),
    kind: Annotated[
        str | None,
        typer.Option(help="What is learnt: molehill methods task lists it.", show_default="as the rows look"),
    ] = None,
    base: Annotated[str | None, typer.Option(help="The base model.", show_default="a small one")] = None,
    clients: Annotated[int | None, typer.Option(min=1, help="Owners.", show_default="as the rows look")] = None,
    ask: Annotated[
        bool, typer.Option("--ask/--no-ask", help="Ask about what is not given, where somebody can answer.")
    ] = True,
) -> None:
    """Write a commented configuration for your rows, which molehill check and simulate take."""
    with explained():
        with needs(EXTRA):
            from molehill_simulation.started import guess, workable, written

        if out.exists():
            raise ConfigError("there is something already", where=str(out), mend="Choose another --out.")
        if base is not None and not base.strip():
            raise ConfigError("it names no base model", where="--base", mend="Name one, or leave it out.")
        found, why = guess(rows, kind)
        answers = replace(found, base=base or found.base, clients=clients or found.clients)
        answers, more = workable(answers, fixed=clients is not None)
        for sentence in (*why, *more):
            typer.echo(f"{sentence[0].upper()}{sentence[1:]}.")
        if ask and _somebody():
            if base is None:
                answers = replace(answers, base=typer.prompt("Base model", default=answers.base))
            if clients is None:
                asked = typer.prompt("Owners", default=answers.clients, type=IntRange(min=1))
                changed = asked != answers.clients
                answers, _ = workable(replace(answers, clients=asked), fixed=changed)
        out.parent.mkdir(parents=True, exist_ok=True)
        files.write(out, written(answers).encode())
        typer.echo(f"Written to {out}. Next: molehill check {out}")


def _somebody() -> bool:
    """Whether somebody can answer."""
    return sys.stdin.isatty()
