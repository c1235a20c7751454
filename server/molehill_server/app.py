"""The ServerApp that runs on every grid."""

from __future__ import annotations

import contextlib
import errno
import json
from collections.abc import Iterator
from pathlib import Path

from molehill import files, locks
from molehill.config import load
from molehill.errors import DeployError, MolehillError
from molehill.wire.exchange import connect
from molehill_server.coordinator import Coordinator
from molehill_server.exchange.grants import Grants
from molehill_server.flower import Context, Grid, GridTransport, ServerApp

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
    lock = None  # of a deployment, held until this process ends, however it ends
    if "introduction" in given:
        lock = locks.hold(out, "another process works in this run folder", mend="Let it end.")
    try:
        with _told():
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
        said = {"kind": type(error).__name__, "what": error.what, "where": error.where, "mend": error.mend}
        if lock is not None:
            with contextlib.suppress(OSError):  # on a full disk
                files.write(out / "error.json", json.dumps(said).encode())
        raise
    finally:
        if lock is not None:
            lock.close()


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Turn what the operating system refuses into words: a full disk is nobody's traceback."""
    try:
        yield
    except OSError as error:
        where = str(error.filename or "")
        mend = (
            "Make room there, then resume." if error.errno in {errno.ENOSPC, errno.EDQUOT} else "Mend it, then resume."
        )
        raise DeployError(f"the server cannot go on: {error.strerror or error}", where=where, mend=mend) from error
