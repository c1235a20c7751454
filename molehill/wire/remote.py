"""The exchange of another machine: gRPC with mutual TLS (``protos/molehill/v1/exchange.proto``).

What broke off goes on where it stopped, after a pause that grows; the call fails when nothing has moved for as long
as the patience lasts. What the server refuses fails at once, with the server's reason.
"""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from molehill.errors import ConfigError, FederationError, MessageError, MolehillError
from molehill.pki import Identity
from molehill.wire.exchange import Place, require_digest, require_size, unknown
from molehill.wire.frames import pack, unpack
from molehill.wire.local import FolderExchange
from molehill.wire.message import digest
from molehill_protos.v1 import exchange_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["AdapterExchange"].full_name
CHUNK = 2**18  # bytes of data in a message; larger ones are slower, as their memory is not reused
MAX_MESSAGE = 2**20 + 2**10  # bytes of a message, the largest chunk and its frame

_RENEW = "Ask whoever runs the server for a new certificate: molehill pki request --renew."
_GONE = {  # worth another try: the connection, the server's process or its place for us, not what we asked for
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.OUT_OF_RANGE,  # the server has another part of the upload than it said: ask again
    grpc.StatusCode.DATA_LOSS,  # the part was damaged and is dropped: start again
    grpc.StatusCode.INTERNAL,  # also how a connection reset in mid-stream may look
    grpc.StatusCode.UNKNOWN,
}
_MENDS = {
    grpc.StatusCode.UNAUTHENTICATED: _RENEW,
    grpc.StatusCode.PERMISSION_DENIED: "Only what this node's current plan asks for is allowed.",
    grpc.StatusCode.ALREADY_EXISTS: "A node sends one delta a round.",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "Ask whoever runs the server.",
    grpc.StatusCode.UNIMPLEMENTED: "Server and node may run different versions of Molehill.",
}

T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """How long to try.

    Attributes:
        stalled: Seconds after which to give up when nothing has moved.
        call: Seconds that one call may take beside moving its bytes.
        slowest: Bytes per second under which a call is broken off and tried again.
        pause: Seconds before the second try; doubles with every try that moved nothing, up to 10.
    """

    stalled: float = 300.0
    call: float = 60.0
    slowest: float = 16 * 2**10
    pause: float = 0.2


