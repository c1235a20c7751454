"""Exported graphs in memory: a traced base, used by many adapters."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import edge_graphs
import numpy as np
import onnx
import onnxruntime as ort
import tiny_models
import tiny_world
import torch
import transformers

from molehill import config
from molehill.molora.adapter import Manifest, save_adapter
from molehill.molora.build import wrap
from molehill.molora.head import Head
from molehill.molora.model import MoLoRAModel
from molehill.molora.targets import find_sites
from molehill.tasks.base_model import load_base
from molehill.tasks.weights import look_up
from molehill_edge.manifest import GRAPH
from molehill_export.base import classifier, decoder
from molehill_export.base_quantise import BLOCK, quantise_base
from molehill_export.export import Options, export
from molehill_export.graph import External, Graph, write_weights
from molehill_export.molora import choose_slots, gate_values, insert
from molehill_simulation.source import open_source

Session = ort.InferenceSession
ARCHITECTURES = ("llama", "gpt2", "minilm")
LABELS = ("a", "b", "c")
# Heads of 16 (for grouped-query attention); a vocabulary that is not the width, which the builder confuses.
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "vocab_size": 48, "initializer_range": 0.1}
_LLAMA = {"num_key_value_heads": 2, "head_dim": 16}
_WIDE = {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 256}
_kept = Path(tempfile.mkdtemp(prefix="molehill-bases-"))  # mapped weights must stay while graphs are used
atexit.register(shutil.rmtree, _kept, ignore_errors=True)


# Further families of decoders: their configuration and its keys, over those of the Llama.
FAMILIES: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "tied": (transformers.LlamaConfig, {"tie_word_embeddings": True}),
    "qwen2": (transformers.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (transformers.Qwen3Config, {}),
    "mistral": (transformers.MistralConfig, {"sliding_window": None}),
    "linear": (transformers.LlamaConfig, {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    }),
    "scaled": (transformers.LlamaConfig, {
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
                            "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    }),
}  # fmt: skip
# Wide enough for whole blocks of 4-bit weights, without biases and with them.
WIDE: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "wide": (transformers.LlamaConfig, _WIDE),
    "wide-qwen2": (transformers.Qwen2Config, _WIDE),
    "wider": (
        transformers.LlamaConfig,
        _WIDE | {"hidden_size": 256, "num_attention_heads": 16, "intermediate_size": 384},
    ),
    # whole blocks of 256 too, and a tokenizer that every runtime knows
    "bytes": (transformers.LlamaConfig, {
        **_WIDE, "hidden_size": 256, "num_attention_heads": 16, "intermediate_size": 512, "vocab_size": 259,
        "max_position_embeddings": 256, "bos_token_id": None, "eos_token_id": 257,
    }),
}  # fmt: skip


@functools.cache
def folder(architecture: str) -> Path:
    """A saved tiny checkpoint."""
    path = _kept / architecture
    if architecture in FAMILIES | WIDE:
        tiny_world.save_base(path, "llama", **SIZES, **_LLAMA)  # the tokenizer
        make, keys = (FAMILIES | WIDE)[architecture]
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(make(**tiny_world.SIZES | SIZES | _LLAMA | keys))
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "norm.weight")):  # which start as zeros and ones
                torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)
        model.save_pretrained(path)
        if architecture == "bytes":
            names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
            tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=edge_graphs.bytes_tokenizer(), **names)
            tokenizer.chat_template = edge_graphs.CHATML
            tokenizer.save_pretrained(path)
        return path
    return tiny_world.save_base(path, architecture, **SIZES, **(_LLAMA if architecture == "llama" else {}))


def base(architecture: str) -> Any:
    """A base without experts."""
    if architecture == "bert":
        settings = config.Base(model=str(folder(architecture)), precision="fp32", device="cpu")
        return load_base(settings, config.Task(labels=LABELS, max_length=64)).model
    if architecture == "minilm":
        return load_base(config.Base(precision="fp32", device="cpu"), config.Task(labels=("a", "b"))).model
    model = transformers.AutoModelForCausalLM.from_pretrained(folder(architecture), dtype=torch.float32)
    return model.eval().requires_grad_(requires_grad=False)


def head(architecture: str) -> Head | None:
    """A head for an encoder."""
    width = {"minilm": 384, "bert": SIZES["hidden_size"]}.get(architecture)
    return None if width is None else Head(int(width), len(LABELS), "mean", anchored=False)


@functools.cache
def traced(architecture: str) -> Graph:
    """The base as a graph; copy it before it is changed."""
    model = base(architecture)
    names = [site.name for site in find_sites(model, "all-linear")]
    top = head(architecture)
    if top is not None:
        return classifier(model, top, names)
    return decoder(model, look_up(folder(architecture), architecture), names)


def adapted(architecture: str, **keys: Any) -> tuple[MoLoRAModel, config.MoLoRA]:
    """A base with an adapter of random numbers that matter but do not drown the base."""
    section = config.parse({"molora": keys}).molora
    model = wrap(base(architecture), section, head=head(architecture)).eval()
    wide = architecture == "minilm"
    tiny_models.shake(model, scale=0.02 if wide else 0.06)
    with torch.no_grad():
        for group in model.routers.values():
            for parameter in group.router.scorer.parameters():
                parameter.mul_(20 if wide else 40)
        if wide and model.head is not None:
            model.head.weight.mul_(30)
    return model, section


@functools.cache
def frozen(architecture: str) -> np.ndarray:
    """Logits of `batch` without experts."""
    model, _ = adapted(architecture, targets="all-linear", experts=1)
    model.state.enabled = False
    return original(model, *batch(architecture))


@functools.cache
def quantised(architecture: str, scheme: Any, block: int = BLOCK) -> tuple[Graph, dict[str, External], Path]:
    """The base in fewer bits, its weights in a file: where they are, and the file's folder."""
    graph = traced(architecture).copy()
    quantise_base(graph, scheme, "logits" if head(architecture) is None else "", block)
    place = Path(tempfile.mkdtemp(prefix=f"{architecture}-{scheme}-", dir=_kept))
    return graph, write_weights(graph.tensors, place / "base.bin"), place


