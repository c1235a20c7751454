"""Experts as signed targets of a repository: what they are called, and what is signed about them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from molehill_edge import gates
from molehill_edge import manifest as manifests

if TYPE_CHECKING:
    from tuf.api.metadata import TargetFile

SUFFIX = ".expert.safetensors"
FORMAT = 1


def expert_target(bundle: str, expert: str) -> str:
    """What an expert for a bundle is called in a repository."""
    return f"experts/{bundle}/{expert}{SUFFIX}"


@dataclass(frozen=True)
class Offer:
    """An expert that a repository offers for a bundle.

    Args:
        id: Of the expert.
        bundle: Id of the bundle.
        version: Grows whenever another file is published under this name.
        base: SHA-256 (hex) of the base that it was trained on, as the manifest names it.
        layout: SHA-256 (hex) of the layout that it fits, as the manifest names it.
        length: Of the file, in bytes.
        sha256: Of the file, in hexadecimal digits.
    """

    id: str
    bundle: str
    version: int
    base: str
    layout: str
    length: int
    sha256: str

    def custom(self) -> dict[str, Any]:
        """What is signed beside length and SHA-256."""
        about = {"id": self.id, "bundle": self.bundle, "version": self.version, "base": self.base}
        return {"format": FORMAT, "kind": "expert", **about, "layout": self.layout}


def read(entry: TargetFile) -> Offer | None:
    """What is signed about an expert; None when the entry is of something else, or of a form that is not known.

    Also who may sign can make mistakes, or have newer software.
    """
    about = entry.custom
    if not isinstance(about, Mapping) or (about.get("format"), about.get("kind")) != (FORMAT, "expert"):
        return None
    texts = [about.get(key) for key in ("id", "bundle", "base", "layout")]
    version, sha256 = about.get("version"), entry.hashes.get("sha256")
    if not all(isinstance(text, str) for text in texts) or type(version) is not int or version < 1 or sha256 is None:
        return None
    name, bundle, base, layout = map(str, texts)
    if not manifests.valid_id(name) or not manifests.valid_id(bundle) or entry.path != expert_target(bundle, name):
        return None
    if not 0 < entry.length <= gates.LARGEST:
        return None
    return Offer(name, bundle, version, base, layout, entry.length, sha256)


def listed(targets: Mapping[str, TargetFile], bundle: str | None = None) -> list[Offer]:
    """The experts in a signed list, by bundle and id; those of one bundle when it is named."""
    found = [offer for path in sorted(targets) if (offer := read(targets[path])) is not None]
    return [offer for offer in found if bundle in (None, offer.bundle)]
