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
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from molehill.logs import Seldom
from molehill.loopback import LOOPBACK, Pair

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

# One plain word: no dots, no escapes, nothing a server behind us could read as another path.
_NODE_CALL = re.compile(r"/v1/fleet/[a-z]+(-[a-z]+)*")
_MAX_BODY = 4 * 2**20  # bytes of a call; replies are a few kilobytes
_MAX_ANSWER = 16 * 2**20  # bytes; plans are a few kilobytes, app bundles at most ten megabytes
_WHOLE = 60.0  # seconds in which the body of a call must have come
_DROP = 2.0  # seconds in which the body of a refused call is read and dropped
_HOP = {b"connection", b"host", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade", b"content-length"}
_HOP |= {b"accept-encoding", b"content-encoding"}  # what can be short on the way and long in memory is not asked for

_CLOSE = (b"connection", b"close")

_log = logging.getLogger(__name__)


class RefusedError(Exception):
    """A call is not forwarded.

    Args:
        status: What the caller is told (HTTP).
        reason: What the log is told.
    """

    who = ""  # whose call it was, once that is known

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


@dataclass(frozen=True)
class Call:
    """A call of a node, before its body is read.

    Attributes:
        path: Of the call.
        headers: As they came; names are in lower case.
        peer: Name of the Unix socket at the other end; empty when it has none.
    """

    path: str
    headers: Sequence[tuple[bytes, bytes]]
    peer: str


class Visit:
    """The time a call is here. This one bounds its body and nothing else; all methods raise `RefusedError`."""

    def __init__(self) -> None:
        self.size = 0  # bytes of the body so far

    def more(self, size: int) -> None:
        """So many bytes more of the body have come."""
        self.size += size
        if self.size > _MAX_BODY:
            raise RefusedError(413, f"a body of more than {_MAX_BODY} bytes")

    def whole(self, body: bytes) -> None:
        """This is the whole body."""


# Judges a call, by raising `RefusedError`, and lets it be here meanwhile.
Guard = Callable[[Call], AbstractContextManager[Visit]]
# Told about every call that was answered: path and status.
Heard = Callable[[str, int], None]


class Gateway:
    """An ASGI application.

    Args:
        target: Where calls go on to, ``https://HOST:PORT``.
        context: TLS to there.
        guard: Looks at every call that is to be forwarded.
        heard: Hears of every call that was answered.
    """

    def __init__(
        self,
        target: str,
        context: ssl.SSLContext,
        guard: Guard = lambda _: contextlib.nullcontext(Visit()),
        heard: Heard = lambda *_: None,
    ) -> None:
        self._target = target
        self._guard, self._heard = guard, heard
        self._seldom = Seldom()
        self._client = httpx.AsyncClient(
            verify=context, timeout=60.0, trust_env=False, headers={"accept-encoding": "identity"}
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a call of a node; 404 for everything else, and what ``guard`` says for what it refuses."""
        path = scope.get("raw_path", b"").decode("ascii", "replace")
        if scope["type"] != "http" or scope["method"] != "POST" or not _NODE_CALL.fullmatch(path):
            await _answer(send, 404, [_CLOSE])
            return
        call = Call(path, scope["headers"], (scope.get("client") or ("",))[0])
        body = _Body(receive)
        try:
            with self._guard(call) as visit:
                await self._forward(call, visit, body, send)
        except RefusedError as refused:
            await body.drop()
            # Not by what was said: whoever calls makes up paths and numbers as it likes.
            if (more := self._seldom((refused.who, refused.status))) is not None:
                said = f"{refused.who}: {refused.reason}" if refused.who else refused.reason
                _log.warning("refused %s with %d: %s%s", path[:80], refused.status, said, more)
            await _answer(send, refused.status, [_CLOSE])

    async def _forward(self, call: Call, visit: Visit, body: _Body, send: Send) -> None:
        parts = []
        try:
            async with asyncio.timeout(_WHOLE):
                while body.left:
                    parts.append(await body.part())
                    visit.more(len(parts[-1]))
        except TimeoutError:
            raise RefusedError(408, f"a body that has not come within {_WHOLE:.0f} s") from None
        if body.gone:
            return
        content = b"".join(parts)
        parts.clear()
        visit.whole(content)
        headers = [(name, value) for name, value in call.headers if name.lower() not in _HOP]
        try:
            async with self._client.stream("POST", self._target + call.path, content=content, headers=headers) as reply:
                answer = await _read(reply)
        except httpx.HTTPError:
            await _answer(send, 503)  # it is being restarted; nodes try again
            return
        self._heard(call.path, reply.status_code)
        kept = [(name, value) for name, value in reply.headers.raw if name.lower() not in _HOP]
        await _answer(send, reply.status_code, kept, answer)

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
        app,
        http=_Named,
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        ssl_certfile=cert,
        ssl_keyfile=key,
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


class _Body:
    """The body of a call, part by part.

    Attributes:
        left: There may be more of it.
        gone: It ended in the middle.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.left, self.gone = True, False

    async def part(self) -> bytes:
        """The next part."""
        event = await self._receive()
        self.gone = event["type"] != "http.request"
        self.left = not self.gone and event.get("more_body", False)
        return bytes(event.get("body", b""))

    async def drop(self) -> None:
        """Read what is left for a moment: an answer is lost on a connection that is closed with something unread."""
        dropped = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DROP):
                while self.left and dropped < 4 * _MAX_BODY:
                    dropped += len(await self.part())


class _Named(H11Protocol):
    """HTTP that bounds the head of a call, and says by which Unix socket it came."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # uvicorn narrows it as well
        super().connection_made(transport)
        peer = transport.get_extra_info("peername")
        if isinstance(peer, str) and peer:
            self.client = (peer, 0)


class _Uvicorn(uvicorn.Server):
    """Leaves signals to us."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _read(reply: httpx.Response) -> bytes:
    """The body of an answer, as it came: whoever answers may lie about what it takes."""
    if "content-encoding" in reply.headers:
        raise RefusedError(502, "an answer that is compressed")
    answer = bytearray()
    async for part in reply.aiter_raw():
        answer += part
        if len(answer) > _MAX_ANSWER:
            raise RefusedError(502, f"an answer of more than {_MAX_ANSWER} bytes")
    return bytes(answer)


async def _answer(send: Send, status: int, headers: list[tuple[bytes, bytes]] | None = None, body: bytes = b"") -> None:
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*(headers or []), length]})
    await send({"type": "http.response.body", "body": body})
