"""The only door to Flower from outside: node calls pass, the control and runtime APIs do not exist here.

Flower serves its three APIs on one port, and its control API asks for no identity: who reaches it can run code. So the
SuperLink listens on loopback, and this proxy, behind the tunnel's exit, forwards the calls of nodes and nothing else.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import httpx

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

# One plain word: no dots, no escapes, nothing a server behind us could read as another path.
_NODE_CALL = re.compile(r"/v1/fleet/[a-z]+(-[a-z]+)*")
_MAX_BODY = 16 * 2**20  # bytes; plans and replies are a few kilobytes, app bundles at most ten megabytes
_HOP = {b"connection", b"host", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade", b"content-length"}


class Gateway:
    """An ASGI application.

    Args:
        superlink: Its address, ``https://127.0.0.1:PORT``.
        context: Verifies its certificate.
    """

    def __init__(self, superlink: str, context: ssl.SSLContext) -> None:
        self._superlink = superlink
        self._client = httpx.AsyncClient(verify=context, timeout=60.0, trust_env=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a call of a node; 404 for everything else."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
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
        headers = [(name, value) for name, value in scope["headers"] if name.lower() not in _HOP]
        try:
            reply = await self._client.post(self._superlink + path, content=bytes(body), headers=headers)
        except httpx.HTTPError:
            await _answer(send, 503)  # it is being restarted; nodes try again
            return
        kept = [(name, value) for name, value in reply.headers.raw if name.lower() not in _HOP | {b"content-encoding"}]
        await _answer(send, reply.status_code, kept, reply.content)

    async def _live(self, receive: Receive, send: Send) -> None:
        while True:
            event = await receive()
            if event["type"] == "lifespan.startup":
                await send({"type": "lifespan.startup.complete"})
            else:
                await self._client.aclose()
                await send({"type": "lifespan.shutdown.complete"})
                return


async def _answer(send: Send, status: int, headers: list[tuple[bytes, bytes]] | None = None, body: bytes = b"") -> None:
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*(headers or []), length]})
    await send({"type": "http.response.body", "body": body})
