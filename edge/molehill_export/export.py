"""From a finished run to a bundle folder."""

from __future__ import annotations

import hashlib
import math
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from molehill import __version__, files
from molehill.errors import ConfigError, DeployError, ModelError
from molehill.molora.banks import PairBank
from molehill.molora.model import MoLoRAModel
from molehill.molora.unwrap import unwrapped
from molehill.tasks.devices import window
from molehill.tasks.kind import kind_of
from molehill.wire.keys import NO_EXPERT, Key
from molehill_edge import archive, gates, tensors
from molehill_edge import manifest as manifests
from molehill_edge.manifest import BASE, EXPERTS, FORMAT, GATE, GRAPH, NAME, layout_digest
from molehill_edge.view import DEFAULT
from molehill_export import companions
from molehill_export import parity as parity_of
from molehill_export.base import cache_shape, classifier, decoder, has_shared_buffer
from molehill_export.base_quantise import BLOCK, Scheme, quantise_base
from molehill_export.graph import PAGE, External, Graph, write_weights
from molehill_export.head import cut_head
from molehill_export.insertion import Inserted
from molehill_export.molora import choose_slots, gate_values, insert
from molehill_export.routers import effective
from molehill_export.rows import labelled
from molehill_export.stacks import expert_tensors, stacks
from molehill_protos.v1 import bundle_pb2 as pb
from molehill_simulation.source import CLIENT, GLOBAL, Source, finished

_OLDEST_RUNTIME = "1.24"  # golden outputs were compared from there on
_ROWS = 400  # labelled rows behind an accuracy
_HEADER = 512  # bytes that a tensor has in the header of its file, at most
_SMALL = 4 << 20  # bytes: the manifest, which may have 2 MiB, and configurations


@dataclass(frozen=True)
class Options:
    """What of a run goes into a bundle, and how.

    Attributes:
        gates: Clients, or ``global``; the first is the default gate.
        scheme: Bits of base and experts.
        block: Weights of the base that share a scale in 4 bits.
        experts: Ids of the experts to take; all when None.
        spare: Empty slots for experts that a device may add.
        id: Name of the bundle; that of the run when empty.
        version: Of the bundle.
        expires: Seconds since 1970 from when on it is refused; 0 for never.
        force: Write it also when it differs too much from the original.
        rows: Labelled rows for the accuracies; those of the run when None.
        expert_files: Folder for a file of every expert as well, see `export_experts`; none when None.
        router_ranks: Whether devices may choose experts by their places among a router's logits, as some strategies do.
    """

    gates: tuple[str, ...] = (GLOBAL,)
    scheme: Scheme = "int8"
    block: int = BLOCK
    experts: tuple[str, ...] | None = None
    spare: int = 0
    id: str = ""
    version: int = 1
    expires: int = 0
    force: bool = False
    rows: Path | None = None
    expert_files: Path | None = None
    router_ranks: bool = False

    @property
    def blocks(self) -> int:
        """Weights of a block; 0 where there are none."""
        return self.block if self.scheme == "int4" else 0


def export(
    source: Source, out: Path, options: Options | None = None, *, progress: Callable[[str], None] = lambda _: None
) -> pb.Manifest:
    """Write a bundle, whole or not at all.

    Args:
        source: What to export.
        out: A folder, which must not exist, or be empty; or, with the suffix .molehill, one file of it all.
        options: What goes in.
        progress: Told what is done next.

    Returns:
        The bundle's manifest.

    Raises:
        BundleError: The bundle differs too much from the original.
        ConfigError: An option does not fit the run.
        DeployError: There is no room for it.
        ModelError: The base or this kind of experts cannot be exported.
        OSError: The disk is full all the same, or fails.
    """
    options = options or Options()
    _check(source, out, options)
    out.parent.mkdir(parents=True, exist_ok=True)
    with files.placed(out), tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        folder = Path(scratch) / "bundle"
        folder.mkdir()
        manifest = _write(source, folder, out, options, progress)
        if out.suffix == archive.SUFFIX:
            progress("Packing")
            archive.pack(folder, out)
        else:
            if out.exists():
                out.rmdir()
            folder.rename(out)
    if options.expert_files is not None:
        export_experts(source, options.expert_files, options.gates[0])
    return manifest


