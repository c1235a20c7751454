"""Putting an expert into a free slot: its tensors into a copy of experts.safetensors, its rows into gates."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from molehill import files
from molehill.errors import BundleError
from molehill_edge import gates
from molehill_edge import manifest as manifests
from molehill_edge.quantise import pack4, quantise, unpack4
from molehill_protos.v1 import bundle_pb2
from molehill_protos.v1.bundle_pb2 import GateTensor, Manifest, Site, SiteTensor

Array = np.ndarray[Any, Any]

_VECTOR, _OLD_VECTOR = "dense.v", "v"  # the role of a vector, and its name in files of earlier versions
_DTYPES = {"F32": np.float32, "I8": np.int8, "U8": np.uint8}


@dataclass(frozen=True)
class Expert:
    """An expert in float32.

    Attributes:
        id: Its name in the bundle.
        sites: Its tensors by site and role: ``A [r, d_in]`` and ``B [d_out, r]``, or others.
        rows: Its row of each gate tensor that has one for every expert.
    """

    id: str
    sites: Mapping[str, Mapping[str, Array]]
    rows: Mapping[str, Array]


def read(path: Path, manifest: Manifest) -> Expert:
    """Read an expert file that was made for this bundle's base.

    Args:
        path: An expert file.
        manifest: Of the bundle.

    Raises:
        BundleError: It cannot be read, has no valid id, is for another base, or lacks sites or has additional ones.
    """
    return parse(read_bytes(path), manifest, str(path))


def read_bytes(path: Path) -> bytes:
    """The bytes of a file that may be an expert.

    Args:
        path: The file.

    Raises:
        BundleError: It cannot be read, is larger than any expert, or is a PEFT folder.
    """
    if any((each / "adapter_config.json").is_file() for each in (path, path.parent)):
        raise BundleError(
            "this is a PEFT folder, and a device takes files of experts",
            where=str(path),
            mend="Where it was trained: molehill export FOLDER --out BUNDLE --expert-files DIR",
        )
    try:
        if path.stat().st_size > gates.LARGEST:
            raise BundleError("larger than any expert file", where=str(path))
        return path.read_bytes()
    except OSError as error:
        raise BundleError(f"cannot read it: {error.strerror}", where=str(path)) from None


def parse(data: bytes, manifest: Manifest, where: str) -> Expert:
    """What `read` returns, from the bytes of an expert file.

    Args:
        data: All of it.
        manifest: Of the bundle.
        where: What it is, for errors.

    Raises:
        BundleError: As `read`.
    """
    tensors, metadata = gates.parse(data, "expert", where)
    if metadata.get("base") != manifest.base.digest:
        raise BundleError("the expert is for another base model", where=where, mend="Use an expert of the same base.")
    if not metadata.get("id"):
        raise BundleError("the expert has no id", where=where)
    if not manifests.valid_id(metadata["id"]):
        raise BundleError(f"{metadata['id'][:80]!r} cannot be the id of an expert", where=where)
    rows = {tensor.name: tensors.pop(tensor.name) for tensor in _with_rows(manifest) if tensor.name in tensors}
    sites: dict[str, dict[str, Array]] = {}
    for site in manifest.sites:
        if f"{site.name}/{_OLD_VECTOR}" in tensors:
            tensors[f"{site.name}/{_VECTOR}"] = tensors.pop(f"{site.name}/{_OLD_VECTOR}")
        names = {role: f"{site.name}/{role}" for role in _shapes(site, 1)}
        if all(name in tensors for name in names.values()):
            sites[site.name] = {role: tensors.pop(name) for role, name in names.items()}
    if tensors:
        raise BundleError(f"the expert has {min(tensors)}, which the bundle does not know", where=where)
    return Expert(metadata["id"], sites, rows)


def find_slot(expert: Expert, manifest: Manifest, where: str) -> int:
    """Return an empty slot of the bundle that an expert fits into.

    Args:
        expert: The expert; its tensors are checked here.
        manifest: Of the bundle, with the experts that it has now.
        where: Its file, for errors.

    Raises:
        BundleError: Its id is taken, there is no empty slot, or its sites, ranks or rows fit none.
    """
    if any(slot.id == expert.id for slot in manifest.slots):
        mend = "Remove that one first."
        raise BundleError(f"the bundle has an expert {expert.id} already", where=where, mend=mend)
    empty = [i for i, slot in enumerate(manifest.slots) if not slot.id and not slot.shared]
    if not empty:
        mend = "Remove an expert, or export the bundle with more slots."
        raise BundleError("the bundle has no empty slot", where=where, mend=mend)
    refused = [_misfit(expert, manifest, slot) for slot in empty]
    for slot, why in zip(empty, refused, strict=True):
        if why is None:
            return slot
    raise BundleError(str(refused[0]), where=where, mend="Export the expert for this bundle's layout.")


def check_layout(expert: Expert, manifest: Manifest, where: str) -> None:
    """Refuse an expert that fits no slot of a bundle, whoever sits there.

    Args:
        expert: The expert.
        manifest: Of the bundle.
        where: Its file, for errors.

    Raises:
        BundleError: It fits none.
    """
    refused = [_misfit(expert, manifest, i) for i, slot in enumerate(manifest.slots) if not slot.shared]
    if None not in refused:
        why = refused[0] if refused else "the bundle has no slots for experts"
        raise BundleError(str(why), where=where, mend="Export the expert for this bundle's layout.")


def place(expert: Expert, slot: int, manifest: Manifest, data: bytes) -> bytes:
    """Return the bytes of experts.safetensors with an expert in a slot.

    Args:
        expert: One that fits the slot.
        slot: Index of the slot.
        manifest: Of the bundle.
        data: The file as it is; the places of its tensors stay the same, since the graph points at them.

    Raises:
        BundleError: The file is damaged, or the expert's numbers are too large to be stored.
    """
    changed = bytearray(data)
    tensors = views(changed)
    for site in manifest.sites:
        if slot in site.slots:
            try:
                with np.errstate(all="raise", under="ignore"):
                    _write(site, list(site.slots).index(slot), expert.sites[site.name], tensors)
            except FloatingPointError:
                what = f"expert {expert.id} has numbers at {site.name} that are too large to be stored"
                raise BundleError(what, where=manifest.id) from None
    return bytes(changed)


def clear(slot: int, manifest: Manifest, data: bytes) -> bytes:
    """Return the bytes of experts.safetensors with zeros in a slot.

    An expert that is not chosen counts 0 times what it says: nothing, but only as long as that is finite.

    Args:
        slot: Index of the slot.
        manifest: Of the bundle.
        data: The file as it is.

    Raises:
        BundleError: The file is damaged.
    """
    sites = {
        site.name: {
            role: np.zeros(shape, np.float32)
            for role, shape in _shapes(site, site.ranks[list(site.slots).index(slot)]).items()
        }
        for site in manifest.sites
        if slot in site.slots
    }
    return place(Expert("", sites, {}), slot, manifest, data)


def views(data: bytearray) -> dict[str, Array]:
    """The tensors of a safetensors file as arrays that write through to its bytes.

    Raises:
        BundleError: It is damaged.
    """
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            part = memoryview(data)[8 + length + begin : 8 + length + end]
            tensors[name] = np.frombuffer(part, dtype=_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise BundleError("damaged", where=manifests.EXPERTS) from None
    return tensors


def rows8(values: Array) -> tuple[Array, Array]:
    """Rows as int8 with a scale each.

    Args:
        values: ``[R, d]``.

    Returns:
        int8 ``[R, d]`` and float32 ``[R]``.
    """
    scale = np.maximum(np.abs(values).max(1), 1e-20).astype(np.float32) / 127
    return np.rint(values / scale[:, None]).astype(np.int8), scale


class RunFolder:
    """A folder beside the bundle's with the same files but other experts, for as long as it is open.

    The files are hard links, so that it costs little and what was checked is never written to.

    Args:
        source: The bundle's folder.
        paths: The files to link.
        experts: The bytes of its experts.safetensors.

    Raises:
        BundleError: It cannot be made.
    """

    def __init__(self, source: Path, paths: list[str], experts: bytes) -> None:
        self.path = source.parent / f".{source.name.lstrip('.')[:40]}.{os.getpid()}-{secrets.token_hex(4)}"
        try:
            self.path.mkdir(mode=0o700)
            for name in paths:
                if name != manifests.EXPERTS:
                    target = self.path / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    _link(source / name, target)
            files.write(self.path / manifests.EXPERTS, experts)
        except OSError as error:
            self.remove()
            raise BundleError(
                f"cannot make a folder for other experts: {error.strerror}",
                where=str(self.path),
                mend=files.cure(error, "Open the bundle from a folder whose parent can be written to."),
            ) from None

    def remove(self) -> None:
        """Delete it; what is linked stays where it came from."""
        shutil.rmtree(self.path, ignore_errors=True)


def _link(source: Path, target: Path) -> None:
    with contextlib.suppress(OSError):
        os.link(source, target)
        return
    shutil.copyfile(source, target)  # file systems without hard links


def _with_rows(manifest: Manifest) -> list[GateTensor]:
    return [tensor for tensor in manifest.gate if tensor.expert_axis >= 0]


def row_shape(tensor: GateTensor) -> tuple[int, ...]:
    """Shape of one expert's row of a gate tensor."""
    return tuple(size for axis, size in enumerate(tensor.shape) if axis != tensor.expert_axis)


