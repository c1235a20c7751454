"""``molehill server``: the coordinator of a federation across machines."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from molehill import address, logs
from molehill.errors import DeployError
from molehill.extras import needs
from molehill.terminal import Json, State, explained, print_json, say, show_table

EXTRA = "server"
STATE = Path("coordinator")

app = typer.Typer(help="The coordinator of a federation across machines.", no_args_is_help=True)


@app.command()
def up(
    identity: Annotated[Path, typer.Option(help="Identity folder of this server (molehill pki).")],
    state: State = STATE,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is all of them.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where nodes come in.")] = 9440,
    exchange_port: Annotated[int, typer.Option(min=1, max=65535, help="Where nodes fetch and send adapters.")] = 9441,
    passphrase_file: Annotated[
        Path | None, typer.Option(help="Its first line opens the key.", show_default=False)
    ] = None,
    revoked: Annotated[
        Path | None,
        typer.Option(help="The authority's revoked.json.", show_default="revoked.json in the identity folder"),
    ] = None,
    blobs: Annotated[
        str | None, typer.Option(metavar="URL", help="Object store for adapters (fsspec).", show_default="a folder")
    ] = None,
) -> None:
    """Start the coordinator, and keep its processes running until Ctrl-C or `server stop`."""
    with explained():
        with needs(EXTRA):
            from molehill_server.deploy.up import House, Running
            from molehill_server.deploy.up import up as run

        logs.begin()

        def ready(found: Running) -> None:
            nodes, adapters = (address.join(found.host, port) for port in (found.port, found.exchange_port))
            say(Text(f"nodes come in at {nodes}, adapters at {adapters}"))
            say(Text(f"start a run with: molehill server run CONFIG --state {state}"))

        run(
            House(identity, state, address.require_host(host), port, exchange_port, passphrase_file, revoked, blobs),
            ready,
        )
        say(Text("the coordinator has ended"))


@app.command()
def status(state: State = STATE, as_json: Json = False) -> None:
    """Show the coordinator, its nodes, and the run it works on."""
    with explained(as_json):
        with needs(EXTRA):
            from molehill_server.deploy.office import Office
            from molehill_server.deploy.up import require_running

        found, office = require_running(state), Office(state)
        nodes = office.call(lambda control: control.nodes())
        job = office.job()
        run_ = None if job is None else office.status(job.number)
        document: dict[str, Any] = {
            "coordinator": asdict(found),
            "nodes": [{"name": node.name, "status": node.status} for node in nodes],
            "run": None
            if job is None or run_ is None
            else {"out": job.out, "status": run_.outcome or run_.status, "details": run_.details},
        }
        if as_json:
            print_json(document)
            return
        console = Console()
        console.print(
            f"up as process {found.pid}, nodes at {address.join(found.host, found.port)}", markup=False, highlight=False
        )
        table = Table(box=SIMPLE_HEAD)
        table.add_column("node")
        table.add_column("status")
        for node in document["nodes"]:
            table.add_row(Text(node["name"]), Text(node["status"]))
        show_table(table)
        if document["run"] is None:
            console.print("no run")
        else:
            console.print(Text(f"run in {document['run']['out']}: {document['run']['status']}"), soft_wrap=True)


@app.command()
def stop(
    state: State = STATE,
    only_run: Annotated[bool, typer.Option("--run", help="Stop the run only; it can be resumed.")] = False,
) -> None:
    """Stop the coordinator, and with it the run it works on."""
    with explained():
        with needs(EXTRA):
            from molehill_server.deploy.office import Office
            from molehill_server.deploy.up import require_running
            from molehill_server.deploy.up import stop as end

        require_running(state)
        try:
            job = Office(state).stop()
        except DeployError:
            if only_run:
                raise
            job = None  # a SuperLink that does not answer shall not keep us from ending it
        if job is not None:
            say(Text(f"stopped the run in {job.out}"))
        elif only_run:
            say(Text("there is no run to stop"))
        if not only_run and end(state):
            say(Text("the coordinator has ended"))
