"""What an exchange is: where blobs lie between sender and receiver, addressed by their digest."""

from __future__ import annotations

import re
from typing import NamedTuple, Protocol

from molehill.errors import MessageError

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
