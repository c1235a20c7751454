"""The frozen base as a graph, in float32, with the places of its linears marked."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
import torch.nn.functional as F
from onnx import helper
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from molehill.errors import ModelError
from molehill.molora.head import Head
from molehill.tasks.devices import slides
from molehill.tasks.weights import Stored
from molehill_export.deferred import Deferred, Weight
from molehill_export.graph import Graph, Place
from molehill_export.guards import drop_nan_guards
from molehill_export.mixtures import every_expert, substitute
from molehill_export.trace import DYNAMIC, export, quiet

GENAI = "genai_config.json"
_DOMAIN = "molehill"
_BUILDER = {"llama", "mistral", "qwen2", "qwen3", "smollm3"}  # model types that onnxruntime-genai's builder is used for
_ROPES = {"default", "llama3"}  # what it gets right; the others are traced
_HEAD = 16  # grouped-query attention takes heads of a multiple of it


def classifier(base: nn.Module, head: Head, sites: Sequence[str]) -> Graph:
    """An encoder (or decoder backbone) with a head whose parameters are inputs.

    Args:
        base: Without experts.
        head: Gives pooling and shape.
        sites: Names of the linears to mark.

    Returns:
        Inputs ``input_ids`` and ``attention_mask`` ``[B, T]``, ``head/-/head.weight`` and ``.bias``; output ``logits``.
    """
    ids = torch.zeros(2, 5, dtype=torch.long)
    args = (ids, torch.ones_like(ids), torch.zeros_like(head.weight), torch.zeros_like(head.bias))
    with _marked(base, sites):
        model = export(
            _Classifier(base, head), args, [{0: DYNAMIC, 1: DYNAMIC}] * 2 + [{}, {}],
            ["input_ids", "attention_mask", "head/-/head.weight", "head/-/head.bias"], ["logits"],
        )  # fmt: skip
    return _without_marks(Graph.of(model))


def decoder(base: PreTrainedModel, stored: Stored, sites: Sequence[str]) -> Graph:
    """A causal LM with its cache of keys and values, for prefill and decoding alike.

    Args:
        base: Its weights are read when those of the graph are.
        stored: The files it was loaded from.
        sites: Names of the linears to mark.

    Returns:
        Inputs ``input_ids [B, T]``, ``attention_mask [B, past + T]``, ``past_key_values.N.key`` and ``.value``; outputs
        ``logits`` and ``present.N.key`` and ``.value``.

    Raises:
        ModelError: A linear has no counterpart in the graph, or the model cannot be exported.
    """
    if slides(base.config.get_text_config()):
        raise ModelError("models whose attention slides over a window cannot be exported", where=stored.origin)
    if is_built(base.config):
        return _built(base, stored, sites)
    return _traced_decoder(base, sites)


def is_built(config: Any) -> bool:
    """Whether the graph of a causal LM of this configuration is built and not traced."""
    settings = config.get_text_config()
    size = getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads
    rope = (getattr(settings, "rope_parameters", None) or {}).get("rope_type", "default")
    return bool(config.model_type in _BUILDER and size % _HEAD == 0 and rope in _ROPES)


@torch.no_grad()
def cache_shape(base: PreTrainedModel) -> tuple[int, int, int]:
    """Layers, heads and features a head of the cache of keys and values, as the model fills it.

    Raises:
        ModelError: It keeps something else, or not the same in every layer.
    """
    cache = DynamicCache(config=base.config)
    base(input_ids=torch.ones(1, 2, dtype=torch.long, device=base.device), past_key_values=cache, use_cache=True)
    kept = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers]
    shapes = {tuple(t.shape) if isinstance(t, Tensor) else () for pair in kept for t in pair}
    shape = next(iter(shapes), ())
    if len(shapes) != 1 or len(shape) != 4 or shape[2] != 2:
        raise ModelError(
            f"{base.config.model_type} keeps more than keys and values of one shape while it writes, which a bundle "
            "cannot hold",
            where="base.model",
            mend="Train a base without state-space layers and of one kind of attention for devices.",
        )
    return len(kept), shape[1], shape[3]


def has_shared_buffer(graph: Graph) -> bool:
    """Whether past and present may be one buffer."""
    return any(node.op_type == "GroupQueryAttention" for node in graph.nodes)


class _Classifier(nn.Module):
    def __init__(self, base: nn.Module, head: Head) -> None:
        super().__init__()
        self.base = base
        self.pool = head.pool

    def forward(self, input_ids: Tensor, attention_mask: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        hidden = self.base(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return F.linear(self.pool(hidden, attention_mask.bool()), weight, bias)


class _Decoder(nn.Module):
    def __init__(self, base: PreTrainedModel) -> None:
        super().__init__()
        self.base = base

    def forward(self, input_ids: Tensor, attention_mask: Tensor, past: list[tuple[Tensor, Tensor]]) -> tuple[Any, ...]:
        cache = DynamicCache(config=self.base.config)
        for layer, (key, value) in enumerate(past):
            cache.update(key, value, layer)
        positions = (attention_mask.cumsum(-1) - 1).clamp_min(0)[:, -input_ids.shape[1] :]
        out = self.base(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, past_key_values=cache,
            use_cache=True,
        )  # fmt: skip
        return (out.logits, *(t for layer in out.past_key_values.layers for t in (layer.keys, layer.values)))


class _Marked(nn.Module):
    """A linear whose input and output are named in the traced graph."""

    def __init__(self, linear: nn.Module, name: str) -> None:
        super().__init__()
        self.linear = linear
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        mark: Tensor = torch.onnx.ops.symbolic(
            f"{_DOMAIN}::Site",
            (x, y),
            {"site": self.name, "flat": int(x.dim() == 2)},
            dtype=y.dtype,
            shape=y.shape,
            version=1,
        )
        return mark


@contextlib.contextmanager
def _marked(base: nn.Module, sites: Sequence[str]) -> Iterator[None]:
    before = {name: base.get_submodule(name) for name in sites}
    try:
        for name, module in before.items():
            substitute(base, name, _Marked(module, name))
        with every_expert(base):
            yield
    finally:
        for name, module in before.items():
            substitute(base, name, module)


def _without_marks(graph: Graph) -> Graph:
    """Turn marks into places."""
    marks = {id(node): node for node in graph.nodes if node.domain == _DOMAIN}
    graph.nodes = [node for node in graph.nodes if id(node) not in marks]
    consumers = graph.consumers()
    # a mark's input may be the output of another mark
    outputs = {node.output[0]: node.input[1] for node in marks.values()}
    for node in marks.values():  # in the order in which they ran
        marks_of = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        name, (x, y) = marks_of["site"].decode(), (outputs.get(each, each) for each in node.input)
        place = Place(x, y, bool(marks_of["flat"]))
        graph.places[name] = (*graph.places.get(name, ()), place)
        graph.rewire(node.output[0], node.input[1], consumers[node.output[0]])
    graph.opsets.pop(_DOMAIN, None)
    drop_nan_guards(graph)
    return graph


def _traced_decoder(base: PreTrainedModel, sites: Sequence[str]) -> Graph:
    layers, heads, size = cache_shape(base)
    ids, mask = torch.zeros(2, 4, dtype=torch.long), torch.ones(2, 7, dtype=torch.long)
    past = [(torch.zeros(2, heads, 3, size), torch.zeros(2, heads, 3, size)) for _ in range(layers)]
    axes = {0: DYNAMIC, 1: DYNAMIC}
    names = [f"{{}}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    with _marked(base, sites):
        model = export(
            _Decoder(base), (ids, mask, past),
            [axes, axes, [({0: DYNAMIC, 2: DYNAMIC},) * 2] * layers],
            ["input_ids", "attention_mask", *(name.format("past_key_values") for name in names)],
            ["logits", *(name.format("present") for name in names)],
        )  # fmt: skip
    return _without_marks(Graph.of(model))


def _built(base: PreTrainedModel, stored: Stored, sites: Sequence[str]) -> Graph:
    """Let onnxruntime-genai build the graph: grouped-query attention, fused norms, no tracing."""
    from onnxruntime_genai.models import builder  # noqa: PLC0415  (only decoders that are built need it; it takes seconds)

    fused = not any(name.endswith((".q_proj", ".k_proj", ".v_proj")) for name in sites)
    options = [f"fuse_qkv={str(fused).lower()}"]
    weights: dict[str, Weight] = {}
    made: list[ir.Model] = []
    register = builder.Model.make_initializer

    def keep(self: Any, tensor: Any, /, name: str, **how: Any) -> None:
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            weights[name] = Deferred(tensor)
        register(self, tensor, name, **how)

    # it takes the weights that are here, and writes no file
    own = {"load_weights": lambda *_: base, "make_initializer": keep, "save_model": lambda it, _: made.append(it.model)}
    with (
        tempfile.TemporaryDirectory() as work, stored.alone() as folder, _replaced(builder.Model, own), quiet(),
        contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()),
    ):  # fmt: skip
        where = ("", str(folder), work, "fp32", "cpu", work)
        try:
            builder.create_model(*where, **builder.parse_extra_options(*where, options))
        except NotImplementedError as error:
            raise ModelError(f"this model cannot be exported: {error}", where=stored.origin) from None
        settings = json.loads((Path(work) / GENAI).read_text(encoding="utf-8"))
    made[0].graph.sort()
    graph = Graph.of(made[0], weights)
    graph.genai = settings
    nodes = {node.name: node for node in graph.nodes}
    consumers = graph.consumers()
    for name in sites:
        wanted = "/" + name.replace(".self_attn.", "/attn/").replace(".mlp.", "/mlp/").replace(
            "model.layers", "model/layers"
        )
        found = nodes.get(f"{wanted}/MatMul")
        if found is None:
            raise ModelError(f"{name} has no counterpart in the exported graph", where=stored.origin)
        y = found.output[0]
        readers = consumers[y]
        if len(readers) == 1 and readers[0].op_type == "Add" and any(i in graph.tensors for i in readers[0].input):
            y = readers[0].output[0]  # the bias
        graph.places[name] = (Place(found.input[0], y),)
    return graph


@contextlib.contextmanager
def _replaced(kind: type[Any], methods: Mapping[str, Any]) -> Iterator[None]:
    """Give a class other methods for a while."""
    before = {name: getattr(kind, name) for name in methods}
    try:
        for name, method in methods.items():
            setattr(kind, name, method)
        yield
    finally:
        for name, method in before.items():
            setattr(kind, name, method)
