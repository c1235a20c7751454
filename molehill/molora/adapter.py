"""Adapter folders: one loadable PEFT folder per expert, the router, the head and ``molora.json``.

    adapter/
      molora.json                      format, base model (id, revision, weight digest), the MoLoRA section, sites
      experts/e0/adapter_config.json   a standard PEFT LoRA (or IA3) folder
      experts/e0/adapter_model.safetensors
      router.safetensors               routers, by wire name (if any)
      head.safetensors                 classification head, by wire name (if any)

An expert's saved LoRA has its scale absorbed in B (so ``lora_alpha`` equals the rank) and its frozen patches appended
along the rank axis: what plain peft loads is exactly what the expert computes at weight 1.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from safetensors import SafetensorError
from safetensors.numpy import save_file
from safetensors.torch import load_file
from transformers.pytorch_utils import Conv1D

from molehill.config import MoLoRA as MoLoRAConfig
from molehill.errors import AdapterError, MessageError
from molehill.molora.experts.lora import LoRABank
from molehill.molora.layer import MoLoRALinear
from molehill.molora.model import MoLoRAModel
from molehill.wire.keys import Key
from molehill.wire.tree import Array

Factors: TypeAlias = tuple[Array, Array]  # A [r, d_in], B [d_out, r]

_PREFIX = "base_model.model."
_UNSUPPORTED = {"use_dora": "DoRA", "lora_bias": "LoRA biases", "megatron_config": "Megatron layers"}


class Manifest(BaseModel):
    """Contents of ``molora.json``.

    Attributes:
        format: Version of the folder's layout.
        base: Base model: id, revision and weight digest.
        task: What the model does: ``classification`` or ``causal-lm``.
        labels: Class names; empty for a causal LM.
        pooling: Pooling of the head; empty for a causal LM.
        molora: The configuration the model was built from.
        ranks: Trained rank of every expert at every site; ranks beyond are frozen patches.
        personal: Policies of ``gate`` and ``head``: what clients keep is not in the folder, or not what it was.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    base: dict[str, str]
    task: str
    labels: tuple[str, ...] = ()
    pooling: str = ""
    molora: MoLoRAConfig
    ranks: dict[str, dict[str, int]]
    personal: dict[str, str] = {}


