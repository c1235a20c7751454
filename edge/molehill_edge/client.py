"""One look at a repository: what it shows is verified, downloads are bounded, refusals are put in one sentence."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence

from tuf.api import exceptions as tuf_errors
from tuf.api.metadata import Metadata, Root, TargetFile, Targets
from tuf.ngclient import FetcherInterface, Updater, UpdaterConfig, Urllib3Fetcher
from urllib3.exceptions import TimeoutError as NoAnswerError
from urllib3.response import BaseHTTPResponse

from molehill import files
from molehill.errors import BundleError, TrustError
from molehill_edge.signatures import Known
from molehill_edge.store import Store
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
_GRACE = 60.0  # seconds after which a file must have come at least at this pace
_SLOWEST = 1024  # bytes a second


class Client:
    """One look at a repository: its newest state, all of it verified.

    Args:
        known: Where what it shows is kept.
        url: Its address, with a slash at the end.
        pinned: The root metadata that this device was given.
        fetcher: Downloads; over HTTP when None.
    """

    def __init__(self, known: Known, url: str, pinned: bytes, fetcher: FetcherInterface | None) -> None:
        self.known = known
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


def download(
    store: Store,
    client: Client,
    lacking: Sequence[tuple[File, TargetFile]],
    progress: Progress | None,
    more: int = 0,
) -> None:
    """Turn files into blobs of the store, each only once all of it is there and right.

    Args:
        store: Where they go.
        client: Shows them.
        lacking: The files, each with what is signed about it.
        progress: Called with the bytes that are there and those of the whole download.
        more: Bytes that will be written besides.

    Raises:
        BundleError: There is no room for them.
    """
    done, total = 0, sum(file.length for file, _ in lacking)
    if total + more:
        store.require_room("the download", total + more)
    for file, entry in lacking:
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


class Refused(tuf_errors.RepositoryError):
    """What is refused, in words of ours."""


_CLOCK = " (or the clock of this device is wrong)"
# The first that fits counts: subclasses before their bases.
_SAID: tuple[tuple[type[Exception], str], ...] = (
    (tuf_errors.DownloadHTTPError, "the server does not give it"),
    (tuf_errors.DownloadLengthMismatchError, "refused a file that is longer than it may be"),
    (tuf_errors.SlowRetrievalError, "cannot reach the server, or it is too slow"),
    (tuf_errors.DownloadError, "cannot get it"),
    (Refused, "refused"),
    (tuf_errors.ExpiredMetadataError, f"refused an old state, or one that its owner must sign anew{_CLOCK}"),
    (tuf_errors.BadVersionNumberError, "refused a state that is older than the known one, or mixed"),
    (tuf_errors.UnsignedMetadataError, "refused what is not signed by the keys of its owner"),
    (tuf_errors.LengthOrHashMismatchError, "refused a file other than the signed one"),
    (Exception, "refused metadata that cannot be used"),
)


@contextlib.contextmanager
def refusals(url: str, stays: Callable[[], str]) -> Iterator[None]:
    """Say in one sentence what was refused, and in another what stays as it was.

    Args:
        url: Of the repository.
        stays: Returns the second sentence.

    Raises:
        BundleError: In place of one without that sentence, or of an OSError.
        TrustError: In place of what the client of The Update Framework says.
    """
    try:
        yield
    except BundleError as error:
        mend = f"{error.mend} {stays()}".strip()
        raise BundleError(error.what, where=error.where, mend=mend) from None
    except OSError as error:
        what = f"cannot use the store: {error.strerror or error}"
        mend = f"{files.cure(error)} {stays()}".strip()
        raise BundleError(what, where=str(error.filename or ""), mend=mend) from None
    except (tuf_errors.RepositoryError, tuf_errors.DownloadError, ValueError) as error:
        said = next(said for kind, said in _SAID if isinstance(error, kind))
        detail = (str(error).splitlines() or [""])[0][:200]
        what = f"{said}: {detail}" if detail else said
        raise TrustError(what, where=url, mend=stays()) from None
