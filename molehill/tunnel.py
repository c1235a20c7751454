"""TCP streams carried inside mutual TLS: an entry beside the node, an exit beside the server.

Flower's nodes verify the server, but cannot show a certificate of their own. Inside a tunnel they need not: the entry
listens on loopback only, and the exit lets nobody in whose certificate it does not know.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Callable, Coroutine
from typing import Any

Admit = Callable[[bytes], str]

_CHUNK = 64 * 1024  # bytes read at a time
_OPEN = 10.0  # seconds for a connection to come about
_AGAIN = 10.0  # seconds between two looks at the certificate of a connection that lasts

_log = logging.getLogger(__name__)


async def entry(address: tuple[str, int], server: tuple[str, int], context: ssl.SSLContext) -> asyncio.Server:
    """Listen, and carry every connection to the exit.

    Args:
        address: Where to listen; port 0 picks a free one.
        server: Host and port of the exit; the host must be in its certificate.
        context: Knows the CA and holds our certificate.

    Raises:
        OSError: The address is in use.
    """

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_OPEN):
                far = await asyncio.open_connection(*server, ssl=context)
        except (OSError, TimeoutError) as error:  # ssl.SSLError is an OSError
            _log.warning("no connection to %s:%d: %s", *server, reason(error))
            await _close(writer)
            return
        await _join((reader, writer), far)

    return await asyncio.start_server(carry, *address)


async def leave(
    address: tuple[str, int], target: tuple[str, int], context: ssl.SSLContext, admit: Admit
) -> asyncio.Server:
    """Accept connections with a certificate, and carry those that are admitted to the target.

    Args:
        address: Where to listen.
        target: Host and port behind the exit.
        context: Demands a certificate that the CA has signed.
        admit: Says why a certificate (DER) is refused, nothing when it is not; asked again while a connection lasts.

    Raises:
        OSError: The address is in use.
    """

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)

        async def admitted() -> bool:
            refused = await asyncio.to_thread(admit, shown)
            if refused:
                _log.warning("refused %s: %s", writer.get_extra_info("peername"), refused)
            return not refused

        async def while_admitted() -> None:
            while await admitted():  # noqa: ASYNC110 - nothing tells us when a certificate is revoked
                await asyncio.sleep(_AGAIN)

        if not await admitted():
            await _close(writer)
            return
        try:
            async with asyncio.timeout(_OPEN):
                far = await asyncio.open_connection(*target)
        except (OSError, TimeoutError):
            await _close(writer)
            return
        await _join((reader, writer), far, while_admitted())

    return await asyncio.start_server(carry, *address, ssl=context, ssl_handshake_timeout=_OPEN)


def reason(error: BaseException) -> str:
    """What a failed connection means, in words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not good: {error.verify_message}"
    if isinstance(error, TimeoutError):
        return "no answer"
    return str(error) or type(error).__name__


Pair = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def _join(near: Pair, far: Pair, *others: Coroutine[Any, Any, None]) -> None:
    """Carry both ways until one side, or one of the others, ends."""
    ways = [asyncio.create_task(each) for each in (_pump(near[0], far[1]), _pump(far[0], near[1]), *others)]
    try:
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
        await _close(near[1])
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
