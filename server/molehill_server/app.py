"""The ServerApp that runs on every grid."""

from __future__ import annotations

from pathlib import Path

from molehill.config import load
from molehill.wire.exchange import connect
from molehill_server.coordinator import Coordinator
from molehill_server.flower import Context, Grid, GridTransport, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that the run configuration names.

    ``config`` is the path of the resolved configuration, ``out`` the run folder, ``exchange`` the address of the
    exchange; ``grace``, when given, overrides the configuration's (in seconds).
    """
    given = context.run_config
    grace = given.get("grace")
    Coordinator(
        load(str(given["config"])),
        Path(str(given["out"])),
        connect(str(given["exchange"])),
        GridTransport(grid),
        grace=None if grace is None else float(grace),
    ).run()
