"""What is signed of a repository: root, targets with their bins, snapshot and timestamp, in its folder ``metadata/``.

All are stored under names that begin with their version, but the timestamp, which says which are the newest.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import TypeVar

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Delegations, Metadata, MetaFile, Root, Snapshot, SuccinctRoles, Targets, Timestamp

from molehill import files
from molehill.errors import TrustError
from molehill_export.keys import Keys

# Blobs are listed in 16 bins by the hash of their name. A bundle has about eight files, so a publication signs, and a
# device downloads, at most eight of them; 10,000 blobs make bins of 140 kB, and a snapshot of 16 bins is 3 kB, which
# every update downloads. Manifests and experts are listed in the targets role itself: one entry each, so a device
# sees what there is, and needs no bin to check what it has.
BITS = 4
PREFIX = "blobs"
_SIGNED = TypeVar("_SIGNED", Root, Targets, Snapshot, Timestamp)


@dataclass(frozen=True)
class Lifetimes:
    """How many days signatures last. The shorter, the sooner a device notices that it is shown an old state."""

    targets: int = 90
    snapshot: int = 7
    timestamp: int = 1


@dataclass
class State:
    """The metadata of a repository, and what of them is to be written.

    Attributes:
        root: The newest.
        targets: Lists manifests and experts.
        bins: List blobs, by name.
        snapshot: Lists targets and bins.
        timestamp: Lists the snapshot.
        resign: Names of bins, and ``targets``: those that have changed.
    """

    root: Root
    targets: Metadata[Targets]
    bins: dict[str, Metadata[Targets]]
    snapshot: Metadata[Snapshot]
    timestamp: Metadata[Timestamp]
    resign: set[str] = field(default_factory=set)


class SignedFolder:
    """The metadata that one set of keys signs.

    Args:
        repository: Its folder.
        keys: Sign it.
        lifetimes: Of signatures.
        now: The time of signing.
    """

    def __init__(self, repository: Path, keys: Keys, lifetimes: Lifetimes, now: datetime) -> None:
        self._repository = repository
        self._folder = repository / "metadata"
        self._keys = keys
        self._lifetimes = lifetimes
        self._now = now

    @property
    def is_there(self) -> bool:
        """Whether something was signed before."""
        return (self._folder / "timestamp.json").is_file()

    def load(self) -> State:
        """The repository as it was signed last, all signatures checked; or an empty one.

        What the offline keys sign next contains what is here now: so nothing may be taken from an online machine
        unseen.

        Raises:
            TrustError: It is damaged, others have signed it, or the root has expired.
        """
        roots = self._keys.roots()
        newest = roots[-1].signed
        if newest.is_expired(self._now):
            mend = "Run: molehill keys renew DIR"
            raise TrustError("the root metadata has expired", where=str(self._keys.folder), mend=mend)
        if not self.is_there:
            return self._empty(newest)
        # Signed under the root that devices see; or, when a crash kept that from being written, under a newer one.
        # Under an older one nothing counts: its keys may have been replaced because they were stolen.
        for root in roots[max(self._shown(len(roots)), 1) - 1 : -1]:
            with contextlib.suppress(TrustError):
                return self._under(root.signed, newest)
        return self._under(newest, newest)

    def _under(self, root: Root, newest: Root) -> State:
        """The repository as this root's keys have signed it."""
        timestamp = self._part(Timestamp, "timestamp", None, root)
        snapshot = self._part(Snapshot, "snapshot", timestamp.signed.snapshot_meta, root)
        meta = snapshot.signed.meta
        targets = self._part(Targets, "targets", meta.get("targets.json"), root)
        delegations = targets.signed.delegations
        if delegations is None or delegations.succinct_roles is None:
            raise TrustError("the repository was made by other software", where=str(self._repository))
        names = delegations.succinct_roles.get_roles()
        bins = {name: self._part(Targets, name, meta.get(f"{name}.json"), targets.signed) for name in names}
        return State(newest, targets, bins, snapshot, timestamp)

    def _shown(self, known: int) -> int:
        """The version of the newest root that devices can see, all of them ours; 0 when there is none."""
        version = 0
        while (path := self._folder / f"{version + 1}.root.json").is_file():
            if version == known or path.read_bytes() != self._keys.root_path(version + 1).read_bytes():
                mend = "Give the newest copy of the keys that it was made with."
                raise TrustError("the repository has a root that these keys do not have", where=str(path), mend=mend)
            version += 1
        return version

    def _part(
        self, kind: type[_SIGNED], role: str, listed: MetaFile | None, delegator: Root | Targets
    ) -> Metadata[_SIGNED]:
        """One signed file, as the one above lists it."""
        path = self._folder / (f"{listed.version}.{role}.json" if listed else f"{role}.json")
        try:
            data = path.read_bytes()
            if listed is not None:
                listed.verify_length_and_hashes(data)
            made = Metadata[_SIGNED].from_bytes(data)
            if not isinstance(made.signed, kind) or (listed and made.signed.version != listed.version):
                raise TrustError("this is not what its name says", where=str(path))
            delegator.verify_delegate(role, made.signed_bytes, made.signatures)
        except OSError as error:
            raise TrustError(f"cannot read it: {error.strerror}", where=str(path)) from None
        except (RepositoryError, ValueError) as error:
            mend = "Put back a copy of the repository, or give the keys that signed it."
            raise TrustError(
                f"the metadata are damaged, or others signed them: {error}", where=str(path), mend=mend
            ) from None
        return made

    def _empty(self, root: Root) -> State:
        """A repository without bundles; versions begin with 1 once it is signed."""
        roles = SuccinctRoles([], 1, BITS, PREFIX)
        targets = Targets(version=1, delegations=Delegations({}, succinct_roles=roles))
        bins = {name: Metadata(Targets(version=1)) for name in roles.get_roles()}
        state = State(root, Metadata(targets), bins, Metadata(Snapshot(version=1)), Metadata(Timestamp(version=1)))
        state.resign |= {Targets.type, *bins}
        return state

    def is_unsigned(self, state: State) -> bool:
        """Whether the current key for targets has not yet signed."""
        delegations = state.targets.signed.delegations
        assert delegations is not None
        assert delegations.succinct_roles is not None
        return delegations.succinct_roles.keyids != state.root.roles[Targets.type].keyids

    def sign(self, state: State) -> None:
        """Sign what has changed and what is above it, and write it from the bottom up."""
        root, lasts = state.root, self._lifetimes
        self._folder.mkdir(parents=True, exist_ok=True)
        if state.resign:
            if self.is_unsigned(state):  # a rotated key: bins as well, which it signs too
                self._delegate(state)
                state.resign |= {Targets.type, *state.bins}
            # The offline keys are here, which is rare: what has lived half its life is signed as well.
            soon = self._now + timedelta(days=lasts.targets / 2)
            parts = {**state.bins, Targets.type: state.targets}  # targets last
            meta = state.snapshot.signed.meta
            for name, part in parts.items():
                if name in state.resign or part.signed.expires < soon:
                    data = self._signed(part, Targets.type, lasts.targets, root)
                    self._write(f"{part.signed.version}.{name}.json", data)
                    meta[f"{name}.json"] = MetaFile.from_data(part.signed.version, data, ["sha256"])
        data = self._signed(state.snapshot, Snapshot.type, lasts.snapshot, root)
        version = state.snapshot.signed.version
        self._write(f"{version}.snapshot.json", data)
        state.timestamp.signed.snapshot_meta = MetaFile.from_data(version, data, ["sha256"])
        data = self._signed(state.timestamp, Timestamp.type, lasts.timestamp, root)
        self._write("timestamp.json", data)
        # A new root comes after what its keys have signed. Between the two, a device finds signatures of keys that it
        # does not know and goes on with what it has; so it does after a crash, until this is done again.
        for each in range(1, root.version + 1):
            if not (self._folder / f"{each}.root.json").is_file():
                self._write(f"{each}.root.json", self._keys.root_path(each).read_bytes())

    def _delegate(self, state: State) -> None:
        """Let the current key for targets sign the bins."""
        keyids = state.root.roles[Targets.type].keyids
        roles = SuccinctRoles(list(keyids), state.root.roles[Targets.type].threshold, BITS, PREFIX)
        keys = {keyid: state.root.get_key(keyid) for keyid in keyids}
        state.targets.signed.delegations = Delegations(keys, succinct_roles=roles)

    def _signed(self, part: Metadata[_SIGNED], role: str, days: int, root: Root) -> bytes:
        """The next version of metadata as bytes."""
        part.signed.version += 1 if part.signatures else 0  # the first stays 1
        part.signed.expires = self._now + timedelta(days=days)
        part.signatures.clear()
        for signer in self._keys.signers(role, root):
            part.sign(signer, append=True)
        return part.to_bytes()

    def _write(self, name: str, data: bytes) -> None:
        files.write(self._folder / name, data)
