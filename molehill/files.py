"""Files that are there whole or not at all, files for the eyes of their owner only, and disks that are full."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from molehill.errors import DeployError, MolehillError

PRIVATE = 0o600
_OTHERS = 0o077

_umask = threading.Lock()
_before: list[int] = []  # the umask before each context of `private` that is open


def place_of(name: str, kind: type[MolehillError]) -> Path:
    """The path that a user's words name, whether or not something is there; ``~`` is a home.

    Args:
        name: As the user wrote it.
        kind: What to raise.

    Raises:
        MolehillError: Of that kind: the system cannot look there.
    """
    try:
        path = Path(name).expanduser()
        path.exists()  # lets through what is more than an absence
    except (RuntimeError, ValueError) as error:  # no such user; a zero byte
        raise kind(f"no such place: {error}", where=name, mend="Write the whole path.") from None
    except OSError as error:
        what = f"the system cannot look there: {error.strerror or error}"
        raise kind(what, where=name, mend="Check the path and who may read it.") from None
    return path


def require_name(name: str, kind: type[MolehillError]) -> None:
    """Refuse a name that no file of this process can have, since its locale knows few characters.

    Args:
        name: Of a folder to be.
        kind: What to raise.

    Raises:
        MolehillError: Of that kind.
    """
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        what = f"no folder can be called {name!r} here, where the names of files are in {sys.getfilesystemencoding()}"
        raise kind(what, mend="Set PYTHONUTF8=1 in the environment.") from None


def write(path: Path, data: bytes | Iterable[bytes | memoryview], *, mode: int = 0o644, replace: bool = True) -> None:
    """Write a file at once or, when interrupted, not at all.

    Args:
        path: The file; its folder must exist.
        data: What it is to hold, whole or in parts.
        mode: Its permissions, less those that the umask takes away; they hold from the first byte on.
        replace: Whether a file that is there may be replaced.

    Raises:
        FileExistsError: It may not.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            part.replace(path)
        else:
            path.hardlink_to(part)  # fails where a rename would replace
        sync(path.parent)
    except OSError as error:
        error.filename = str(path)  # a disk that is full does not say where
        raise
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside a file for others to write to: it becomes that file when the block ends well, else it goes.

    Args:
        path: The file; its folder must exist.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        with placed(path):
            yield part
            sync(part)
            part.replace(path)
            sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def placed(path: Path) -> Iterator[None]:
    """Let an OSError say where something was written: a disk that is full does not, or names a file that has gone."""
    try:
        yield
    except OSError as error:
        if is_full(error) or not error.filename:
            error.filename = str(path)
        raise


def require_room(what: str, *needed: tuple[Path, int], kind: type[MolehillError], mend: str) -> None:
    """Refuse to begin what a disk has no room for.

    Args:
        what: What is to be written, as the subject of a sentence.
        needed: Folders, which need not exist yet, and the bytes that go into each.
        kind: What to raise.
        mend: How to mend it.

    Raises:
        MolehillError: Of that kind: a disk has less free than what goes there.
    """
    disks: dict[int, tuple[Path, Path, int]] = {}
    for folder, size in needed:
        there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
        disk = there.stat().st_dev
        first, _, before = disks.get(disk, (folder, there, 0))
        disks[disk] = first, there, before + size
    for folder, there, size in disks.values():
        room = shutil.disk_usage(there)
        if room.total and size > room.free:  # some file systems say nothing of their size
            raise kind(
                f"{what} needs {size:,} bytes, and {room.free:,} are free", where=str(folder.absolute()), mend=mend
            )


def sweep(folder: Path) -> None:
    """Remove what `write` left half done, in a folder where nobody writes, because its process was killed."""
    for path in folder.rglob(".*.part"):
        path.unlink(missing_ok=True)


def digest_of(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_folder(path: Path) -> None:
    """Make a folder, and what is missing above it, so that a crash does not lose the folder itself."""
    new = [each for each in (path, *path.parents) if not each.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for each in new:
        sync(each.parent)


def sync(path: Path) -> None:
    """Have the file system write a file, or a folder's entries, to the disk, so that it survives a crash."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_private(path: Path) -> bool:
    """Whether nobody but the owner may read or write a file."""
    return not path.stat().st_mode & _OTHERS


@contextlib.contextmanager
def private() -> Iterator[None]:
    """Whatever this process and its children create meanwhile is for its owner alone, by whichever library."""
    with _umask:
        _before.append(os.umask(_OTHERS))
    try:
        yield
    finally:
        with _umask:  # one of another thread may be open still: the last to be closed finds what was there at first
            os.umask(_before.pop())


@contextlib.contextmanager
def told(who: str, folder: Path, then: str = "resume") -> Iterator[None]:
    """Turn what the operating system refuses into words: a full disk is nobody's traceback.

    Args:
        who: Who cannot go on.
        folder: Where, if the system does not say it.
        then: What to do once it is mended.

    Raises:
        DeployError: In place of an OSError.
    """
    try:
        yield
    except OSError as error:
        mend = f"Make room there, then {then}." if is_full(error) else f"Mend it, then {then}."
        where = str(error.filename or folder)
        raise DeployError(f"{who} cannot go on: {error.strerror or error}", where=where, mend=mend) from error


def is_full(error: OSError) -> bool:
    """Whether there is no room left, on the disk or of what this user may have of it."""
    return error.errno in {errno.ENOSPC, errno.EDQUOT}


def cure(error: OSError, otherwise: str = "") -> str:
    """How to mend what the system refuses.

    Args:
        error: What it says.
        otherwise: The sentence where the disk is not full.
    """
    return "Make room on that disk." if is_full(error) else otherwise


def parse_json(text: str | bytes) -> Any:
    """Read JSON that may have been damaged, or made to do harm.

    Raises:
        ValueError: It is no JSON, or nested deeper than anything that is written here.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
