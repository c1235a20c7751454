"""Experts for the bundles of a device: from the repository of the bundle, signed like it, or from a file."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tuf.ngclient import FetcherInterface

from molehill import files
from molehill.errors import BundleError, TrustError
from molehill_edge import experts, offers
from molehill_edge import manifest as manifests
from molehill_edge.added import Added
from molehill_edge.client import Client, Progress, Refused, download, refusals
from molehill_edge.experts import Expert
from molehill_edge.offers import Offer
from molehill_edge.signatures import Known
from molehill_edge.store import Current, Store
from molehill_protos.v1.bundle_pb2 import File, Manifest

_NEWER = "Run: molehill edge update, or have its owner publish it for this version."


@dataclass(frozen=True)
class SetAside:
    """An expert that is not in use any more.

    Args:
        id: Of the expert.
        why: As the end of a sentence.
    """

    id: str
    why: str


@dataclass(frozen=True)
class Renewed:
    """The experts of a bundle for a version of it.

    Args:
        kept: Those that stay, or come.
        newer: Those of which the repository has a newer version: id and version.
        set_aside: Those that go.
    """

    kept: tuple[Added, ...]
    newer: tuple[tuple[str, int], ...]
    set_aside: tuple[SetAside, ...]


@dataclass(frozen=True)
class Choice:
    """An expert that a repository offers for a bundle of this device.

    Args:
        offer: What is signed about it.
        fits: Whether it is for the layout of the version in use.
        added: The version that is added on this device; None when none is.
    """

    offer: Offer
    fits: bool
    added: int | None


def choices(store: Store, bundle: str, *, fetcher: FetcherInterface | None = None) -> list[Choice]:
    """The experts that the repository of a bundle offers for it now.

    Args:
        store: Where the bundle is.
        bundle: Its id.
        fetcher: Asks; over HTTP when None.

    Raises:
        TrustError: What the repository shows is refused, or cannot be reached.
        BundleError: There is no such bundle.
    """
    with _shown(store, bundle, fetcher) as (client, current):
        layout = store.manifest(current).layout.hex()
        have = {added.id: added.version for added in store.added(bundle) if added.signed}
        found = offers.listed(client.targets.targets, bundle)
        return [Choice(offer, offer.layout == layout, have.get(offer.id)) for offer in found]


def add(
    store: Store,
    bundle: str,
    expert: str,
    *,
    fetcher: FetcherInterface | None = None,
    progress: Progress | None = None,
) -> Added:
    """Get an expert from the repository of a bundle, and have it in the bundle at every opening from now on.

    Nothing of it is opened before its signatures, length and SHA-256 are right. One that is there gets its newest
    version.

    Args:
        store: Where the bundle is.
        bundle: Its id.
        expert: Id of the expert.
        fetcher: Downloads; over HTTP when None.
        progress: Called with the bytes that are there and those of the whole download.

    Raises:
        TrustError: What the repository shows is refused, or cannot be reached.
        BundleError: There is no such bundle, the expert does not fit it, or there is no room.
    """
    with _shown(store, bundle, fetcher) as (client, _):
        found = offers.listed(client.targets.targets, bundle)
        offer = next((offer for offer in found if offer.id == expert), None)
        if offer is None:
            if offers.expert_target(bundle, expert) in client.targets.targets:
                raise Refused(f"what is signed about expert {expert} cannot be used by this version of molehill")
            names = ", ".join(offer.id for offer in found[:20]) or "none"
            raise Refused(f"the repository has no expert {expert[:80]!r} for bundle {bundle}, only: {names}")
        with store.admit(bundle) as admitted:
            manifest, given = admitted.manifest, admitted.experts
        others = [experts.parse(data, manifest, added.id) for added, data in given if added.id != expert]
        before = next((added for added, _ in given if added.id == expert), None)
        if before is not None and not before.signed:
            mend = f"Remove that one first: molehill edge remove {bundle} {expert}"
            raise BundleError(f"an expert {expert} was added from a file", where=bundle, mend=mend)
        try:
            added = _take(store, client, offer, manifest, before, progress)
            _fit(store, [*others, _parsed(store, added, manifest)], manifest)
            store.keep_expert(added, client.listed)
        finally:
            store.collect()
        return added


def add_file(store: Store, bundle: str, path: Path) -> Added:
    """Have an expert of a file that nobody has signed in a bundle at every opening from now on.

    Args:
        store: Where the bundle is.
        bundle: Its id.
        path: The expert file, which is copied.

    Raises:
        TrustError: This device takes signed experts only.
        BundleError: There is no such bundle, or the expert does not fit it.
    """
    with store.locked():
        if store.signed_experts_only:
            what = "this device takes signed experts only, and a file is not signed"
            mend = f"Add it from the repository: molehill edge add {bundle} EXPERT"
            raise TrustError(what, where=str(path), mend=mend)
        data = experts.read_bytes(path)
        with store.admit(bundle) as admitted:
            manifest, given = admitted.manifest, admitted.experts
        expert = experts.parse(data, manifest, str(path))
        if any(added.id == expert.id for added, _ in given):
            mend = f"Remove that one first: molehill edge remove {bundle} {expert.id}"
            raise BundleError(f"the bundle has an expert {expert.id} already", where=str(path), mend=mend)
        others = [experts.parse(old, manifest, added.id) for added, old in given]
        _fit(store, [*others, expert], manifest, str(path))
        added = Added(expert.id, bundle, hashlib.sha256(data).hexdigest())
        store.require_room("the expert", len(data))
        with store.incoming(_file(added, len(data))) as incoming:
            incoming.write_bytes(data)
        store.keep_expert(added, None)
        return added


def renew(store: Store, client: Client, manifest: Manifest, progress: Progress | None) -> Renewed:
    """Get the newest versions of the experts that this device adds to a bundle; nothing is in use before `settle`.

    What does not fit the bundle any more is set aside: an update of the bundle goes before.

    Args:
        store: Where the bundle is.
        client: Shows the bundle's repository; the store is locked.
        manifest: The version of the bundle that will be in use.
        progress: Called with the bytes that are there and those of the whole download.

    Raises:
        BundleError: There is no room for one.
    """
    kept: list[Added] = []
    fitting: list[Expert] = []
    newer: list[tuple[str, int]] = []
    aside: list[SetAside] = []
    offered = {offer.id: offer for offer in offers.listed(client.targets.targets, manifest.id)}
    for before in store.added(manifest.id):
        added, offer = before, offered.get(before.id)
        if before.signed and offer is None:
            aside.append(SetAside(before.id, "its owner offers it no more"))
            continue
        try:
            if before.signed and offer is not None:
                added = _take(store, client, offer, manifest, before, progress)
            expert = _parsed(store, added, manifest)
            _fit(store, [*fitting, expert], manifest)
        except BundleError as error:
            aside.append(SetAside(before.id, error.what))
            continue
        if added.version != before.version:
            newer.append((added.id, added.version))
        kept.append(added)
        fitting.append(expert)
    return Renewed(tuple(kept), tuple(newer), tuple(aside))


def settle(store: Store, client: Client, bundle: str, renewed: Renewed) -> None:
    """Use what `renew` has found from now on; `Store.collect` comes after.

    Args:
        store: Where the bundle is.
        client: Has shown the list that names them; the store is locked.
        bundle: Its id.
        renewed: The experts.
    """
    for added in renewed.kept:
        store.keep_expert(added, client.listed if added.signed else None)
    for gone in renewed.set_aside:
        store.forget_expert(bundle, gone.id)


def _home(store: Store, bundle: str) -> tuple[Current, Known]:
    """Which version of a bundle is in use, and the repository that it is from."""
    current = store.current(bundle)
    if current is None:
        mend = "Get it first: molehill edge pull URL --root root.json"
        raise BundleError(f"there is no bundle {bundle} in this store", where=str(store.folder), mend=mend)
    known = next((known for known in store.repositories() if known.name == current.repository), None)
    if known is None:
        raise TrustError("the repository of this bundle is not known any more", where=str(store.folder))
    return current, known


@contextlib.contextmanager
def _shown(store: Store, bundle: str, fetcher: FetcherInterface | None) -> Iterator[tuple[Client, Current]]:
    """The newest state of the repository that a bundle is from, while nobody else changes the store."""
    current, known = _home(store, bundle)
    stays = f"Bundle {bundle} stays as it was."
    with refusals(known.url, lambda: stays), files.placed(store.folder), store.locked():
        yield Client(known, known.url, known.pinned.read_bytes(), fetcher), current


def _file(added: Added, length: int) -> File:
    return File(path=f"{added.id}{offers.SUFFIX}", length=length, sha256=bytes.fromhex(added.sha256))


def _take(
    store: Store, client: Client, offer: Offer, manifest: Manifest, before: Added | None, progress: Progress | None
) -> Added:
    """The file of an offer as a blob, whole and right; what is known to be of no use is not downloaded."""
    name = offer.id
    if before is not None and before.repository != client.known.name:
        raise Refused(f"expert {name} of this device is from another repository")
    if before is not None and offer.version < before.version:
        raise Refused(f"it shows version {offer.version} of expert {name}, older than the one in use")
    if before is not None and offer.version == before.version and offer.sha256 != before.sha256:
        raise Refused(f"it shows another expert {name} as version {offer.version}, which is in use")
    if (offer.base, offer.layout) != (manifest.base.digest, manifest.layout.hex()):
        what = f"expert {name} is for another layout of bundle {manifest.id} than that of version {manifest.version}"
        raise BundleError(what, where=client.url, mend=_NEWER)
    came = client.known.name, client.root, client.targets.version
    added = Added(name, manifest.id, offer.sha256, offer.version, *came)
    file = _file(added, offer.length)
    entry = client.targets.targets[offers.expert_target(manifest.id, name)]
    download(store, client, [] if store.has(file) else [(file, entry)], progress)
    return added


def _parsed(store: Store, added: Added, manifest: Manifest) -> Expert:
    """An expert whose file is a blob."""
    path = store.blob(_file(added, 0))
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BundleError(f"cannot read expert {added.id}: {error.strerror}", where=str(path)) from None
    if hashlib.sha256(data).hexdigest() != added.sha256:
        raise BundleError(f"the file of expert {added.id} is damaged", where=str(path))
    expert = experts.parse(data, manifest, str(path))
    if expert.id != added.id:
        raise Refused(f"what it shows as expert {added.id} is expert {expert.id}")
    return expert


def _fit(store: Store, found: Sequence[Expert], manifest: Manifest, where: str = "") -> None:
    """Refuse experts that a bundle has no place for, all of them together, before it is opened with them in vain.

    Raises:
        BundleError: It has none, or their numbers cannot be stored.
    """
    made = Manifest()
    made.CopyFrom(manifest)
    blobs = [store.blob(file) for file in manifest.files if file.path == manifests.EXPERTS]
    data = blobs[0].read_bytes() if blobs else b""
    for expert in found:
        slot = experts.find_slot(expert, made, where or expert.id)
        data = experts.place(expert, slot, made, data)
        made.slots[slot].id = expert.id
