"""Bundles from a repository: nothing is believed that its owner has not signed, and nothing older than what is known.

Logs nothing of its own. The client of The Update Framework logs details at INFO and DEBUG, and urllib3 a WARNING for
every connection that it tries again.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import urllib.parse
from dataclasses import dataclass
from pathlib import Path

from tuf.api.metadata import TargetFile
from tuf.ngclient import FetcherInterface

from molehill import files
from molehill.errors import BundleError, TrustError
from molehill_edge import fetch_experts
from molehill_edge import manifest as manifests
from molehill_edge.client import Client, Progress, Refused, download, refusals
from molehill_edge.fetch_experts import SetAside
from molehill_edge.signatures import Known
from molehill_edge.store import Current, Store, blob_target, target
from molehill_protos.v1.bundle_pb2 import File, Manifest


@dataclass(frozen=True)
class Pulled:
    """What a pull did.

    Args:
        id: Of the bundle.
        version: That is in use now.
        before: That was in use before; None for the first.
        files: How many were downloaded, beside the manifest.
        bytes: Their length.
        experts: Signed experts that were added on this device and have a newer version now: id and version.
        set_aside: Experts that were added on this device and are not in use any more, and why.
    """

    id: str
    version: int
    before: int | None
    files: int
    bytes: int
    experts: tuple[tuple[str, int], ...] = ()
    set_aside: tuple[SetAside, ...] = ()


def pull(
    store: Store,
    url: str,
    *,
    bundle: str | None = None,
    root: bytes | None = None,
    fetcher: FetcherInterface | None = None,
    progress: Progress | None = None,
) -> Pulled:
    """Get the newest version of a bundle, and use it from now on; the one in use stays when anything is refused.

    Args:
        store: Where it goes.
        url: Of the repository.
        bundle: Its id; may be left out when the repository has one bundle only.
        root: The root metadata of the repository, from its owner by a way that is trusted; needed the first time only.
        fetcher: Downloads; over HTTP when None.
        progress: Called with the bytes that are there and those of the whole download.

    Raises:
        TrustError: What the repository shows is refused, or cannot be reached.
        BundleError: The bundle is not plausible, has expired or does not fit this machine, or there is no room for it.
    """
    url = _checked_url(url)
    if bundle is not None and not manifests.valid_id(bundle):
        raise BundleError(f"{bundle[:80]!r} cannot be the id of a bundle")
    with refusals(url, lambda: _stays(store, url, bundle)), files.placed(store.folder), store.locked():
        known, pinned, new = _known(store, url, root)
        try:
            client = Client(known, url, pinned, fetcher)
        except BaseException:
            if new:
                shutil.rmtree(known.folder, ignore_errors=True)  # pinned by mistake, perhaps
            raise
        return _pull(store, client, known, bundle or _only(client), progress)


def update(
    store: Store,
    bundle: str,
    *,
    fetcher: FetcherInterface | None = None,
    progress: Progress | None = None,
) -> Pulled:
    """Get the newest version of a bundle from where it came from.

    Args:
        store: Where it is.
        bundle: Its id.
        fetcher: Downloads; over HTTP when None.
        progress: Called with the bytes that are there and those of the whole download.

    Raises:
        TrustError: What the repository shows is refused, or cannot be reached.
        BundleError: There is no such bundle, or the new version cannot be used.
    """
    current = store.current(bundle)
    if current is None:
        raise BundleError(f"there is no bundle {bundle} in this store", where=str(store.folder))
    known = next((known for known in store.repositories() if known.name == current.repository), None)
    if known is None:
        raise TrustError("the repository of this bundle is not known any more", where=str(store.folder))
    pinned = known.pinned.read_bytes()
    return pull(store, known.url, bundle=bundle, root=pinned, fetcher=fetcher, progress=progress)


def _pull(store: Store, client: Client, known: Known, bundle: str, progress: Progress | None) -> Pulled:
    before = store.current(bundle)
    if before is not None and before.repository != known.name:
        raise Refused(f"bundle {bundle} of this device is from another repository")
    entry = client.find(target(bundle))
    if entry is None:
        raise Refused(f"the repository has no bundle {bundle}, only: {', '.join(_ids(client)[:20]) or 'none'}")
    data = read_manifest(client, entry)
    digest = hashlib.sha256(data).hexdigest()
    manifest = manifests.read(data, f"{client.url}targets/{entry.get_prefixed_paths()[0]}")
    version = manifest.version
    if manifest.id != bundle:
        raise Refused(f"what it shows as bundle {bundle} is bundle {manifest.id}")
    if before is not None and version < before.version:
        raise Refused(f"it shows version {version} of bundle {bundle}, older than the one in use")
    if before is not None and version == before.version and digest != before.manifest:
        raise Refused(f"it shows another bundle {bundle} as version {version}, which is in use")
    folder = before.folder if before else ""
    now = Current(bundle, version, folder, digest, known.name, client.root, client.targets.version)
    same = before is not None and digest == before.manifest and _is_sound(store, bundle)
    lacking = [] if same else _lacking(store, client, manifest)
    try:
        download(store, client, lacking, progress, 0 if same else store.copied(manifest))
        # before the switch: a refusal leaves all as it was
        renewed = fetch_experts.renew(store, client, manifest, progress)
        if same:
            store.confirm(client.listed, now)
        else:
            store.install(manifest, data, client.listed, now)
        fetch_experts.settle(store, client, bundle, renewed)
    except OSError as error:
        if files.is_full(error):
            with contextlib.suppress(OSError):
                store.collect()  # what has come so far would only keep the disk full
        raise
    store.collect()
    size = sum(file.length for file, _ in lacking)
    came = before.version if before else None
    return Pulled(bundle, version, came, len(lacking), size, renewed.newer, renewed.set_aside)


def _lacking(store: Store, client: Client, manifest: Manifest) -> list[tuple[File, TargetFile]]:
    """The files of a bundle that are not here, each with what is signed about it."""
    found = []
    for file in {file.sha256: file for file in manifest.files if not store.has(file)}.values():
        entry = client.find(blob_target(file))
        if entry is None or entry.length != file.length or entry.hashes["sha256"] != file.sha256.hex():
            raise Refused(f"the signed list does not name {file.path} as its manifest does")
        found.append((file, entry))
    return found


def _is_sound(store: Store, bundle: str) -> bool:
    """Whether the bundle in use can be opened."""
    try:
        store.admit(bundle).close()
    except (BundleError, TrustError):
        return False
    return True


def read_manifest(client: Client, entry: TargetFile) -> bytes:
    """The bytes of a bundle's manifest, as signed.

    Raises:
        RepositoryError: They are others, or too many.
        DownloadError: The repository does not give them.
    """
    if entry.length > manifests.MAX_BYTES:
        raise Refused(f"the manifest has more than {manifests.MAX_BYTES >> 20} MiB")
    data = b"".join(client.read(entry))
    entry.verify_length_and_hashes(data)
    return data


def _checked_url(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.netloc:
        raise TrustError(
            "this is not the address of a repository", where=url, mend="It begins with https:// or http://"
        )
    return url if url.endswith("/") else f"{url}/"


def _known(store: Store, url: str, root: bytes | None) -> tuple[Known, bytes, bool]:
    """The repository behind an address or a root, its pinned root, and whether it is new here.

    A repository is who signs it, not where it is: it may move, and another may come to its address.
    """
    for known in store.repositories():
        history = [known.pinned, *known.metadata.glob("root_history/*.root.json")]
        if (root is None and known.url == url) or (
            root is not None and root in [path.read_bytes() for path in history]
        ):
            return known, known.pinned.read_bytes(), False
    if root is None:
        mend = "Get root.json from its owner by a way that you trust, and give it: --root root.json"
        raise TrustError("this device does not know this repository", where=url, mend=mend)
    if any(known.url == url for known in store.repositories()):
        what = "this device has pinned another root for this repository"
        raise TrustError(what, where=url, mend="Leave out --root, or choose another --store.")
    known = store.repository(root)
    return known, root, True


def _ids(client: Client) -> list[str]:
    names = (path.split("/") for path in sorted(client.targets.targets))
    return [name[1] for name in names if len(name) == 3 and target(name[1]) == "/".join(name)]


def _only(client: Client) -> str:
    found = _ids(client)
    if len(found) != 1:
        names = ", ".join(found[:20])
        what = f"the repository has several bundles: {names}" if found else "the repository has no bundle"
        raise BundleError(what, where=client.url, mend="Say which: --id ID" if found else "")
    return found[0]


def _stays(store: Store, url: str, bundle: str | None) -> str:
    """What a refusal leaves, as a sentence."""
    with contextlib.suppress(BundleError, OSError):
        names = [known.name for known in store.repositories() if known.url == url]
        for current in store.bundles():
            if current.id == bundle or (bundle is None and current.repository in names):
                return f"Version {current.version} of bundle {current.id} stays in use."
    return "Nothing was installed."


def read_root(path: Path) -> bytes:
    """The root metadata that a person gives.

    Raises:
        TrustError: The file cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise TrustError(f"cannot read it: {error.strerror}", where=str(path)) from None
