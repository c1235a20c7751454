"""Adapter folders: one loadable PEFT folder per expert, the router, the head and ``molora.json``.

    adapter/
      molora.json                      format, base model (id, revision, weight digest), the MoLoRA section, sites, and
                                       the digest of every file, itself included
      experts/e0/adapter_config.json   a standard PEFT LoRA (or IA3) folder
      experts/e0/adapter_model.safetensors
      experts/e0/expert.safetensors    in place of both: an expert that peft does not have, by wire name
      router.safetensors               routers, by wire name (if any)
      common.safetensors               tensors that are of all experts of a site, by wire name (if any)
      head.safetensors                 classification head, by wire name (if any)

An expert's saved LoRA has its scale absorbed in B (so ``lora_alpha`` equals the rank) and its frozen patches appended
along the rank axis: what plain peft loads is exactly what the expert computes at weight 1.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from transformers.pytorch_utils import Conv1D

from molehill import files, registry
from molehill.config import MoLoRA as MoLoRAConfig
from molehill.errors import AdapterError, MessageError
from molehill.molora.banks import Bank, PairBank, Peft
from molehill.molora.model import MoLoRAModel
from molehill.molora.peft_folder import (
    CONFIG,
    WEIGHTS,
    plain_lora,
    read_config,
    read_peft,
    read_tensors,
    write_peft,
)
from molehill.tensors import write as write_tensors
from molehill.wire.keys import NO_EXPERT, Key
from molehill.wire.tree import Array

_OWN = "expert.safetensors"
_OTHER = "Save the adapter anew: a part of it is of another."


class Manifest(BaseModel):
    """Contents of ``molora.json``.

    Attributes:
        format: Version of the folder's layout; 1 had another name for the parts of a router that stay with a client.
        base: Base model: id, revision and weight digest.
        task: What the model does, a method of the axis ``task``.
        labels: Class names, for tasks with classes.
        range: Least and greatest number of a regression, which the head's -1 and 1 stand for.
        pooling: Pooling of the head; empty where there is none.
        molora: The configuration the model was built from.
        ranks: Trained rank of every expert at every site; ranks beyond are frozen patches.
        personal: Policies of ``gate`` and ``head``: what clients keep is not in the folder, or not what it was.
        files: SHA-256 (hex) of every file of the folder, by its path there; of ``molora.json`` without its own. Empty
            in folders of older versions.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1, 2] = 2
    base: dict[str, str]
    task: str
    labels: tuple[str, ...] = ()
    range: tuple[float, float] | None = None
    pooling: str = ""
    molora: MoLoRAConfig
    ranks: dict[str, dict[str, int]]
    personal: dict[str, str] = {}
    files: dict[str, str] = {}


_NAME = "molora.json"


def save_adapter(folder: Path, model: MoLoRAModel, manifest: Manifest, place: str = "") -> None:
    """Write an adapter folder.

    Args:
        folder: Created when missing; every file is replaced at once, and then experts that this adapter has not go.
        model: The model.
        manifest: What to record; its ``ranks`` and ``files`` are filled in here.
        place: Where other libraries find the base: its folder; empty for a hub id, which the manifest has.
    """
    ranks: dict[str, dict[str, int]] = {}
    for expert in model.experts:
        out = folder / "experts" / expert
        out.mkdir(parents=True, exist_ok=True)
        ranks[expert] = {name: bank.ranks[index] for name, (bank, index) in model.banks_of(expert).items()}
        _save_expert(out, model, expert, manifest, place)
    for name, kind in _parts(model):
        write_tensors(folder / name, _by_name(model, kind), {})
    digests = {name: files.digest_of(folder / name) for name in _names(model)}
    made = manifest.model_copy(update={"ranks": ranks, "files": digests})
    digests[_NAME] = _own_digest(json.loads(made.model_dump_json()))
    files.write(folder / _NAME, f"{made.model_dump_json(indent=2)}\n".encode())
    for path in (folder / "experts").iterdir():
        if path.name not in model.experts:
            shutil.rmtree(path)


def _names(model: MoLoRAModel) -> list[str]:
    """Paths in the folder of all files of an adapter beside its description."""
    experts = [
        f"experts/{expert}/{name}"
        for expert in model.experts
        for name in ((_OWN,) if _method(model, expert) is None else (CONFIG, WEIGHTS))
    ]
    return [*experts, *(name for name, _ in _parts(model))]


def _method(model: MoLoRAModel, expert: str) -> Peft | None:
    """What peft calls an expert; None where it has no such thing."""
    methods = {model.sites[name].peft for name in model.banks_of(expert)}
    return methods.pop() if len(methods) == 1 else None


def _own_digest(said: dict[str, Any]) -> str:
    """SHA-256 (hex) of ``molora.json`` without what it says of itself."""
    others = {name: digest for name, digest in said["files"].items() if name != _NAME}
    return hashlib.sha256(json.dumps({**said, "files": others}, sort_keys=True).encode()).hexdigest()


