"""``molehill check``: what a configuration comes to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from molehill.errors import ConfigError
from molehill.extras import needs
from molehill.terminal import Json, explained, print_json, show_table
from molehill_simulation.commands.running import EXTRA, Overrides

__all__ = ["EXTRA", "check"]


def check(
    config: Annotated[Path, typer.Argument(help="TOML file.")],
    overrides: Overrides = None,
    probe: Annotated[
        int | None, typer.Option(min=1, metavar="STEPS", help="Train so many steps to tell how long a run takes.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Print what a configuration comes to, and refuse what cannot work."""
    with explained(as_json):
        from molehill.config import load

        with needs(EXTRA):
            from molehill_server.check import check as find_conflicts
            from molehill_simulation.census import census_table
            from molehill_simulation.describe import describe

        resolved = load(config, tuple(overrides or ()))
        conflicts = find_conflicts(resolved)
        refused = [conflict for conflict in conflicts if conflict.verdict == "refuse"]
        found = describe(resolved, sound=not refused, probe=probe or 0)
        warnings = [*found.warnings]
        warnings += [f"{' with '.join(each.keys)}: {each.why}" for each in conflicts if each not in refused]
        if as_json and not refused:
            print_json({**found.as_dict(), "warnings": warnings})
            return
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(style="dim")
        for label, text in found.plan:
            table.add_row(label, Text(text))
        if not as_json:
            show_table(table, *(census_table(found.clients) if found.clients else ()))
            console = Console()
            for text in warnings:
                console.print(Text.assemble(("warning: ", "bold yellow"), text), soft_wrap=True)
        if refused:
            reasons = "; ".join(f"{' with '.join(conflict.keys)}: {conflict.why}" for conflict in refused)
            mend = refused[0].mend if len(refused) == 1 else "Change one key of each."
            raise ConfigError(reasons, where=str(config), mend=mend)
