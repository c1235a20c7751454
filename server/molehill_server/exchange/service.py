"""The gRPC service: its calls, and what happens to the bytes."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from io import RawIOBase
from pathlib import Path
from typing import Any

import grpc

from molehill.errors import FederationError, IdentityError, MessageError
from molehill.logs import Seldom
from molehill.wire.frames import pack, unpack
from molehill.wire.remote import CHUNK
from molehill_protos.v1 import exchange_pb2 as pb
from molehill_server.exchange.grants import Grant
from molehill_server.exchange.refusal import Refusal, require_digest
from molehill_server.exchange.rights import Rights
from molehill_server.exchange.spool import Blobs, DiskFullError, Part, Receipt, Spool
from molehill_server.exchange.traffic import Limits, Traffic, Transfer
from molehill_server.exchange.writer import Writer, in_thread

log = logging.getLogger("molehill.exchange")

_AHEAD = 2**19  # bytes of a blob that are read at a time, while those before them are sent


@dataclass
class _Node:
    """What is known of a node while the process lives."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)  # over its part and receipt
    writer: Writer | None = None  # of the one stream that may write; a newer one takes its place


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
        self._rights = Rights(folder / "grants", revoked or folder / "revoked.json")
        self._traffic = Traffic(self._limits)
        self._nodes: defaultdict[str, _Node] = defaultdict(_Node)
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
            require_digest(request.digest)
            self._rights.may_read(name, request.digest)

            def allowed() -> None:
                self._rights.may_read(self._rights.identify(context), request.digest)

            async with self._traffic.slot(name):
                try:
                    file = await in_thread(self._spool.blobs.open, request.digest)
                except FileNotFoundError:
                    raise Refusal(grpc.StatusCode.NOT_FOUND, f"there is no blob {request.digest[:12]}") from None
                transfer = Transfer()
                with file:
                    async with self._traffic.watched(transfer, allowed):
                        length = await self._send(file, request.offset, name, transfer, context)
            log.info("sent %s to %s: %d bytes", request.digest[:12], name, length - request.offset)

    async def Offset(self, request: pb.OffsetRequest, context: Any) -> pb.OffsetReply:  # noqa: N802 - by protocol
        """Say what is here of a delta, and let no older stream add to it."""
        async with self.answer(context, "offset") as name:
            grant = self._rights.may_write(name, request.run, request.round)
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
                require_digest(header.digest)
            grant = self._rights.may_write(name, header.run, header.round)
            limit = min(grant.max_bytes, self._limits.max_bytes)
            if header.length > limit:
                text = f"a delta of {header.length} bytes, the limit is {limit}"
                raise Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
            async with self._traffic.slot(name):
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
            name = self._rights.identify(context)
            with self._traffic.counted(name):
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
        keep = {digest for grant in self._rights.grants.all().values() if grant is not None for digest in grant.read}
        for name in self._spool.nodes() | self._nodes.keys():
            async with self._nodes[name].lock:  # the grant is read under the lock: what comes later is of a later one
                try:
                    grant = self._rights.grants.of(name)
                except (MessageError, IdentityError) as error:
                    log.error("%s", error)  # noqa: TRY400 - its words say it all
                    continue
                removed = await in_thread(self._spool.collect, name, grant, keep)
            for path in removed:
                log.info("collected %s", path)

    # ---- parts -----------------------------------------------------------------------------------------------

    async def _send(self, file: RawIOBase, offset: int, name: str, transfer: Transfer, context: Any) -> int:
        """Send a file from an offset on, the next piece being read meanwhile; returns its length."""
        length: int = await in_thread(file.seek, 0, 2)
        file.seek(min(offset, length))
        await self._traffic.write(context, pb.Chunk(length=length), transfer)
        reading = asyncio.ensure_future(in_thread(file.read, _AHEAD))
        try:
            while data := await reading:
                reading = asyncio.ensure_future(in_thread(file.read, _AHEAD))
                for start in range(0, len(data), CHUNK):
                    piece = memoryview(data)[start : start + CHUNK]
                    await self._traffic.pace(name, len(piece))
                    await self._traffic.write(context, piece, transfer)
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
            self._rights.may_write(self._rights.identify(context), header.run, header.round)

        with part:
            transfer = Transfer()
            try:
                async with self._traffic.watched(transfer, allowed):
                    await self._fill(part, name, writer, header.offset, transfer, context)
            finally:
                await writer.end()
            async with node.lock:
                _require_writer(node, writer)
                node.writer = None
                self._rights.identify(context)  # the certificate may have ended meanwhile
                return await self._commit(name, part, header)

    async def _fill(self, part: Part, name: str, writer: Writer, offset: int, transfer: Transfer, context: Any) -> None:
        """Read the data and have it written down."""
        node, size = self._nodes[name], part.size
        if size != offset:
            text = f"the data begins at byte {offset}, the server has {size}"
            raise Refusal(grpc.StatusCode.OUT_OF_RANGE, text)
        while isinstance(piece := await self._traffic.read(context, transfer), memoryview):
            size += len(piece)
            transfer.moved += len(piece)
            if size > part.length:
                raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, "more data than the header announced")
            await self._traffic.pace(name, len(piece))
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
        grant = self._rights.may_write(name, header.run, header.round)  # the round may have ended meanwhile
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
        first = await self._traffic.read(context, Transfer())
        if not isinstance(first, pb.PutChunk) or first.WhichOneof("part") != "header":
            raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, "an upload begins with a header")
        header: pb.PutHeader = first.header
        return header


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