class GrpcExchange:
    """The exchange of a coordinator, as one of its nodes sees it.

    Args:
        target: ``HOST:PORT``; the host must be a name or address in the server's certificate.
        identity: This node's.
        cache: Folder that keeps fetched blobs, so that what did not change since is not fetched again; made when
            missing. None keeps nothing.
        cache_bytes: The cache drops what was used longest ago above this size.
        patience: How long to try.
    """

    def __init__(
        self,
        target: str,
        identity: Identity,
        cache: Path | None = None,
        *,
        cache_bytes: int = 4 * 2**30,
        patience: Patience | None = None,
    ) -> None:
        credentials = grpc.ssl_channel_credentials(identity.authority.pem, identity.key_pem(), identity.certificate.pem)
        options = {
            "grpc.enable_http_proxy": 0,  # a proxy would not carry our certificates
            "grpc.max_receive_message_length": MAX_MESSAGE,
            "grpc.initial_reconnect_backoff_ms": 200,
            "grpc.max_reconnect_backoff_ms": 5_000,
            "grpc.keepalive_time_ms": 30_000,  # a peer that vanished without a word is noticed
            "grpc.keepalive_timeout_ms": 10_000,
        }
        self._target = target
        channel = self._channel = grpc.secure_channel(target, credentials, options=list(options.items()))
        self._get = channel.unary_stream(f"/{SERVICE}/Get", pb.GetRequest.SerializeToString, unpack(pb.Chunk))
        self._put = channel.stream_unary(f"/{SERVICE}/Put", pack, pb.Receipt.FromString)
        self._offset = channel.unary_unary(
            f"/{SERVICE}/Offset", pb.OffsetRequest.SerializeToString, pb.OffsetReply.FromString
        )
        self._cache = None if cache is None else _Cache(cache, cache_bytes)
        self._patience = patience or Patience()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls under way fail."""
        self._channel.close()

    def put(self, blob: bytes, at: Place | None = None) -> str:
        """Upload this node's delta of a round; returns its digest once the server has all of it.

        Args:
            blob: The delta.
            at: Its round.

        Raises:
            ValueError: It is said to be no delta: a node can put nothing else.
            MessageError: The server refuses it.
            FederationError: The server cannot be reached, or nothing moved for too long.
        """
        if at is None:
            raise ValueError("a node can only put a delta: give the run and round it is for")
        upload = _Upload(blob, at)

        def attempt() -> str:
            held = self._offset(pb.OffsetRequest(run=at.run, round=at.round), timeout=self._patience.call)
            header = upload.header(held)
            upload.moved = max(upload.moved, header.offset)
            receipt = upload.send(self._put, header, self._seconds(len(blob) - header.offset))
            if (receipt.run, receipt.round, receipt.length) != (*at, len(blob)) or (
                header.digest not in {"", receipt.digest}
            ):
                raise self._foreign("the receipt is for something else")
            return str(receipt.digest)

        return self._patiently(attempt, lambda: upload.moved)

    def get(self, name: str, max_bytes: int | None = None) -> bytes:
        """See `Exchange.get`.

        Raises:
            MessageError: The server refuses it, it is too large, or it was damaged.
            FederationError: The server cannot be reached, or nothing moved for too long.
        """
        require_digest(name)
        if self._cache is not None and (held := self._cache.get(name, max_bytes)) is not None:
            return held
        with ThreadPoolExecutor(1) as other:
            blob = self._fetch(_Download(name, max_bytes, other))
        if self._cache is not None:
            self._cache.put(blob)
        return blob

    def _fetch(self, download: _Download) -> bytes:
        name, max_bytes = download.name, download.max_bytes

        def attempt() -> None:
            left = (download.length or 0) - download.moved
            call = self._get(
                pb.GetRequest(digest=name, offset=download.moved), timeout=self._seconds(left or max_bytes or 2**30)
            )
            try:
                for chunk in call:
                    download.take(chunk)
            finally:
                call.cancel()
            if download.moved != download.length:
                raise self._foreign("the blob ends before its length")

        self._patiently(attempt, lambda: download.moved)
        blob = b"".join(download.parts)
        if download.digest() != name:
            raise self._foreign("the blob does not fit its digest")
        return blob

    def has(self, name: str) -> bool:
        """Whether this node may get the blob with this digest, and it is there."""
        require_digest(name)
        seconds = self._patience.call

        def attempt() -> bool:
            call = self._get(pb.GetRequest(digest=name), timeout=seconds)
            try:
                next(call)  # its length
            except grpc.RpcError as error:
                if error.code() in {grpc.StatusCode.NOT_FOUND, grpc.StatusCode.PERMISSION_DENIED}:
                    return False
                raise
            finally:
                call.cancel()
            return True

        return self._patiently(attempt, lambda: 0)

    def drop(self, name: str) -> None:
        """Forget the copy this node holds; on the server only the coordinator drops."""
        if self._cache is not None:
            self._cache.drop(name)

    def _seconds(self, size: int) -> float:
        return self._patience.call + size / self._patience.slowest

    def _patiently(self, attempt: Callable[[], T], moved: Callable[[], int]) -> T:
        """Try again until it works, is refused, or nothing has moved for too long."""
        since, before, tries = time.monotonic(), moved(), 0
        while True:
            try:
                return attempt()
            except grpc.RpcError as error:
                if error.code() not in _GONE or "CERTIFICATE_VERIFY_FAILED" in (error.details() or ""):
                    raise self._refusal(error) from None
                if moved() > before:
                    since, before, tries = time.monotonic(), moved(), 0
                if time.monotonic() - since > self._patience.stalled:
                    raise FederationError(
                        f"the exchange has not answered for {self._patience.stalled:.0f} s ({_words(error)})",
                        where=self._target,
                        mend="Check that it runs, the address, the firewall, and that it knows this certificate's "
                        "authority.",
                    ) from None
            # Many nodes that lost the same server should not come back in the same moment.
            time.sleep(min(10.0, self._patience.pause * 2**tries) * random.uniform(0.5, 1.0))  # noqa: S311 - no secret
            tries += 1

    def _refusal(self, error: Any) -> MolehillError:
        code = error.code()
        if code in _GONE:
            mend = "Check the address, and that ca.pem is of the authority that signed the server's certificate."
            return ConfigError(
                f"the server's certificate is not accepted ({_words(error)})", where=self._target, mend=mend
            )
        if code is grpc.StatusCode.NOT_FOUND:
            return MessageError(_words(error), where=self._target, mend=unknown("").mend)
        return MessageError(f"refused: {_words(error)}", where=self._target, mend=_MENDS.get(code, ""))

    def _foreign(self, what: str) -> MessageError:
        mend = "Server and node may run different versions of Molehill, or the server's disk is damaged."
        return MessageError(what, where=self._target, mend=mend)


def _words(error: Any) -> str:
    return str(error.details() or error.code().name.lower())


@dataclass
class _Upload:
    """A delta on its way; `moved` counts the bytes the server is known to have had."""

    blob: bytes
    at: Place
    moved: int = 0

    def header(self, held: pb.OffsetReply) -> pb.PutHeader:
        """Go on after what the server has if this delta begins with it, and else begin again.

        An upload in one go needs no digest from here: TLS vouches for what travels, and the server makes it. What lay
        on a disk meanwhile is compared.
        """
        start = memoryview(self.blob)[: held.offset]
        offset = held.offset if held.offset == len(start) and held.digest == digest(start) else 0
        known = digest(self.blob) if offset or len(self.blob) <= CHUNK else ""
        run, number = self.at
        return pb.PutHeader(run=run, round=number, digest=known, length=len(self.blob), offset=offset)

    def send(self, put: Any, header: pb.PutHeader, seconds: float) -> pb.Receipt:
        """Send the header and, when the server has answered that it is our turn, the data."""

        def parts() -> Iterator[pb.PutChunk | memoryview]:
            yield pb.PutChunk(header=header)
            calls.get().initial_metadata()
            for start in range(header.offset, len(self.blob), CHUNK):
                yield memoryview(self.blob)[start : start + CHUNK]

        calls: SimpleQueue[Any] = SimpleQueue()  # of one: the call, once there is one
        call = put.future(parts(), timeout=seconds)
        calls.put(call)
        receipt: pb.Receipt = call.result()
        return receipt


class _Download:
    """A blob on its way; what has come is kept for the next try."""

    def __init__(self, name: str, max_bytes: int | None, other: ThreadPoolExecutor) -> None:
        self.name = name
        self.max_bytes = max_bytes
        self.parts: list[memoryview] = []
        self.moved = 0
        self.length: int | None = None
        self._hash = hashlib.sha256()
        self._other = other
        self._hashed = 0  # parts of which the hash is made, or being made
        self._hashing: Future[None] | None = None

    def take(self, part: pb.Chunk | memoryview) -> None:
        """Take the next message."""
        if not isinstance(part, memoryview):
            require_size(part.length, self.max_bytes)
            self.length = part.length
            return
        self.parts.append(part)
        self.moved += part.nbytes
        if self.length is None or self.moved > self.length:
            raise MessageError(f"blob {self.name[:12]} is longer than it was said to be")
        if self._hashing is None or self._hashing.done():
            self._hash_more()

    def digest(self) -> str:
        """SHA-256 (hex) of what has come."""
        self._hash_more().result()
        return self._hash.hexdigest()

    def _hash_more(self) -> Future[None]:
        """Go on in the other thread, which takes less than the network: it hashes what came meanwhile."""
        parts, self._hashed = self.parts[self._hashed :], len(self.parts)

        def update() -> None:
            for part in parts:
                self._hash.update(part)

        self._hashing = self._other.submit(update)
        return self._hashing


class _Cache:
    """The blobs used last, in a folder. Nothing depends on it: on a full disk they are fetched again."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._blobs = FolderExchange(folder)
        self._folder = folder
        self._max_bytes = max_bytes

    def get(self, name: str, max_bytes: int | None) -> bytes | None:
        if not self._blobs.has(name):
            return None
        try:
            blob = self._blobs.get(name, max_bytes)
            os.utime(self._folder / name)
        except (MessageError, OSError):
            return None
        return blob

    def put(self, blob: bytes) -> None:
        with suppress(OSError):
            self._blobs.put(blob)
            used = 0
            for path, status in sorted(
                ((path, path.stat()) for path in self._folder.iterdir()), key=lambda each: -each[1].st_mtime_ns
            ):
                used += status.st_size
                if used > self._max_bytes:
                    path.unlink(missing_ok=True)

    def drop(self, name: str) -> None:
        self._blobs.drop(name)