def _require_whole(folder: Path, names: Iterable[str], digests: Mapping[str, str]) -> None:
    for name in names:
        if digests and files.digest_of(folder / name) != digests.get(name):
            raise _damaged(folder / name)


def _damaged(path: Path) -> AdapterError:
    what = "the file was damaged: it does not have the digest that molora.json has of it"
    return AdapterError(what, where=str(path), mend="Restore it, or go on with its run, which writes it again.")


def read_manifest(folder: Path) -> Manifest:
    """Read ``molora.json``.

    Raises:
        AdapterError: It is missing, damaged or not what this version writes.
    """
    path = folder / _NAME
    try:
        text = path.read_text(encoding="utf-8")
        made = Manifest.model_validate_json(text)
    except OSError as error:
        raise AdapterError(f"no adapter here: {error.strerror}", where=str(path)) from None
    except (ValidationError, UnicodeDecodeError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": "not UTF-8 text"}
        if first["loc"] == ("format",):
            what, mend = f"its format is {first['input']!r}, not 1 or 2", "Read it with the Molehill that wrote it."
            raise AdapterError(what, where=str(path), mend=mend) from None
        raise AdapterError(f"not a valid adapter description: {first['msg']}", where=str(path)) from None
    if made.files and made.files.get(_NAME) != _own_digest(json.loads(text)):
        raise _damaged(path)
    return made


def load_adapter(
    folder: Path, model: MoLoRAModel, *, base_digest: str, weights_digest: Callable[[], str] | None = None
) -> None:
    """Load an adapter folder into a model that was built from its manifest.

    Args:
        folder: The adapter.
        model: What it is loaded into.
        base_digest: Of the model's base.
        weights_digest: Gives the digest of that base without its settings, by which folders of format 1 know it; None
            refuses those that do.

    Raises:
        AdapterError: A file is missing or damaged, the adapter belongs to another base, or shapes differ.
    """
    manifest = read_manifest(folder)
    said = manifest.base.get("digest")
    if said != base_digest and (manifest.format != 1 or weights_digest is None or said != weights_digest()):
        raise AdapterError(
            f"adapter was trained on {manifest.base.get('id')} with weight digest "
            f"{manifest.base.get('digest', '')[:12]}, this base has {base_digest[:12]}",
            where=str(folder),
            mend="Load the base model named in molora.json.",
        )
    values: dict[Key, Array] = {}
    patches: dict[tuple[str, str], tuple[Array, Array]] = {}
    for expert in model.experts:
        where = model.banks_of(expert)
        for name, tensors in _of_expert(folder, where, expert).items():
            bank, _ = where[name]
            if isinstance(bank, PairBank):
                rank = manifest.ranks.get(expert, {}).get(name, len(tensors["A"]))
                if len(tensors["A"]) > rank:
                    patches[name, expert] = (tensors["A"][rank:], tensors["B"][:, rank:])
                tensors |= {"A": tensors["A"][:rank], "B": tensors["B"][:, :rank]}
            values |= {Key(name, expert, role): value for role, value in tensors.items()}
    for part, _ in _parts(model):
        values |= {_renamed(key, model): value for key, value in _by_key(folder / part).items()}
    missing = [k.name for k in model.layout if k not in values and not k.residual]
    if missing:
        raise AdapterError(f"adapter lacks {missing[0]} and {len(missing) - 1} more tensors", where=str(folder))
    model.load(values)
    model.set_patches(patches)
    _require_whole(folder, _names(model), manifest.files)  # last: what does not fit together says more than a digest


def describe_peft(folder: Path) -> Manifest:
    """The description of a PEFT folder as an adapter with one expert, for `load_peft`.

    Raises:
        AdapterError: It cannot be one exactly, or is for another task than text generation.
    """
    said, factors = read_config(folder), read_peft(folder)
    where = str(folder / CONFIG)
    if said.task_type not in {None, "CAUSAL_LM"}:
        raise AdapterError(
            f"an adapter for the task {said.task_type} has no head that could be taken along",
            where=where,
            mend="Only those of causal language models stand alone; of a run, give the folder that has molora.json.",
        )
    if not all("A" in tensors for tensors in factors.values()):
        raise AdapterError(
            f"an adapter of peft type {said.peft_type} cannot stand alone", where=where, mend="Give a LoRA."
        )
    base = {"id": said.base_model_name_or_path or "", "revision": said.revision or "", "digest": ""}
    try:
        molora = MoLoRAConfig(**{**registry.build("preset", "lora"), **plain_lora(factors)})
    except ValidationError as error:
        what = f"not an adapter: {error.errors()[0]['msg']}"
        raise AdapterError(what, where=where, mend="Save it anew with peft.") from None
    return Manifest(base=base, task="causal-lm", molora=molora, ranks={})


def load_peft(folder: Path, model: MoLoRAModel) -> None:
    """Load a PEFT folder into a model that was built from `describe_peft`.

    Raises:
        AdapterError: Its modules or shapes are not those of the model.
    """
    (expert,) = model.experts
    values: dict[Key, Array] = {}
    for site, tensors in read_peft(folder).items():
        if site not in model.sites:
            what = f"the base has no linear module {site} in its layers"
            raise AdapterError(what, where=str(folder), mend="Give the base that the adapter was made for.")
        values |= {Key(site, expert, role): value for role, value in tensors.items()}
    model.load(values)


def _parts(model: MoLoRAModel) -> list[tuple[str, str]]:
    """Files beside the experts, with the kind of tensor each holds; a plain LoRA has no router."""
    routed = any(key.kind == "gate" and not key.residual for key in model.layout)
    parts = [("router.safetensors", "gate")] if routed else []
    parts += [("common.safetensors", "dense")] if any(site.bank.common for site in model.sites.values()) else []
    return parts + ([("head.safetensors", "head")] if model.head is not None else [])


def _by_name(model: MoLoRAModel, kind: str) -> dict[str, Array]:
    """Shared tensors of one kind by wire name; personal residuals are not part of an adapter."""
    tree = model.tree(lambda key: key.kind == kind and key.expert == NO_EXPERT and not key.residual)
    return {key.name: np.ascontiguousarray(value) for key, value in tree.items()}


def _by_key(path: Path) -> dict[Key, Array]:
    """The tensors of a file whose names are those of the wire."""
    try:
        return {Key.parse(name): value for name, value in read_tensors(path).items()}
    except MessageError as error:
        raise AdapterError(error.what, where=str(path), mend=_OTHER) from None


def _renamed(key: Key, model: MoLoRAModel) -> Key:
    """The name that a tensor of a folder of format 1 has now."""
    own = key._replace(role=key.role.replace("gate.", "gate.own.", 1))
    return own if key not in model.layout and own in model.layout else key


def _read_expert(folder: Path) -> dict[str, dict[str, Array]]:
    """An expert's tensors by site and role."""
    if not (folder / _OWN).is_file():
        return read_peft(folder)
    found: dict[str, dict[str, Array]] = {}
    for key, value in _by_key(folder / _OWN).items():
        if key.expert != folder.name:
            what = f"{key.name} is of another expert than {folder.name}"
            raise AdapterError(what, where=str(folder / _OWN), mend=_OTHER)
        found.setdefault(key.site, {})[key.role] = value
    return found


def _of_expert(folder: Path, where: Mapping[str, tuple[Bank, int]], expert: str) -> dict[str, dict[str, Array]]:
    """An expert's tensors, which are those that its banks want of it."""
    found = _read_expert(folder / "experts" / expert)
    for name, (bank, index) in where.items():
        if name not in found:
            raise AdapterError(f"expert {expert} has no tensors for {name}", where=str(folder), mend=_OTHER)
        wanted = {part.role for part in bank.parts() if part.expert == index}
        if found[name].keys() != wanted:
            has, needs = (", ".join(sorted(roles)) for roles in (found[name], wanted))
            what = f"expert {expert} at {name} has {has}, its kind has {needs}"
            raise AdapterError(what, where=str(folder), mend=_OTHER)
    strange = found.keys() - where.keys()
    if strange:
        what = f"expert {expert} has tensors for {min(strange)}, which is no site of it"
        raise AdapterError(what, where=str(folder), mend=_OTHER)
    return found


def _save_expert(out: Path, model: MoLoRAModel, expert: str, manifest: Manifest, place: str) -> None:
    tree = model.tree(lambda key: key.expert == expert)
    found: dict[str, dict[str, Array]] = {}
    where = model.banks_of(expert)
    for key, value in tree.items():
        found.setdefault(key.site, {})[key.role] = value
    for name, (bank, index) in where.items():
        if isinstance(bank, PairBank):
            A, B = (each.numpy() for each in bank.patches(index))
            tensors = found[name]
            found[name] = {"A": np.concatenate([tensors["A"], A]), "B": np.concatenate([tensors["B"], B], axis=1)}
    method = _method(model, expert)
    if method is None:
        own = {Key(site, expert, role).name: np.ascontiguousarray(value)
               for site, tensors in found.items() for role, value in tensors.items()}  # fmt: skip
        write_tensors(out / _OWN, own, {})
    else:
        base = (place or manifest.base["id"], None if place else manifest.base.get("revision") or None)
        write_peft(out, method, found, base, conv=any(isinstance(model.sites[name].base, Conv1D) for name in where),
                   task="CAUSAL_LM" if model.head is None else "FEATURE_EXTRACTION")  # fmt: skip
    for name in [CONFIG, WEIGHTS] if method is None else [_OWN]:
        (out / name).unlink(missing_ok=True)