def _misfit(expert: Expert, manifest: Manifest, slot: int) -> str | None:
    """Why an expert does not fit a slot."""
    wanted = {site.name: site for site in manifest.sites if slot in site.slots}
    if missing := wanted.keys() - expert.sites.keys():
        return f"the expert lacks {min(missing)}"
    if extra := expert.sites.keys() - wanted.keys():
        return f"the slot has no place at {min(extra)}"
    for name, site in wanted.items():
        rank = site.ranks[list(site.slots).index(slot)]
        tensors = expert.sites[name]
        if "A" in tensors and tensors["A"].ndim == 2 and len(tensors["A"]) != rank:
            return f"the expert has rank {len(tensors['A'])} at {name}, the slot {rank}"
        if why := _wrong([(tensors[role], shape, role) for role, shape in _shapes(site, rank).items()], name):
            return why
    gate = [tensor for tensor in _with_rows(manifest) if slot in manifest.routers[tensor.router].slots]
    if missing := {tensor.name for tensor in gate} - expert.rows.keys():
        return f"the expert lacks its row of {min(missing)}"
    return next((why for t in gate if (why := _wrong([(expert.rows[t.name], row_shape(t), "row")], t.name))), None)


def _wrong(arrays: Sequence[tuple[Array, tuple[int, ...], str]], name: str) -> str | None:
    try:
        for array, shape, what in arrays:
            gates.check(array, shape, f"{what} of {name}", "")
    except BundleError as error:
        return error.what
    return None