class _PeftConfig(BaseModel):
    """What of an ``adapter_config.json`` decides what its tensors mean."""

    model_config = ConfigDict(extra="allow", frozen=True)

    peft_type: str
    lora_alpha: float = 8
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool = False

    @field_validator("alpha_pattern")
    @classmethod
    def _expressions(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for pattern in value or ():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"alpha_pattern {pattern!r}: {error}") from None
        return value

    def scale(self, site: str, rank: int) -> float:
        """Alpha over the rank; a pattern is a regular expression over the end of the module path, as in peft."""
        alpha = self.lora_alpha
        for pattern, value in (self.alpha_pattern or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", site):
                alpha = value
                break
        return alpha / (rank**0.5 if self.use_rslora else rank)


def save_adapter(folder: Path, model: MoLoRAModel, manifest: Manifest) -> None:
    """Write an adapter folder.

    Args:
        folder: Created when missing; files in it are replaced, and experts of an adapter that was there removed.
        model: The model.
        manifest: What to record; its ``ranks`` are filled in here.
    """
    ranks: dict[str, dict[str, int]] = {}
    if (folder / "experts").exists():
        shutil.rmtree(folder / "experts")  # the adapter before may have had more of them
    for expert in model.experts:
        where = {n: s for n, s in model.sites.items() if expert in model.expert_ids(s)}
        out = folder / "experts" / expert
        out.mkdir(parents=True, exist_ok=True)
        for name, site in where.items():
            ranks.setdefault(expert, {})[name] = site.bank.ranks[model.expert_ids(site).index(expert)]
        _save_expert(out, model, expert, where, manifest)
    for name, kind in _parts(model):
        save_file(_by_name(model, kind), folder / name)
    text = manifest.model_copy(update={"ranks": ranks}).model_dump_json(indent=2)
    (folder / "molora.json").write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """Read ``molora.json``.

    Raises:
        AdapterError: It is missing or not what this version writes.
    """
    path = folder / "molora.json"
    try:
        return Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AdapterError(f"no adapter here: {error.strerror}", where=str(path)) from None
    except (ValidationError, UnicodeDecodeError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": "not UTF-8 text"}
        if first["loc"] == ("format",):
            what, mend = f"its format is {first['input']!r}, not 1", "Read it with the Molehill that wrote it."
            raise AdapterError(what, where=str(path), mend=mend) from None
        raise AdapterError(f"not a valid adapter description: {first['msg']}", where=str(path)) from None


def load_adapter(folder: Path, model: MoLoRAModel, *, base_digest: str) -> None:
    """Load an adapter folder into a model that was built from its manifest.

    Raises:
        AdapterError: A file is missing or damaged, the adapter belongs to another base, or shapes differ.
    """
    manifest = read_manifest(folder)
    if manifest.base.get("digest") != base_digest:
        raise AdapterError(
            f"adapter was trained on {manifest.base.get('id')} with weight digest "
            f"{manifest.base.get('digest', '')[:12]}, this base has {base_digest[:12]}",
            where=str(folder),
            mend="Load the base model named in molora.json.",
        )
    values: dict[Key, Array] = {}
    patches: dict[tuple[str, str], Factors] = {}
    for expert in model.experts:
        factors = read_peft(folder / "experts" / expert)
        for name, site in model.sites.items():
            if expert not in model.expert_ids(site):
                continue
            if name not in factors:
                raise AdapterError(f"expert {expert} has no tensors for {name}", where=str(folder))
            _take(values, patches, Key(name, expert, ""), site, factors[name], manifest)
    for part, _ in _parts(model):
        try:
            values |= {Key.parse(n): v for n, v in _read(folder / part).items()}
        except MessageError as error:
            raise AdapterError(error.what, where=str(folder / part)) from None
    missing = [k.name for k in model.layout if k not in values and not k.residual]
    if missing:
        raise AdapterError(f"adapter lacks {missing[0]} and {len(missing) - 1} more tensors", where=str(folder))
    model.load(values)
    model.set_patches(patches)


def read_peft(folder: Path) -> dict[str, Factors | Array]:
    """Read a PEFT LoRA folder (A and B, scale absorbed in B) or IA3 folder (vectors minus one) by module path.

    Raises:
        AdapterError: Not a PEFT folder, damaged, or of a variant that is not a plain LoRA or IA3.
    """
    path = folder / "adapter_config.json"
    try:
        config = _PeftConfig.model_validate_json(path.read_bytes())
    except OSError as error:
        raise AdapterError(f"no PEFT adapter here: {error.strerror}", where=str(path)) from None
    except ValidationError as error:
        raise AdapterError(f"not a PEFT configuration: {error.errors()[0]['msg']}", where=str(path)) from None
    tensors = {n.removeprefix(_PREFIX): t for n, t in _read(folder / "adapter_model.safetensors").items()}
    if config.peft_type == "IA3":
        return {n.removesuffix(".ia3_l"): t.reshape(-1) - 1 for n, t in tensors.items()}
    if config.peft_type != "LORA":
        raise AdapterError(f"peft type {config.peft_type!r} cannot be an expert", where=str(path))
    for key, name in _UNSUPPORTED.items():
        if (config.model_extra or {}).get(key):
            raise AdapterError(
                f"{name} ({key}) cannot be an expert", where=str(path), mend="Merge or retrain it as plain LoRA."
            )
    out: dict[str, Factors | Array] = {}
    for name, A in tensors.items():
        site, _, rest = name.partition(".lora_A.")
        if not rest:
            continue
        B = tensors.get(f"{site}.lora_B.{rest}")
        if B is None or A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
            raise AdapterError(f"factors of {site} do not fit each other", where=str(folder))
        out[site] = (A, B * np.float32(config.scale(site, A.shape[0])))
    return out


def _read(path: Path) -> dict[str, Array]:
    """Tensors of a safetensors file in float32, whatever they are stored in."""
    try:
        return {name: tensor.float().numpy() for name, tensor in load_file(path).items()}
    except OSError as error:
        raise AdapterError(f"cannot be read: {error.strerror or error}", where=str(path)) from None
    except SafetensorError as error:
        raise AdapterError(f"not a valid safetensors file: {error}", where=str(path)) from None


def _parts(model: MoLoRAModel) -> list[tuple[str, str]]:
    """Files beside the experts, with the kind of tensor each holds; a plain LoRA has no router."""
    parts = [("router.safetensors", "gate")] if model.routers else []
    return parts + ([("head.safetensors", "head")] if model.head is not None else [])


def _by_name(model: MoLoRAModel, kind: str) -> dict[str, Array]:
    """Shared tensors of one kind by wire name; personal residuals are not part of an adapter."""
    tree = model.tree(lambda key: key.kind == kind and not key.residual)
    return {key.name: np.ascontiguousarray(value) for key, value in tree.items()}


def _save_expert(
    out: Path, model: MoLoRAModel, expert: str, where: Mapping[str, MoLoRALinear], manifest: Manifest
) -> None:
    tree = model.tree(lambda key: key.expert == expert)
    tensors: dict[str, Array] = {}
    ranks: dict[str, int] = {}
    for name, site in where.items():
        bank = site.bank
        if not isinstance(bank, LoRABank):
            tensors[f"{_PREFIX}{name}.ia3_l"] = 1 + tree[Key(name, expert, "dense.v")].reshape(-1, 1)
            continue
        index = model.expert_ids(site).index(expert)
        mine = (bank.patch_expert == index).cpu()
        A = np.concatenate([tree[Key(name, expert, "A")], bank.patch_A.cpu()[mine].numpy()])
        B = np.concatenate([tree[Key(name, expert, "B")], bank.patch_Bt.cpu()[mine].numpy().T], axis=1)
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = A
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = np.ascontiguousarray(B)
        ranks[name] = A.shape[0]
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    conv = any(isinstance(site.base, Conv1D) for site in where.values())
    common: dict[str, Any] = {
        "base_model_name_or_path": manifest.base["id"],
        "revision": manifest.base.get("revision") or None,
        "task_type": "CAUSAL_LM" if manifest.task == "causal-lm" else "FEATURE_EXTRACTION",
        "target_modules": sorted(where),
        "inference_mode": True,
    }
    if ranks:
        rank = max(ranks.values())
        pattern = {re.escape(n): r for n, r in ranks.items() if r != rank}
        common |= {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "rank_pattern": pattern,
                   "alpha_pattern": pattern, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": conv}  # fmt: skip
    else:
        common |= {"peft_type": "IA3", "feedforward_modules": [], "fan_in_fan_out": conv}
    (out / "adapter_config.json").write_text(json.dumps(common, indent=2) + "\n", encoding="utf-8")


def _take(
    values: dict[Key, Array],
    patches: dict[tuple[str, str], Factors],
    key: Key,
    site: MoLoRALinear,
    factors: Factors | Array,
    manifest: Manifest,
) -> None:
    """Sort one expert's tensors at one site into trained values and frozen patches."""
    name, expert = key.site, key.expert
    if isinstance(site.bank, LoRABank):
        if not isinstance(factors, tuple):
            raise AdapterError(f"expert {expert} at {name} is not a LoRA")
        A, B = factors
        rank = manifest.ranks.get(expert, {}).get(name, A.shape[0])
        values[Key(name, expert, "A")], values[Key(name, expert, "B")] = A[:rank], B[:, :rank]
        if A.shape[0] > rank:
            patches[name, expert] = (A[rank:], B[:, rank:])
    elif isinstance(factors, tuple):
        raise AdapterError(f"expert {expert} at {name} is not an IA3 vector")
    else:
        values[Key(name, expert, "dense.v")] = factors.reshape(1, -1)
