"""An expert, or a gate as a fixed mixture of all experts, as a LoRA that llama.cpp reads (GGUF).

Names and layout are those of llama.cpp's ``convert_lora_to_gguf.py``: ``blk.N.attn_q.weight.lora_a`` ``[r, d_in]`` and
``.lora_b`` ``[d_out, r]``, in float32. Of a mixture the factors of all experts follow each other on the rank axis, with
each expert's weight in its B. All linears get the same rank, filled with zeros, and ``alpha`` is that rank, so that
readers scale by 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from molehill import files
from molehill.errors import ConfigError, DeployError, ModelError
from molehill.tasks.kind import kind_of
from molehill_export.as_one import alone, as_lora, by_routes
from molehill_export.insertion import Array
from molehill_export.static import Fixed, fix_gate
from molehill_simulation.source import GLOBAL, Source

_HEADER = 512  # bytes of the file that are no numbers, for each tensor and for the whole, at most


@dataclass(frozen=True)
class _Family:
    """How llama.cpp stores the models of a family.

    Attributes:
        architecture: Its name for them.
        turned: Whether queries and keys have the two halves of every rotated pair side by side.
    """

    architecture: str
    turned: bool = False


# By the model type of transformers. Files of all of them are compared with what peft makes of the same expert.
_FAMILIES = {
    "llama": _Family("llama", turned=True),
    "mistral": _Family("llama", turned=True),
    "qwen2": _Family("qwen2"),
    "qwen3": _Family("qwen3"),
}


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        experts: Ids of the experts in it.
        rank: Of every linear.
        linears: How many there are.
        fixed: How the experts are weighed; None for one expert.
    """

    experts: tuple[str, ...]
    rank: int
    linears: int
    fixed: Fixed | None


@dataclass(frozen=True)
class Wanted:
    """What is to be written.

    Attributes:
        expert: Its id; None for a mixture, or where there is one only.
        gate: Whose gate the mixture has, as for `Source.client`; None where no router decides.
        rows: Labelled rows to take the mean over; None for those of a simulation, or the public texts.
        force: Also a mixture that differs much from the routed model.
    """

    expert: str | None = None
    gate: str | None = None
    rows: Path | None = None
    force: bool = False


def export_lora(source: Source, out: Path, wanted: Wanted) -> Written:
    """Write a LoRA for llama.cpp.

    Args:
        source: The run or adapter, of a causal LM.
        out: The file to write, whole or not at all.
        wanted: What is to be in it.

    Raises:
        BundleError: A fixed mixture differs too much from the routed model.
        ConfigError: The run is no causal LM, or what is wanted makes no sense for it.
        DeployError: There is no room for it.
        ModelError: llama.cpp has no LoRA for such experts or such a base.
        OSError: The disk is full all the same, or fails.
    """
    if not kind_of(source.task).writes:
        raise ConfigError("llama.cpp reads adapters of causal language models only", where="--gguf")
    if wanted.expert is not None and wanted.gate is not None:
        raise ConfigError("--expert and --gate exclude each other", mend="Give the one or the other.")
    family = _family(source)
    model = source.model
    fixed = None
    if wanted.expert is None and len(model.experts) > 1:
        experts = model.experts
        fixed = _weigh(source, wanted)
        with source.gate(wanted.gate or GLOBAL):  # it may have experts of its own
            factors = as_lora(model, by_routes(model, fixed.weights))
    else:
        experts = (wanted.expert or model.experts[0],)
        if experts[0] not in model.experts:
            raise ConfigError(f"there is no expert {experts[0]!r}", where="--expert", mend=_those(model.experts))
        if wanted.gate is not None and not (wanted.gate in source.clients() and source.replaced(wanted.gate)):
            raise ConfigError("there is one expert, and no gate to weigh it", where="--gate", mend="Leave it out.")
        with source.gate(wanted.gate) if wanted.gate else nullcontext():
            factors = as_lora(model, alone(model, experts[0]))
    rank = max(len(a) for a, _ in factors.values())
    _write(source, out, _stored(source, family, factors), rank)
    return Written(experts, rank, len(factors), fixed)


def _weigh(source: Source, wanted: Wanted) -> Fixed:
    """Fixed weights of all experts by somebody's gate.

    Raises:
        BundleError: They change too much.
        ConfigError: Nobody said whose, and the routers decide token by token.
    """
    gate = wanted.gate or GLOBAL
    fixed = fix_gate(source, gate, wanted.rows)
    if not fixed.exact and wanted.gate is None:
        raise ConfigError(
            "the routers choose experts token by token, and a LoRA of llama.cpp has one weight for all tokens",
            where="--gguf",
            mend=f"Give --expert ({', '.join(source.model.experts)}), or --gate CLIENT|global for its mean weights.",
        )
    if not wanted.force:
        fixed.require(gate, "Take one expert with --expert, ship a bundle with --out, or insist with --force.")
    return fixed


def _family(source: Source) -> _Family:
    """What llama.cpp has for a base.

    Raises:
        ModelError: Nothing that is known here.
    """
    kind = source.text.model_type
    if kind not in _FAMILIES:
        raise ModelError(
            f"bases of type {kind!r} cannot become a GGUF LoRA here",
            where=source.base.id,
            mend=f"Known are {', '.join(_FAMILIES)}.",
        )
    return _FAMILIES[kind]


def _stored(
    source: Source, family: _Family, factors: Mapping[str, tuple[Array, Array]]
) -> dict[str, tuple[Array, Array]]:
    """Factors under llama.cpp's names, with B's rows as it stores a linear's.

    Raises:
        ModelError: It has no such linear.
    """
    shape = source.text
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[family.architecture], shape.num_hidden_layers)
    found = {}
    for site, (a, b) in factors.items():
        name = names.get_name(f"{site}.weight", try_suffixes=(".weight",))
        if name is None:
            raise ModelError(f"llama.cpp has no name for it in {family.architecture}", where=site)
        heads, key_heads = shape.num_attention_heads, shape.num_key_value_heads
        found[name] = a, _turned(b, name, heads, key_heads) if family.turned else b
    return found


def _turned(b: Array, name: str, heads: int, key_heads: int) -> Array:
    """Rows of B in the order that llama.cpp has of queries and keys; others as they are."""
    part = name.split(".")[2]
    if part not in {"attn_q", "attn_k"}:
        return b
    n = heads if part == "attn_q" else key_heads
    return b.reshape(n, 2, len(b) // n // 2, -1).swapaxes(1, 2).reshape(b.shape)


def _write(source: Source, out: Path, factors: Mapping[str, tuple[Array, Array]], rank: int) -> None:
    size = sum(4 * rank * (a.shape[1] + len(b)) + 2 * _HEADER for a, b in factors.values()) + _HEADER
    mend = "Make room, or write to another disk."
    files.require_room("the LoRA", (out.parent, size), kind=DeployError, mend=mend)
    with files.replacing(out) as path:
        writer = gguf.GGUFWriter(path, _FAMILIES[source.text.model_type].architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_name(source.name)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
        for name, (a, b) in sorted(factors.items()):
            more = rank - len(a)
            writer.add_tensor(f"{name}.lora_a", np.ascontiguousarray(np.pad(a, ((0, more), (0, 0))), np.float32))
            writer.add_tensor(f"{name}.lora_b", np.ascontiguousarray(np.pad(b, ((0, 0), (0, more))), np.float32))
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def _those(experts: Sequence[str]) -> str:
    return f"There are: {', '.join(experts)}."
