"""The manifest of a bundle: reading it, and what it must say before anything else of the bundle is opened."""

from __future__ import annotations

import errno
import functools
import hashlib
import math
import os
import re
import stat
import time
from collections.abc import Iterable, Sequence
from importlib import metadata
from io import BufferedReader
from pathlib import Path
from typing import TypeVar

from google.protobuf.message import DecodeError

from molehill.errors import BundleError
from molehill.outputs import READINGS, About, Reading
from molehill_protos.v1.bundle_pb2 import Form, Generation, Golden, Manifest, Site, Task

FORMAT = 1
NAME = "manifest.pb"
GRAPH, EXPERTS, GATE, TOKENIZER = "model.onnx", "experts.safetensors", "gate.safetensors", "tokenizer.json"
BASE = "base.bin"
GATES = "gates"  # folder of further gates
LOGITS_FROM = "logits_from"  # input of a causal LM's graph: the position of the first logits
KINDS = tuple(READINGS)
PRECISIONS = ("fp32", "int8", "int4")

# Far above what any real bundle needs, far below what would hurt the reader.
MAX_BYTES = 2 << 20  # of the manifest
MAX_TEMPLATE = 64 << 10  # characters of a chat template
MAX_FILES = 256
MAX_FILE = 64 << 30  # bytes
MAX_LENGTH = 1 << 30  # tokens; a tokenizer without a limit says as much
MAX_ENTRIES = 65_536  # slots, sites, routers, gate tensors, labels; each
MAX_SIZE = 1 << 28  # one axis of a tensor
MAX_ELEMENTS = 1 << 31  # of a gate tensor
MAX_GOLDEN = 64

_T = TypeVar("_T")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_HEX = re.compile(r"[0-9a-f]{64}")
_RELEASE = re.compile(r"\d{1,6}(\.\d{1,6}){0,3}")
_FIXED = frozenset({GRAPH, BASE, EXPERTS, GATE, TOKENIZER, "genai_config.json", "tokenizer_config.json"})
# The runtime is published under several names, one for every kind of accelerator.
_RUNTIMES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino", "onnxruntime-qnn")
_NEWER = "Update molehill on this machine."
_AGAIN = "Get the bundle again from where it came from."


def layout_digest(manifest: Manifest) -> bytes:
    """SHA-256 over all that a gate or an expert must fit: base, slots, sites, routers and gate tensors."""
    part = Manifest(base=manifest.base, sites=manifest.sites, routers=manifest.routers, gate=manifest.gate)
    part.slots.extend(manifest.slots)
    for slot in part.slots:
        slot.id = ""  # who sits in a slot may change
    return hashlib.sha256(part.SerializeToString(deterministic=True)).digest()


def read(data: bytes, where: str, *, now: float | None = None) -> Manifest:
    """Read a manifest and refuse one that is damaged, too new, expired or implausible.

    Args:
        data: The bytes of ``manifest.pb``.
        where: The file they come from, for the message.
        now: Seconds since 1970; the clock's when None.

    Raises:
        BundleError: It cannot be used, with the first reason found.
    """
    if len(data) > MAX_BYTES:
        raise BundleError(f"the manifest has more than {MAX_BYTES >> 20} MiB", where=where, mend=_AGAIN)
    manifest = Manifest()
    try:
        manifest.ParseFromString(data)
    except DecodeError:
        raise BundleError("the manifest is damaged, or not a manifest at all", where=where, mend=_AGAIN) from None
    if manifest.format > FORMAT:
        what = f"the bundle has format {manifest.format}, and this version of molehill reads up to {FORMAT}"
        raise BundleError(what, where=where, mend=_NEWER)
    try:
        _check_head(manifest)
        _check_files(manifest)
        _check_task(manifest.task)
        _check_quantisation(manifest)
        _check_slots(manifest)
        _check_gate(manifest)
        for golden in _at_most(MAX_GOLDEN, manifest.golden, "golden inputs"):
            _check_golden(golden, manifest.task)
    except _ImplausibleError as error:
        raise BundleError(f"the manifest is not plausible: {error}", where=where, mend=_AGAIN) from None
    if manifest.layout != layout_digest(manifest):
        what = "the layout digest of the manifest is not that of its slots, sites, routers and gate"
        raise BundleError(what, where=where, mend=_AGAIN)
    if manifest.expires and manifest.expires <= (time.time() if now is None else now):
        day = time.strftime("%Y-%m-%d", time.gmtime(min(manifest.expires, 253_402_300_799)))
        raise BundleError(f"the bundle expired on {day}", where=where, mend="Get a newer version of it.")
    _check_runtime(manifest.runtime.onnxruntime, where)
    return manifest


