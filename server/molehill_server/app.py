"""The ServerApp that runs on every grid."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from molehill import files
from molehill.config import load
from molehill.errors import MolehillError
from molehill.wire.connect import connect
from molehill_server.coordinator import Coordinator
from molehill_server.exchange.grants import Grants
from molehill_server.flower import Context, Grid, GridTransport, ServerApp
from molehill_server.folder import take

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that the run configuration names.

    ``config`` is the path of the resolved configuration, ``out`` the run folder, ``exchange`` the address of the
    exchange. Of a deployment also ``introduction``, what nodes are told about the run, ``clients``, how many to wait
    for, and ``grants``, the folder where the exchange looks up what they may do. ``grace``, when given, overrides the
    configuration's (in seconds).
    """
    given = context.run_config
    grace = given.get("grace")
    out = Path(str(given["out"]))
    # Of a deployment, held until this process ends, however it ends; who simulates has it already.
    lock = take(out) if "introduction" in given else None
    try:
        with files.private(), files.told("the server", out):
            Coordinator(
                load(str(given["config"])),
                out,
                connect(str(given["exchange"])),
                GridTransport(grid),
                grace=None if grace is None else float(grace),
                introduction=str(given.get("introduction", "")),
                clients=int(given.get("clients", 1)),
                grants=Grants(Path(str(given["grants"]))) if given.get("grants") else None,
            ).run()
    except MolehillError as error:
        # Whoever started a deployment is another process, and Flower tells it only that something failed.
        if lock is not None:
            with contextlib.suppress(OSError):  # on a full disk
                files.write(out / "error.json", json.dumps(error.as_dict()).encode(), mode=files.PRIVATE)
        raise
    finally:
        if lock is not None:
            lock.close()