def export_experts(source: Source, folder: Path, gate: str = GLOBAL) -> list[Path]:
    """Write every routed expert as a file that a device can add to a bundle of the same base and shape.

    Args:
        source: The run.
        folder: Created when missing.
        gate: Whose router the rows for the experts are from.

    Raises:
        DeployError: There is no room for them.
        ModelError: They go with what is of all experts of their run.
        OSError: The disk is full all the same, or fails.
    """
    for name, site in source.model.sites.items():
        if site.bank.common:
            raise ModelError(
                f"{site.bank.noun} experts go with tensors of their run that are of all experts, so that none can be "
                "added to another bundle",
                where=name, mend="Export a bundle of the run.",
            )  # fmt: skip
    _require_room((folder, _size_of_experts(source)))
    folder.mkdir(parents=True, exist_ok=True)
    with files.placed(folder), tempfile.TemporaryDirectory(dir=folder, prefix=".experts.") as scratch:
        written = []
        for expert in source.model.experts:
            if not expert.startswith("shared"):
                path = Path(scratch) / f"{expert}.expert.safetensors"
                about = {"format": "1", "kind": "expert", "id": expert, "base": source.base.digest}
                tensors.write(path, _expert(source, expert, gate), about)
                written.append(path)
        return [path.replace(folder / path.name) for path in written]  # all, or none of them


def _size_of_experts(source: Source) -> int:
    """Bytes that the files of all routed experts have at most."""
    model = source.model
    own = model.layout.where(lambda key: key.site != "head" and not key.expert.startswith("shared"))
    patches = sum(value.numel() for site in model.sites.values() for value in site.bank.buffers())
    return 4 * (own.size + patches) + _HEADER * len(own)


def _require_room(*needed: tuple[Path, int]) -> None:
    mend = "Make room, or write to another disk."
    files.require_room("the export", *needed, kind=DeployError, mend=mend)


def _check(source: Source, out: Path, options: Options) -> None:
    if out.exists() and (out.suffix == archive.SUFFIX or not out.is_dir() or any(out.iterdir())):
        raise ConfigError("there is something already", where=str(out), mend="Choose another --out.")
    _require_known(source)
    routers = [group.router for group in source.model.routers.values()]
    if kind_of(source.task).writes and not all(router.selector.causal for router in routers):
        name = source.adapter.molora.selector.name
        raise ConfigError(
            f"selector {name!r} looks at later tokens, which do not exist while a text is written",
            where="molora.selector", mend="Export a classifier, or train with another selector.",
        )  # fmt: skip
    for site in source.model.sites.values():
        if not isinstance(site.bank, PairBank):
            stacks(site.bank)
    if len(set(options.gates)) != len(options.gates):
        raise ConfigError("a gate is named twice", where="--gate")
    _require_gates(source, options)
    if options.block != BLOCK and not options.blocks:
        raise ConfigError(
            f"only int4 has blocks, and this is {options.scheme}", where="--block", mend="Add --quantize int4."
        )
    if options.id and not manifests.valid_id(options.id):
        mend = "Use letters, digits, dot, dash and underscore."
        raise ConfigError(f"{options.id!r} cannot name a bundle", where="--id", mend=mend)
    if options.expires and options.expires <= time.time():
        raise ConfigError("the bundle would have expired already", where="--expires")


def _require_gates(source: Source, options: Options) -> None:
    for gate in options.gates:
        with source.gate(gate):
            pass  # it is there
        if len(options.gates) > 1 and any(site.gain is not None for site in source.model.sites.values()):
            raise ConfigError(
                "owners of this run adapt sites of their own, and a bundle has those of one",
                where="--gate", mend="Export each by itself.",
            )  # fmt: skip
        if len(options.gates) > 1 and source.replaced(gate):
            raise ConfigError(
                f"{gate} has experts of its own, and a bundle has one of each", where=f"--gate {gate}",
                mend="Export it by itself.",
            )  # fmt: skip
        if source.k(gate) != source.k(options.gates[0]):
            raise ConfigError(
                f"{gate} has another number of experts per token than {options.gates[0]}, and a bundle has one",
                where=f"--gate {gate}", mend="Export it by itself.",
            )  # fmt: skip


def _require_known(source: Source) -> None:
    if kind_of(source.task).bundle not in manifests.KINDS:
        mend = f"Devices run {', '.join(manifests.KINDS)}."
        raise ConfigError(f"no device can run a {source.task.kind} yet", where="task.kind", mend=mend)


