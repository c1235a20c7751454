"""A repository of bundles: static files after The Update Framework, which any web server can serve.

``metadata/`` is what is signed, ``targets/`` what it speaks of: ``bundles/<id>/manifest.pb`` for every bundle,
``blobs/<sha256>`` for every file of one, so that two bundles that share their base share the file, and
``experts/<bundle>/<id>.expert.safetensors`` for every expert that devices may add. All are stored under names that
begin with their SHA-256, and metadata but the timestamp under names that begin with their version (consistent
snapshots): a device that reads while somebody publishes sees the old state or the new one, whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Signed, Snapshot, TargetFile, Targets, Timestamp

from molehill import files, locks
from molehill.errors import BundleError, TrustError
from molehill_edge import archive, offers
from molehill_edge import manifest as manifests
from molehill_edge.offers import Offer
from molehill_edge.store import blob_target, target
from molehill_export import expert_targets
from molehill_export.keys import Keys
from molehill_export.metadata import Lifetimes, SignedFolder, State
from molehill_protos.v1.bundle_pb2 import Manifest

_CHUNK = 1 << 20
_ROOM = 32 << 20  # bytes for what is signed: the list of bundles has 8 MB at most, and its older versions stay


@dataclass(frozen=True)
class Published:
    """What a publication did.

    Args:
        id: Of the bundle; empty when none was published.
        version: Of the bundle.
        changed: Whether it is new; False when this very bundle was there.
        new_files: Files of it that the repository did not have.
        new_bytes: Their length, in bytes.
        versions: Of the metadata: root, targets, snapshot, timestamp.
        ends: When each of them expires.
        experts: What is signed about each expert, and whether that is new.
        left: Ids of experts for this bundle that were published for another layout of it.
    """

    id: str
    version: int
    changed: bool
    new_files: int
    new_bytes: int
    versions: dict[str, int]
    ends: dict[str, datetime]
    experts: tuple[tuple[Offer, bool], ...] = ()
    left: tuple[str, ...] = ()


class Repository:
    """A repository that one set of keys signs.

    Args:
        folder: Its root, which a web server serves.
        keys: Sign it.
        lifetimes: Of signatures.
        now: The time of signing; the clock's when None.
    """

    def __init__(
        self, folder: Path, keys: Keys, lifetimes: Lifetimes | None = None, now: datetime | None = None
    ) -> None:
        self.folder = folder
        self._keys = keys
        self._now = (now or datetime.now(UTC)).replace(microsecond=0)
        self._signed = SignedFolder(folder, keys, lifetimes or Lifetimes(), self._now)
        self._targets = folder / "targets"

    def publish(self, bundle: Path | None, experts: Sequence[Path] = (), fits: str | None = None) -> Published:
        """Add a bundle, or a new version of one, and experts for a bundle, and sign what is due.

        A crash leaves the state before: what devices read first, the timestamp, is written last.

        Args:
            bundle: Its folder or archive; None to publish experts only, or, without any, to sign all anew, so that it
                lasts longer.
            experts: Expert files that devices may add to a bundle.
            fits: Id of that bundle; when None the one that is published, or the only one with the experts' base.

        Raises:
            BundleError: The bundle is damaged or expired, or not newer than the one that is published; or an expert is
                damaged or does not fit; or there is no room for them.
            TrustError: The repository is damaged, or other keys have signed it.
            IdentityError: A key is missing or cannot be read.
        """
        root = self._keys.roots()[-1].signed
        for role in (Targets.type, Snapshot.type, Timestamp.type):
            self._keys.signers(role, root)  # before anything else: also where there is nothing to sign
        self.folder.mkdir(parents=True, exist_ok=True)
        with (
            locks.hold(self.folder, "somebody else is publishing", "Try again later.", name=".lock"),
            contextlib.ExitStack() as opened,
        ):
            state = self._signed.load()
            made, count, size, changed = None, 0, 0, False
            if bundle is not None:
                folder = opened.enter_context(self._opened(bundle))
                made, data = manifests.load(folder, now=self._now.timestamp())
                changed = self._is_newer(state, made, data)
            elif not experts:
                state.resign |= {Targets.type, *state.bins}
            offered = self._offered(state, made, experts, fits)  # all is checked before anything is written
            self._require_room(made if changed else None, experts)
            if changed:
                assert made is not None
                count, size = self._add(state, folder, made, data)
            added = tuple(self._add_expert(state, path, entry) for path, entry in offered)
            anew = any(new for _, new in added)
            if not changed and not anew and (bundle is not None or experts):
                return self._published(state, made, changed=False, experts=added)
            self._signed.sign(state)
            done = self._published(state, made, changed=changed, new_files=count, new_bytes=size, experts=added)
            return replace(done, left=_left(state, made))

    def refresh(self) -> Published:
        """Sign snapshot and timestamp anew, with the keys that are kept online, so that devices see it is up to date.

        Raises:
            TrustError: There is nothing to sign, the repository is damaged, or the offline keys must sign first.
            IdentityError: A key is missing or cannot be read.
        """
        if not self._signed.is_there:
            raise TrustError("there is no repository here", where=str(self.folder), mend="Publish a bundle first.")
        with locks.hold(self.folder, "somebody else is publishing", "Try again later.", name=".lock"):
            state = self._signed.load()
            mend = "Run molehill publish --repo DIR --keys DIR where the offline keys are."
            if self._signed.is_unsigned(state):
                raise TrustError("the key for targets was rotated since", where=str(self.folder), mend=mend)
            for name, part in ((Targets.type, state.targets), *state.bins.items()):
                if part.signed.is_expired(self._now):
                    raise TrustError(f"the signature of {name} has expired", where=str(self.folder), mend=mend)
            self._signed.sign(state)
            return self._published(state, None, changed=False)

    @contextlib.contextmanager
    def _opened(self, bundle: Path) -> Iterator[Path]:
        """The folder of a bundle, of which each file is checked once it is copied."""
        if bundle.is_dir():
            yield bundle
            return
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=".incoming-") as folder:
            archive.unpack(bundle, Path(folder) / "bundle", now=self._now.timestamp())
            yield Path(folder) / "bundle"

    def _is_newer(self, state: State, made: Manifest, data: bytes) -> bool:
        """Whether a bundle is to be published; False when it is already.

        Raises:
            BundleError: It is not newer, and another.
        """
        entry = state.targets.signed.targets.get(target(made.id))
        if entry is None:
            return True
        if entry.hashes["sha256"] == hashlib.sha256(data).hexdigest():
            return False
        published = self._manifest(entry)
        if made.version <= published.version:
            what = f"version {made.version} of bundle {made.id} is not newer than the published {published.version}"
            raise BundleError(what, where=str(self.folder), mend="Export it with a higher version.")
        return True

    def _manifest(self, entry: TargetFile) -> Manifest:
        """A published manifest; its fields are not checked again, since it may have expired meanwhile."""
        path = self._stored(entry)
        try:
            known = path.read_bytes()
            entry.verify_length_and_hashes(known)
        except (OSError, RepositoryError):
            mend = "Put back a copy of the repository."
            raise TrustError("a published manifest is lost or damaged", where=str(path), mend=mend) from None
        return Manifest.FromString(known)

    def _require_room(self, made: Manifest | None, experts: Sequence[Path]) -> None:
        """Refuse to copy what there is no room for; what the repository has already is not copied.

        Raises:
            BundleError: There is none.
        """
        found = [] if made is None else made.files
        entries = [TargetFile(file.length, {"sha256": file.sha256.hex()}, blob_target(file)) for file in found]
        size = sum(entry.length for entry in entries if not self._stored(entry).is_file())
        size += sum(path.stat().st_size for path in experts)
        what, mend = "the publication", "Make room there, or move the repository."
        files.require_room(what, (self.folder, size + _ROOM), kind=BundleError, mend=mend)

    def _offered(
        self, state: State, made: Manifest | None, experts: Sequence[Path], fits: str | None
    ) -> list[tuple[Path, TargetFile]]:
        """What is to be signed about expert files, each of them checked."""
        if not experts:
            return []
        listed = state.targets.signed.targets
        known = [self._manifest(listed[path]) for path in sorted(listed) if path.startswith("bundles/")]
        bundles = {each.id: each for each in known} | ({} if made is None else {made.id: made})
        if fits is None and made is not None:
            fits = made.id
        found: dict[str, tuple[Path, TargetFile]] = {}
        for path in experts:
            entry = expert_targets.entry(path, bundles, fits, listed, where=str(self.folder))
            if entry.path in found:
                raise BundleError(f"{found[entry.path][0]} is an expert of the same id", where=str(path))
            found[entry.path] = path, entry
        return list(found.values())

    def _add_expert(self, state: State, path: Path, entry: TargetFile) -> tuple[Offer, bool]:
        """Store an expert file and list it; returns what is signed about it, and whether that is new."""
        new = state.targets.signed.targets.get(entry.path) != entry
        self._store(path, entry)
        if new:
            state.targets.signed.targets[entry.path] = entry
            state.resign.add(Targets.type)
        offer = offers.read(entry)
        assert offer is not None
        return offer, new

    def _add(self, state: State, folder: Path, made: Manifest, data: bytes) -> tuple[int, int]:
        """Store the files of a bundle and list them; returns how many were new, and their bytes."""
        count = size = 0
        roles = state.targets.signed.delegations
        assert roles is not None
        assert roles.succinct_roles is not None
        for file in made.files:
            entry = TargetFile(file.length, {"sha256": file.sha256.hex()}, blob_target(file))
            if self._store(folder / file.path, entry):
                count, size = count + 1, size + file.length
            name = roles.succinct_roles.get_role_for_target(entry.path)
            if state.bins[name].signed.targets.setdefault(entry.path, entry) is entry:
                state.resign.add(name)
        entry = TargetFile.from_data(target(made.id), data, ["sha256"])
        path = self._stored(entry)
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, data)
        state.targets.signed.targets[entry.path] = entry
        state.resign.add(Targets.type)
        return count, size

    def _store(self, source: Path, entry: TargetFile) -> bool:
        """Copy a file of a bundle unless it is there; returns whether it was copied."""
        path = self._stored(entry)
        try:
            with manifests.open_regular(source) as stream:
                wanted = entry.hashes["sha256"]
                if hashlib.file_digest(stream, "sha256").hexdigest() != wanted or stream.tell() != entry.length:
                    raise BundleError("the file is not the one of the manifest: its SHA-256 differs", where=str(source))
                if manifests.has_digest(path, entry.length, bytes.fromhex(wanted)):
                    return False
                stream.seek(0)
                path.parent.mkdir(parents=True, exist_ok=True)
                part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
                try:
                    with part.open("xb") as target:
                        while chunk := stream.read(_CHUNK):
                            target.write(chunk)
                        target.flush()
                        os.fsync(target.fileno())
                    part.replace(path)
                finally:
                    part.unlink(missing_ok=True)
        except OSError as error:
            what = f"cannot copy a file of the bundle: {error.strerror}"
            where = str(self.folder if files.is_full(error) else error.filename or source)
            raise BundleError(what, where=where, mend=files.cure(error)) from None
        files.sync(path.parent)
        return True

    def _stored(self, entry: TargetFile) -> Path:
        return self._targets / entry.get_prefixed_paths()[0]

    def _published(
        self,
        state: State,
        made: Manifest | None,
        *,
        changed: bool,
        new_files: int = 0,
        new_bytes: int = 0,
        experts: tuple[tuple[Offer, bool], ...] = (),
    ) -> Published:
        parts: dict[str, Signed] = {
            "root": state.root,
            "targets": state.targets.signed,
            "snapshot": state.snapshot.signed,
            "timestamp": state.timestamp.signed,
        }
        ends = {name: part.expires for name, part in parts.items()}
        ends["targets"] = min(part.signed.expires for part in (state.targets, *state.bins.values()))
        versions = {name: part.version for name, part in parts.items()}
        name, version = ("", 0) if made is None else (made.id, made.version)
        return Published(name, version, changed, new_files, new_bytes, versions, ends, experts)


def _left(state: State, made: Manifest | None) -> tuple[str, ...]:
    """Experts for a bundle that do not fit the version that is published now."""
    if made is None:
        return ()
    found = offers.listed(state.targets.signed.targets, made.id)
    return tuple(offer.id for offer in found if offer.layout != made.layout.hex())
