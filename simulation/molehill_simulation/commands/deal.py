"""``molehill deal``: the rows of a configuration, in a folder for every owner."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from molehill.extras import needs
from molehill.terminal import explained

EXTRA = "simulation"


def deal(
    config: Annotated[Path, typer.Argument(help="TOML file.")],
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="One for every owner.")],
) -> None:
    """Deal the rows of a configuration to folders, to try on one machine what is meant for several.

    Rows that data.validation_fraction sets aside go to validation.jsonl, and into no other file.
    """
    with explained():
        from molehill.config import load

        with needs(EXTRA):
            from molehill_simulation.data import deal_to

        for folder, owner in zip(folders, deal_to(load(config), folders), strict=True):
            aside = f", {len(owner.spare)} in validation.jsonl" if owner.spare else ""
            typer.echo(f"{folder}: {len(owner.train)} rows in train.jsonl, {len(owner.test)} in test.jsonl{aside}")
