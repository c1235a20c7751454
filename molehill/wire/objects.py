"""Blobs in an object store, or on whatever else fsspec knows: for those who outgrow a disk."""

from __future__ import annotations

import io
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from molehill.errors import ConfigError, FederationError, MessageError, MolehillError
from molehill.extras import needs
from molehill.wire.exchange import Place, require_digest, require_size, unknown
from molehill.wire.message import digest

_WHOLE = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "oci", "obs"}  # an object appears whole or not


class ObjectExchange:
    """Blobs under a URL. The store keeps what it says it keeps, and shows it to everybody at once.

    Args:
        url: As fsspec takes it, for example ``s3://bucket/molehill``; keys and end points come from where the store's
            own library looks for them.

    Raises:
        ConfigError: fsspec or the library of the store is not installed, or fsspec does not know such a URL.
        FederationError: The store does not answer.
    """

    def __init__(self, url: str) -> None:
        with needs("object-storage"):
            from fsspec.core import url_to_fs  # noqa: PLC0415 - an extra
        try:
            self._store, self._root = url_to_fs(url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            mend = "Use a URL that fsspec knows, and install what it needs, for example: pip install s3fs"
            raise ConfigError(f"cannot use the object store ({error})", where=url, mend=mend) from None
        self._url = url
        names = self._store.protocol
        self._atomic = not _WHOLE.isdisjoint({names} if isinstance(names, str) else names)
        if not self._atomic:
            with self._answers():
                self._store.makedirs(self._root, exist_ok=True)

    def put(self, blob: bytes, at: Place | None = None) -> str:  # noqa: ARG002 - everybody may put anything here
        """See `Exchange.put`."""
        name = digest(blob)
        if not self.has(name):
            self._appear(name, lambda path: self._store.pipe_file(path, blob))
        return name

    def get(self, name: str, max_bytes: int | None = None) -> bytes:
        """See `Exchange.get`; an object that does not fit its digest is removed, so that it can be put again."""
        path = self._path(name)
        try:
            with self._answers():
                require_size(self._store.size(path), max_bytes)
                blob: bytes = self._store.cat_file(path)
        except FileNotFoundError:
            raise unknown(name) from None
        if digest(blob) != name:
            self.drop(name)
            raise MessageError("the object does not fit its digest", where=path, mend="Send it again.")
        return blob

    def has(self, name: str) -> bool:
        """See `Exchange.has`."""
        path = self._path(name)
        with self._answers():
            return bool(self._store.exists(path))

    def drop(self, name: str) -> None:
        """See `Exchange.drop`."""
        path = self._path(name)
        with suppress(FileNotFoundError), self._answers():
            self._store.rm_file(path)

    def take(self, file: Path, name: str) -> None:
        """Put a whole file, which has this digest, and remove it here."""
        self._appear(name, lambda path: self._store.put_file(str(file), path))
        file.unlink()

    def open(self, name: str) -> io.RawIOBase:
        """Open a blob to read; every read is a request.

        Raises:
            FileNotFoundError: There is none.
        """
        path = self._path(name)
        with self._answers():
            return _Reader(self, self._store.size(path), path)

    def part(self, path: str, start: int, end: int) -> bytes:
        """Bytes of an object."""
        with self._answers():
            data: bytes = self._store.cat_file(path, start=start, end=end)
        return data

    def _appear(self, name: str, write: Callable[[str], Any]) -> None:
        path = self._path(name)
        with self._answers():
            if self._atomic:
                write(path)
                return
            part = f"{self._root}/.{name}.{secrets.token_hex(8)}.part"
            try:
                write(part)
                self._store.mv(part, path)
            finally:
                with suppress(FileNotFoundError):
                    self._store.rm_file(part)

    def _path(self, name: str) -> str:
        require_digest(name)
        return f"{self._root}/{name}"

    @contextmanager
    def _answers(self) -> Iterator[None]:
        """Put into words what goes wrong with a store: every library has errors of its own."""
        try:
            yield
        except (FileNotFoundError, MolehillError):
            raise
        except Exception as error:
            mend = "Check that the store can be reached, and the rights of the keys in use."
            raise FederationError(f"the object store fails ({error})", where=self._url, mend=mend) from error


class _Reader(io.RawIOBase):
    """An object, read piece by piece."""

    def __init__(self, store: ObjectExchange, size: int, path: str) -> None:
        self._store, self._size, self._path, self._at = store, size, path, 0

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        end = self._size if size < 0 else min(self._size, self._at + size)
        data = self._store.part(self._path, self._at, end) if self._at < end else b""
        self._at += len(data)
        return data
