"""Gates: the float32 graph inputs that belong to one owner, and the files that hold them."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from molehill import files
from molehill.errors import BundleError
from molehill_edge import tensors
from molehill_edge.session import value
from molehill_protos.v1.bundle_pb2 import Manifest

Array = np.ndarray[Any, Any]

BIAS, MASK = "router_bias", "expert_mask"
PLACES = "router_ranks"  # input of graphs in which experts may be chosen by their places among the logits
FORMAT = "1"
LARGEST = 1 << 30  # bytes of a gate or expert file


@dataclass(frozen=True, eq=False)
class Gate:
    """What one owner adds to a bundle.

    Attributes:
        name: Whose it is.
        tensors: One float32 array for every gate tensor of the manifest.
        bias: Added to the routers' logits, float32 ``[S]``.
        mask: Experts that may be chosen, bool ``[S]``.
    """

    name: str
    tensors: Mapping[str, Array]
    bias: Array = field(repr=False)
    mask: Array = field(repr=False)

    @cached_property
    def values(self) -> Mapping[str, tuple[ort.OrtValue, Array]]:
        """The tensors as the graph takes them, each with the array that it points at."""
        kept = {name: np.ascontiguousarray(array) for name, array in self.tensors.items()}
        return {name: (value(array), array) for name, array in kept.items()}


def slots(manifest: Manifest) -> list[int]:
    """The bundle's slot behind each number of ``router_bias`` and ``expert_mask``, ``[S]``."""
    return [slot for router in manifest.routers for slot in router.slots]


def starts(manifest: Manifest) -> list[int]:
    """Where each router begins in ``router_bias`` and ``expert_mask``, and where the last ends."""
    found = [0]
    for router in manifest.routers:
        found.append(found[-1] + len(router.slots))
    return found


def usable(manifest: Manifest) -> Array:
    """Which numbers of ``expert_mask`` stand for an expert rather than an empty slot, bool ``[S]``."""
    return np.array([bool(manifest.slots[slot].id) for slot in slots(manifest)], dtype=bool)


def read(path: Path, manifest: Manifest, added: Container[int] = ()) -> Gate:
    """Read a gate file that was made for this bundle's base, layout and experts.

    Args:
        path: A gate file.
        manifest: Of the bundle, with the experts that it has now.
        added: Slots with experts that were added on this device: their rows are their own, whatever the gate says.

    Raises:
        BundleError: It cannot be read, is no gate, is for another base, layout or expert, or its tensors do not fit.
    """
    found, about = load(path, "gate")
    where = str(path)
    if about.get("base") != manifest.base.digest:
        raise BundleError("the gate is for another base model", where=where, mend="Use a gate of this bundle's run.")
    if about.get("layout") != manifest.layout.hex():
        raise BundleError(
            "the gate is for another layout of experts and routers",
            where=where,
            mend="Use a gate of this bundle's run.",
        )
    _check_experts(about, manifest, added, where)
    shapes = {tensor.name: tuple(tensor.shape) for tensor in manifest.gate}
    size = starts(manifest)[-1]
    missing = shapes.keys() - found.keys()
    extra = found.keys() - shapes.keys() - {BIAS, MASK}
    if missing or extra:
        said = f"lacks {min(missing)}" if missing else f"has {min(extra)}, which the bundle does not know"
        raise BundleError(f"the gate {said}", where=where)
    for name, shape in shapes.items():
        check(found[name], shape, name, where)
    bias = found.get(BIAS, np.zeros(size, np.float32))
    mask = found.get(MASK, np.ones(size, bool))
    check(bias, (size,), BIAS, where)
    if mask.shape != (size,) or mask.dtype not in (np.uint8, np.bool_):
        raise BundleError(f"{MASK} is not one bit for each of {size} experts", where=where)
    ordered = {name: np.ascontiguousarray(found[name]) for name in shapes}
    # Who sits in a slot that is empty now is for its owner to say, not for the gate.
    allowed = mask.astype(bool) | ~usable(manifest)
    return Gate(about.get("name", path.name), ordered, np.ascontiguousarray(bias), allowed)


