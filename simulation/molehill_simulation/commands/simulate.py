"""``molehill simulate``: a federation on this machine."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.text import Text

from molehill.extras import needs
from molehill.terminal import INTERRUPTED, Json, explained, print_json
from molehill_simulation.commands.run_folder import claim, interrupted

EXTRA = "simulation"


def simulate(
    config: Annotated[Path | None, typer.Argument(help="TOML file; the demo when omitted.", show_default=False)] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Run folder.", show_default="runs/<name of the run>")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key; may be repeated.")
    ] = None,
    engine: Annotated[Literal["local", "ray"], typer.Option(help="One process, or Flower's Ray engine.")] = "local",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the run folder.")] = False,
    as_json: Json = False,
) -> None:
    """Run a federation on this machine, from private rows to personalised models.

    With --resume and no CONFIG, the configuration in the run folder is used.
    """
    folder = out if resume else None  # of a run that there is something of
    with explained(as_json):
        try:
            from molehill.config import load

            if resume and config is None and out is not None and (out / "config.toml").is_file():
                config = out / "config.toml"
            resolved = load(config or _demo(), overrides or ())
            claimed = out or Path("runs") / resolved.run.name
            claim(claimed, resume)
            folder = claimed

            with needs(EXTRA):
                from molehill_simulation.pace import Work
                from molehill_simulation.simulate import simulate as run
                from molehill_simulation.ui import RunView, show_summary

            console = Console(quiet=as_json)
            # Libraries below print to standard output too; with --json that stream is promised to one document.
            with (
                RunView(console, Work.of(resolved)) as view,
                contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout),
            ):
                summary = run(resolved, folder, engine=engine, observer=view)
        except KeyboardInterrupt:
            interrupted(folder, ["molehill", "simulate"], [] if engine == "local" else ["--engine", engine], as_json)
            raise typer.Exit(INTERRUPTED) from None
        if as_json:
            print_json(summary.model_dump(mode="json", by_alias=True))
        else:
            show_summary(summary, console)
            console.print(Text(f"Report: {folder / 'report.html'}"), soft_wrap=True)


def _demo() -> Path:
    """The configuration that runs when none is named."""
    return Path(__file__).parents[1] / "demo.toml"