def _roles(site: Site) -> Sequence[SiteTensor]:
    """What is stored of experts that are no low-rank pairs."""
    if site.form == bundle_pb2.VECTORS:
        return [SiteTensor(role=_VECTOR, name=site.b, by_rank=True, shape=[site.d_out])]
    return site.tensors


def _shapes(site: Site, rank: int) -> dict[str, tuple[int, ...]]:
    """The shapes of an expert's tensors at a site, by role."""
    roles = _roles(site)
    if not roles:
        return {"A": (rank, site.d_in), "B": (site.d_out, rank)}
    return {each.role: (rank if each.by_rank else 1, *each.shape) for each in roles}


def _write(site: Site, position: int, expert: Mapping[str, Array], tensors: Mapping[str, Array]) -> None:
    """Write an expert into its ranks of one site."""
    begin = sum(site.ranks[:position])
    end = begin + site.ranks[position]
    ranks, lead = slice(begin, end), slice(site.a_start + begin, site.a_start + end)
    if roles := _roles(site):
        for each in roles:
            tensors[each.name][ranks if each.by_rank else slice(position, position + 1)] = expert[each.role]
        return
    A, B, a, b = expert["A"], expert["B"], tensors[site.a], tensors[site.b]
    if site.form == bundle_pb2.GEMM_FP32:
        a[:, lead], b[ranks] = A.T, B.T
    elif site.form == bundle_pb2.GEMM_INT8:
        q = quantise(A.T, B.T, tensors[f"{site.b}.scale"], 8)
        a[:, lead], tensors[f"{site.a}.scale"][lead], b[ranks] = q.a, q.a_scale, q.b
    elif site.form == bundle_pb2.GEMM_INT4:
        q = quantise(A.T, B.T, tensors[f"{site.b}.scale"][:, 0], 4, site.a_block)
        a[lead], tensors[f"{site.a}.scale"][lead] = pack4(q.a, site.a_block), q.a_scale.T
        whole = unpack4(b, sum(site.ranks))
        whole[ranks] = q.b
        b[:] = pack4(whole, site.b_block)
    elif site.form == bundle_pb2.ROWS_FP32:
        a[lead], b[ranks] = A, B.T
    else:
        a[lead], tensors[f"{site.a}.scale"][lead] = rows8(A)
        b[ranks], tensors[f"{site.b}.scale"][ranks] = rows8(np.ascontiguousarray(B.T))
