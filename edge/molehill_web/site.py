"""Writing the page: its own files, its libraries, and where its bundle is."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from molehill_web.vendor import Part, parts

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


def of_bundle(admitted: Admitted, out: Path, vendor: Path | None = None) -> Written:
    """Write a page that brings its bundle: it runs these bytes and no others.

    Args:
        admitted: The bundle, all of it checked.
        out: Folder of the page.
        vendor: Of the libraries' archives, see `molehill_web.vendor.parts`.

    Raises:
        BundleError: The folder is that of a bundle, or there is no room in it.
        DeployError: A library is not to be had.
    """
    libraries = list(parts(vendor))
    data = (admitted.folder / manifests.NAME).read_bytes()
    about = {"bundle": admitted.manifest.id, "manifest": hashlib.sha256(data).hexdigest()}
    size = len(data) + sum(file.length for file in admitted.manifest.files)
    _make(out, libraries, size)
    with files.placed(out), tempfile.TemporaryDirectory(dir=out, prefix=f".{BUNDLE}.") as scratch:
        place = Path(scratch) / BUNDLE
        for name in (manifests.NAME, *(file.path for file in admitted.manifest.files)):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(admitted.folder / name, place / name)
        shutil.rmtree(out / BUNDLE, ignore_errors=True)
        place.rename(out / BUNDLE)
    count, length = _write(out, about, {}, libraries)
    return Written(out, out, admitted.manifest, signed=False, files=count, bytes=length + size)


def of_repository(bundle: str, repository: Path, root: Path, out: Path, vendor: Path | None = None) -> Written:
    """Write a page that gets a bundle, and its newer versions, from a repository on the same web server.

    Args:
        bundle: Its id.
        repository: Folder that ``molehill publish`` has written.
        root: ``root.json`` of its owner, which the page pins.
        out: Folder of the page.
        vendor: As for `of_bundle`.

    Raises:
        BundleError: The repository has no such bundle, the folder is that of one, or there is no room in it.
        TrustError: What the repository shows is not signed by the keys of this root.
        DeployError: A library is not to be had.
    """
    pinned = read_root(root)
    manifest = _shown(bundle, repository, pinned)
    libraries = list(parts(vendor))
    _make(out, libraries, 0)
    way = os.path.relpath(repository.resolve(), out.resolve()).replace(os.sep, "/") + "/"
    count, length = _write(out, {"bundle": bundle, "repository": way}, {"root.json": pinned}, libraries)
    serve = Path(os.path.commonpath([repository.resolve(), out.resolve()]))
    return Written(out, serve, manifest, signed=True, files=count, bytes=length)


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


def _make(out: Path, libraries: Sequence[Part], more: int) -> None:
    """Make the folder of a page that has ``more`` bytes beside libraries and its own files."""
    if (out / manifests.NAME).exists():
        raise BundleError("this is the folder of a bundle", where=str(out), mend="Name another one for the page.")
    own = sum(path.stat().st_size for path in PAGE.rglob("*") if path.is_file())
    size = more + own + sum(len(part.data) for part in libraries)
    files.require_room("the page", (out, size), kind=BundleError, mend="Make room, or choose another --out.")
    out.mkdir(parents=True, exist_ok=True)


def _write(out: Path, about: dict[str, Any], more: dict[str, bytes], libraries: Sequence[Part]) -> tuple[int, int]:
    """Write the page; returns how many files it has, and their bytes.

    The list of its files comes last: until then a browser that knows the page keeps to the former.
    """
    said = json.dumps({"format": 1, "molehill": __version__, **about}, indent=2) + "\n"
    eager = {"site.json": said.encode(), **more}
    eager |= {
        path.relative_to(PAGE).as_posix(): path.read_bytes() for path in sorted(PAGE.rglob("*")) if path.is_file()
    }
    lazy: dict[str, bytes] = {}
    for part in libraries:
        (lazy if part.lazy else eager)[part.path] = part.data
    everything = eager | lazy
    before = _listed(out)
    for path, data in everything.items():
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        files.write(out / path, data)
    files.write(out / SHELL, _shell(eager, lazy))
    for path in before - everything.keys():
        (out / path).unlink(missing_ok=True)
    return len(everything) + 1, sum(map(len, everything.values()))


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


def _listed(out: Path) -> set[str]:
    """The files of a page that was written here before."""
    try:
        text = (out / SHELL).read_text(encoding="utf-8")
        shell = json.loads(text.removeprefix("self.SHELL = ").rstrip().rstrip(";"))
        names = [*shell["files"], *shell["lazy"]]
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    return {
        name for name in names if isinstance(name, str) and ".." not in Path(name).parts and not name.startswith("/")
    }
