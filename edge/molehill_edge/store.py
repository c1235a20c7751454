"""The bundles of a device, and the proof that somebody trusted signed them.

::

    repositories/<digest of the pinned root>/pinned.json, url, metadata/   what the repository has shown so far
    blobs/sha256/<hash>                                                     every file once, whichever bundles have it
    bundles/<id>/current.json                                               which version is in use
    bundles/<id>/<version>-<random>/files/                                  its files, hard links to blobs
    bundles/<id>/<version>-<random>/<n>.targets.json                        the signed list that named its manifest
    experts/, settings.json                                                 see `molehill_edge.added`

A new version is assembled beside the old one, and ``current.json``, replaced by a rename, is the switch. The signed
list is kept with the version, since the repository's moves on when it is asked about another bundle.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import platformdirs
from google.protobuf.message import DecodeError

from molehill import files
from molehill.errors import BundleError, TrustError
from molehill_edge import manifest as manifests
from molehill_edge import signatures
from molehill_edge.added import Added, Shelf
from molehill_edge.signatures import Known
from molehill_edge.trust import Admitted
from molehill_protos.v1.bundle_pb2 import File, Manifest

VARIABLE = "MOLEHILL_STORE"
_PATIENCE = 10.0  # seconds that a command waits for another one at the same store
_ROOM = 64 << 20  # bytes that what comes into the store leaves free
_UPDATE = "Run: molehill edge update"


def default_folder() -> Path:
    """Where bundles lie unless somebody says otherwise: `MOLEHILL_STORE`, or the user's data folder."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named else platformdirs.user_data_path("molehill") / "bundles"


@dataclass(frozen=True)
class Current:
    """Which version of a bundle is in use.

    Args:
        id: Of the bundle.
        version: Of the bundle.
        folder: Name of its folder in that of the bundle.
        manifest: SHA-256 of its manifest, in hexadecimal digits.
        repository: Where it is from, by the digest of the pinned root.
        root: Version of the root metadata whose keys have signed the list.
        listed: Version of the signed list.
    """

    id: str
    version: int
    folder: str
    manifest: str
    repository: str
    root: int
    listed: int