def _write(source: Source, folder: Path, out: Path, options: Options, progress: Callable[[str], None]) -> pb.Manifest:
    causal = source.model.head is None
    progress("Tracing the base")
    graph = traced(source).copy()
    if options.scheme != "fp32":
        progress(f"Quantising the base to {options.scheme}")
    quantise_base(graph, options.scheme, "logits" if causal else "", options.block)
    progress("Adding experts and routers")
    slots = choose_slots(source.model, options.experts, options.spare)
    manifest = pb.Manifest(
        format=FORMAT, id=options.id or _plain_name(source.name), version=options.version, expires=options.expires,
        base=pb.Base(id=source.base.id, revision=source.base.revision or "", digest=source.base.digest), slots=slots,
        quantisation=pb.Quantisation(
            base=options.scheme, experts=options.scheme, block=options.blocks,
            head=("int8" if options.blocks else options.scheme) if causal else "fp32",
        ),
        task=_task(source, graph),
    )  # fmt: skip
    with source.gate(options.gates[0]) as model:
        inserted = insert(
            graph, model, source.adapter.molora.scorer, slots, options.scheme, by_places=options.router_ranks
        )
        graph.drop_unused()
        if causal:
            cut_head(graph)
        manifest.sites.extend(inserted.sites)
        if inserted.sites and all(site.form == pb.TENSORS for site in inserted.sites):
            manifest.quantisation.experts = "fp32"  # only low-rank ones are rounded
        manifest.routers.extend(inserted.routers)
        manifest.gate.extend(inserted.gate)
        manifest.layout = layout_digest(manifest)
        size = sum(value.nbytes for value in graph.tensors.values())
        _require_room(
            (out.parent, _size(source, graph, inserted, options) * (2 if out.suffix == archive.SUFFIX else 1)),
            *([] if options.expert_files is None else [(options.expert_files, _size_of_experts(source))]),
        )
        progress(f"Writing {size / 1e6:,.0f} MB to {folder.parent}, which goes when the bundle is whole")
        _files(graph, model, inserted, manifest, options.gates[0], folder)
    for gate in options.gates[1:]:
        (folder / "gates").mkdir(exist_ok=True)
        with source.gate(gate) as model:
            tensors.write(
                folder / "gates" / f"{gate_file(gate)}.safetensors",
                gate_values(model, inserted),
                gates.metadata(gate, manifest),
            )
    companions.write(source, graph, manifest, folder)
    graph.tensors.clear()  # they are written
    inserted.experts.clear()
    progress("Comparing with the original")
    texts = parity_of.calibration(source.tokenizer, manifest.task.max_length)
    with source.gate(options.gates[0]) as model, _only(model, slots):
        rows = labelled(source, options.gates[0], options.rows, _ROWS)
        original = parity_of.originals(model, texts, rows, manifests.reading(manifest.task))
    figures, golden = parity_of.compare(
        original, parity_of.Runner(folder / GRAPH, manifest), manifests.about(manifest.task)
    )
    parity_of.require(figures, options.scheme, force=options.force)
    manifest.parity.CopyFrom(figures)
    manifest.golden.extend(golden)
    domains = sorted(domain for domain in graph.opsets if domain)
    manifest.runtime.CopyFrom(pb.Runtime(onnxruntime=_OLDEST_RUNTIME, opset=graph.opsets[""], domains=domains))
    _provenance(source, manifest, options.gates[0])
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            manifest.files.append(pb.File(path=name, length=path.stat().st_size, sha256=_sha256(path)))
    data = manifest.SerializeToString(deterministic=True)
    manifests.read(data, str(folder / NAME))  # what a device will say of it
    (folder / NAME).write_bytes(data)
    return manifest


def _size(source: Source, graph: Graph, inserted: Inserted, options: Options) -> int:
    """Bytes of a bundle at most."""
    weights = sum(value.nbytes + PAGE for value in graph.tensors.values())
    further = (len(options.gates) - 1) * sum(4 * math.prod(tensor.shape) + _HEADER for tensor in inserted.gate)
    beside = len(source.tokenizer.backend_tokenizer.to_str().encode()) + sum(node.ByteSize() for node in graph.nodes)
    return weights + further + beside + _SMALL


def traced(source: Source) -> Graph:
    """The base of a source as a graph, made once."""
    if "graph" not in source.made:
        names, head = source.model.marks, source.model.head
        with unwrapped(source.model) as base:
            source.made["graph"] = (
                decoder(base, source.stored, names) if head is None else classifier(base, head, names)
            )
    graph: Graph = source.made["graph"]
    return graph


