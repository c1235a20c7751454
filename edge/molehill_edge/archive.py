"""A bundle in one file: a ZIP that holds exactly the files of its manifest, none of them compressed."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import stat
import struct
import zipfile
from pathlib import Path
from typing import IO

from molehill import files
from molehill.errors import BundleError
from molehill_edge import manifest as manifests
from molehill_protos.v1.bundle_pb2 import File, Manifest

SUFFIX = ".molehill"
_CHUNK = 1 << 20
_DATE = (1980, 1, 1, 0, 0, 0)  # the first that a ZIP can name
_MODE = (stat.S_IFREG | 0o644) << 16
_UNIX = 3  # what the mode above is a mode of
_ENCRYPTED = 0x1
_MAX_DIRECTORY = 64 << 10  # bytes: of as many files as a manifest may list, with the longest names
# The records that end a ZIP; the first two only where the last has no room for a number.
_END64, _LOCATOR, _END = struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL"), struct.Struct("<4s4H2LH")
_AGAIN = "Get the archive again from where it came from."


def pack(folder: Path, path: Path, *, now: float | None = None) -> Manifest:
    """Write the archive of a bundle; equal bundles give equal bytes.

    Args:
        folder: The bundle.
        path: The archive; one that is there is replaced, and only by a whole one.
        now: Seconds since 1970; the clock's when None.

    Raises:
        BundleError: The bundle is damaged or cannot be read, the archive cannot be written, or there is no room for it.
    """
    manifest, data = manifests.load(folder, now=now)
    size = _size(manifest, data) + _MAX_DIRECTORY
    files.require_room("the archive", (path.parent, size), kind=BundleError, mend="Make room, or choose another place.")
    try:
        with files.replacing(path) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr(_entry(manifests.NAME, len(data)), data)
            for file in manifest.files:
                source = folder / file.path
                with manifests.open_regular(source) as stream:
                    _require(os.fstat(stream.fileno()).st_size == file.length, "is not of its length", source)
                    with archive.open(_entry(file.path, file.length), "w") as target:
                        _copy(stream, target, file, str(source))
    except OSError as error:
        what = f"cannot pack the bundle: {error.strerror or error}"
        raise BundleError(what, where=str(error.filename or path), mend=files.cure(error)) from None
    return manifest


def unpack(path: Path, folder: Path, *, now: float | None = None) -> Manifest:
    """Write the files of an archive to a new folder, every one checked on the way, or nothing at all.

    Args:
        path: The archive.
        folder: Where its files go; must not exist, or be empty.
        now: Seconds since 1970; the clock's when None.

    Returns:
        Manifest: Of the bundle.

    Raises:
        BundleError: The archive is damaged, holds anything but the files of its manifest, its manifest is refused, or
            there is no room for its files.
    """
    part = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.part")
    try:
        part.mkdir(parents=True)
        manifest = _unpack(path, part, now)
        part.replace(folder)
    except OSError as error:
        what = f"cannot unpack the archive: {error.strerror or error}"
        where = str(folder.parent if files.is_full(error) else error.filename or path)
        raise BundleError(what, where=where, mend=files.cure(error, _AGAIN)) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return manifest


def _unpack(path: Path, folder: Path, now: float | None) -> Manifest:
    where = str(path)
    with manifests.open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        try:
            _check_directory(stream, size, where)
            with zipfile.ZipFile(stream) as archive:
                entries = archive.infolist()
                _check_entries(entries, size, where)
                data = archive.read(entries[0])
                manifest = manifests.read(data, f"{where}, {manifests.NAME}", now=now)
                _check_against(manifest, entries, where)
                wanted = (folder.parent, _size(manifest, data))
                mend = "Make room there; if it is a temporary folder, TMPDIR in the environment names another."
                files.require_room("what the archive holds", wanted, kind=BundleError, mend=mend)
                (folder / manifests.NAME).write_bytes(data)
                for file, entry in zip(manifest.files, entries[1:], strict=True):
                    target = folder / file.path
                    target.parent.mkdir(exist_ok=True)
                    with archive.open(entry) as source, target.open("xb") as out:
                        _copy(source, out, file, f"{where}, {file.path}")
        except BundleError:
            raise
        # What zipfile raises for bytes that are no ZIP is not documented: BadZipFile, NotImplementedError,
        # struct.error, UnicodeDecodeError, EOFError and others.
        except Exception as error:
            if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: an offset before the beginning
                raise
            raise BundleError("the archive is damaged, or not an archive at all", where=where, mend=_AGAIN) from None
    return manifest


def _size(manifest: Manifest, data: bytes) -> int:
    """Bytes of the files of a bundle, the manifest ``data`` among them."""
    return len(data) + sum(file.length for file in manifest.files)


def _check_directory(stream: IO[bytes], size: int, where: str) -> None:
    """Refuse a list of files that no bundle has, before it is read into memory."""
    ends = _END64.size + _LOCATOR.size
    stream.seek(max(size - ends - _END.size, 0))
    tail = stream.read(ends + _END.size)
    mark, *_, count, length, _, comment = _END.unpack(tail[-_END.size :])
    if mark != b"PK\5\6" or comment:
        raise zipfile.BadZipFile
    if tail[: -_END.size][-_LOCATOR.size :].startswith(b"PK\6\7"):
        _, _, at, _ = _LOCATOR.unpack(tail[_END64.size : ends])
        mark, *_, count, length, _ = _END64.unpack(tail[: _END64.size])
        if mark != b"PK\6\6" or at != size - len(tail):
            raise zipfile.BadZipFile
    _require(count <= manifests.MAX_FILES + 1, f"holds {count} files", where)
    _require(length <= _MAX_DIRECTORY, f"has a list of files of {length} bytes", where)


def _check_entries(entries: list[zipfile.ZipInfo], size: int, where: str) -> None:
    """Refuse what no bundle has, before a byte of an entry is read."""
    _require(bool(entries), "holds nothing", where)
    _require(len(entries) <= manifests.MAX_FILES + 1, f"holds {len(entries)} files", where)
    for entry in entries:
        kind = stat.S_IFMT(entry.external_attr >> 16)
        name = repr(entry.filename[:80])
        _require(not entry.flag_bits & _ENCRYPTED, f"holds an encrypted file, {name}", where)
        # Without compression the files cannot be larger than the archive: no bombs.
        stored = entry.compress_type == zipfile.ZIP_STORED and entry.compress_size == entry.file_size
        _require(stored, f"holds a compressed file, {name}", where)
        _require(kind in {0, stat.S_IFREG}, f"holds something other than a file, {name}", where)
    _require(sum(entry.file_size for entry in entries) <= size, "holds files that overlap", where)
    first = entries[0]
    _require(first.filename == manifests.NAME, f"does not begin with {manifests.NAME}", where)
    _require(first.file_size <= manifests.MAX_BYTES, f"has a {manifests.NAME} that is too large", where)


def _check_against(manifest: Manifest, entries: list[zipfile.ZipInfo], where: str) -> None:
    """Refuse all but the manifest's files in their order; so no name can lead outside, and none can come twice."""
    listed = [file.path for file in manifest.files]
    found = [entry.filename for entry in entries[1:]]
    for name in found:
        _require(name in listed, f"holds a file that its manifest does not list, {name[:80]!r}", where)
    _require(len(set(found)) == len(found), "holds a file twice", where)
    _require(set(found) == set(listed), f"lacks {', '.join(sorted(set(listed) - set(found)))}", where)
    _require(found == listed, "holds its files in another order than its manifest", where)
    for file, entry in zip(manifest.files, entries[1:], strict=True):
        _require(entry.file_size == file.length, f"holds {file.path} with another length than its manifest", where)


def _require(condition: bool, what: str, where: str | Path) -> None:
    if not condition:
        subject = "the archive" if isinstance(where, str) else "the file"
        raise BundleError(f"{subject} {what}", where=str(where), mend=_AGAIN)


def _entry(name: str, size: int) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, _DATE)
    entry.create_system, entry.external_attr, entry.file_size = _UNIX, _MODE, size
    return entry


def _copy(source: IO[bytes], target: IO[bytes], file: File, where: str) -> None:
    """Copy one file of a bundle, and refuse it when it is not the one of the manifest."""
    digest, length = hashlib.sha256(), 0
    while chunk := source.read(_CHUNK):
        length += len(chunk)
        if length > file.length:
            break
        digest.update(chunk)
        target.write(chunk)
    if length != file.length or digest.digest() != file.sha256:
        raise BundleError("the file is not the one of the manifest: its SHA-256 differs", where=where, mend=_AGAIN)