def load(folder: Path, *, now: float | None = None) -> tuple[Manifest, bytes]:
    """The manifest of a bundle's folder, read as `read` does, and its bytes.

    Args:
        folder: The bundle.
        now: Seconds since 1970; the clock's when None.

    Raises:
        BundleError: There is none, or it cannot be used.
    """
    path = folder / NAME
    try:
        with open_regular(path) as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        what = "there is no bundle here" if isinstance(error, FileNotFoundError) else "cannot read the manifest"
        raise BundleError(what, where=str(path), mend="Name a bundle's folder or its .molehill archive.") from None
    return read(data, str(path), now=now), data


def check_files(folder: Path, manifest: Manifest) -> None:
    """Refuse a folder whose files are not those of its manifest; what else lies there is not touched.

    Args:
        folder: The bundle.
        manifest: What `read` returned.

    Raises:
        BundleError: A file is missing, a link, of another length or of another content.
    """
    for file in manifest.files:
        path = folder / file.path
        try:
            # The bundle's own folder may be reached by a link; one inside could lead elsewhere.
            if "/" in file.path and path.parent.is_symlink():
                raise BundleError("a folder of the bundle is a link", where=str(path.parent), mend=_AGAIN)
            with open_regular(path) as stream:
                length = os.fstat(stream.fileno()).st_size
                if length != file.length:
                    what = f"the file has {length} bytes, and the manifest says {file.length}"
                    raise BundleError(what, where=str(path), mend=_AGAIN)
                digest = hashlib.file_digest(stream, "sha256").digest()
        except OSError as error:
            raise BundleError(f"cannot read a file of the bundle: {error.strerror}", where=str(path)) from None
        if digest != file.sha256:
            what = "the file is not the one of the manifest: its SHA-256 differs"
            raise BundleError(what, where=str(path), mend=_AGAIN)


