"""``molehill server run``: a federation on the machines that have joined.

It is a verb of the coordinator that this part brings, since what concludes a run (scores, report) is the same here and
in a simulation.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from molehill.errors import ConfigError
from molehill.extras import needs
from molehill.terminal import INTERRUPTED, Json, explained, print_json
from molehill_server.commands.options import STATE, State
from molehill_simulation.commands.run_folder import claim, interrupted

EXTRA = "simulation"


def run(
    config: Annotated[Path | None, typer.Argument(help="TOML file.", show_default=False)] = None,
    state: State = STATE,
    out: Annotated[
        Path | None, typer.Option("--out", help="Run folder.", show_default="runs/<name of the run>")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key; may be repeated.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the run folder.")] = False,
    as_json: Json = False,
) -> None:
    """Run a federation on the machines that have joined; waits for as many as data.clients says.

    Ctrl-C stops the run; with --resume and no CONFIG it goes on with the configuration in the run folder.
    """
    folder = None
    with explained(as_json):
        try:
            from molehill.config import load

            if resume and config is None and out is not None and (out / "config.toml").is_file():
                config = out / "config.toml"
            if config is None:
                raise ConfigError("there is no configuration", mend="Give a TOML file, or --resume with --out.")
            resolved = load(config, overrides or ())
            claimed = out or Path("runs") / resolved.run.name
            claim(claimed, resume)
            folder = claimed

            with needs(EXTRA):
                from molehill_server.deploy.run import run as start
                from molehill_server.folder import working
                from molehill_simulation.conclude import conclude
                from molehill_simulation.pace import Work
                from molehill_simulation.ui import RunView, show_summary

            console = Console(quiet=as_json)
            with (
                RunView(console, Work.of(resolved)) as view,
                contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout),
            ):
                model, base, _ = start(resolved, state, folder, view)
                with working(folder, patience=None):  # the server process has let go of it
                    summary = conclude(resolved, model, base, folder)
        except KeyboardInterrupt:
            interrupted(folder, ["molehill", "server", "run"], ["--state", str(state)], as_json)
            raise typer.Exit(INTERRUPTED) from None
        if as_json:
            print_json(summary.model_dump(mode="json", by_alias=True))
        else:
            show_summary(summary, console)
            console.print(Text(f"Report: {folder / 'report.html'}"), soft_wrap=True)
