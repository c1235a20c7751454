"""The coordinator's door: TLS in which both sides show a certificate, and behind it a Unix socket."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import ipaddress
import itertools
import logging
import socket
import ssl
from collections.abc import Callable, Coroutine, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molehill.logs import Seldom

Admit = Callable[[bytes], str]

_CHUNK = 64 * 1024  # bytes read at a time
_OPEN = 10.0  # seconds for a connection to come about
_AGAIN = 10.0  # seconds between two looks at the certificate of a connection that lasts

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """How many connections the door bears; where there are too many, the oldest makes room.

    A connection takes about a third of a megabyte, also before anybody has shown a certificate. A machine that takes
    part has two or three.

    Attributes:
        handshakes: Connections that have not shown a certificate yet.
        handshakes_per_address: Of them, from one address (of IPv6, from one network of 64 bits).
        connections: Connections of all machines.
        connections_per_machine: Connections of one certificate.
    """

    handshakes: int = 128
    handshakes_per_address: int = 32
    connections: int = 1024
    connections_per_machine: int = 12


Pair = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def open_door(
    address: tuple[str, int],
    target: Path,
    context: ssl.SSLContext,
    admit: Admit,
    *,
    guests: MutableMapping[str, bytes] | None = None,
    limits: Limits | None = None,
) -> asyncio.Server:
    """Accept connections with a certificate, and carry those that are admitted to the target.

    Args:
        address: Where to listen.
        target: The Unix socket behind it.
        context: Demands a certificate that the CA has signed.
        admit: Says why a certificate (DER) is refused, nothing when it is not; asked again while a connection lasts.
            When it fails, the certificate is refused.
        guests: Filled with the certificates of those who are inside, by the names of the sockets that the target
            finds at the other ends of their connections.
        limits: How many connections there may be.

    Raises:
        OSError: The address is in use.
    """
    doorway = _Doorway(target, context, admit, {} if guests is None else guests, limits or Limits())
    return await asyncio.get_running_loop().create_server(lambda: _Arrival(doorway), *address)


class _Arrival(asyncio.Protocol):
    """A connection before TLS; nothing of it is read before it has its place."""

    def __init__(self, doorway: _Doorway) -> None:
        self._doorway = doorway

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.pause_reading()
        self._doorway.greet(transport)


class _Doorway:
    def __init__(
        self,
        target: Path,
        context: ssl.SSLContext,
        admit: Admit,
        guests: MutableMapping[str, bytes],
        limits: Limits,
    ) -> None:
        self._target, self._context, self._admit = target, context, admit
        self._guests, self._limits = guests, limits
        self._shaking: dict[asyncio.Task[None], str] = {}  # by address, oldest first
        self._inside: dict[asyncio.Task[None], str] = {}  # by certificate, oldest first
        self._numbers = itertools.count()
        self._seldom = Seldom()

    def greet(self, transport: asyncio.Transport) -> None:
        """Begin with a connection."""
        host = _network(transport.get_extra_info("peername")[0])
        self._make_room(self._shaking, host, self._limits.handshakes_per_address, self._limits.handshakes)
        task = asyncio.get_running_loop().create_task(self._receive(transport, host))
        self._shaking[task] = host
        task.add_done_callback(lambda task: self._forget(task, transport))

    def _make_room(self, those: dict[asyncio.Task[None], str], name: str, per_name: int, most: int) -> None:
        """End the oldest connection of this name if it has too many, else the oldest of all if there are too many."""
        own = [task for task, each in those.items() if each == name]
        if len(own) >= per_name or len(those) >= most:
            oldest = own[0] if len(own) >= per_name else next(iter(those))
            if (more := self._seldom((name, per_name))) is not None:
                _log.warning("too many connections of %s: the oldest makes room%s", those[oldest][:40], more)
            del those[oldest]
            oldest.cancel()

    def _forget(self, task: asyncio.Task[None], transport: asyncio.Transport) -> None:
        transport.abort()  # here, since a task that is cancelled at once never runs
        self._shaking.pop(task, None)
        self._inside.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("a connection ended", exc_info=error)

    async def _receive(self, transport: asyncio.Transport, host: str) -> None:
        """Let somebody show a certificate, and in."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        reader = asyncio.StreamReader(_CHUNK)
        protocol = asyncio.StreamReaderProtocol(reader)
        assert task is not None
        try:
            tls = await loop.start_tls(
                transport, protocol, self._context, server_side=True, ssl_handshake_timeout=_OPEN
            )
        except OSError:  # no TLS, no certificate, or too slow
            return
        finally:
            self._shaking.pop(task, None)
        if tls is None:  # it went away in the middle of it
            return
        protocol.connection_made(tls)
        writer = asyncio.StreamWriter(tls, protocol, reader, loop)
        try:
            shown: bytes = tls.get_extra_info("ssl_object").getpeercert(binary_form=True)
            # Of a certificate, not of a name: who holds one that was revoked must not push its successor out.
            which = hashlib.sha256(shown).hexdigest()
            self._make_room(self._inside, which, self._limits.connections_per_machine, self._limits.connections)
            self._inside[task] = which
            if await self._admitted(shown, host):
                await self._carry((reader, writer), shown, host)
        finally:
            await _close(writer)

    async def _carry(self, near: Pair, shown: bytes, host: str) -> None:
        """Join a connection with the target until one end closes it, or the certificate is refused."""
        name = f"{self._target}.{next(self._numbers)}"

        async def while_admitted() -> None:
            while True:
                await asyncio.sleep(_AGAIN)  # nothing tells us when a certificate is revoked
                if not await self._admitted(shown, host):
                    return

        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(_OPEN):
                far = await _connect(self._target, name)
            self._guests[name] = shown
            try:
                await _join(near, far, while_admitted())
            finally:
                del self._guests[name]

    async def _admitted(self, shown: bytes, host: str) -> bool:
        try:
            refused = await asyncio.to_thread(self._admit, shown)
        except Exception as error:  # noqa: BLE001 - whoever cannot be judged, say since the disk is full, stays out
            refused = f"it cannot be judged ({error})"
        if refused and (more := self._seldom((host, refused))) is not None:
            _log.warning("refused a machine at %s: %s%s", host, refused, more)
        return not refused


def _network(host: str) -> str:
    """What counts as one address: whoever has one of IPv6 has 2^64 of them."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, 64), strict=False))
    return host


async def _connect(target: Path, name: str) -> Pair:
    """Connect to a Unix socket from one with a name, which is how the other end knows us."""
    line = socket.socket(socket.AF_UNIX)
    try:
        line.setblocking(False)  # noqa: FBT003 - its only argument
        line.bind(name)
        try:
            await asyncio.get_running_loop().sock_connect(line, str(target))
        finally:
            _unlink(name)
        return await asyncio.open_unix_connection(sock=line, limit=_CHUNK)
    except BaseException:
        line.close()
        raise


async def _join(near: Pair, far: Pair, *others: Coroutine[Any, Any, None]) -> None:
    """Carry both ways until one side, or one of the others, ends; the far side is closed then."""
    ways = [asyncio.create_task(each) for each in (_pump(near[0], far[1]), _pump(far[0], near[1]), *others)]
    try:
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
        await _close(far[1])


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(_CHUNK):
            writer.write(data)
            await writer.drain()


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError, asyncio.TimeoutError):
        async with asyncio.timeout(1.0):
            await writer.wait_closed()


def _unlink(name: str) -> None:
    Path(name).unlink(missing_ok=True)