def _task(source: Source, graph: Graph) -> pb.Task:
    settings = source.text
    limit = source.limit
    if source.model.head is None:
        limit = min(limit, window(settings) or limit)  # within its window, attention reaches all
    task = pb.Task(kind=kind_of(source.task).bundle, max_length=limit)
    if source.model.head is not None:
        task.labels.extend(source.adapter.labels)
        task.range.extend(source.adapter.range or ())
        task.pooling = source.model.head.pooling
        return task
    tokenizer = source.tokenizer
    keys = [value for value in graph.inputs if value.name.endswith(".key")]
    _, heads, size = cache_shape(cast("PreTrainedModel", source.model.base))
    template = source.template()
    task.generation.CopyFrom(
        pb.Generation(
            eos=source.ends(), pad=tokenizer.pad_token_id or 0,
            template=bool(template), chat_template=template,
            bos_token=tokenizer.bos_token or "", eos_token=tokenizer.eos_token or "", layers=len(keys), heads=heads,
            head_dim=size, vocabulary=settings.vocab_size, shared_buffer=has_shared_buffer(graph),
        )
    )  # fmt: skip
    return task


def _files(
    graph: Graph, model: MoLoRAModel, inserted: Inserted, manifest: pb.Manifest, gate: str, folder: Path
) -> None:
    """Weights in three files, and the graph that points into them."""
    values = gate_values(model, inserted)
    graph.tensors.update(values)
    origin = {"format": "1", "base": manifest.base.digest}
    stored = {
        EXPERTS: (inserted.experts, {**origin, "kind": "experts"}),
        GATE: (values, gates.metadata(gate, manifest)),
    }
    external: dict[str, External] = {}
    for name, (contents, metadata) in stored.items():
        offsets = tensors.write(folder / name, contents, metadata)
        external |= {key: External(name, offset, contents[key].nbytes) for key, offset in offsets.items()}
    # constants depend on the number of slots and stay in the graph, so that bundles of one base share its file
    rest = {k: v for k, v in graph.tensors.items() if k not in external and not k.startswith("molora/const/")}
    external |= write_weights(rest, folder / BASE)
    (folder / GRAPH).write_bytes(graph.model(external).SerializeToString(deterministic=True))


def gate_file(gate: str) -> str:
    """Name of the file of a gate in a bundle; a gate with letters that other systems may lack gets a digest.

    A device finds such a gate by its own name all the same, which the file has in it.
    """
    name = gate.removeprefix(CLIENT)
    if gate == GLOBAL or (manifests.valid_id(name) and name not in {GLOBAL, DEFAULT}):
        return name
    letters = "".join(char for char in unicodedata.normalize("NFKD", name) if not unicodedata.combining(char))
    plain = _plain_name(letters, "gate").strip("-")[:40]
    return f"{plain}-{hashlib.sha256(gate.encode()).hexdigest()[:8]}"


@contextmanager
def _only(model: MoLoRAModel, slots: Sequence[pb.Slot]) -> Iterator[None]:
    """Mask the experts that are not in a bundle."""
    wanted = {slot.id for slot in slots}
    groups = list(model.routers.values())
    try:
        for group in groups:
            site = model.site_of(group)
            ids = model.expert_ids(site)[site.shared :]
            if not set(ids) <= wanted:
                group.overrides.expert_mask = torch.tensor([expert in wanted for expert in ids])
        yield
    finally:
        for group in groups:
            group.overrides.expert_mask = None


def _provenance(source: Source, manifest: pb.Manifest, gate: str) -> None:
    tools = ", ".join(f"{name} {installed(name)}" for name in ("torch", "onnxruntime-genai"))
    about = pb.Provenance(gate=gate, exporter=f"molehill {__version__}, {tools}")
    if source.run is not None and source.out is not None:
        manifest.created, about.rounds, about.epsilon = finished(source.out)
        about.run, about.config_digest = source.run.run.name, source.run.digest
        about.federation = str(source.run.federation.preset or "")
    manifest.provenance.CopyFrom(about)


def _expert(source: Source, expert: str, gate: str) -> dict[str, NDArray[Any]]:
    """An expert's tensors at every site, and its row of every router."""
    model = source.model
    with source.gate(gate) as shared:
        values = dict(expert_tensors(model, expert))
        for group in shared.routers.values():
            first = shared.site_of(group)
            ids = shared.expert_ids(first)[first.shared :]
            if expert not in ids:
                continue
            roles = group.router.roles()
            for part, axis in group.router.scorer.axes().items():
                if axis >= 0:
                    row = np.take(effective(group.router, part), ids.index(expert), axis)
                    values[Key(group.site.name, NO_EXPERT, roles[part]).name] = np.array(row)  # a number stays one
    return values


def _plain_name(name: str, otherwise: str = "bundle") -> str:
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in name).lstrip("._-")
    return plain if manifests.valid_id(plain) else otherwise


def _sha256(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
