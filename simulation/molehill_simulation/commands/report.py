"""``molehill report``: the report of a run, once more."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from molehill.extras import needs
from molehill.terminal import explained

EXTRA = "simulation"


def report(folder: Annotated[Path, typer.Argument(metavar="DIR", help="Run folder.")]) -> None:
    """Write report.html of a run again, finished or not."""
    with explained():
        with needs(EXTRA):
            from molehill_simulation.report import write_report

        typer.echo(str(write_report(folder)))
