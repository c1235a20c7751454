"""A proxy for the calls of Flower's nodes, at both ends of the way between a lab machine and its coordinator.

Flower serves its three APIs on one port, and its control API asks for no identity: who reaches it can run code. So the
SuperLink listens on loopback, and what comes in from outside passes here: the calls of nodes, and nothing else.

A node cannot show a certificate either, and one that is cut off in the middle of a handshake never tries again. So it
talks to such a proxy on its own machine, which is always there, shows the certificate, and says 503 when the
coordinator is away: that a node understands.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping
from typing import Any

import httpx
import uvicorn

from molehill.logs import Seldom
from molehill.loopback import LOOPBACK, Pair

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

# One plain word: no dots, no escapes, nothing a server behind us could read as another path.
_NODE_CALL = re.compile(r"/v1/fleet/[a-z]+(-[a-z]+)*")
_MAX_BODY = 16 * 2**20  # bytes; plans and replies are a few kilobytes, app bundles at most ten megabytes
_HOP = {b"connection", b"host", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade", b"content-length"}

_log = logging.getLogger(__name__)

# Says why a call, of which it is given path and body, is not forwarded: status and reason; None lets it pass.
Refuse = Callable[[str, bytes], tuple[int, str] | None]
# Told about every call that was answered: path and status.
Heard = Callable[[str, int], None]


class Gateway:
    """An ASGI application.

    Args:
        target: Where calls go on to, ``https://HOST:PORT``.
        context: TLS to there.
        refuse: Looks at every call that is to be forwarded.
        heard: Hears of every call that was answered.
    """

    def __init__(
        self,
        target: str,
        context: ssl.SSLContext,
        refuse: Refuse = lambda *_: None,
        heard: Heard = lambda *_: None,
    ) -> None:
        self._target = target
        self._refuse, self._heard = refuse, heard
        self._seldom = Seldom()
        self._client = httpx.AsyncClient(verify=context, timeout=60.0, trust_env=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a call of a node; 404 for everything else, and what ``refuse`` says for what it refuses."""
        path = scope.get("raw_path", b"").decode("ascii", "replace")
        if scope["type"] != "http" or scope["method"] != "POST" or not _NODE_CALL.fullmatch(path):
            await _answer(send, 404)
            return
        body = bytearray()
        while True:
            event = await receive()
            body += event.get("body", b"")
            if len(body) > _MAX_BODY:
                await _answer(send, 413)
                return
            if event["type"] != "http.request" or not event.get("more_body"):
                break
        refused = self._refuse(path, bytes(body))
        if refused is not None:
            status, reason = refused
            if (more := self._seldom((path, reason))) is not None:
                _log.warning("refused %s with %d: %s%s", path, status, reason, more)
            await _answer(send, status)
            return
        headers = [(name, value) for name, value in scope["headers"] if name.lower() not in _HOP]
        try:
            reply = await self._client.post(self._target + path, content=bytes(body), headers=headers)
        except httpx.HTTPError:
            await _answer(send, 503)  # it is being restarted; nodes try again
            return
        self._heard(path, reply.status_code)
        kept = [(name, value) for name, value in reply.headers.raw if name.lower() not in _HOP | {b"content-encoding"}]
        await _answer(send, reply.status_code, kept, reply.content)

    async def close(self) -> None:
        """Close the connections to the target."""
        await self._client.aclose()


@contextlib.asynccontextmanager
async def serving(app: Gateway, listener: socket.socket, pair: Pair | None = None) -> AsyncIterator[None]:
    """Serve a gateway meanwhile.

    Args:
        app: The gateway.
        listener: Where; TCP on loopback or a Unix socket.
        pair: Its certificate; without one it speaks plain HTTP.
    """
    cert, key = pair or (None, None)
    config = uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="off", ws="none", ssl_certfile=cert, ssl_keyfile=key
    )
    server = _Uvicorn(config)
    task = asyncio.create_task(server.serve([listener]))
    try:
        yield
    finally:
        server.should_exit = server.force_exit = True
        await task
        await app.close()


def listen() -> socket.socket:
    """A socket on loopback, with whatever port is free."""
    return socket.create_server((LOOPBACK, 0))


class _Uvicorn(uvicorn.Server):
    """Leaves signals to us."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _answer(send: Send, status: int, headers: list[tuple[bytes, bytes]] | None = None, body: bytes = b"") -> None:
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*(headers or []), length]})
    await send({"type": "http.response.body", "body": body})
