"""Experts as signed targets: what of a file is checked before it is signed, and what is signed about it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tuf.api.metadata import TargetFile

from molehill.errors import BundleError
from molehill_edge import experts, gates, offers
from molehill_edge.offers import Offer
from molehill_protos.v1.bundle_pb2 import Manifest


def entry(
    path: Path, bundles: Mapping[str, Manifest], fits: str | None, listed: Mapping[str, TargetFile], where: str
) -> TargetFile:
    """What is to be signed about an expert file.

    Its version is one more than that of another file under its name, so that devices refuse to go back.

    Args:
        path: The file.
        bundles: Those of the repository, by id.
        fits: Id of the bundle that it is for; when None the only one with its base.
        listed: What is signed now.
        where: The repository, for errors.

    Raises:
        BundleError: It is no expert file, or fits no slot of the bundle; or it is not clear which bundle is meant.
    """
    data = experts.read_bytes(path)
    _, about = gates.parse(data, "expert", str(path))
    manifest = _bundle(about.get("base", ""), bundles, fits, str(path), where)
    expert = experts.parse(data, manifest, str(path))
    experts.check_layout(expert, manifest, str(path))
    made = TargetFile.from_data(offers.expert_target(manifest.id, expert.id), data, ["sha256"])
    before = listed.get(made.path)
    known = None if before is None else offers.read(before)
    layout, sha256 = manifest.layout.hex(), made.hashes["sha256"]
    version = 1 if known is None else known.version
    if known is not None and (known.sha256, known.layout) != (sha256, layout):
        version += 1
    offer = Offer(expert.id, manifest.id, version, manifest.base.digest, layout, made.length, sha256)
    made.unrecognized_fields["custom"] = offer.custom()
    return made


def _bundle(base: str, bundles: Mapping[str, Manifest], fits: str | None, path: str, where: str) -> Manifest:
    """The bundle that an expert is for."""
    names = ", ".join(sorted(bundles)) or "none"
    if fits is not None:
        if fits not in bundles:
            mend = f"Publish the bundle first, or choose another with --for; there are: {names}."
            raise BundleError(f"the repository has no bundle {fits}", where=where, mend=mend)
        return bundles[fits]
    same = [manifest for manifest in bundles.values() if manifest.base.digest == base]
    if len(same) == 1:
        return same[0]
    if not same:
        what = "no bundle of the repository has the base of this expert"
        raise BundleError(what, where=path, mend=f"Publish the bundle first; there are: {names}.")
    several = ", ".join(sorted(manifest.id for manifest in same))
    raise BundleError(f"the expert may be for several bundles: {several}", where=path, mend="Say which: --for ID")
