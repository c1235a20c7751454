"""The proof that somebody trusted signed what lies on a device, without a network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from molehill.errors import TrustError

if TYPE_CHECKING:
    from tuf.api.metadata import TargetFile


@dataclass(frozen=True)
class Known:
    """A repository that this device has seen.

    Args:
        name: The digest of its pinned root.
        folder: What is kept of it.
    """

    name: str
    folder: Path

    @property
    def metadata(self) -> Path:
        """What it has shown so far, as the client of The Update Framework keeps it."""
        return self.folder / "metadata"

    @property
    def pinned(self) -> Path:
        """The root metadata that this device was given, from which all trust comes."""
        return self.folder / "pinned.json"

    @property
    def url(self) -> str:
        """Where it was last; empty when that is lost."""
        path = self.folder / "url"
        return path.read_text(errors="replace").strip() if path.is_file() else ""

    def root_path(self, version: int) -> Path:
        """Where a version of its root metadata lies."""
        return self.metadata / "root_history" / f"{version}.root.json"


def check(known: Known, root: int, listed: Path, target: str, data: bytes, *, what: str, mend: str) -> TargetFile:
    """Follow the signatures from the pinned root over a signed list to a file.

    That metadata have expired meanwhile does not count here: expiry tells an update that it is shown an old state, and
    a device that has no network must go on with what it has. A bundle's own expiry counts always.

    Args:
        known: The repository that it is from.
        root: Version of the root metadata whose keys have signed the list.
        listed: The list.
        target: What the file is called in it.
        data: The file.
        what: The file in words, for the message.
        mend: What to do when the signatures do not hold.

    Returns:
        What is signed about the file.

    Raises:
        TrustError: A signature does not hold, or the file is not the signed one.
    """
    from tuf.api.exceptions import RepositoryError  # noqa: PLC0415  # 0.1 s that a local bundle does not need

    try:
        return _follow(known, root, listed, target, data)
    except (OSError, RepositoryError, AttributeError, ValueError) as error:
        said = (str(error).splitlines() or [""])[0][:200]
        raise TrustError(f"the signatures of {what} do not hold: {said}", where=str(listed.parent), mend=mend) from None


def _follow(known: Known, version: int, path: Path, target: str, data: bytes) -> TargetFile:
    """What a list says of a file, every signature from the pinned root on checked.

    Raises:
        ValueError: One of them does not hold; or RepositoryError, OSError, AttributeError for the same reason.
    """
    from tuf.api.metadata import Metadata, Root, Targets  # noqa: PLC0415  # as above

    root = Metadata[Root].from_bytes(known.pinned.read_bytes())
    root.signed.verify_delegate(Root.type, root.signed_bytes, root.signatures)
    while root.signed.version < version:
        after = Metadata[Root].from_bytes(known.root_path(root.signed.version + 1).read_bytes())
        for signer in (root.signed, after.signed):
            signer.verify_delegate(Root.type, after.signed_bytes, after.signatures)
        if after.signed.version != root.signed.version + 1:
            raise ValueError("a root is of another version")
        root = after
    listed = Metadata[Targets].from_bytes(path.read_bytes())
    root.signed.verify_delegate(Targets.type, listed.signed_bytes, listed.signatures)
    entry = listed.signed.targets.get(target)
    if entry is None:
        raise ValueError("the signed list does not name it")
    entry.verify_length_and_hashes(data)
    return entry