def metadata(name: str, manifest: Manifest) -> dict[str, str]:
    """What a gate file says of itself.

    Args:
        name: Whose gate it is.
        manifest: Of the bundle that it is for, with the experts that it has now.
    """
    return {
        "format": FORMAT,
        "kind": "gate",
        "name": name,
        "base": manifest.base.digest,
        "layout": manifest.layout.hex(),
        "slots": json.dumps([slot.id for slot in manifest.slots]),
    }


def write(path: Path, gate: Gate, manifest: Manifest) -> None:
    """Write a gate file, whole or not at all.

    Args:
        path: The file; its folder must exist.
        gate: What it holds.
        manifest: Of the bundle that the gate is for.

    Raises:
        BundleError: It cannot be written.
    """
    values = {**gate.tensors, BIAS: gate.bias, MASK: gate.mask.astype(np.uint8)}
    data, _ = tensors.pack(values, metadata(gate.name, manifest))
    try:
        files.write(path, data, mode=files.PRIVATE)  # it says something about its owner's texts
    except OSError as error:
        raise BundleError(f"cannot write it: {error.strerror}", where=str(path), mend=files.cure(error)) from None


def load(path: Path, kind: str) -> tuple[dict[str, Array], dict[str, str]]:
    """Read a safetensors file of a kind.

    Args:
        path: The file.
        kind: What its metadata must call it: gate or expert.

    Returns:
        Its tensors, and its metadata.

    Raises:
        BundleError: It cannot be read, is no safetensors file, or is of another kind or format.
    """
    where = str(path)
    try:
        if path.stat().st_size > LARGEST:
            raise BundleError(f"larger than any {kind} file", where=where)
    except OSError as error:
        raise BundleError(f"cannot read it: {error.strerror}", where=where) from None
    return _of_kind(tensors.read(path), kind, where)


def parse(data: bytes, kind: str, where: str) -> tuple[dict[str, Array], dict[str, str]]:
    """What `load` returns, from the bytes of a file.

    Args:
        data: All of it.
        kind: What its metadata must call it: gate or expert.
        where: What it is, for errors.

    Raises:
        BundleError: It is no safetensors file, or is of another kind or format.
    """
    return _of_kind(tensors.parse(data, where), kind, where)


def _of_kind(
    read: tuple[dict[str, Array], dict[str, str]], kind: str, where: str
) -> tuple[dict[str, Array], dict[str, str]]:
    found, said = read
    if said.get("kind") != kind:
        raise BundleError(f"not {_a(kind)} file", where=where, mend=f"Give {_a(kind)} file.")
    if said.get("format") != FORMAT:
        raise BundleError(
            f"{_a(kind)} file of format {said.get('format')!r}", where=where, mend="Update molehill on this device."
        )
    return found, said


def check(array: Array, shape: tuple[int, ...], name: str, where: str) -> None:
    """Refuse an array that is not float32, of another shape, or not finite.

    Raises:
        BundleError: It is.
    """
    if array.dtype != np.float32:
        raise BundleError(f"{name} is {array.dtype}, not float32", where=where)
    if array.shape != shape:
        raise BundleError(f"{name} has shape {list(array.shape)} where {list(shape)} fits", where=where)
    if not np.isfinite(array).all():
        raise BundleError(f"{name} holds numbers that are not finite", where=where)


def _check_experts(said: Mapping[str, str], manifest: Manifest, added: Container[int], where: str) -> None:
    """Refuse a gate whose rows belong to other experts than those of the slots; either side may lack some."""
    try:
        theirs = json.loads(said["slots"])
    except (KeyError, ValueError, RecursionError):
        theirs = None
    ours = [slot.id for slot in manifest.slots]
    if not isinstance(theirs, list) or len(theirs) != len(ours) or not all(isinstance(name, str) for name in theirs):
        raise BundleError("the gate is damaged: it does not say which experts it is for", where=where)
    for slot, (their, our) in enumerate(zip(theirs, ours, strict=True)):
        if their and our and their != our and slot not in added:
            what = f"the gate is for expert {their[:80]!r} where the bundle has {our}"
            raise BundleError(what, where=where, mend="Use a gate of this bundle's run and experts.")


def _a(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"
