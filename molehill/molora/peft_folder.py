"""PEFT folders: what one LoRA or (IA)3 adapter says, where it can be said exactly; all else is refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from safetensors import SafetensorError
from safetensors.torch import load_file

from molehill import files
from molehill.errors import AdapterError
from molehill.molora.banks import Peft
from molehill.tensors import write as write_tensors
from molehill.wire.tree import Array

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_ANEW = "Save it anew with peft."
_MEND = "Merge it into its base, or train it anew as a plain LoRA."

# Keys with a value under which the folder is more, or something else, than factors of linear modules. What is neither
# here nor in `_PLAIN` is not known to this version, and so refused when it is set.
_REFUSED = {
    "use_dora": "DoRA",
    "lora_bias": "LoRA biases",
    "megatron_config": "Megatron layers",
    "modules_to_save": "whole modules",
    "trainable_token_indices": "trained tokens",
    "layer_replication": "replicated layers",
    "target_parameters": "factors of bare parameters",
    "feedforward_modules": "vectors on the inputs of modules",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "BD-LoRA",
    "loftq_config": "LoftQ",
    "velora_config": "VeLoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
}
# Starts that leave the base as it is; under any other, such as PiSSA, the factors are for a changed base.
_STARTS = {True, False, "gaussian", "eva", "orthogonal"}
_PLAIN = {
    *("auto_mapping", "peft_version", "inference_mode", "r", "target_modules", "exclude_modules", "lora_dropout"),
    *("fan_in_fan_out", "layers_to_transform", "layers_pattern", "rank_pattern", "megatron_core", "eva_config"),
    *(
        "rank_dropout",
        "module_dropout",
        "use_effective_conv2d",
        "decompose_factor",
        "rank_dropout_scale",
        "init_weights",
    ),
    *("corda_config", "lora_ga_config", "qalora_group_size", "runtime_config", "ensure_weight_tying"),
}


# What peft calls the tensors of an expert, by their role; the scale is absorbed in the one that is named first.
_PRODUCTS: dict[str, dict[str, str]] = {
    "LOHA": {"dense.w2a": "hada_w2_a", "dense.w1a": "hada_w1_a", "dense.w1b": "hada_w1_b", "dense.w2b": "hada_w2_b"},
    "LOKR": {"dense.w2a": "lokr_w2_a", "dense.w1": "lokr_w1", "dense.w2b": "lokr_w2_b"},
}


class PeftConfig(BaseModel):
    """What of an ``adapter_config.json`` decides what its tensors mean.

    Attributes:
        peft_type: The method.
        task_type: What the model is for.
        base_model_name_or_path: The base.
        revision: Of the base.
        lora_alpha: Over the rank, the scale.
        alpha: The same of products (``LOHA``, ``LOKR``).
        alpha_pattern: Other values by module.
        use_rslora: Whether the scale is alpha over the root of the rank.
        bias: Which biases were trained as well.
        init_lora_weights: How the factors were started.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    peft_type: str
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    lora_alpha: float = 8
    alpha: float = 8
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool = False
    bias: str = "none"
    init_lora_weights: bool | str = True

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
        alpha = self.alpha if self.peft_type in _PRODUCTS else self.lora_alpha
        for pattern, value in (self.alpha_pattern or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", site):
                alpha = value
                break
        return alpha / (rank**0.5 if self.use_rslora else rank)

    def objections(self) -> Iterator[str]:
        """What about it keeps it from being an expert, in words with the keys."""
        if self.peft_type not in {"LORA", "IA3", *_PRODUCTS}:
            yield f"peft type {self.peft_type!r}"
        if self.bias != "none":
            yield f"trained biases (bias = {self.bias!r})"
        if self.init_lora_weights not in _STARTS:
            yield f"factors for a base that its start has changed (init_lora_weights = {self.init_lora_weights!r})"
        for key, value in (self.model_extra or {}).items():
            if not value or key in _PLAIN:
                continue
            if key in _REFUSED:
                names = value if isinstance(value, list) and all(isinstance(each, str) for each in value) else [key]
                yield f"{_REFUSED[key]} ({key}{'' if names == [key] else ': ' + ', '.join(sorted(names))})"
            else:
                yield f"the key {key!r}, which this version does not know"


def is_peft(folder: Path) -> bool:
    """Whether a folder looks like one that peft has saved."""
    return (folder / CONFIG).is_file()


def read_config(folder: Path) -> PeftConfig:
    """Read ``adapter_config.json``.

    Raises:
        AdapterError: Not a PEFT folder, damaged, or of a variant that cannot be an expert; all its reasons are named.
    """
    path = folder / CONFIG
    try:
        config = PeftConfig.model_validate_json(path.read_bytes())
    except OSError as error:
        what = f"no PEFT adapter here: {error.strerror}"
        raise AdapterError(what, where=str(path), mend="Give the folder that peft has saved.") from None
    except ValidationError as error:
        what = f"not a PEFT configuration: {error.errors()[0]['msg']}"
        raise AdapterError(what, where=str(path), mend=_ANEW) from None
    found = list(config.objections())
    if found:
        raise AdapterError(f"{', '.join(found)} cannot be an expert", where=str(path), mend=_MEND)
    return config


def read_peft(folder: Path) -> dict[str, dict[str, Array]]:
    """Read a PEFT folder, by module and role: LoRA (scale absorbed in B), IA3 (vectors minus one), LoHa and LoKr.

    Raises:
        AdapterError: Not a PEFT folder, damaged, or of a variant that is none of these as they are.
    """
    config = read_config(folder)
    tensors = {n.removeprefix(PREFIX): t for n, t in read_tensors(folder / WEIGHTS).items()}
    if config.peft_type == "IA3":
        _require_known(folder, [name for name in tensors if not name.endswith(".ia3_l")])
        return {n.removesuffix(".ia3_l"): {"dense.v": t.reshape(1, -1) - 1} for n, t in tensors.items()}
    if config.peft_type in _PRODUCTS:
        return _products(folder, config, tensors)
    out: dict[str, dict[str, Array]] = {}
    used: set[str] = set()
    for name, A in tensors.items():
        site, _, rest = name.partition(".lora_A.")
        if not rest:
            continue
        other = f"{site}.lora_B.{rest}"
        B = tensors.get(other)
        if B is None or A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
            raise AdapterError(f"factors of {site} do not fit each other", where=str(folder), mend=_ANEW)
        out[site] = {"A": A, "B": B * np.float32(config.scale(site, A.shape[0]))}
        used |= {name, other}
    _require_known(folder, sorted(tensors.keys() - used))
    if not out:
        raise AdapterError("there is no factor in it", where=str(folder / WEIGHTS), mend=_ANEW)
    return out


def _products(folder: Path, config: PeftConfig, tensors: Mapping[str, Array]) -> dict[str, dict[str, Array]]:
    """The tensors of products by module and role, scale absorbed."""
    names = _PRODUCTS[config.peft_type]
    roles = {name: role for role, name in names.items()}
    out: dict[str, dict[str, Array]] = {}
    _require_known(folder, sorted(name for name in tensors if name.rpartition(".")[2] not in roles))
    for name, tensor in tensors.items():
        site, _, last = name.rpartition(".")
        out.setdefault(site, {})[roles[last]] = tensor
    for site, found in out.items():
        if found.keys() != names.keys():
            raise AdapterError(f"{site} lacks a factor", where=str(folder), mend=_ANEW)
        first = next(iter(names))
        found[first] = found[first] * np.float32(config.scale(site, found[first].shape[1]))
    return out


def write_peft(
    folder: Path,
    method: Peft,
    expert: Mapping[str, Mapping[str, Array]],
    base: tuple[str, str | None],
    *,
    task: str,
    conv: bool,
) -> None:
    """Write a folder that `read_peft` and other libraries read.

    Args:
        folder: Where; it exists.
        method: What the expert is.
        expert: Its tensors by module and role, scale absorbed.
        base: Where the base is, and its revision.
        task: The task in peft's words.
        conv: Whether the modules store their weights transposed (GPT-2).
    """
    common: dict[str, Any] = {
        "base_model_name_or_path": base[0],
        "revision": base[1],
        "task_type": task,
        "target_modules": sorted(expert),
        "inference_mode": True,
    }
    if method == "LORA":
        ranks = {name: len(tensors["A"]) for name, tensors in expert.items()}
        rank = max(ranks.values())
        pattern = {re.escape(n): r for n, r in ranks.items() if r != rank}
        common |= {"peft_type": method, "r": rank, "lora_alpha": rank, "rank_pattern": pattern,
                   "alpha_pattern": pattern, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": conv}  # fmt: skip
        values = {f"{PREFIX}{n}.lora_{role}.weight": t[role] for n, t in expert.items() for role in ("A", "B")}
    elif method in _PRODUCTS:
        names = _PRODUCTS[method]
        ranks = {name: tensors[next(iter(names))].shape[1] for name, tensors in expert.items()}
        rank = max(ranks.values())
        pattern = {re.escape(n): r for n, r in ranks.items() if r != rank}
        common |= {"peft_type": method, "r": rank, "alpha": rank, "rank_pattern": pattern, "alpha_pattern": pattern}
        values = {f"{PREFIX}{n}.{name}": t[role] for n, t in expert.items() for role, name in names.items()}
    else:
        common |= {"peft_type": method, "feedforward_modules": [], "fan_in_fan_out": conv}
        values = {f"{PREFIX}{name}.ia3_l": 1 + tensors["dense.v"].reshape(-1, 1) for name, tensors in expert.items()}
    write_tensors(
        folder / WEIGHTS, {name: np.ascontiguousarray(value) for name, value in values.items()}, {"format": "pt"}
    )
    files.write(folder / CONFIG, (json.dumps(common, indent=2) + "\n").encode())


def _require_known(folder: Path, left: list[str]) -> None:
    if left:
        more = f" and {len(left) - 1} more tensors" if len(left) > 1 else ""
        raise AdapterError(
            f"it has {left[0]}{more}, which cannot be part of an expert", where=str(folder / WEIGHTS), mend=_MEND
        )


def read_tensors(path: Path) -> dict[str, Array]:
    """Tensors of a safetensors file in float32, whatever they are stored in.

    Raises:
        AdapterError: It cannot be read.
    """
    pickle = path.with_suffix(".bin")
    if not path.exists() and pickle.is_file():
        raise AdapterError(
            f"{pickle.name} is a pickle, which can run code when it is opened",
            where=str(path.parent),
            mend="Load the adapter with peft where you trust it and call save_pretrained, which writes safetensors.",
        )
    try:
        return {name: tensor.float().numpy() for name, tensor in load_file(path).items()}
    except OSError as error:
        what = f"cannot be read: {error.strerror or error}"
        raise AdapterError(what, where=str(path), mend="Check that the folder is whole, and who may read it.") from None
    except SafetensorError as error:
        raise AdapterError(f"not a valid safetensors file: {error}", where=str(path), mend="Save it anew.") from None


def plain_lora(factors: Mapping[str, Mapping[str, Array]]) -> dict[str, Any]:
    """The section ``molora`` of a model with one expert that holds these factors exactly.

    Args:
        factors: Of an adapter, by module path; lower ranks than the highest are filled up with zeros.
    """
    rank = max(len(tensors["A"]) for tensors in factors.values())
    targets = tuple(re.escape(site) for site in sorted(factors))
    return {"preset": "lora", "targets": targets, "rank": rank, "alpha": float(rank)}
