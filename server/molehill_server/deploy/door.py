"""The coordinator's door: TLS in which both sides show a certificate, and behind it a Unix socket."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from molehill.logs import Seldom

Admit = Callable[[bytes], str]

_CHUNK = 64 * 1024  # bytes read at a time
_OPEN = 10.0  # seconds for a connection to come about
_AGAIN = 10.0  # seconds between two looks at the certificate of a connection that lasts

_log = logging.getLogger(__name__)


async def open_door(address: tuple[str, int], target: Path, context: ssl.SSLContext, admit: Admit) -> asyncio.Server:
    """Accept connections with a certificate, and carry those that are admitted to the target.

    Args:
        address: Where to listen.
        target: The Unix socket behind it.
        context: Demands a certificate that the CA has signed.
        admit: Says why a certificate (DER) is refused, nothing when it is not; asked again while a connection lasts.
            When it fails, the certificate is refused.

    Raises:
        OSError: The address is in use.
    """
    seldom = Seldom()

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def admitted() -> bool:
            shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
            try:
                refused = await asyncio.to_thread(admit, shown)
            except Exception as error:  # noqa: BLE001 - whoever cannot be judged, say since the disk is full, stays out
                refused = f"it cannot be judged ({error})"
            host = writer.get_extra_info("peername")[0]
            if refused and (more := seldom((host, refused))) is not None:
                _log.warning("refused a machine at %s: %s%s", host, refused, more)
            return not refused

        async def while_admitted() -> None:
            while await admitted():  # noqa: ASYNC110 - nothing tells us when a certificate is revoked
                await asyncio.sleep(_AGAIN)

        try:
            if not await admitted():
                return
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(_OPEN):
                    far = await asyncio.open_unix_connection(target)
                await _join((reader, writer), far, while_admitted())
        finally:
            await _close(writer)

    return await asyncio.start_server(carry, *address, ssl=context, ssl_handshake_timeout=_OPEN)


Pair = tuple[asyncio.StreamReader, asyncio.StreamWriter]


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
