"""Blobs, unfinished uploads and receipts on disk. Nothing here knows gRPC; all of it survives a kill at any moment."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from molehill.files import sync, write
from molehill_server.exchange.grants import Grant

_BEGIN = 8 * 2**20  # bytes written before the disk begins with them


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
        self._begun = 0  # of them on their way to the disk
        self._hash = hashlib.sha256()
        self._file = path.open("ab+", buffering=0)
        self._file.seek(0)
        while data := self._file.read(2**20):
            self._hash.update(data)
            self.size += len(data)

    def write(self, data: memoryview) -> None:
        """Append.

        Raises:
            DiskFullError: There is no room.
        """
        with self.room():
            left = data
            while left:
                left = left[self._file.write(left) :]
        self._hash.update(data)
        self.size += len(data)
        if self.size >= self._begun + _BEGIN:
            self._begin()

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of what it holds."""
        return self._hash.hexdigest()

    def sync(self) -> None:
        """Have it on the disk.

        Raises:
            DiskFullError: There is no room.
        """
        with self.room():
            os.fdatasync(self._file.fileno())

    def _begin(self) -> None:
        """Have what was written go to the disk from now on, without waiting, so that the end waits for little of it."""
        if hasattr(os, "posix_fadvise"):  # what is not on the disk yet cannot be dropped, and so is written: on Linux
            os.posix_fadvise(self._file.fileno(), self._begun, self.size - self._begun, os.POSIX_FADV_DONTNEED)
        self._begun = self.size

    def drop(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)

    @contextmanager
    def room(self) -> Iterator[None]:
        """Remove the file when there is no room to write something.

        Raises:
            DiskFullError: There is none.
        """
        try:
            yield
        except OSError as error:
            if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
                raise
            self.drop()
            raise DiskFullError from None

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Blobs(Protocol):
    """Where whole blobs are kept; `molehill.wire.objects.ObjectExchange` is one."""

    def has(self, name: str) -> bool:
        """Whether there is a blob with this digest."""
        ...

    def open(self, name: str) -> io.RawIOBase:
        """Open a blob to read.

        Raises:
            FileNotFoundError: There is none.
        """
        ...

    def take(self, file: Path, name: str) -> None:
        """Let a file, which is whole and on the disk, be the blob with this digest."""
        ...

    def drop(self, name: str) -> None:
        """Forget a blob, if there is one."""
        ...


class FolderBlobs:
    """Blobs in a folder of the same file system as the spool: to take one is to rename it.

    Args:
        folder: The folder; it is made when missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def has(self, name: str) -> bool:
        """See `Blobs.has`."""
        return (self._folder / name).exists()

    def open(self, name: str) -> io.RawIOBase:
        """See `Blobs.open`."""
        return (self._folder / name).open("rb", buffering=0)

    def take(self, file: Path, name: str) -> None:
        """See `Blobs.take`."""
        file.replace(self._folder / name)
        sync(self._folder)

    def drop(self, name: str) -> None:
        """See `Blobs.drop`."""
        (self._folder / name).unlink(missing_ok=True)


class Spool:
    """The folder of the exchange.

    Args:
        folder: The folder; it is made when missing.
        reserve: Bytes of the disk to leave free for the coordinator.
        blobs: Where whole blobs are kept; in the folder when omitted.
    """

    def __init__(self, folder: Path, reserve: int = 0, blobs: Blobs | None = None) -> None:
        self.blobs = FolderBlobs(folder / "blobs") if blobs is None else blobs
        self._folder, self._parts, self._receipts = folder, folder / "parts", folder / "receipts"
        self._reserve = reserve
        for path in (self._parts, self._receipts):
            path.mkdir(parents=True, exist_ok=True)

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

        The receipt comes first, and says nothing while there is no blob: a node whose upload was cut between the two
        finds the part and ends it.

        Raises:
            DiskFullError: The receipt has no room.
        """
        before = self.receipt(receipt.node)
        with ThreadPoolExecutor(1) as other, part.room():
            syncing = other.submit(part.sync)  # it and the receipt wait for the disk together
            self.sign(receipt)
            syncing.result()
        self.blobs.take(part.path, receipt.digest)
        if before is not None and before.digest != receipt.digest:
            self.blobs.drop(before.digest)

    def sign(self, receipt: Receipt) -> None:
        """Write a receipt."""
        write(self._receipts / f"{receipt.node}.json", receipt.model_dump_json().encode())

    def receipt(self, node: str) -> Receipt | None:
        """What the node delivered last; None when that is nothing, or damaged."""
        try:
            return Receipt.model_validate_json((self._receipts / f"{node}.json").read_bytes())
        except (FileNotFoundError, ValidationError):
            return None

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
            What was removed.
        """
        current = None if grant is None else f"{grant.run}.{grant.round}"
        files = [path for path in self._parts.glob(f"{node}/*") if path.stem != current]
        removed = []
        receipt = self.receipt(node)
        if receipt is None or grant is None or not receipt.of(grant):
            if receipt is not None and receipt.digest not in keep and self.blobs.has(receipt.digest):
                self.blobs.drop(receipt.digest)
                removed.append(f"blob {receipt.digest}")
            files.append(self._receipts / f"{node}.json")  # last, so that a kill in between leaves no blob for ever
        for path in files:
            if path.exists():
                path.unlink(missing_ok=True)
                removed.append(str(path.relative_to(self._folder)))
        return removed

    def _part(self, node: str, grant: Grant) -> Path:
        return self._parts / node / f"{grant.run}.{grant.round}.part"
