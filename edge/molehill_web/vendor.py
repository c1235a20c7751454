"""The libraries of the page: from npm, of exactly these bytes, kept in the cache folder, with their licences."""

from __future__ import annotations

import base64
import hashlib
import io
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from molehill.cache import cache_folder
from molehill.errors import DeployError

_LICENCES = Path(__file__).parent / "licences"
_PATIENCE = 600  # seconds for one package: 33 MB over a slow line
# One more try, soon: without a network npm would wait for a minute.
_OPTIONS = (
    "--ignore-scripts",
    "--loglevel=error",
    "--no-progress",
    "--fetch-retries=1",
    "--fetch-retry-mintimeout=1000",
)
_ABOUT = re.compile(r"npm error (?:code|syscall|errno)\b")  # lines that say less than the one after them


@dataclass(frozen=True)
class Package:
    """One release on npm.

    Attributes:
        name: On npm.
        version: The release.
        integrity: As npm writes it: the SHA-512 of the archive in base64.
        folder: In the page's ``vendor/``.
        files: What the page needs of it, by path in the archive.
        lazy: What it needs on some devices only, and keeps from then on.
        licence: Path of the licence in the archive; empty where it has none, and `licences/` holds it.
    """

    name: str
    version: str
    integrity: str
    folder: str
    files: tuple[str, ...]
    lazy: tuple[str, ...] = ()
    licence: str = "LICENSE"

    @property
    def archive(self) -> str:
        """Name of the archive, as ``npm pack`` calls it."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"

    @property
    def pin(self) -> str:
        """As npm wants it."""
        return f"{self.name}@{self.version}"


RUNTIME = Package(
    "onnxruntime-web",
    "1.30.0",
    "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ==",
    "onnxruntime-web",
    ("dist/ort.wasm.min.mjs", "dist/ort-wasm-simd-threaded.mjs", "dist/ort-wasm-simd-threaded.wasm"),
    (
        "dist/ort.webgpu.min.mjs",
        "dist/ort-wasm-simd-threaded.asyncify.mjs",
        "dist/ort-wasm-simd-threaded.asyncify.wasm",
    ),
    licence="",
)
PACKAGES = (
    RUNTIME,
    Package(
        "@huggingface/tokenizers",
        "0.2.0",
        "sha512-LidMHe1FpcSYH4vcSjXooda34pC0M8m1gmDOv7SQi6Iv+ib1zX7J3sHBCC9/3FPCkn2k1b55FneVqMRxrr99pg==",
        "tokenizers",
        ("dist/tokenizers.min.mjs",),
    ),
    Package(
        "@huggingface/jinja",
        "0.5.11",
        "sha512-YzEzwM5oQf4r0vs7ifWQ+yuVR1YkAHrjERQ+a8WRsStHHp4NRBg+NesjiFc+X2AFUpRvvrIeHDS1xFy9jY/IjQ==",
        "jinja",
        ("dist/index.js",),
    ),
)


@dataclass(frozen=True)
class Part:
    """A file of a library in the page.

    Attributes:
        path: In the page.
        data: Its bytes.
        lazy: Whether the page loads it on some devices only.
    """

    path: str
    data: bytes
    lazy: bool


def parts(folder: Path | None = None) -> Iterator[Part]:
    """Every file of the libraries that the page needs, and their licences.

    Args:
        folder: Of the archives as ``npm pack`` writes them; the cache, or npm, when None.

    Raises:
        DeployError: An archive is neither there nor to be had, or is another.
    """
    for package in PACKAGES:
        data = _given(package, folder) if folder is not None else _cached(package)
        wanted = (*package.files, *package.lazy, *([package.licence] if package.licence else []))
        found = _members(data, wanted)
        for name in (*package.files, *package.lazy):
            # Browsers run what a server calls a script, and many do not know the suffix .mjs.
            path = f"vendor/{package.folder}/{name.rpartition('/')[2].replace('.mjs', '.js')}"
            yield Part(path, found[name], name in package.lazy)
        licence = _LICENCES / f"{package.folder}.txt"
        text = found[package.licence] if package.licence else licence.read_bytes()
        yield Part(f"vendor/{package.folder}/LICENSE.txt", text, lazy=False)


def _given(package: Package, folder: Path) -> bytes:
    path = folder / package.archive
    try:
        data = path.read_bytes()
    except OSError as error:
        mend = f"Make it on a machine with npm: npm pack {package.pin}"
        raise DeployError(f"cannot read it: {error.strerror}", where=str(path), mend=mend) from None
    _check(package, data, str(path))
    return data


def _cached(package: Package) -> bytes:
    """The archive from the cache or through npm; its hash is checked at every read."""
    path = cache_folder() / "npm" / package.archive
    if path.is_file():
        data = path.read_bytes()
        if _is_right(package, data):
            return data
    data = _download(package)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_bytes(data)
        part.replace(path)
    except OSError as error:
        raise DeployError(f"cannot keep a download: {error.strerror}", where=str(path)) from None
    return data


def _download(package: Package) -> bytes:
    """Let npm fetch the archive: it knows the user's registry, proxy and keys."""
    mend = f"Run once with npm and its registry in reach; or elsewhere: npm pack {package.pin}, and give --vendor DIR."
    npm = shutil.which("npm")
    if npm is None:
        raise DeployError(f"npm, which fetches {package.pin}, is not installed", mend=mend)
    with tempfile.TemporaryDirectory(prefix="molehill-npm-") as folder:
        command = [npm, "pack", package.pin, "--pack-destination", folder, *_OPTIONS]
        try:
            done = subprocess.run(  # noqa: S603  (fixed arguments, no shell)
                command, cwd=folder, capture_output=True, text=True, check=False, timeout=_PATIENCE
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise DeployError(f"npm does not fetch {package.pin}: {error}", mend=mend) from None
        path = Path(folder) / package.archive
        if done.returncode or not path.is_file():
            lines = [line for line in done.stderr.splitlines() if line.strip() and not _ABOUT.match(line)]
            reason = lines[0].removeprefix("npm error ") if lines else f"it ended with {done.returncode}"
            raise DeployError(f"npm does not fetch {package.pin}: {reason[:200]}", mend=mend)
        data = path.read_bytes()
    _check(package, data, package.pin)
    return data


def _is_right(package: Package, data: bytes) -> bool:
    digest = base64.b64encode(hashlib.sha512(data).digest()).decode()
    return package.integrity == f"sha512-{digest}"


def _check(package: Package, data: bytes, where: str) -> None:
    if not _is_right(package, data):
        what = f"this is not the archive of {package.pin}: its SHA-512 differs"
        raise DeployError(what, where=where, mend="Get it from another registry; what is pinned does not change.")


def _members(data: bytes, names: Collection[str]) -> dict[str, bytes]:
    """Files of an archive, unpacked once from its beginning; its hash is pinned, so what it holds is known."""
    found = {}
    with tarfile.open(fileobj=io.BytesIO(data), mode="r|gz") as archive:
        for member in archive:
            name = member.name.removeprefix("package/")
            if name in names and (stream := archive.extractfile(member)) is not None:
                found[name] = stream.read()
    return found
