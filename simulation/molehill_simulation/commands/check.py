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
from molehill.terminal import explained, show_table

EXTRA = "simulation"


def check(config: Annotated[Path, typer.Argument(help="TOML file.")]) -> None:
    """Print what a configuration comes to, and refuse what cannot work."""
    with explained():
        from molehill.config import load

        with needs(EXTRA):
            from molehill_server.check import check as find_conflicts
            from molehill_simulation.describe import describe

        resolved = load(config)
        conflicts = find_conflicts(resolved)
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(style="dim")
        plan = describe(resolved)
        for label, text in plan:
            if label != "warning":
                table.add_row(label, Text(text))
        show_table(table)
        console = Console()
        for label, text in plan:
            if label == "warning":
                console.print(Text.assemble(("warning: ", "bold yellow"), text), soft_wrap=True)
        refused = [conflict for conflict in conflicts if conflict.verdict == "refuse"]
        for conflict in conflicts:
            if conflict not in refused:
                keys = " with ".join(conflict.keys)
                console.print(Text.assemble(("warning: ", "bold yellow"), f"{keys}: {conflict.why}"), soft_wrap=True)
        if refused:
            reasons = "; ".join(f"{' with '.join(conflict.keys)}: {conflict.why}" for conflict in refused)
            mend = refused[0].mend if len(refused) == 1 else "Change one key of each."
            raise ConfigError(reasons, where=str(config), mend=mend)
