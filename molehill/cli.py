"""The command line: ``molehill simulate | server | client | export | publish | keys | edge | ...``.

Text for people goes to the terminal; with ``--json`` standard output holds one JSON document and nothing else. A
mistake of the user ends in one paragraph and an exit code (`docs/reference/errors.md`), never in a traceback.
Heavy imports wait until a command needs them.
"""

from __future__ import annotations

import contextlib
import sys
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from molehill import __version__, logs
from molehill.characters import survive
from molehill.commands import audit, client, edge, export, keys, pki, publish, server
from molehill.commands.common import INTERRUPTED, Json, claim, explained, interrupted, print_json
from molehill.errors import ConfigError
from molehill.extras import needs

app = typer.Typer(
    help="Fine-tune one language model for many private data owners with mixtures of LoRA experts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(server.app, name="server")
app.add_typer(client.app, name="client")
app.add_typer(pki.app, name="pki")
app.add_typer(audit.app, name="audit")
app.add_typer(keys.app, name="keys")
app.add_typer(edge.app, name="edge")
export.register(app)
publish.register(app)


def main() -> None:
    """Run the command line."""
    survive()
    app(prog_name="molehill")


def _print_version(wanted: bool) -> None:
    if wanted:
        with explained():
            typer.echo(f"molehill {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    log_json: Annotated[
        bool,
        typer.Option("--log-json", envvar="MOLEHILL_LOG_JSON", help="Log to standard error, one JSON object a line."),
    ] = False,
) -> None:
    """Options before the command."""
    if log_json:
        logs.use_json()


@app.command()
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

            with needs("simulation"):
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
    return Path(str(resources.files("molehill_simulation") / "demo.toml"))


@app.command()
def check(config: Annotated[Path, typer.Argument(help="TOML file.")]) -> None:
    """Print what a configuration comes to, and refuse what cannot work."""
    with explained():
        from molehill.config import load

        with needs("simulation"):
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
        console = Console()
        console.print(table)
        for label, text in plan:
            if label == "warning":
                console.print(Text.assemble(("warning: ", "bold yellow"), text), soft_wrap=True)
        refused = [conflict for conflict in conflicts if conflict.verdict == "refuse"]
        for conflict in conflicts:
            if conflict not in refused:
                keys = " with ".join(conflict.keys)
                console.print(Text.assemble(("warning: ", "bold yellow"), f"{keys}: {conflict.why}"))
        if refused:
            reasons = "; ".join(f"{' with '.join(conflict.keys)}: {conflict.why}" for conflict in refused)
            mend = refused[0].mend if len(refused) == 1 else "Change one key of each."
            raise ConfigError(reasons, where=str(config), mend=mend)


@app.command()
def deal(
    config: Annotated[Path, typer.Argument(help="TOML file.")],
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="One for every owner.")],
) -> None:
    """Deal the rows of a configuration to folders, to try on one machine what is meant for several."""
    with explained():
        from molehill.config import load

        with needs("simulation"):
            from molehill_simulation.data import deal_to

        for folder, owner in zip(folders, deal_to(load(config), folders), strict=True):
            typer.echo(f"{folder}: {len(owner.train)} rows in train.jsonl, {len(owner.test)} in test.jsonl")


@app.command()
def methods(as_json: Json = False) -> None:
    """List every method: name, axis, paper, and the code of the system it stands for."""
    with explained(as_json):
        from molehill import registry

        found = list(registry.methods())
        if as_json:
            keys = ("name", "axis", "paper", "url", "seeds", "summary")
            print_json([{key: getattr(method, key) for key in keys} for method in found])
            return
        table = Table(box=SIMPLE_HEAD)
        for column in ("axis", "name", "paper", "seed"):
            table.add_column(column, overflow="fold")
        for method in found:
            table.add_row(*(Text(text) for text in (method.axis, method.name, method.paper, " ".join(method.seeds))))
        console = Console()
        console.print(table, width=None if console.is_terminal else 160)


@app.command()
def report(folder: Annotated[Path, typer.Argument(metavar="DIR", help="Run folder.")]) -> None:
    """Write report.html of a run again, finished or not."""
    with explained():
        with needs("simulation"):
            from molehill_simulation.report import write_report

        typer.echo(str(write_report(folder)))
