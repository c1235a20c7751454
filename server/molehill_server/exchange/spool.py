"""Blobs, unfinished uploads and receipts on disk. Nothing here knows gRPC; all of it survives a kill at any moment."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from molehill.files import sync, write
from molehill_server.exchange.grants import Grant


class DiskFullError(Exception):
    """There is no room for a blob; nothing of it was kept."""


class Receipt(BaseModel):
    """That a node delivered its delta of a round, whole.

    Attributes:
        run: Name of the run.
        round: Round number.
        attempt: Of the grant.
        node: Name of the node.
        digest: Of the delta.
        length: Of the delta, in bytes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: str
    round: int
    attempt: int
    node: str
    digest: str
    length: int

    def of(self, grant: Grant) -> bool:
        """Whether it was given under this grant."""
        return (self.run, self.round, self.attempt) == (grant.run, grant.round, grant.attempt)


class Part:
    """An upload under way: a file that grows, and the digest of what it holds.

    Args:
        path: The file; what it holds is kept.
        length: Bytes it shall have.
    """

    def __init__(self, path: Path, length: int) -> None:
        self.path = path
        self.length = length
        self.size = 0  # bytes written
        self.synced = 0  # of them on the disk for certain
        self._hash = hashlib.sha256()
        self._file = path.open("ab+", buffering=0)
        self._file.seek(0)
        while data := self._file.read(2**20):
            self._hash.update(data)
            self.size += len(data)

    def write(self, pieces: Iterable[memoryview]) -> None:
        """Append.

        Raises:
            DiskFullError: There is no room.
        """
        for data in pieces:
            try:
                view = data
                while view:
                    view = view[self._file.write(view) :]
            except OSError as error:
                if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
                    raise
                self.drop()
                raise DiskFullError from None
            self._hash.update(data)
            self.size += len(data)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of what it holds."""
        return self._hash.hexdigest()

    def sync(self) -> None:
        """Have it on the disk."""
        size = self.size
        os.fsync(self._file.fileno())
        self.synced = size

    def drop(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


class Spool:
    """The folder of the exchange.

    Args:
        folder: The folder; it is made when missing.
        reserve: Bytes of the disk to leave free for the coordinator.
    """

    def __init__(self, folder: Path, reserve: int = 0) -> None:
        self._blobs, self._parts, self._receipts = (folder / name for name in ("blobs", "parts", "receipts"))
        self._reserve = reserve
        for path in (self._blobs, self._parts, self._receipts):
            path.mkdir(parents=True, exist_ok=True)

    def has(self, digest: str) -> bool:
        """Whether there is a whole blob."""
        return (self._blobs / digest).exists()

    def open(self, digest: str) -> BinaryIO:
        """Open a blob to read.

        Raises:
            FileNotFoundError: There is none.
        """
        return (self._blobs / digest).open("rb", buffering=0)

    def held(self, node: str, grant: Grant) -> tuple[int, str]:
        """Bytes of a node's delta that came so far, and their digest."""
        with suppress(FileNotFoundError), self._part(node, grant).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return file.tell(), digest
        return 0, hashlib.sha256().hexdigest()

    def open_part(self, node: str, grant: Grant, length: int, offset: int) -> Part:
        """Open the node's one unfinished upload; any other of its uploads is dropped.

        Args:
            node: Name of the node.
            grant: What it may do.
            length: Bytes of the whole delta.
            offset: Bytes to go on after; 0 begins again.

        Raises:
            DiskFullError: The rest of it has no room.
        """
        path = self._part(node, grant)
        path.parent.mkdir(exist_ok=True)
        for other in path.parent.iterdir():
            if other != path or not offset:
                other.unlink(missing_ok=True)
        missing = length - offset
        if missing > 0 and shutil.disk_usage(self._parts).free < missing + self._reserve:
            path.unlink(missing_ok=True)
            raise DiskFullError
        return Part(path, length)

    def commit(self, part: Part, receipt: Receipt) -> None:
        """Let a whole part appear as a blob, with its receipt.

        The receipt comes first: a node whose upload was cut between the two finds the part whole and ends it.

        Raises:
            DiskFullError: The receipt has no room.
        """
        before = self.receipt(receipt.node)
        try:
            part.sync()
            self.sign(receipt)
        except OSError as error:
            if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
                raise
            part.drop()
            raise DiskFullError from None
        part.path.replace(self._blobs / receipt.digest)
        sync(self._blobs)
        if before is not None and before.digest != receipt.digest:
            self.drop(before.digest)

    def sign(self, receipt: Receipt) -> None:
        """Write a receipt."""
        write(self._receipts / f"{receipt.node}.json", receipt.model_dump_json().encode())

    def receipt(self, node: str) -> Receipt | None:
        """What the node delivered last; None when that is nothing, or damaged."""
        try:
            return Receipt.model_validate_json((self._receipts / f"{node}.json").read_bytes())
        except (FileNotFoundError, ValidationError):
            return None

    def drop(self, digest: str) -> None:
        """Remove a blob."""
        (self._blobs / digest).unlink(missing_ok=True)

    def nodes(self) -> set[str]:
        """Names of the nodes of which there is anything."""
        return {path.stem for path in self._receipts.glob("[!.]*.json")} | {path.name for path in self._parts.iterdir()}

    def collect(self, node: str, grant: Grant | None, keep: Collection[str] = ()) -> list[str]:
        """Remove what a node sent for rounds that are over.

        Args:
            node: Name of the node.
            grant: What it may do now.
            keep: Digests of blobs that stay whatever happens.

        Returns:
            Paths that were removed, under the folder.
        """
        current = None if grant is None else f"{grant.run}.{grant.round}"
        removed = [path for path in self._parts.glob(f"{node}/*") if path.stem != current]
        receipt = self.receipt(node)
        if receipt is None or grant is None or not receipt.of(grant):
            if receipt is not None and receipt.digest not in keep:
                removed.append(self._blobs / receipt.digest)
            removed.append(self._receipts / f"{node}.json")  # last, so that a kill in between leaves no blob for ever
        removed = [path for path in removed if path.exists()]
        for path in removed:
            path.unlink(missing_ok=True)
        return [str(path.relative_to(self._blobs.parent)) for path in removed]

    def _part(self, node: str, grant: Grant) -> Path:
        return self._parts / node / f"{grant.run}.{grant.round}.part"
