"""``molehill server run``: a federation on the machines that have joined.

It is a verb of the coordinator that this part brings, since what concludes a run (scores, report) is the same here and
in a simulation.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from molehill.extras import needs
from molehill.terminal import Json, State
from molehill_server.commands.server import STATE
from molehill_simulation.commands.running import EXTRA, Out, Overrides, Resume, conduct

if TYPE_CHECKING:
    from molehill.config import Config
    from molehill_simulation.summary import Summary
    from molehill_simulation.ui import RunView

__all__ = ["EXTRA", "run"]


def run(
    config: Annotated[Path | None, typer.Argument(help="TOML file.", show_default=False)] = None,
    state: State = STATE,
    out: Out = None,
    overrides: Overrides = None,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Run a federation on the machines that have joined; waits for as many as data.clients says.

    Ctrl-C stops the run; with --resume and no CONFIG it goes on with the configuration in the run folder.
    """

    def work(resolved: Config, folder: Path, view: RunView) -> Summary:
        with needs(EXTRA):
            from molehill_server.deploy.run import run as start
            from molehill_server.folder import working
            from molehill_simulation.conclude import conclude

        model, base, *_ = start(resolved, state, folder, view)
        with working(folder, patience=None):  # the server process has let go of it
            return conclude(resolved, model, base, folder)

    conduct(
        work, config, out, overrides, resume=resume, as_json=as_json,
        command=["molehill", "server", "run"], options=["--state", str(state)],
    )  # fmt: skip
