"""Where blobs lie between sender and receiver, addressed by their digest."""

from __future__ import annotations

import os
import re
import secrets
import threading
from pathlib import Path
from typing import NamedTuple, Protocol

from molehill.errors import ConfigError, MessageError
from molehill.wire.message import digest

_DIGEST = re.compile(r"[0-9a-f]{64}")


class Place(NamedTuple):
    """The round a delta belongs to.

    Attributes:
        run: Name of the run.
        round: Round number.
    """

    run: str
    round: int


class Exchange(Protocol):
    """A store of blobs by SHA-256 (hex). Putting a blob twice is the same as once; all methods are thread-safe."""

    def put(self, blob: bytes, at: Place | None = None) -> str:
        """Keep a blob and return its digest.

        Args:
            blob: The blob.
            at: The round it is a delta of; an exchange across machines takes nothing else.
        """
        ...

    def get(self, name: str, max_bytes: int | None = None) -> bytes:
        """Return the blob with this digest.

        Args:
            name: The digest.
            max_bytes: Its largest size; a larger one is not read. None reads any.

        Raises:
            MessageError: There is none, it is too large, or it was damaged.
        """
        ...

    def has(self, name: str) -> bool:
        """Whether there is a blob with this digest."""
        ...

    def drop(self, name: str) -> None:
        """Forget the blob with this digest, if there is one."""
        ...


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


_memories: dict[str, MemoryExchange] = {}
_lock = threading.Lock()


def connect(address: str) -> Exchange:
    """Open the exchange at an address.

    Args:
        address: ``memory:NAME`` (the same object for everybody in this process), ``folder:PATH`` or ``fsspec:URL``
            (`molehill.wire.objects`); for the exchange of a coordinator see `molehill.wire.remote`.

    Raises:
        ConfigError: No such kind of exchange, no name, path or URL, or what it needs is not installed.
    """
    kind, _, rest = address.partition(":")
    if rest and kind == "memory":
        with _lock:
            return _memories.setdefault(rest, MemoryExchange())
    if rest and kind == "folder":
        return FolderExchange(Path(rest))
    if rest and kind == "fsspec":
        from molehill.wire.objects import ObjectExchange  # noqa: PLC0415 - it is built on this module

        return ObjectExchange(rest)
    raise ConfigError(f"unknown exchange {address!r}", mend="Use memory:NAME, folder:PATH or fsspec:URL.")


def require_digest(name: str) -> None:
    """Refuse what is no SHA-256 in hexadecimal digits.

    Raises:
        MessageError: It is something else.
    """
    if not _DIGEST.fullmatch(name):
        raise MessageError(f"{name[:80]!r} is no digest", mend="Expected 64 hexadecimal digits.")


def require_size(size: int, max_bytes: int | None) -> None:
    """Refuse a blob over the limit.

    Args:
        size: Length of the blob.
        max_bytes: The limit; None is none.

    Raises:
        MessageError: It is longer.
    """
    if max_bytes is not None and size > max_bytes:
        raise MessageError(
            f"a blob of {size} bytes, the limit is {max_bytes}",
            mend="Its plan asks for no more, or wire.max_bytes is too small.",
        )


def unknown(name: str) -> MessageError:
    """The error that says that a blob is not there."""
    return MessageError(f"no blob {name[:80]!r} in the exchange", mend="It was never sent, or was dropped since.")
