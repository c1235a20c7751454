"""Who may call: those that have the key, or without one programs of this machine only."""

from __future__ import annotations

import hmac
import ipaddress
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from molehill import files
from molehill.errors import ConfigError
from molehill_edge.serving import replies
from molehill_edge.serving.requests import RefusedError

HEALTH = "/health"
_SHORTEST = 16  # characters of a key
_MEND = "Write one: (umask 077; head -c 24 /dev/urandom | base64 > key)"


class Guard:
    """Lets a request through to the paths behind, or refuses it.

    Without a key the name by which the server is called must be one of this machine: a page that a browser has open
    could else reach it under a name of its own (DNS rebinding).

    Args:
        app: What is behind.
        key: That callers must know; None for none.
    """

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self._app = app
        self._key = key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, as any application of ASGI."""
        if scope["type"] == "http" and scope["path"] != HEALTH:
            error = self._refuses(Headers(scope=scope))
            if error is not None:
                headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else None
                await replies.refusal(error, headers)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refuses(self, headers: Headers) -> RefusedError | None:
        if self._key is None:
            if is_loopback(_name(headers.get("host", ""))):
                return None
            return RefusedError(403, "This server is for programs of its own machine.", code="foreign_host")
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self._key.encode()):
            return None
        return RefusedError(401, "The API key is missing or wrong.", code="invalid_api_key")


def read_key(path: Path) -> str:
    """The key in a file that only its owner can read.

    Raises:
        ConfigError: It cannot be read, others can read it, or it is too short.
    """
    where = str(path)
    try:
        private, text = files.is_private(path), path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        what = f"cannot read the key: {getattr(error, 'strerror', None) or 'it is no text'}"
        raise ConfigError(what, where=where, mend=_MEND) from None
    if not private:
        raise ConfigError("others can read the key", where=where, mend=f"Run: chmod 600 {path}")
    if len(text) < _SHORTEST or not text.isascii() or any(each.isspace() for each in text):
        raise ConfigError(f"a key is one line of {_SHORTEST} ASCII characters or more", where=where, mend=_MEND)
    return text


def is_loopback(host: str) -> bool:
    """Whether a name or address (without brackets) is one of this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _name(host: str) -> str:
    """The name or address in a header ``Host``, without port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]
