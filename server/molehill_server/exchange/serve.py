"""The process: ``python -m molehill_server.exchange --folder DIR --identity DIR``."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health

from molehill import logs
from molehill.errors import ConfigError, FederationError, MolehillError
from molehill.pki import Identity, read_passphrase
from molehill.wire.objects import ObjectExchange
from molehill.wire.remote import MAX_MESSAGE, SERVICE
from molehill_server.exchange.service import Service, log
from molehill_server.exchange.spool import Blobs
from molehill_server.exchange.traffic import Limits

_DEFAULTS = Limits()
WINDOW = 2**20  # bytes an upload may be ahead of the server; at 50 ms there and back, 20 MB a second


async def serve(
    folder: Path,
    identity: Identity,
    address: str,
    limits: Limits | None = None,
    revoked: Path | None = None,
    ready: Callable[[int], None] = lambda _: None,
    blobs: Blobs | None = None,
) -> None:
    """Serve until cancelled; then transfers get a moment to end, and unfinished uploads stay for the next start.

    Args:
        folder: See `molehill_server.exchange`.
        identity: The server's; nodes need a certificate of one of its authorities, whatever they ask.
        address: ``HOST:PORT`` to listen on; port 0 is any free one.
        limits: What it bears.
        revoked: See `Service`.
        ready: Called with the port once it listens.
        blobs: See `Service`.

    Raises:
        ConfigError: The address cannot be listened on.
    """
    limits = limits or _DEFAULTS
    options = {
        "grpc.so_reuseport": 0,  # a port in use is an error
        "grpc.max_receive_message_length": MAX_MESSAGE,
        "grpc.http2.bdp_probe": 0,  # a window that grows with the speed of the network takes memory of every upload
        "grpc.http2.lookahead_bytes": WINDOW,
        "grpc.max_concurrent_streams": 2 * limits.streams_per_node,  # of one connection
        "grpc.max_connection_idle_ms": 600_000,
        "grpc.server_handshake_timeout_ms": 10_000,
        "grpc.max_allowed_incoming_connections": limits.connections,
        "grpc.keepalive_time_ms": 30_000,
        "grpc.keepalive_timeout_ms": 10_000,
        "grpc.http2.min_ping_interval_without_data_ms": 10_000,
    }
    server = grpc.aio.server(options=list(options.items()))
    service = Service(folder, limits, revoked, blobs)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, service.handlers()),))
    state = _Health(service)
    health_pb2_grpc.add_HealthServicer_to_server(state, server)
    pair = (identity.key_pem(), identity.certificate.pem)
    credentials = grpc.ssl_server_credentials([pair], identity.authority.pem, require_client_auth=True)
    try:
        port = server.add_secure_port(address, credentials)
    except RuntimeError:
        mend = "Another process may use the port: choose another one, or stop that process."
        raise ConfigError("cannot listen there", where=address, mend=mend) from None
    await service.collect()
    await server.start()
    for name in ("", SERVICE):
        await state.set(name, health_pb2.HealthCheckResponse.SERVING)
    ready(port)
    try:
        while True:
            await asyncio.sleep(limits.collect)
            try:
                await service.collect()
            except (OSError, FederationError):
                log.exception("cannot collect old rounds")
    finally:
        await state.enter_graceful_shutdown()
        await server.stop(grace=1.0)


class _Health(health.HealthServicer):  # type: ignore[misc]  # comes without types
    """Says whether the server is well, to those whom the service lets in."""

    def __init__(self, service: Service) -> None:
        super().__init__()
        self._service = service

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802 - by protocol
        async with self._service.answer(context, "health"):
            return await super().Check(request, context)

    async def Watch(self, request: Any, context: Any) -> None:  # noqa: N802 - by protocol
        async with self._service.answer(context, "health"):
            await super().Watch(request, context)


async def _until_told(
    folder: Path, identity: Identity, listen: str, limits: Limits, revoked: Path | None, blobs: Blobs | None
) -> None:
    serving = asyncio.current_task()
    assert serving is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, serving.cancel)
    host = listen.rpartition(":")[0]
    with contextlib.suppress(asyncio.CancelledError):
        await serve(
            folder,
            identity,
            listen,
            limits,
            revoked,
            lambda port: typer.echo(f"The exchange listens on {host}:{port}."),
            blobs,
        )


def run(
    folder: Annotated[Path, typer.Option(help="Folder it shares with the coordinator.")],
    identity: Annotated[Path, typer.Option(help="Folder with key.pem, cert.pem and ca.pem.")],
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where to listen.")] = "127.0.0.1:9443",
    passphrase_file: Annotated[Path | None, typer.Option(help="Its first line opens the key.")] = None,
    revoked: Annotated[Path | None, typer.Option(help="The authority's list of revoked certificates.")] = None,
    blobs: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Object store for whole blobs, as fsspec takes it; the coordinator's too."),
    ] = None,
    max_bytes: Annotated[int, typer.Option(help="Largest delta.")] = _DEFAULTS.max_bytes,
    streams: Annotated[int, typer.Option(help="Transfers at a time; more wait.")] = _DEFAULTS.streams,
    rate: Annotated[float, typer.Option(help="Bytes per second of one node.")] = _DEFAULTS.rate,
    idle: Annotated[float, typer.Option(help="Seconds a node may send nothing.")] = _DEFAULTS.idle,
    reserve: Annotated[int, typer.Option(help="Bytes of the disk to leave free.")] = _DEFAULTS.reserve,
    collect: Annotated[float, typer.Option(help="Seconds between collections of old rounds.")] = _DEFAULTS.collect,
) -> None:
    """Serve the coordinator's blobs to its nodes until SIGTERM or Ctrl-C."""
    logs.begin()
    limits = Limits(max_bytes=max_bytes, streams=streams, rate=rate, idle=idle, reserve=reserve, collect=collect)
    try:
        own = Identity.load(identity, usage="server", passphrase=read_passphrase(passphrase_file))
        store = None if blobs is None else ObjectExchange(blobs)
        asyncio.run(_until_told(folder, own, listen, limits, revoked, store))
    except MolehillError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(error.exit_code) from None
