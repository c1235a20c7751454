"""Files that are there whole or not at all, and files for the eyes of their owner only."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

PRIVATE = 0o600


def write(path: Path, data: bytes, *, mode: int = 0o644, replace: bool = True) -> None:
    """Write a file at once or, when interrupted, not at all.

    Args:
        path: The file; its folder must exist.
        data: What it is to hold.
        mode: Its permissions, less those that the umask takes away; they hold from the first byte on.
        replace: Whether a file that is there may be replaced.

    Raises:
        FileExistsError: It may not.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            part.replace(path)
        else:
            path.hardlink_to(part)  # fails where a rename would replace
        sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have the file system write a file, or a folder's entries, to the disk, so that it survives a crash."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_private(path: Path) -> bool:
    """Whether nobody but the owner may read or write a file."""
    return not path.stat().st_mode & 0o077
