"""The gRPC service: who asks, what they may do, and how fast."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from io import RawIOBase
from pathlib import Path
from typing import Any

import grpc

from molehill.errors import ConfigError, FederationError, IdentityError, MessageError
from molehill.logs import Seldom
from molehill.pki import Certificate, Door
from molehill.wire.exchange import require_digest
from molehill.wire.frames import pack, unpack
from molehill.wire.remote import CHUNK
from molehill_protos.v1 import exchange_pb2 as pb
from molehill_server.exchange.grants import Grant, Grants
from molehill_server.exchange.spool import Blobs, DiskFullError, Part, Receipt, Spool
from molehill_server.exchange.writer import Writer, in_thread

log = logging.getLogger("molehill.exchange")

_BURST = 0.05  # seconds that a node may be ahead of its rate: shorter pauses take longer than they should
_CALLS = 4  # calls at a time of one node, for each of its transfers
_LOOK = 5.0  # seconds between two looks at whether a transfer may go on
_AHEAD = 2**19  # bytes of a blob that are read at a time, while those before them are sent


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


class Refusal(Exception):  # noqa: N818 - not our error
    """What a node is told.

    Args:
        code: gRPC status.
        text: Why.
    """

    def __init__(self, code: grpc.StatusCode, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


@dataclass
class _Node:
    """What is known of a node while the process lives."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)  # over its part and receipt
    writer: Writer | None = None  # of the one stream that may write; a newer one takes its place
    streams: int = 0
    calls: int = 0  # streams included
    free_at: float = 0.0  # when it has used up its rate


@dataclass
class _Transfer:
    """What a transfer has come to; time that the server itself takes is not the node's."""

    moved: int = 0  # bytes
    waited: float = 0.0  # seconds for the node


