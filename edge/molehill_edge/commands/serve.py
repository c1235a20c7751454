"""``molehill edge serve``: a bundle over HTTP, for programs that speak OpenAI's API."""

from __future__ import annotations

import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from molehill import address
from molehill.characters import harmless
from molehill.errors import ConfigError
from molehill.extras import needs
from molehill.terminal import explained, learning
from molehill_edge.commands.opening import (
    Assigned,
    Experts,
    GateOption,
    Insecure,
    Memory,
    Name,
    StoreFolder,
    StrategyName,
    Threads,
    named,
    opened,
)  # fmt: skip

if TYPE_CHECKING:
    from starlette.applications import Starlette

EXTRA = "serve"
_GRACE = 10  # seconds for answers that are being written when the server is told to end
_IDLE = 64  # connections beyond those that are computed or wait


def serve(
    name: Name,
    host: Annotated[str, typer.Option(help="Address to listen on; another than loopback needs a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for a free one.")] = 8000,
    key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The API key that callers must have; only you may read the file.", show_default=False
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer that a request may ask for.")] = 1024,
    body_kb: Annotated[int, typer.Option("--body-kb", min=1, max=1 << 16, help="Longest request in KiB.")] = 1024,
    at_once: Annotated[int, typer.Option(min=1, max=32, help="Requests that are computed at the same time.")] = 2,
    queue: Annotated[int, typer.Option(min=0, max=4096, help="Requests that may wait for them.")] = 32,
    gate: GateOption = None,
    experts: Experts = None,
    strategy: StrategyName = None,
    assigned: Assigned = None,
    threads: Threads = None,
    spin: Annotated[
        bool,
        typer.Option("--spin/--no-spin", help="Threads wait for work awake; requests at the same time share them."),
    ] = False,
    memory_mb: Memory = None,
    insecure_local: Insecure = False,
    store: StoreFolder = None,
) -> None:
    """Serve a bundle in the shapes of OpenAI's API: chat, completions, models, and a path for classes.

    A request names the bundle as its model, with one of its gates as BUNDLE@GATE.
    """
    with explained():
        with needs(EXTRA):
            from molehill_edge.serving import app, guard

        place = address.require_host(host)
        key = None if key_file is None else guard.read_key(key_file)
        if key is None and not guard.is_loopback(place):
            mend = "Give --key-file, or listen on 127.0.0.1."
            raise ConfigError(f"without a key anybody could ask what is served on {place}", where="--host", mend=mend)
        limits = app.Limits(body=body_kb << 10, answer=max_tokens, at_once=at_once, waiting=queue)
        with (
            socket.create_server((place, port), family=socket.AF_INET6 if ":" in place else socket.AF_INET) as listener,
            opened(
                name, insecure=insecure_local, store=store, threads=threads, spin=spin, memory_mb=memory_mb, gate=gate
            ) as bundle,
        ):
            from molehill.decoding.options import assigned as parsed

            asked = strategy is not None or assigned
            values, through = parsed(assigned or ()), learning(quiet=False)
            models = app.Models(
                bundle,
                None if experts is None else named(experts),
                lambda view: view.strategy(strategy, values, through) if asked else None,
            )
            where = address.join(place, listener.getsockname()[1])
            how = f" by {strategy}" if strategy is not None else ""
            typer.echo(f"http://{where}/v1 answers as {harmless(', '.join(models.names))}{how}")
            _run(app.make(models, limits, key), listener, at_once + queue + _IDLE)


def _run(app: Starlette, listener: socket.socket, connections: int) -> None:
    """Serve until a signal comes; what is being written then may end."""
    import uvicorn

    configuration = uvicorn.Config(
        app, log_config=None, log_level="warning", access_log=False, server_header=False, lifespan="off", ws="none",
        limit_concurrency=connections, timeout_graceful_shutdown=_GRACE,
    )  # fmt: skip
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)
    uvicorn.Server(configuration).run(sockets=[listener])


def _end(*_: object) -> None:
    """End well: the server raises the signal that ended it once more when all is done."""
    raise typer.Exit