def open_regular(path: Path) -> BufferedReader:
    """Open a file for reading, and neither a link nor a device or a pipe.

    Raises:
        OSError: It is one of these, or cannot be read.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    file = os.fdopen(handle, "rb")
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


def has_digest(path: Path, length: int, sha256: bytes) -> bool:
    """Whether a path is a regular file of this length, in bytes, and this SHA-256."""
    try:
        with open_regular(path) as stream:
            right = os.fstat(stream.fileno()).st_size == length
            return right and hashlib.file_digest(stream, "sha256").digest() == sha256
    except OSError:
        return False


def known_path(path: str) -> bool:
    """Whether a bundle may hold a file of this path: names are fixed, so that none can lead outside."""
    folder, _, name = path.rpartition("/")
    if not folder:
        return path in _FIXED
    stem, _, suffix = name.rpartition(".")
    return folder == GATES and suffix == "safetensors" and valid_id(stem)


def valid_id(text: str) -> bool:
    """Whether a text may be the id of a bundle: letters, digits, dot, dash, underscore; no dot or dash first."""
    return _ID.fullmatch(text) is not None


def reading(task: Task) -> Reading:
    """How the numbers that a bundle says are read."""
    return READINGS[task.kind]


def about(task: Task) -> About:
    """What they are about."""
    return About(tuple(task.labels), (task.range[0], task.range[1]) if task.range else None)


def outputs(task: Task) -> int:
    """How many a bundle says of a text, or of a token of it."""
    how = reading(task)
    return task.generation.vocabulary if how.writes else how.outputs(about(task))


class _ImplausibleError(Exception):
    """What is wrong, as the end of a sentence."""


def _must(condition: bool, what: str) -> None:
    if not condition:
        raise _ImplausibleError(what)


def _at_most(limit: int, items: Sequence[_T], what: str) -> Sequence[_T]:
    _must(len(items) <= limit, f"it has {len(items)} {what}, more than {limit}")
    return items


def _distinct(items: Iterable[object], what: str) -> None:
    seen = list(items)
    _must(len(set(seen)) == len(seen), f"{what} twice")


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:80]}...")


def _check_head(manifest: Manifest) -> None:
    _must(manifest.format == FORMAT, f"format {manifest.format} does not exist")
    _must(valid_id(manifest.id), f"{_quoted(manifest.id)} cannot be the id of a bundle")
    _must(manifest.version >= 1, "it has no version")
    _must(manifest.created >= 0 and manifest.expires >= 0, "a date before 1970")
    _must(bool(manifest.base.id), "the base model has no id")
    _must(_HEX.fullmatch(manifest.base.digest) is not None, "the digest of the base model is not SHA-256")


def _check_files(manifest: Manifest) -> None:
    paths = [file.path for file in _at_most(MAX_FILES, manifest.files, "files")]
    for file in manifest.files:
        _must(known_path(file.path), f"{_quoted(file.path)} is not a file that a bundle may hold")
        _must(len(file.sha256) == 32, f"{file.path} has no SHA-256")
        _must(file.length <= MAX_FILE, f"{file.path} has more than {MAX_FILE >> 30} GiB")
    # A file system may take two spellings for one name.
    _distinct((path.casefold() for path in paths), "a file is listed")
    _must(paths == sorted(paths), "its files are not in order")
    required = {GRAPH, BASE, TOKENIZER}
    required |= {EXPERTS} if manifest.sites else set()
    required |= {GATE} if manifest.gate else set()
    missing = sorted(required - set(paths))
    _must(not missing, f"{', '.join(missing)} not listed")


def _check_task(task: Task) -> None:
    _must(task.kind in KINDS, f"{_quoted(task.kind)} is not a task")
    _must(1 <= task.max_length <= MAX_LENGTH, f"an input of {task.max_length} tokens")
    _must(len(task.range) in {0, 2} and all(map(math.isfinite, task.range)), "a range without two ends")
    _must(not task.range or task.range[0] < task.range[1], "a range without width")
    if not reading(task).writes:
        _distinct(_at_most(MAX_ENTRIES, task.labels, "labels"), "a label is listed")
        _must(outputs(task) >= 1, "it has no labels, or no range")
        ways = ("token",) if reading(task).by_token else ("mean", "cls", "last")
        _must(task.pooling in ways, f"{_quoted(task.pooling)} is not a way of pooling")
    else:
        _must(task.HasField("generation"), "it does not say how to generate")
        _check_generation(task.generation)


def _check_generation(generation: Generation) -> None:
    for name in ("layers", "heads", "head_dim", "vocabulary"):
        value = getattr(generation, name)
        _must(1 <= value <= 1 << 24, f"{value} {name.replace('_', ' ')}")
    _at_most(1024, generation.eos, "tokens that end an answer")
    for token in (generation.pad, *generation.eos):
        _must(0 <= token < generation.vocabulary, f"token {token} is not in its vocabulary")
    _must(len(generation.chat_template) <= MAX_TEMPLATE, f"a chat template of more than {MAX_TEMPLATE} characters")
    _must(bool(generation.chat_template) or not generation.template, "it has no chat template, and says it has")


def _check_quantisation(manifest: Manifest) -> None:
    quantisation = manifest.quantisation
    for name in ("base", "head", "experts"):
        value = getattr(quantisation, name)
        # Where nothing is written the head is as the base, and a bundle may have no experts.
        optional = (name == "head" and not reading(manifest.task).writes) or (name == "experts" and not manifest.sites)
        _must(value in PRECISIONS or (optional and not value), f"{_quoted(value)} is not a precision")
    if "int4" in (quantisation.base, quantisation.head):
        _must(_is_block(quantisation.block), f"{quantisation.block} weights sharing a scale")


def _is_block(size: int) -> bool:
    """Whether an operator for 4-bit weights takes blocks of this size."""
    return 16 <= size <= 4096 and size & (size - 1) == 0


def _check_slots(manifest: Manifest) -> None:
    slots = _at_most(MAX_ENTRIES, manifest.slots, "slots")
    _distinct((slot.id for slot in slots if slot.id), "an expert sits")
    for slot in slots:
        _must(not slot.id or valid_id(slot.id), f"{_quoted(slot.id)} cannot be the id of an expert")
    _distinct((site.name for site in _at_most(MAX_ENTRIES, manifest.sites, "sites")), "a site is listed")
    for site in manifest.sites:
        _check_site(site, len(slots))
    for router in _at_most(MAX_ENTRIES, manifest.routers, "routers"):
        _must(bool(router.name), "a router without a name")
        _check_indices(router.slots, len(slots), f"router {_quoted(router.name)}")


def _check_indices(indices: Sequence[int], count: int, owner: str) -> None:
    _must(bool(indices), f"{owner} has no slots")
    _must(max(indices) < count, f"{owner} has slot {max(indices)}, and there are {count}")
    _distinct(indices, f"{owner} has a slot")


def _check_site(site: Site, slots: int) -> None:
    owner = f"site {_quoted(site.name)}"
    _must(bool(site.name), "a site without a name")
    _check_indices(site.slots, slots, owner)
    _must(len(site.ranks) == len(site.slots), f"{owner} has {len(site.slots)} slots and {len(site.ranks)} ranks")
    _must(all(1 <= rank <= MAX_ENTRIES for rank in site.ranks), f"{owner} has an impossible rank")
    vectors, tensors = site.form == Form.VECTORS, site.form == Form.TENSORS
    _must(site.form in Form.values() and site.form != Form.FORM_UNSPECIFIED, f"{owner} has no known form")
    _must(1 <= site.d_out <= MAX_SIZE and (vectors or site.d_in >= 1), f"{owner} has no size")
    _must(tensors == bool(site.tensors), f"{owner} has not the tensors of its form")
    _distinct((each.role for each in _at_most(MAX_ENTRIES, site.tensors, "roles")), f"{owner} has a role")
    for each in site.tensors:
        shape = _at_most(8, each.shape, f"axes in {owner}")
        _must(bool(each.role) and bool(each.name), f"{owner} has a tensor without a name")
        _must(all(1 <= size <= MAX_SIZE for size in shape), f"{owner} has an impossible shape")
    _must(site.d_in <= MAX_SIZE, f"{owner} is too large")
    if tensors:
        return
    _must(bool(site.b) and vectors != bool(site.a), f"{owner} has not the tensors of its form")
    _must(not vectors or set(site.ranks) == {1}, f"{owner} has vectors of a rank other than 1")
    _must(site.a_start <= MAX_SIZE, f"{owner} begins too late")
    if site.form == Form.GEMM_INT4:
        _must(_is_block(site.a_block) and _is_block(site.b_block), f"{owner} has no block of 4-bit weights")


def _check_gate(manifest: Manifest) -> None:
    _distinct((t.name for t in _at_most(MAX_ENTRIES, manifest.gate, "gate tensors")), "a gate tensor is listed")
    for tensor in manifest.gate:
        owner = f"gate tensor {_quoted(tensor.name)}"
        _must(bool(tensor.name), "a gate tensor without a name")
        shape = _at_most(8, tensor.shape, f"axes in {owner}")
        _must(all(1 <= size <= MAX_SIZE for size in shape), f"{owner} has an impossible shape")
        _must(math.prod(shape) <= MAX_ELEMENTS, f"{owner} is too large")
        _must(-1 <= tensor.router < len(manifest.routers), f"{owner} belongs to router {tensor.router}")
        _must(-1 <= tensor.expert_axis < len(shape), f"{owner} has axis {tensor.expert_axis}")
        if tensor.expert_axis >= 0:
            _must(tensor.router >= 0, f"{owner} has experts and no router")
            experts = len(manifest.routers[tensor.router].slots)
            along = shape[tensor.expert_axis]
            _must(along == experts, f"{owner} is made for {along} experts, and its router has {experts}")


def _check_golden(golden: Golden, task: Task) -> None:
    _must(1 <= len(golden.input_ids) <= task.max_length, f"a golden input of {len(golden.input_ids)} tokens")
    _must(min(golden.input_ids) >= 0, "a golden input with a negative token")
    classes = outputs(task)
    _must(0 <= golden.best < classes, f"golden answer {golden.best} of {classes}")
    _must(1 <= len(golden.logits) <= classes, f"a golden answer of {len(golden.logits)} numbers")
    _must(all(map(math.isfinite, golden.logits)), "a golden answer that is not a number")


def _check_runtime(needed: str, where: str) -> None:
    """Refuse a bundle that needs a newer ONNX Runtime, without importing it."""
    if not _RELEASE.fullmatch(needed):
        what = f"the manifest is not plausible: {_quoted(needed)} is not a version of onnxruntime"
        raise BundleError(what, where=where, mend=_AGAIN)
    here = installed_runtime()
    if here is None:
        mend = "Run: pip install 'molehill[edge]'"
        raise BundleError("onnxruntime is not installed on this machine", where=where, mend=mend)
    if is_older(here, needed):
        what = f"the bundle needs onnxruntime {needed} or newer, and {here} is installed"
        raise BundleError(what, where=where, mend=f"Run: pip install 'onnxruntime>={needed}'")


def is_older(version: str, other: str) -> bool:
    """Whether a version, such as ``1.9.2``, comes before another."""
    return _release(version) < _release(other)


@functools.cache
def installed_runtime() -> str | None:
    """The version of the ONNX Runtime that is installed, under whichever of its names; None without one."""
    for name in _RUNTIMES:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _release(version: str) -> tuple[int, ...]:
    """The numbers at the front of a version, four of them."""
    found = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in found[0].split(".")] if found else []
    return tuple([*numbers, 0, 0, 0, 0][:4])