class Store:
    """The bundles of a device; opens only what somebody trusted has signed.

    Args:
        folder: Where they lie; `default_folder` when None.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = default_folder() if folder is None else Path(folder)
        self._blobs = self.folder / "blobs" / "sha256"
        self._bundles = self.folder / "bundles"
        self._repositories = self.folder / "repositories"
        self._shelf = Shelf(
            self.folder, lambda sha256: self._blobs / sha256, lambda name: Known(name, self._repositories / name)
        )

    def admit(self, name: str | Path) -> Admitted:
        """The bundle of this id with what was added to it, every signature and every file checked, without a network.

        Raises:
            BundleError: There is none, it has expired or a file of it is damaged.
            TrustError: The signatures do not hold, or an added expert has none and this device asks for them.
        """
        current, handle = self._hold(str(name))
        try:
            folder, manifest = self._version(current) / "files", self._checked(current)
            experts = self._shelf.checked(current.id)
            strict = self._shelf.signed_only
        except BaseException:
            os.close(handle)
            raise
        return Admitted(folder, manifest, lambda: os.close(handle), experts, strict)

    @property
    def signed_experts_only(self) -> bool:
        """Whether this device refuses experts that did not come as signed targets of a repository.

        Raises:
            BundleError: The settings of the store cannot be read.
        """
        return self._shelf.signed_only

    def require_signed_experts(self, *, required: bool = True) -> None:
        """Refuse, from now on and in every program that opens this store, experts that nobody trusted has signed.

        Args:
            required: False to take files from anywhere again.

        Raises:
            BundleError: Another process changes the store.
        """
        with self.locked():
            self._shelf.require_signed(required=required)

    def added(self, bundle: str) -> list[Added]:
        """The experts that were added to a bundle on this device, as written down; they are checked by `admit`.

        Raises:
            BundleError: The store is damaged.
        """
        return self._shelf.of(bundle)

    def keep_expert(self, added: Added, listed: bytes | None) -> None:
        """Add an expert whose file is a blob to a bundle; while the store is locked.

        Args:
            added: The expert.
            listed: The signed list that names it; None for a file that nobody has signed.
        """
        self._shelf.keep(added, listed)

    def remove_expert(self, bundle: str, expert: str) -> None:
        """Take an expert that was added on this device out of a bundle again.

        Args:
            bundle: Its id.
            expert: Id of the expert.

        Raises:
            BundleError: None of this name was added, or another process changes the store.
        """
        with self.locked():
            if not self._shelf.forget(bundle, expert):
                names = ", ".join(added.id for added in self.added(bundle)) or "none"
                what = f"no expert {expert!r} was added to bundle {bundle} on this device"
                raise BundleError(what, where=str(self.folder), mend=f"Added were: {names}.")
            self.collect()

    def forget_expert(self, bundle: str, expert: str) -> None:
        """Take an added expert out of a bundle; while the store is locked, and `collect` comes after."""
        self._shelf.forget(bundle, expert)

    def current(self, bundle: str) -> Current | None:
        """Which version of a bundle is in use; None when there is none.

        Raises:
            BundleError: This cannot be read.
        """
        path = self._bundles / bundle / "current.json"
        try:
            if not manifests.valid_id(bundle):
                return None
            made = Current(**files.parse_json(path.read_bytes()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError):
            raise BundleError("the store is damaged", where=str(path), mend="Delete this folder and pull.") from None
        plain = all(part.isascii() and "/" not in part and part not in {"", ".", ".."} for part in _names(made))
        numbers = (made.version, made.root, made.listed)
        if not plain or made.id != bundle or not all(isinstance(number, int) for number in numbers):
            raise BundleError("the store is damaged", where=str(path), mend="Delete this folder and pull.")
        return made

    def bundles(self) -> list[Current]:
        """What is in use, by id.

        Raises:
            BundleError: The store is damaged.
        """
        names = sorted(path.parent.name for path in self._bundles.glob("*/current.json"))
        return [found for name in names if (found := self.current(name)) is not None]

    def manifest(self, current: Current) -> Manifest:
        """The manifest of a bundle in use, for a list; it is not checked, so nothing may be opened by it.

        Raises:
            BundleError: It cannot be read.
        """
        path = self._version(current) / "files" / manifests.NAME
        try:
            return Manifest.FromString(path.read_bytes())
        except (OSError, DecodeError):
            raise BundleError("cannot read the manifest", where=str(path), mend=_UPDATE) from None

    def repositories(self) -> list[Known]:
        """The repositories that this device has seen."""
        return [Known(path.parent.name, path.parent) for path in sorted(self._repositories.glob("*/pinned.json"))]

    def repository(self, root: bytes) -> Known:
        """The repository with this pinned root, which may not be there yet."""
        name = hashlib.sha256(root).hexdigest()[:32]
        return Known(name, self._repositories / name)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only one that changes the store.

        Raises:
            BundleError: Another process changes it.
        """
        made = not self.folder.exists()
        end = time.monotonic() + _PATIENCE
        while (handle := self._try_lock()) is None:
            if time.monotonic() > end:
                raise BundleError("another process updates this store", where=str(self.folder), mend="Try later.")
            time.sleep(0.05)
        try:
            yield
        finally:
            self._tidy(made=made)
            os.close(handle)

    def _try_lock(self) -> int | None:
        """The open lock; None when another process has it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "lock"
        with contextlib.ExitStack() as undo, contextlib.suppress(FileNotFoundError):
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            undo.callback(os.close, handle)
            # One that was taken away meanwhile (`_tidy`) would keep nobody out.
            if _flock(handle, fcntl.LOCK_EX) and os.path.samestat(os.fstat(handle), path.stat()):
                undo.pop_all()
                return handle
        return None

    def _tidy(self, *, made: bool) -> None:
        """Leave nothing of a store that nothing came into."""
        with contextlib.suppress(OSError):
            self._repositories.rmdir()
        with contextlib.suppress(OSError):
            if [path.name for path in self.folder.iterdir()] == ["lock"]:
                (self.folder / "lock").unlink()
                if made:
                    self.folder.rmdir()

    def blob(self, file: File) -> Path:
        """Where a file lies, or will."""
        return self._blobs / file.sha256.hex()

    def has(self, file: File) -> bool:
        """Whether a file is here, undamaged."""
        return manifests.has_digest(self.blob(file), file.length, file.sha256)

    @contextlib.contextmanager
    def incoming(self, file: File) -> Iterator[Path]:
        """A path to write a file to, which becomes a blob when the block ends well and is gone otherwise."""
        partial = self.folder / "partial"
        for folder in (partial, self._blobs):
            folder.mkdir(parents=True, exist_ok=True)
        path = partial / file.sha256.hex()
        path.unlink(missing_ok=True)  # of a process that was killed
        try:
            yield path
            path.chmod(0o444)  # shared by every version that has this file
            path.replace(self.blob(file))
            files.sync(self._blobs)
        finally:
            path.unlink(missing_ok=True)

    def require_room(self, what: str, needed: int) -> None:
        """Refuse to begin what this disk has no room for.

        Args:
            what: What is to come into the store, as the subject of a sentence.
            needed: Its bytes.

        Raises:
            BundleError: Less is free, or so little that nothing else could be written.
        """
        what = f"{what}, with what stays free,"
        mend = "Make room, or choose another --store."
        files.require_room(what, (self.folder, needed + _ROOM), kind=BundleError, mend=mend)

    def copied(self, manifest: Manifest) -> int:
        """Bytes that `install` writes beside the blobs: those of a bundle, where the file system has no links."""
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".link-") as probe:
            other = Path(f"{probe.name}-2")
            try:
                other.hardlink_to(probe.name)
            except OSError:
                return sum(file.length for file in manifest.files)
            other.unlink()
        return 0

    def install(self, manifest: Manifest, data: bytes, listed: bytes, now: Current) -> None:
        """Assemble a version from its blobs and switch to it, at once or not at all; `collect` comes after.

        Args:
            manifest: Of the bundle.
            data: Its bytes.
            listed: The signed list that names it.
            now: What will be in use; its folder is chosen here.
        """
        home = self._bundles / manifest.id
        name = f"{manifest.version}-{secrets.token_hex(4)}"
        folder = home / name
        with contextlib.ExitStack() as undo:
            undo.callback(self._forget_unused, manifest.id, folder)
            (folder / "files").mkdir(parents=True)
            (folder / "lock").touch()
            for file in manifest.files:
                target = folder / "files" / file.path
                target.parent.mkdir(exist_ok=True)
                try:
                    target.hardlink_to(self.blob(file))
                except OSError:  # a file system without links, or too many of them
                    shutil.copyfile(self.blob(file), target)
            files.write(folder / "files" / manifests.NAME, data, mode=0o444)
            files.sync(folder / "files")
            self._switch(folder, listed, Current(**{**asdict(now), "folder": name}))

    def confirm(self, listed: bytes, now: Current) -> None:
        """Keep a newer signed list for the version in use: it may be signed by newer keys."""
        self._switch(self._version(now), listed, now)

    def _switch(self, folder: Path, listed: bytes, now: Current) -> None:
        proof = folder / f"{now.listed}.targets.json"
        files.write(proof, listed)
        files.write(folder.parent / "current.json", json.dumps(asdict(now), indent=2).encode() + b"\n")
        for path in folder.glob("*.targets.json"):
            if path != proof:
                path.unlink()

    def _forget_unused(self, bundle: str, folder: Path) -> None:
        """Remove a version that the switch did not reach."""
        current = self.current(bundle)
        if current is None or current.folder != folder.name:
            shutil.rmtree(folder, ignore_errors=True)

    def _version(self, current: Current) -> Path:
        return self._bundles / current.id / current.folder

    def _hold(self, bundle: str) -> tuple[Current, int]:
        """Which version is in use, and the open lock that keeps its folder."""
        for _ in range(10):
            current = self.current(bundle)
            if current is None:
                mend = f"Run: molehill edge pull URL --id {bundle} --root root.json"
                if Path(bundle).exists():
                    mend = "It is a folder or file that nobody has signed: --insecure-local opens it all the same."
                raise BundleError(f"there is no bundle {bundle} in this store", where=str(self.folder), mend=mend)
            try:
                handle = os.open(self._version(current) / "lock", os.O_RDONLY)
            except FileNotFoundError:
                continue  # an update has just taken it away
            if _flock(handle, fcntl.LOCK_SH) and self._version(current).is_dir():
                return current, handle
            os.close(handle)
        raise BundleError("the store is damaged", where=str(self._bundles / bundle), mend=_UPDATE)

    def _checked(self, current: Current) -> Manifest:
        """The manifest of a version of which all was checked."""
        folder = self._version(current) / "files"
        manifest, data = manifests.load(folder)
        known = Known(current.repository, self._repositories / current.repository)
        listed = self._version(current) / f"{current.listed}.targets.json"
        what = f"bundle {current.id}"
        signatures.check(known, current.root, listed, target(current.id), data, what=what, mend=_UPDATE)
        if (manifest.id, manifest.version) != (current.id, current.version):
            raise TrustError("the manifest is of another bundle or version", where=str(folder), mend=_UPDATE)
        manifests.check_files(folder, manifest)
        return manifest

    def collect(self) -> None:
        """Remove versions that are not in use and that nobody has open, files that nothing has, and cut downloads."""
        for path in (self.folder / "partial").glob("*"):
            path.unlink()
        needed: set[str] = set()
        try:
            used = self.bundles()
            for current in used:
                needed |= {file.sha256.hex() for file in self.manifest(current).files}
            needed |= {added.sha256 for added in self._shelf.all()}
        except BundleError:  # of another bundle or expert; its own mend comes first
            return
        for current in used:
            for folder in (self._bundles / current.id).iterdir():
                if folder.is_dir() and folder.name != current.folder:
                    _remove(folder)
        for path in self._blobs.iterdir():
            if path.name not in needed:
                path.unlink()


def target(bundle: str) -> str:
    """What the manifest of a bundle is called in a repository."""
    return f"bundles/{bundle}/{manifests.NAME}"


def blob_target(file: File) -> str:
    """What a file of a bundle is called in a repository."""
    return f"blobs/{file.sha256.hex()}"


def _names(current: Current) -> tuple[str, ...]:
    return tuple(str(part) for part in (current.id, current.folder, current.repository))


def _flock(handle: int, kind: int) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove(folder: Path) -> None:
    """Remove a version unless somebody has it open."""
    try:
        handle = os.open(folder / "lock", os.O_RDONLY)
    except FileNotFoundError:
        shutil.rmtree(folder, ignore_errors=True)
        return
    try:
        if _flock(handle, fcntl.LOCK_EX):
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(handle)
