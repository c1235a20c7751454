"""Exchanges on this machine: in the memory of this process, and in a folder."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from molehill.errors import MessageError
from molehill.wire.exchange import Place, require_digest, require_size, unknown
from molehill.wire.message import digest


class MemoryExchange:
    """Blobs in the memory of this process."""

    def __init__(self) -> None:
        self._blobs: dict[str, bytes] = {}

    def put(self, blob: bytes, at: Place | None = None) -> str:  # noqa: ARG002 - everybody may put anything here
        """See `Exchange.put`."""
        name = digest(blob)
        self._blobs[name] = blob
        return name

    def get(self, name: str, max_bytes: int | None = None) -> bytes:
        """See `Exchange.get`."""
        try:
            blob = self._blobs[name]
        except KeyError:
            raise unknown(name) from None
        require_size(len(blob), max_bytes)
        return blob

    def has(self, name: str) -> bool:
        """See `Exchange.has`."""
        return name in self._blobs

    def drop(self, name: str) -> None:
        """See `Exchange.drop`."""
        self._blobs.pop(name, None)


class FolderExchange:
    """Blobs as files, for processes that share a file system. A file appears whole or not at all.

    Args:
        path: The folder; it is made when missing.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.mkdir(parents=True, exist_ok=True)

    def put(self, blob: bytes, at: Place | None = None) -> str:  # noqa: ARG002 - everybody may put anything here
        """See `Exchange.put`."""
        name = digest(blob)
        if not self.has(name):
            part = self._path / f".{name}.{secrets.token_hex(8)}.part"
            try:
                part.write_bytes(blob)
                part.replace(self._file(name))
            finally:
                part.unlink(missing_ok=True)
        return name

    def get(self, name: str, max_bytes: int | None = None) -> bytes:
        """See `Exchange.get`; a file that does not fit its digest is removed, so that it can be put again."""
        try:
            with self._file(name).open("rb") as file:
                require_size(os.fstat(file.fileno()).st_size, max_bytes)
                blob = file.read()
        except FileNotFoundError:
            raise unknown(name) from None
        if digest(blob) != name:
            self.drop(name)
            raise MessageError("the file does not fit its digest", where=str(self._file(name)), mend="Send it again.")
        return blob

    def has(self, name: str) -> bool:
        """See `Exchange.has`."""
        return self._file(name).exists()

    def drop(self, name: str) -> None:
        """See `Exchange.drop`."""
        self._file(name).unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        # A digest comes from the network: nothing else may become part of a path.
        require_digest(name)
        return self._path / name