class Service:
    """Serves a folder (`molehill_server.exchange`) to the nodes that its grants name.

    Args:
        folder: The folder; it is made when missing.
        limits: What it bears.
        revoked: The authority's list of revoked certificates; ``revoked.json`` of the folder when omitted.
        blobs: Where whole blobs are kept; in the folder when omitted.
    """

    def __init__(
        self, folder: Path, limits: Limits | None = None, revoked: Path | None = None, blobs: Blobs | None = None
    ) -> None:
        self._limits = limits or Limits()
        self._spool = Spool(folder, self._limits.reserve, blobs)
        self._grants = Grants(folder / "grants")
        self._door = Door(revoked or folder / "revoked.json")
        self._nodes: defaultdict[str, _Node] = defaultdict(_Node)
        self._slots = asyncio.Semaphore(self._limits.streams)
        self._waiting = 0
        self._seldom = Seldom()

    def handlers(self) -> dict[str, Any]:
        """The methods, as gRPC takes them."""
        return {
            "Get": grpc.unary_stream_rpc_method_handler(self.Get, pb.GetRequest.FromString, pack),
            "Offset": grpc.unary_unary_rpc_method_handler(
                self.Offset, pb.OffsetRequest.FromString, pb.OffsetReply.SerializeToString
            ),
            "Put": grpc.stream_unary_rpc_method_handler(self.Put, unpack(pb.PutChunk), pb.Receipt.SerializeToString),
        }

    # ---- calls -----------------------------------------------------------------------------------------------

    async def Get(self, request: pb.GetRequest, context: Any) -> None:  # noqa: N802 - by protocol
        """Send a blob that the node's plan names."""
        async with self.answer(context, "get") as name:
            _require_digest(request.digest)
            self._may_read(name, request.digest)

            def allowed() -> None:
                self._may_read(self._identify(context), request.digest)

            async with self._slot(name):
                try:
                    file = await in_thread(self._spool.blobs.open, request.digest)
                except FileNotFoundError:
                    raise Refusal(grpc.StatusCode.NOT_FOUND, f"there is no blob {request.digest[:12]}") from None
                transfer = _Transfer()
                with file:
                    async with self._watched(transfer, allowed):
                        length = await self._send(file, request.offset, name, transfer, context)
            log.info("sent %s to %s: %d bytes", request.digest[:12], name, length - request.offset)

    async def Offset(self, request: pb.OffsetRequest, context: Any) -> pb.OffsetReply:  # noqa: N802 - by protocol
        """Say what is here of a delta, and let no older stream add to it."""
        async with self.answer(context, "offset") as name:
            grant = self._may_write(name, request.run, request.round)
            node = self._nodes[name]
            async with node.lock:
                await _stop(node)
                size, digest = await in_thread(self._held, name, grant)
                return pb.OffsetReply(offset=size, digest=digest)
        raise AssertionError("an answer or an error was given")

    async def Put(self, requests: Any, context: Any) -> pb.Receipt:  # noqa: ARG002, N802 - by protocol
        """Take the node's delta of its current round."""
        async with self.answer(context, "put") as name:
            header = await self._header(context)
            if header.digest:
                _require_digest(header.digest)
            grant = self._may_write(name, header.run, header.round)
            limit = min(grant.max_bytes, self._limits.max_bytes)
            if header.length > limit:
                text = f"a delta of {header.length} bytes, the limit is {limit}"
                raise Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
            async with self._slot(name):
                await context.send_initial_metadata(())  # the node may begin
                receipt = await self._receive(name, grant, header, context)
            log.info(
                "%s delivered %s for round %d of %s: %d bytes",
                *(name, receipt.digest[:12], receipt.round, receipt.run, receipt.length),
            )
            return pb.Receipt(**receipt.model_dump(exclude={"attempt"}))
        raise AssertionError("an answer or an error was given")

    @asynccontextmanager
    async def answer(self, context: Any, what: str) -> AsyncIterator[str]:
        """Name the node that asks, and tell it why when it is refused.

        Args:
            context: Of the call.
            what: Name of the call.
        """
        name = "?"
        try:
            name = self._identify(context)
            with self._counted(name):
                yield name
        except Refusal as refusal:
            code, text = refusal.code, refusal.text
        except DiskFullError:
            code, text = grpc.StatusCode.RESOURCE_EXHAUSTED, "the server's disk is full"
        except FederationError as error:
            log.error("%s", error)  # noqa: TRY400 - its words say it all
            code, text = grpc.StatusCode.UNAVAILABLE, "the server's object store fails"
        else:
            return
        # Of a node not by what was said: it makes up digests as it likes.
        if (more := self._seldom((name, what, text if name == "?" else code))) is not None:
            log.warning("refused %s of %s (%s): %s%s", what, name, code.name, text, more)
        await context.abort(code, text)

    async def collect(self) -> None:
        """Remove what is left of rounds that are over."""
        keep = {digest for grant in self._grants.all().values() if grant is not None for digest in grant.read}
        for name in self._spool.nodes() | self._nodes.keys():
            async with self._nodes[name].lock:  # the grant is read under the lock: what comes later is of a later one
                try:
                    grant = self._grants.of(name)
                except (MessageError, IdentityError) as error:
                    log.error("%s", error)  # noqa: TRY400 - its words say it all
                    continue
                removed = await in_thread(self._spool.collect, name, grant, keep)
            for path in removed:
                log.info("collected %s", path)

    # ---- parts -----------------------------------------------------------------------------------------------

    async def _send(self, file: RawIOBase, offset: int, name: str, transfer: _Transfer, context: Any) -> int:
        """Send a file from an offset on, the next piece being read meanwhile; returns its length."""
        length: int = await in_thread(file.seek, 0, 2)
        file.seek(min(offset, length))
        await self._write(context, pb.Chunk(length=length), transfer)
        reading = asyncio.ensure_future(in_thread(file.read, _AHEAD))
        try:
            while data := await reading:
                reading = asyncio.ensure_future(in_thread(file.read, _AHEAD))
                for start in range(0, len(data), CHUNK):
                    piece = memoryview(data)[start : start + CHUNK]
                    await self._pace(name, len(piece))
                    await self._write(context, piece, transfer)
                    transfer.moved += len(piece)
        finally:
            await asyncio.wait({reading})  # the file is its
        return length

    def _held(self, name: str, grant: Grant) -> tuple[int, str]:
        """Bytes of a node's delta that are here, and their digest."""
        size, digest = self._spool.held(name, grant)
        receipt = None if size else self._spool.receipt(name)
        if receipt is not None and self._spool.blobs.has(receipt.digest):
            return receipt.length, receipt.digest
        return size, digest

    async def _receive(self, name: str, grant: Grant, header: pb.PutHeader, context: Any) -> Receipt:
        """Take the data of a delta, or say again that it is here."""
        node = self._nodes[name]
        async with node.lock:
            await _stop(node)
            done = await in_thread(self._delivered, name, grant, header.digest, header.length)
            if done is not None:
                return done
            part: Part = await in_thread(self._spool.open_part, name, grant, header.length, header.offset)
            writer = node.writer = Writer(part)

        def allowed() -> None:
            self._may_write(self._identify(context), header.run, header.round)

        with part:
            transfer = _Transfer()
            try:
                async with self._watched(transfer, allowed):
                    await self._fill(part, name, writer, header.offset, transfer, context)
            finally:
                await writer.end()
            async with node.lock:
                _require_writer(node, writer)
                node.writer = None
                self._identify(context)  # the certificate may have ended meanwhile
                return await self._commit(name, part, header)

    async def _fill(
        self, part: Part, name: str, writer: Writer, offset: int, transfer: _Transfer, context: Any
    ) -> None:
        """Read the data and have it written down."""
        node, size = self._nodes[name], part.size
        if size != offset:
            text = f"the data begins at byte {offset}, the server has {size}"
            raise Refusal(grpc.StatusCode.OUT_OF_RANGE, text)
        while isinstance(piece := await self._read(context, transfer), memoryview):
            size += len(piece)
            transfer.moved += len(piece)
            if size > part.length:
                raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, "more data than the header announced")
            await self._pace(name, len(piece))
            _require_writer(node, writer)
            await writer.give(piece)
        if piece is not grpc.aio.EOF:
            raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, "after the header there is only data")

    def _delivered(self, name: str, grant: Grant, digest: str, length: int) -> Receipt | None:
        """The receipt of a delta that is here already; its digest may not be known yet."""
        receipt = self._spool.receipt(name)
        if receipt is not None and receipt.of(grant) and receipt.digest != digest:
            if not digest and not self._spool.blobs.has(receipt.digest):  # dropped since, and perhaps sent again
                return None
            text = f"{name} has delivered another delta, {receipt.digest[:12]}, for round {grant.round} of {grant.run}"
            raise Refusal(grpc.StatusCode.ALREADY_EXISTS, text)
        if not digest or not self._spool.blobs.has(digest):
            return None
        if receipt is None or receipt.digest != digest:
            raise Refusal(grpc.StatusCode.PERMISSION_DENIED, f"blob {digest[:12]} is not a delta of {name}")
        if not receipt.of(grant):  # the same delta for another attempt
            receipt = _receipt(name, grant, digest, length)
            self._spool.sign(receipt)
        return receipt

    async def _commit(self, name: str, part: Part, header: pb.PutHeader) -> Receipt:
        if part.size < header.length:
            text = f"the data ends at byte {part.size} of {header.length}"
            raise Refusal(grpc.StatusCode.OUT_OF_RANGE, text)
        digest = part.digest
        if header.digest not in {"", digest}:
            part.drop()
            raise Refusal(grpc.StatusCode.DATA_LOSS, "the data does not fit its digest and was dropped; send it again")
        grant = self._may_write(name, header.run, header.round)  # the round may have ended meanwhile
        try:
            receipt = await in_thread(self._delivered, name, grant, digest, header.length)
        except Refusal:
            part.drop()
            raise
        if receipt is None:
            receipt = _receipt(name, grant, digest, header.length)
            await in_thread(self._spool.commit, part, receipt)
        part.drop()
        return receipt

    async def _header(self, context: Any) -> pb.PutHeader:
        first = await self._read(context, _Transfer())
        if not isinstance(first, pb.PutChunk) or first.WhichOneof("part") != "header":
            raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, "an upload begins with a header")
        header: pb.PutHeader = first.header
        return header

    async def _read(self, context: Any, transfer: _Transfer) -> Any:
        with self._stalled("sent", transfer):
            async with asyncio.timeout(self._limits.idle):
                return await context.read()

    async def _write(self, context: Any, chunk: pb.Chunk | memoryview, transfer: _Transfer) -> None:
        with self._stalled("taken", transfer):
            async with asyncio.timeout(self._limits.idle):
                await context.write(chunk)

    @contextmanager
    def _stalled(self, what: str, transfer: _Transfer) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        except TimeoutError:
            text = f"nothing was {what} for {self._limits.idle:.0f} s"
            raise Refusal(grpc.StatusCode.DEADLINE_EXCEEDED, text) from None
        transfer.waited += time.monotonic() - began

    @asynccontextmanager
    async def _watched(self, transfer: _Transfer, allowed: Callable[[], None]) -> AsyncIterator[None]:
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

    def _require_progress(self, transfer: _Transfer) -> None:
        if transfer.waited > self._limits.idle + transfer.moved / self._limits.slowest:
            text = f"{transfer.moved} bytes in {transfer.waited:.0f} s are too few; go on from there"
            raise Refusal(grpc.StatusCode.DEADLINE_EXCEEDED, text)

    # ---- who, what and how much ------------------------------------------------------------------------------

    def _identify(self, context: Any) -> str:
        """The name of the node, from its certificate.

        TLS has checked the certificate when the connection was made; it may have expired or been revoked since.
        """
        certificate = Certificate.parse(context.auth_context()["x509_pem_cert"][0])
        try:
            return self._door.admit(certificate)
        except IdentityError as error:
            raise Refusal(grpc.StatusCode.UNAUTHENTICATED, str(error)) from None
        except ConfigError:
            raise Refusal(grpc.StatusCode.UNAVAILABLE, "the server's list of revoked certificates is damaged") from None

    def _granted(self, name: str) -> Grant:
        try:
            grant = self._grants.of(name)
        except (MessageError, IdentityError) as error:
            log.error("%s", error)  # noqa: TRY400 - its words say it all
            raise Refusal(grpc.StatusCode.UNAVAILABLE, f"the server's grant for {name} is damaged") from None
        if grant is None:
            raise Refusal(grpc.StatusCode.PERMISSION_DENIED, f"there is no plan for {name}")
        return grant

    def _may_read(self, name: str, digest: str) -> None:
        if digest not in self._granted(name).read:
            raise Refusal(grpc.StatusCode.PERMISSION_DENIED, f"the plan of {name} does not name blob {digest[:12]}")

    def _may_write(self, name: str, run: str, number: int) -> Grant:
        grant = self._granted(name)
        if not grant.write or (grant.run, grant.round) != (run, number):
            may = f"for round {grant.round} of {grant.run}" if grant.write else "nothing"
            text = f"{name} may deliver {may}, not for round {number} of {run[:64]}"
            raise Refusal(grpc.StatusCode.PERMISSION_DENIED, text)
        return grant

    @contextmanager
    def _counted(self, name: str) -> Iterator[None]:
        """Count a call of a node: one that says nothing holds what has come of its first message."""
        node, most = self._nodes[name], _CALLS * self._limits.streams_per_node
        if node.calls >= most:
            raise Refusal(grpc.StatusCode.UNAVAILABLE, f"{name} has {most} calls under way; try again")
        node.calls += 1
        try:
            yield
        finally:
            node.calls -= 1

    @asynccontextmanager
    async def _slot(self, name: str) -> AsyncIterator[None]:
        """Wait for a turn."""
        node = self._nodes[name]
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

    async def _pace(self, name: str, size: int) -> None:
        """Wait until the node's rate allows ``size`` bytes more."""
        node, now = self._nodes[name], time.monotonic()
        start = max(now, node.free_at)
        node.free_at = start + size / self._limits.rate
        if start > now + _BURST:
            await asyncio.sleep(start - now)


def _receipt(name: str, grant: Grant, digest: str, length: int) -> Receipt:
    return Receipt(run=grant.run, round=grant.round, attempt=grant.attempt, node=name, digest=digest, length=length)


async def _stop(node: _Node) -> None:
    """Let the stream that may write do so no longer; called under the node's lock."""
    writer, node.writer = node.writer, None
    if writer is not None:
        with suppress(DiskFullError, OSError):  # the stream says it
            await writer.end()


def _require_writer(node: _Node, writer: Writer) -> None:
    if node.writer is not writer:
        raise Refusal(grpc.StatusCode.ABORTED, "a newer upload took the place of this one")


def _require_digest(name: str) -> None:
    try:
        require_digest(name)
    except (MessageError, IdentityError) as error:
        raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from None
