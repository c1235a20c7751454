"""How much nodes may have under way, how fast, and how long the server waits for them."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from molehill_protos.v1 import exchange_pb2 as pb
from molehill_server.exchange.refusal import Refusal

_BURST = 0.05  # seconds that a node may be ahead of its rate: shorter pauses take longer than they should
_CALLS = 4  # calls at a time of one node, for each of its transfers
_LOOK = 5.0  # seconds between two looks at whether a transfer may go on


@dataclass(frozen=True)
class Limits:
    """What the exchange bears.

    With the defaults one node has at most 4 of the 32 turns: it takes eight nodes to keep the others waiting, and four
    leave them half. A transfer of n bytes that keeps the server waiting for more than ``idle + n / slowest`` seconds
    (100 MB: 3.4 hours; one byte: 60 s) loses its turn; what came of an upload stays, to go on with. And it ends within
    five seconds of its grant or its node's certificate.

    Attributes:
        max_bytes: Largest delta, whatever a grant says.
        connections: Open at a time, those that have shown no certificate yet included; more are closed at once.
        streams: Transfers at a time; more wait for their turn.
        waiting: Transfers that wait; more are told to come again.
        streams_per_node: Transfers of one node, waiting ones included; more are told to come again.
        rate: Bytes per second of one node.
        idle: Seconds that a node may send or take nothing.
        slowest: Bytes per second that a node must send or take on average, after ``idle`` seconds.
        reserve: Bytes of the disk left free for the coordinator.
        collect: Seconds between collections of old rounds.
    """

    max_bytes: int = 2**30
    connections: int = 1024
    streams: int = 32
    waiting: int = 1024
    streams_per_node: int = 4
    rate: float = 2.0**30
    idle: float = 60.0
    slowest: float = 2.0**13
    reserve: int = 256 * 2**20
    collect: float = 60.0


@dataclass
class _Load:
    """What a node has under way."""

    streams: int = 0
    calls: int = 0  # streams included
    free_at: float = 0.0  # when it has used up its rate


@dataclass
class Transfer:
    """What a transfer has come to; time that the server itself takes is not the node's."""

    moved: int = 0  # bytes
    waited: float = 0.0  # seconds for the node


class Traffic:
    """Keeps nodes to the limits.

    Args:
        limits: What the exchange bears.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._loads: defaultdict[str, _Load] = defaultdict(_Load)
        self._slots = asyncio.Semaphore(limits.streams)
        self._waiting = 0

    async def read(self, context: Any, transfer: Transfer) -> Any:
        """The next message of a stream.

        Raises:
            Refusal: None came for too long.
        """
        with self._stalled("sent", transfer):
            async with asyncio.timeout(self._limits.idle):
                return await context.read()

    async def write(self, context: Any, chunk: pb.Chunk | memoryview, transfer: Transfer) -> None:
        """Send the next message of a stream.

        Raises:
            Refusal: It was not taken for too long.
        """
        with self._stalled("taken", transfer):
            async with asyncio.timeout(self._limits.idle):
                await context.write(chunk)

    @contextmanager
    def _stalled(self, what: str, transfer: Transfer) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        except TimeoutError:
            text = f"nothing was {what} for {self._limits.idle:.0f} s"
            raise Refusal(grpc.StatusCode.DEADLINE_EXCEEDED, text) from None
        transfer.waited += time.monotonic() - began

    @asynccontextmanager
    async def watched(self, transfer: Transfer, allowed: Callable[[], None]) -> AsyncIterator[None]:
        """End a transfer that may go on no longer, or never ends; beside it, so that it costs the transfer nothing."""
        allowed()  # it may have waited long for its turn
        ended: list[Exception] = []

        async def watch() -> None:
            while not ended:
                await asyncio.sleep(_LOOK)
                try:
                    allowed()
                    self._require_progress(transfer)
                except Exception as error:  # noqa: BLE001 - whatever it is, raised where the transfer waits
                    ended.append(error)
                    limit.reschedule(asyncio.get_running_loop().time())

        try:
            async with asyncio.timeout(None) as limit:
                watching = asyncio.create_task(watch())
                try:
                    yield
                finally:
                    watching.cancel()
        except TimeoutError:
            if not ended:
                raise
            raise ended[0] from None

    def _require_progress(self, transfer: Transfer) -> None:
        if transfer.waited > self._limits.idle + transfer.moved / self._limits.slowest:
            text = f"{transfer.moved} bytes in {transfer.waited:.0f} s are too few; go on from there"
            raise Refusal(grpc.StatusCode.DEADLINE_EXCEEDED, text)

    @contextmanager
    def counted(self, name: str) -> Iterator[None]:
        """Count a call of a node: one that says nothing holds what has come of its first message."""
        node, most = self._loads[name], _CALLS * self._limits.streams_per_node
        if node.calls >= most:
            raise Refusal(grpc.StatusCode.UNAVAILABLE, f"{name} has {most} calls under way; try again")
        node.calls += 1
        try:
            yield
        finally:
            node.calls -= 1

    @asynccontextmanager
    async def slot(self, name: str) -> AsyncIterator[None]:
        """Wait for a turn."""
        node = self._loads[name]
        if node.streams >= self._limits.streams_per_node:
            text = f"{name} has {node.streams} transfers under way; try again"
            raise Refusal(grpc.StatusCode.UNAVAILABLE, text)
        if self._slots.locked() and self._waiting >= self._limits.waiting:
            raise Refusal(grpc.StatusCode.UNAVAILABLE, "the exchange is busy; try again")
        node.streams += 1
        try:
            self._waiting += 1
            try:
                await self._slots.acquire()
            finally:
                self._waiting -= 1
            try:
                yield
            finally:
                self._slots.release()
        finally:
            node.streams -= 1

    async def pace(self, name: str, size: int) -> None:
        """Wait until the node's rate allows ``size`` bytes more."""
        node, now = self._loads[name], time.monotonic()
        start = max(now, node.free_at)
        node.free_at = start + size / self._limits.rate
        if start > now + _BURST:
            await asyncio.sleep(start - now)
