"""Bundles from a repository: nothing is believed that its owner has not signed, and nothing older than what is known.

Logs nothing of its own. The client of The Update Framework logs details at INFO and DEBUG, and urllib3 a WARNING for
every connection that it tries again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tuf.api import exceptions as tuf_errors
from tuf.api.metadata import Metadata, Root, TargetFile, Targets
from tuf.ngclient import FetcherInterface, Updater, UpdaterConfig, Urllib3Fetcher
from urllib3.exceptions import TimeoutError as NoAnswerError
from urllib3.response import BaseHTTPResponse

from molehill import files
from molehill.errors import BundleError, TrustError
from molehill_edge import manifest as manifests
from molehill_edge.store import Current, Known, Store, blob_target, target
from molehill_protos.v1.bundle_pb2 import File

Progress = Callable[[int, int], None]
# A repository of thousands of bundles stays below these; what is longer is not read to its end.
_LIMITS = UpdaterConfig(
    max_root_rotations=256,
    max_delegations=4,  # the targets role and one bin
    root_max_length=256_000,
    timestamp_max_length=16_384,
    snapshot_max_length=256_000,
    targets_max_length=8_000_000,
)
_ROOM = 64 << 20  # bytes that a download leaves free
_GRACE = 60.0  # seconds after which a file must have come at least at this pace
_SLOWEST = 1024  # bytes a second


@dataclass(frozen=True)
class Pulled:
    """What a pull did.

    Args:
        id: Of the bundle.
        version: That is in use now.
        before: That was in use before; None for the first.
        files: How many were downloaded, beside the manifest.
        bytes: Their length.
    """

    id: str
    version: int
    before: int | None
    files: int
    bytes: int


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
    with _refusals(store, url, bundle), store.locked():
        known, pinned, new = _known(store, url, root)
        try:
            client = _Client(known, url, pinned, fetcher)
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


class _Client:
    """One look at a repository: its newest state, all of it verified."""

    def __init__(self, known: Known, url: str, pinned: bytes, fetcher: FetcherInterface | None) -> None:
        known.metadata.mkdir(parents=True, exist_ok=True)
        self.url = url
        self._fetcher = _Guarded(fetcher or _Http(app_user_agent="molehill"))
        self._updater = Updater(
            str(known.metadata),
            f"{url}metadata/",
            target_base_url=f"{url}targets/",
            fetcher=self._fetcher,
            config=_LIMITS,
            bootstrap=pinned,
        )
        self._updater.refresh()
        files.write(known.folder / "url", f"{url}\n".encode())
        if not known.pinned.is_file():
            files.write(known.pinned, pinned)  # last: it makes the repository a known one
        self.listed = (known.metadata / "targets.json").read_bytes()
        self.targets = Metadata[Targets].from_bytes(self.listed).signed
        self.root = Metadata[Root].from_bytes((known.metadata / "root.json").read_bytes()).signed.version

    def find(self, path: str) -> TargetFile | None:
        """What is signed about a file; None when nothing is."""
        found = self._updater.get_targetinfo(path)
        return found if found is not None and "sha256" in found.hashes else None

    def read(self, entry: TargetFile) -> Iterator[bytes]:
        """The bytes of a file in pieces, and never more than are signed; they are not checked yet.

        Written to disk here and not by the client of The Update Framework, which puts a download into a temporary file
        of the system first: a small device may not have the room twice.
        """
        length = 0
        for chunk in self._fetcher.fetch(f"{self.url}targets/{entry.get_prefixed_paths()[0]}"):
            length += len(chunk)
            if length > entry.length:
                raise tuf_errors.DownloadLengthMismatchError(f"{entry.path} has more than {entry.length} bytes")
            yield chunk


class _Http(Urllib3Fetcher):
    """Gives bytes as they come, where the client of The Update Framework waits for 400 kB of them."""

    def _chunks(self, response: BaseHTTPResponse) -> Iterator[bytes]:
        try:
            while data := response.read1(self.chunk_size):
                yield data
        except NoAnswerError as error:
            raise tuf_errors.SlowRetrievalError from error
        finally:
            response.release_conn()


class _Guarded(FetcherInterface):
    """Lets nothing but the errors of The Update Framework out, and ends what is too slow: the store is locked."""

    def __init__(self, inner: FetcherInterface) -> None:
        self._inner = inner

    def _fetch(self, url: str) -> Iterator[bytes]:
        return self._chunks(self._inner.fetch(url), url)

    @staticmethod
    def _chunks(chunks: Iterator[bytes], url: str) -> Iterator[bytes]:
        begin, length = time.monotonic(), 0
        try:
            for chunk in chunks:
                length += len(chunk)
                _check_pace(length, time.monotonic() - begin, url)
                yield chunk
        except tuf_errors.DownloadError:
            raise
        except Exception as error:  # whatever the library below says to a broken connection
            raise tuf_errors.DownloadError(f"the download of {url} was cut") from error


def _check_pace(length: int, taken: float, url: str) -> None:
    if taken > _GRACE and length < _SLOWEST * taken:
        raise tuf_errors.SlowRetrievalError(f"{length} bytes in {taken:.0f} s of {url}")


def _pull(store: Store, client: _Client, known: Known, bundle: str, progress: Progress | None) -> Pulled:
    before = store.current(bundle)
    if before is not None and before.repository != known.name:
        raise _Refused(f"bundle {bundle} of this device is from another repository")
    entry = client.find(target(bundle))
    if entry is None:
        raise _Refused(f"the repository has no bundle {bundle}, only: {', '.join(_ids(client)[:20]) or 'none'}")
    data = _manifest(client, entry)
    digest = hashlib.sha256(data).hexdigest()
    manifest = manifests.read(data, f"{client.url}targets/{entry.get_prefixed_paths()[0]}")
    version = manifest.version
    if manifest.id != bundle:
        raise _Refused(f"what it shows as bundle {bundle} is bundle {manifest.id}")
    if before is not None and version < before.version:
        raise _Refused(f"it shows version {version} of bundle {bundle}, older than the one in use")
    if before is not None and version == before.version and digest != before.manifest:
        raise _Refused(f"it shows another bundle {bundle} as version {version}, which is in use")
    folder = before.folder if before else ""
    now = Current(bundle, version, folder, digest, known.name, client.root, client.targets.version)
    if before is not None and digest == before.manifest and _is_sound(store, bundle):
        store.confirm(client.listed, now)
        return Pulled(bundle, version, version, 0, 0)
    lacking = list({file.sha256: file for file in manifest.files if not store.has(file)}.values())
    _check_room(store, lacking)
    _download(store, client, lacking, progress)
    store.install(manifest, data, client.listed, now)
    size = sum(file.length for file in lacking)
    return Pulled(bundle, version, before.version if before else None, len(lacking), size)


def _is_sound(store: Store, bundle: str) -> bool:
    """Whether the bundle in use can be opened."""
    try:
        store.admit(bundle).close()
    except (BundleError, TrustError):
        return False
    return True


def _manifest(client: _Client, entry: TargetFile) -> bytes:
    if entry.length > manifests.MAX_BYTES:
        raise _Refused(f"the manifest has more than {manifests.MAX_BYTES >> 20} MiB")
    data = b"".join(client.read(entry))
    entry.verify_length_and_hashes(data)
    return data


def _download(store: Store, client: _Client, lacking: list[File], progress: Progress | None) -> None:
    """Turn files into blobs, each only once all of it is there and right."""
    done, total = 0, sum(file.length for file in lacking)
    for file in lacking:
        entry = client.find(blob_target(file))
        if entry is None or entry.length != file.length or entry.hashes["sha256"] != file.sha256.hex():
            raise _Refused(f"the signed list does not name {file.path} as its manifest does")
        with store.incoming(file) as path:
            digest, length = hashlib.sha256(), 0
            with path.open("wb") as out:
                for chunk in client.read(entry):
                    digest.update(chunk)
                    length += len(chunk)
                    out.write(chunk)
                    if progress is not None:
                        progress(done + length, total)
                if length < entry.length:
                    raise tuf_errors.DownloadError(f"{file.path} ends after {length} of {entry.length} bytes")
                if digest.digest() != file.sha256:
                    raise tuf_errors.LengthOrHashMismatchError(f"{file.path} has another SHA-256")
                out.flush()
                os.fsync(out.fileno())
        done += file.length


def _check_room(store: Store, lacking: list[File]) -> None:
    needed = sum(file.length for file in lacking)
    free = shutil.disk_usage(store.folder).free
    if lacking and needed + _ROOM > free:
        what = f"the download needs {needed >> 20} MiB, and {free >> 20} MiB are free"
        raise BundleError(what, where=str(store.folder), mend="Make room, or choose another --store.")


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


def _ids(client: _Client) -> list[str]:
    names = (path.split("/") for path in sorted(client.targets.targets))
    return [name[1] for name in names if len(name) == 3 and target(name[1]) == "/".join(name)]


def _only(client: _Client) -> str:
    found = _ids(client)
    if len(found) != 1:
        names = ", ".join(found[:20])
        what = f"the repository has several bundles: {names}" if found else "the repository has no bundle"
        raise BundleError(what, where=client.url, mend="Say which: --id ID" if found else "")
    return found[0]


class _Refused(tuf_errors.RepositoryError):
    """What is refused, in words of ours."""


def _stays(store: Store, url: str, bundle: str | None) -> str:
    """What a refusal leaves, as a sentence."""
    with contextlib.suppress(BundleError, OSError):
        names = [known.name for known in store.repositories() if known.url == url]
        for current in store.bundles():
            if current.id == bundle or (bundle is None and current.repository in names):
                return f"Version {current.version} of bundle {current.id} stays in use."
    return "Nothing was installed."


_CLOCK = " (or the clock of this device is wrong)"
# The first that fits counts: subclasses before their bases.
_SAID: tuple[tuple[type[Exception], str], ...] = (
    (tuf_errors.DownloadHTTPError, "the server does not give it"),
    (tuf_errors.DownloadLengthMismatchError, "refused a file that is longer than it may be"),
    (tuf_errors.SlowRetrievalError, "cannot reach the server, or it is too slow"),
    (tuf_errors.DownloadError, "cannot get it"),
    (_Refused, "refused"),
    (tuf_errors.ExpiredMetadataError, f"refused an old state, or one that its owner must sign anew{_CLOCK}"),
    (tuf_errors.BadVersionNumberError, "refused a state that is older than the known one, or mixed"),
    (tuf_errors.UnsignedMetadataError, "refused what is not signed by the keys of its owner"),
    (tuf_errors.LengthOrHashMismatchError, "refused a file other than the signed one"),
    (Exception, "refused metadata that cannot be used"),
)


@contextlib.contextmanager
def _refusals(store: Store, url: str, bundle: str | None) -> Iterator[None]:
    """Say in one sentence what was refused, and in another that the bundle in use stays."""
    try:
        yield
    except BundleError as error:
        mend = f"{error.mend} {_stays(store, url, bundle)}".strip()
        raise BundleError(error.what, where=error.where, mend=mend) from None
    except OSError as error:
        what = f"cannot use the store: {error.strerror or error}"
        raise BundleError(what, where=str(error.filename or ""), mend=_stays(store, url, bundle)) from None
    except (tuf_errors.RepositoryError, tuf_errors.DownloadError, ValueError) as error:
        said = next(said for kind, said in _SAID if isinstance(error, kind))
        detail = (str(error).splitlines() or [""])[0][:200]
        what = f"{said}: {detail}" if detail else said
        raise TrustError(what, where=url, mend=_stays(store, url, bundle)) from None


def read_root(path: Path) -> bytes:
    """The root metadata that a person gives.

    Raises:
        TrustError: The file cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise TrustError(f"cannot read it: {error.strerror}", where=str(path)) from None