def session(
    model: MoLoRAModel, section: config.MoLoRA, architecture: str, scheme: Any = "fp32", **keys: Any
) -> ort.InferenceSession:
    """The adapter in its graph, opened; further keys are those of `insert`."""
    base_, external, place = quantised(architecture, scheme)
    graph = base_.copy()
    inserted = insert(graph, model, section.scorer, choose_slots(model, None, 0), scheme, **keys)
    graph.tensors.update(gate_values(model, inserted))
    return opened(graph, external, place)


def opened(
    graph: Graph, external: dict[str, External] | None = None, place: Path | None = None
) -> ort.InferenceSession:
    """A session of a graph."""
    graph.drop_unused()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    there = {name: where for name, where in (external or {}).items() if name in graph.tensors}
    path = (place or _kept) / "model.onnx"
    path.write_bytes(graph.model(there).SerializeToString())
    return ort.InferenceSession(path, options)


def write(
    out: Path, architecture: str, scheme: Any, block: int = BLOCK, *, router_ranks: bool = False, spare: int = 0,
    adapter: Path | None = None, **molora: Any,
) -> MoLoRAModel:  # fmt: skip
    """Export a bundle of a base and an adapter of random numbers that matter; returns what it is made from."""
    model, section = adapted(architecture, **molora)
    path = folder(architecture)
    about = Manifest(
        base={"id": str(path), "digest": look_up(path, architecture).digest()},
        task="causal-lm" if model.head is None else "classification",
        labels=() if model.head is None else LABELS,
        pooling="" if model.head is None else model.head.pooling,
        molora=section,
        ranks={},
    )
    with tempfile.TemporaryDirectory() as place:
        kept = adapter or Path(place)
        save_adapter(kept, model, about)
        export(
            open_source(kept),
            out,
            Options(scheme=scheme, block=block, id=architecture, force=True, router_ranks=router_ranks, spare=spare),
        )
    return model


def joined(bundle: Path) -> int:
    """How many linears of a bundle have their experts inside, which a runtime has to put there."""
    graph = onnx.load(bundle / GRAPH, load_external_data=False).graph
    made = {name: node for node in graph.node for name in node.output}
    weights = [node.input[1] for node in graph.node if node.op_type == "MatMulNBits"]
    for name in weights:  # grows: products that became one have their weights one after the other
        if name in made and made[name].attribute[0].i == 0:
            weights.extend(made[name].input)
    return sum(name in made and made[name].attribute[0].i == 1 for name in weights)


def batch(architecture: str, rows: int = 0, tokens: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids ``[rows, tokens]`` and a mask; the last row is padded on the right."""
    generator = torch.Generator().manual_seed(3)
    top = 20000 if architecture == "minilm" else SIZES["vocab_size"]
    ids = torch.randint(5, int(top), (rows or (12 if architecture == "minilm" else 3), tokens), generator=generator)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[-1, tokens - 3 :] = False
    return ids, mask


@torch.no_grad()
def original(model: MoLoRAModel, ids: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
    """Logits of torch: ``[B, C]``, or those of real tokens ``[N, V]``."""
    model.state.announce(mask)
    if model.head is not None:
        return model.head(model.head.pool(model.hidden(ids, mask), mask)).numpy()
    return model.base(input_ids=ids, attention_mask=mask.long()).logits[mask].numpy()


def exported(session_: ort.InferenceSession, ids: torch.Tensor, mask: torch.Tensor, **feed: Any) -> np.ndarray:
    """Logits of the graph in the same form."""
    given = {"input_ids": ids.numpy(), "attention_mask": mask.long().numpy(), **no_past(session_, len(ids)), **feed}
    logits = session_.run(["logits"], given)[0]
    return logits if logits.ndim == 2 else logits[mask.numpy()]


def no_past(session_: ort.InferenceSession, rows: int) -> dict[str, np.ndarray]:
    """An empty cache of keys and values."""
    shapes = {v.name: v.shape for v in session_.get_inputs() if v.name.startswith("past_key_values.")}
    # GPT-2's graph leaves the number of heads open
    return {
        name: np.zeros((rows, s[1] if isinstance(s[1], int) else 4, 0, 16), np.float32) for name, s in shapes.items()
    }


def error(original_: np.ndarray, other: np.ndarray) -> float:
    """Mean squared difference over the variance."""
    return float(np.square(original_ - other).mean() / original_.var())
