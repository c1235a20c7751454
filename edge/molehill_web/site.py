"""Writing the page: its own files, its libraries, and where its bundle is."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from tuf.api.exceptions import DownloadHTTPError
from tuf.ngclient import FetcherInterface

from molehill import __version__, files
from molehill.errors import BundleError
from molehill_edge import manifest as manifests
from molehill_edge.client import Client, refusals
from molehill_edge.fetch import read_manifest, read_root
from molehill_edge.signatures import Known
from molehill_edge.store import target
from molehill_protos.v1.bundle_pb2 import Manifest
from molehill_web.vendor import RUNTIME, Part, parts

if TYPE_CHECKING:
    from molehill_edge.trust import Admitted

PAGE = Path(__file__).parent / "page"
BUNDLE = "bundle"  # folder of a bundle that comes with the page
SHELL = "shell.js"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Written:
    """A page.

    Attributes:
        folder: Where it is.
        serve: The folder that a web server must show, so that the page finds the repository.
        shown: Of that folder, what has to be there: it may hold other things, which are not for everybody.
        manifest: Of the bundle that it runs.
        signed: Whether a repository vouches for it.
        files: How many the page has.
        bytes: Their length, the bundle's included when it comes with the page.
    """

    folder: Path
    serve: Path
    manifest: Manifest
    signed: bool
    files: int
    bytes: int
    shown: tuple[Path, ...]


def of_bundle(admitted: Admitted, out: Path, vendor: Path | None = None) -> Written:
    """Write a page that brings its bundle: it runs these bytes and no others.

    Args:
        admitted: The bundle, all of it checked.
        out: Folder of the page.
        vendor: Of the libraries' archives, see `molehill_web.vendor.parts`.

    Raises:
        BundleError: The folder is that of a bundle, has other things where the page would be, or no room for it; or the
            bundle needs a newer runtime than the page has, or is for what the page does not show.
        DeployError: A library is not to be had.
    """
    _require_runs(admitted.manifest, str(admitted.folder))
    libraries = list(parts(vendor))
    data = (admitted.folder / manifests.NAME).read_bytes()
    about = {"bundle": admitted.manifest.id, "manifest": hashlib.sha256(data).hexdigest()}
    page = _Page(about, {}, libraries)
    size = page.bytes + len(data) + sum(file.length for file in admitted.manifest.files)
    with _place(out, {*page.files, BUNDLE}, size) as before:
        # Copied, then moved there: what is copied may be the copy of before.
        with tempfile.TemporaryDirectory(dir=out, prefix=f".{BUNDLE}.") as scratch:
            copy = Path(scratch) / BUNDLE
            for name in (manifests.NAME, *(file.path for file in admitted.manifest.files)):
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(admitted.folder / name, copy / name)
            shutil.rmtree(out / BUNDLE, ignore_errors=True)
            copy.rename(out / BUNDLE)
        page.write(out, before - {BUNDLE})
    return Written(out, out, admitted.manifest, signed=False, files=len(page.files), bytes=size, shown=(out,))


def of_repository(bundle: str, repository: Path, root: Path, out: Path, vendor: Path | None = None) -> Written:
    """Write a page that gets a bundle, and its newer versions, from a repository on the same web server.

    Args:
        bundle: Its id.
        repository: Folder that ``molehill publish`` has written.
        root: ``root.json`` of its owner, which the page pins.
        out: Folder of the page.
        vendor: As for `of_bundle`.

    Raises:
        BundleError: The repository has no such bundle, or one that needs a newer runtime than the page has or is for
            what the page does not show; or the folder is that of one, has other things where the page would be, or no
            room for it.
        TrustError: What the repository shows is not signed by the keys of this root.
        DeployError: A library is not to be had.
    """
    pinned = read_root(root)
    manifest = _shown(bundle, repository, pinned)
    _require_runs(manifest, f"{repository}/")
    libraries = list(parts(vendor))
    way = os.path.relpath(repository.resolve(), out.resolve()).replace(os.sep, "/") + "/"
    page = _Page({"bundle": bundle, "repository": quote(way)}, {"root.json": pinned}, libraries)
    with _place(out, page.files.keys(), page.bytes) as before:
        page.write(out, before)
    both = repository.resolve(), out.resolve()
    serve = Path(os.path.commonpath(both))
    shown = (serve,) if serve in both else both
    return Written(out, serve, manifest, signed=True, files=len(page.files), bytes=page.bytes, shown=shown)


class _Folder(FetcherInterface):
    """Reads a repository from the disk."""

    def _fetch(self, url: str) -> Iterator[bytes]:
        try:
            with Path(url).open("rb") as file:
                while chunk := file.read(_CHUNK):
                    yield chunk
        except OSError:
            raise DownloadHTTPError(f"there is no {url}", 404) from None


def _shown(bundle: str, repository: Path, pinned: bytes) -> Manifest:
    """The manifest that a repository shows to whoever trusts this root."""
    where = f"{repository}/"
    with refusals(where, lambda: ""), tempfile.TemporaryDirectory(prefix="molehill-site-") as folder:
        client = Client(Known("", Path(folder)), where, pinned, _Folder())
        entry = client.find(target(bundle)) if manifests.valid_id(bundle) else None
        if entry is None:
            raise BundleError(f"the repository has no bundle {bundle}", where=where)
        return manifests.read(read_manifest(client, entry), where)


def _require_runs(manifest: Manifest, where: str) -> None:
    """Refuse a bundle that the page would refuse, or could not show."""
    if not manifests.reading(manifest.task).several:
        what = f"the page classifies and chats, and the bundle is for {manifest.task.kind}"
        raise BundleError(what, where=where, mend="Use molehill edge run, or molehill edge serve.")
    needed = manifest.runtime.onnxruntime
    if manifests.is_older(RUNTIME.version, needed):
        what = f"the bundle needs onnxruntime {needed} or newer, and the page has {RUNTIME.version}"
        raise BundleError(what, where=where, mend="Update molehill, which brings the page.")


@contextmanager
def _place(out: Path, names: Collection[str], size: int) -> Iterator[set[str]]:
    """The folder of a page, made if it is not there; with what of it is of a page that was written there before.

    Args:
        out: The folder.
        names: What will be written into it.
        size: Bytes of that.

    Raises:
        BundleError: The folder is that of a bundle, has other things of these names, or no room.
    """
    if (out / manifests.NAME).exists():
        raise BundleError("this is the folder of a bundle", where=str(out), mend="Name another one for the page.")
    before = _written_before(out)
    for name in sorted(names):
        if name not in before and os.path.lexists(out / name):
            mend = "Name a folder for the page alone, or remove this."
            raise BundleError("something else has this place", where=str(out / name), mend=mend)
    files.require_room("the page", (out, size), kind=BundleError, mend="Make room, or choose another --out.")
    new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        with files.placed(out):
            yield before
    except BaseException:
        if new:
            shutil.rmtree(out, ignore_errors=True)
        raise


class _Page:
    """The files of a page.

    Args:
        about: What it says in ``site.json``.
        more: Files beside its own.
        libraries: Its libraries.

    Attributes:
        files: What they hold, by path; the list of them comes last.
        bytes: Of all but that list.
    """

    def __init__(self, about: dict[str, Any], more: dict[str, bytes], libraries: Sequence[Part]) -> None:
        head = {"format": 1, "molehill": __version__, "onnxruntime": RUNTIME.version}
        said = json.dumps(head | about, indent=2) + "\n"
        eager = {"site.json": said.encode(), **more}
        eager |= {
            path.relative_to(PAGE).as_posix(): path.read_bytes() for path in sorted(PAGE.rglob("*")) if path.is_file()
        }
        lazy: dict[str, bytes] = {}
        for part in libraries:
            (lazy if part.lazy else eager)[part.path] = part.data
        self.bytes = sum(map(len, (eager | lazy).values()))
        self.files = {**eager, **lazy, SHELL: _shell(eager, lazy)}

    def write(self, out: Path, before: set[str]) -> None:
        """Write them, and remove those of before that are not among them.

        The list of files comes last: until then a browser that knows the page keeps to the former.
        """
        for path, data in self.files.items():
            (out / path).parent.mkdir(parents=True, exist_ok=True)
            files.write(out / path, data)
        for path in before - self.files.keys():
            if path == BUNDLE:
                shutil.rmtree(out / path, ignore_errors=True)
            else:
                (out / path).unlink(missing_ok=True)


def _shell(eager: dict[str, bytes], lazy: dict[str, bytes]) -> bytes:
    """What the service worker is told: every file of the page and its SHA-256."""
    digests = [
        {path: hashlib.sha256(data).hexdigest() for path, data in sorted(group.items())} for group in (eager, lazy)
    ]
    shell = {
        "digest": hashlib.sha256(json.dumps(digests).encode()).hexdigest(),
        "files": digests[0],
        "lazy": digests[1],
    }
    return f"self.SHELL = {json.dumps(shell, indent=2)};\n".encode()


def _written_before(out: Path) -> set[str]:
    """Files of a page that was written here before, and the folder of its bundle if it brought one."""
    try:
        shell = (out / SHELL).read_text(encoding="utf-8").removeprefix("self.SHELL = ").rstrip().rstrip(";")
        listed, about = json.loads(shell), json.loads((out / "site.json").read_bytes())
        names = [SHELL, *listed["files"], *listed["lazy"], *([BUNDLE] if "manifest" in about else [])]
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    return {
        name for name in names if isinstance(name, str) and ".." not in Path(name).parts and not name.startswith("/")
    }
