"""The frozen base in fewer bits.

``int8``: activations are quantised as they come (one scale per tensor), weights are signed, with one scale per output:
the form that vector units multiply fastest. An input is quantised once for all products that read it.
``int4``: weights alone, in blocks of 128 inputs or 256; the head of a language model, which decides its quality, in
8 bits. Embeddings have 8 bits per weight in both, and share their bytes with a tied head.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from molehill_edge.quantise import LEVELS8, block_of, pack4
from molehill_export.deferred import Weight
from molehill_export.graph import MICROSOFT, Graph

Scheme = Literal["fp32", "int8", "int4"]
BLOCK = 128
_ACCURACY = 4  # activations of block products in int8; without it the 8-bit product is slower than float32
_SMALLEST = 1 << 14  # weights; below, quantising costs more than it saves
_PART, _COLUMNS = 1 << 18, 16  # weights that are rounded at once, so that they stay in the cache; columns at least


def quantise_base(graph: Graph, scheme: Scheme, head: str = "", largest: int = BLOCK) -> None:
    """Replace the products with weights, and the look-ups in tables, of a graph.

    Args:
        graph: Changed in place.
        scheme: To what.
        head: Name of the output that the head of a language model writes; empty for a classifier.
        largest: Inputs that share a scale in 4 bits, where a weight's are a multiple of so many.
    """
    if scheme == "fp32":
        return
    _plain_gemms(graph)
    consumers = graph.consumers()
    before, graph.nodes = graph.nodes, []
    shared = Activations(graph)
    done: set[int] = set()
    for node in before:
        if id(node) in done:
            continue
        weight = graph.tensors.get(node.input[1]) if len(node.input) > 1 else None
        if node.op_type == "MatMul" and weight is not None and weight.ndim == 2 and weight.size >= _SMALLEST:
            if scheme == "int4":
                bits: Literal[4, 8] = 8 if node.output[0] == head else 4
                block = BLOCK if bits == 8 else largest
                block_product(graph, node.input[0], weight, bits, node.input[1], node.output[0], block)
                continue
            bias, out = "", node.output[0]
            readers = consumers.get(out, [])
            if len(readers) == 1 and readers[0].op_type == "Add":
                add = readers[0]
                other = next((name for name in add.input if name != out), "")
                if other in graph.tensors and graph.tensors[other].ndim == 1:
                    bias, out = other, add.output[0]
                    done.add(id(add))
            q, scale = int8_columns(weight)
            names = graph.weight(f"{node.input[1]}.int8", q), graph.weight(f"{node.input[1]}.scale", scale)
            shared.product(node.input[0], *names, bias=bias, out=out)
        elif _is_lookup(node, graph):
            _lookup(graph, node)
        else:
            graph.nodes.append(node)
    graph.drop_unused()


class Activations:
    """Quantised inputs of int8 products, each made once.

    Args:
        graph: Receives the nodes; inputs that it quantises already are used again.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        found = (node for node in graph.nodes if node.op_type == "DynamicQuantizeLinear")
        self._known = {node.input[0]: list(node.output) for node in found}

    def product(self, x: str, weight: str, scale: str, *, bias: str = "", out: str = "") -> str:
        """``x @ weight * scale + bias`` for an int8 weight; the name of the result."""
        if x not in self._known:
            self._known[x] = self._graph.split("DynamicQuantizeLinear", [x], 3)
        q, s, zero = self._known[x]
        inputs = [q, weight, s, scale, zero, *(["", bias] if bias else [])]
        return self._graph.node("MatMulIntegerToFloat", inputs, domain=MICROSOFT, out=out)


def int8_columns(weight: Weight) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """A weight ``[K, N]`` in int8 and its scales ``[N]``."""
    q, scale = np.empty(weight.shape, np.int8), np.empty(weight.shape[1], np.float32)
    for columns in _parts(weight):
        part = np.asarray(weight[:, columns])
        scale[columns] = np.maximum(np.abs(part).max(0), 1e-20).astype(np.float32) / LEVELS8
        q[:, columns] = np.rint(part / scale[columns])
    return q, scale


def block_product(
    graph: Graph, x: str, weight: Weight, bits: Literal[4, 8], name: str, out: str = "", largest: int = BLOCK
) -> str:
    """``x @ weight`` with weights rounded in blocks along the inputs; the name of the result.

    Args:
        graph: Receives node and weights.
        x: Input.
        weight: ``[K, N]``.
        bits: Per weight.
        name: Of the weight.
        out: Name for the result.
        largest: Inputs of a block, as for `quantise_base`.
    """
    K, N = weight.shape
    block = largest if K % largest == 0 else block_of(K, BLOCK)
    q, scale = _in_blocks(weight, block, bits)
    inputs = [x, graph.weight(f"{name}.int{bits}", q), graph.weight(f"{name}.scale", scale)]
    return graph.node(
        "MatMulNBits",
        inputs,
        domain=MICROSOFT,
        out=out,
        K=K,
        N=N,
        bits=bits,
        block_size=block,
        accuracy_level=_ACCURACY,
    )


def _in_blocks(weight: Weight, block: int, bits: Literal[4, 8]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """A weight ``[K, N]`` as block products and look-ups hold it, and its scales ``[N, K / block]``."""
    made = _blocks4 if bits == 4 else _blocks8
    parts = [made(np.asarray(weight[:, columns]), block) for columns in _parts(weight)]
    q, scale = zip(*parts, strict=True)
    return np.concatenate(q), np.concatenate(scale)


def _parts(weight: Weight) -> list[slice]:
    """Runs of columns of a weight ``[K, N]`` that are rounded together, each about as long as the others."""
    N = weight.shape[1]
    count = max(1, min(weight.size // _PART, N // _COLUMNS))
    ends = [N * part // count for part in range(count + 1)]
    return [slice(start, stop) for start, stop in pairwise(ends)]


def _blocks4(weight: NDArray[Any], block: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """``[N, K / block, block / 2]`` and scales ``[N, K / block]``, the best of a few by squared error."""
    K, N = weight.shape
    padded = np.zeros((-(-K // block) * block, N), np.float32)
    padded[:K] = weight
    blocks = padded.reshape(-1, block, N)
    # the largest value may take the level -8, which has no positive twin
    at = np.abs(blocks).argmax(1, keepdims=True)
    peak = np.take_along_axis(blocks, at, 1)
    best, error = None, None
    for shrink in (1.0, 0.92, 0.84, 0.76):
        scale = peak * np.float32(-shrink / 8)
        scale = np.where(scale == 0, np.float32(1e-20), scale)
        rounded = np.clip(np.rint(blocks / scale), -8, 7)
        loss = np.square(rounded * scale - blocks).sum(1, keepdims=True)
        if best is None or error is None:
            best, error = scale, loss
        else:
            best, error = np.where(loss < error, scale, best), np.minimum(loss, error)
    assert best is not None
    q = np.clip(np.rint(blocks / best), -8, 7).astype(np.int8).reshape(-1, N)
    return pack4(q, block), np.ascontiguousarray(best[:, 0].T)


def _blocks8(weight: NDArray[Any], block: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """``[N, K / block, block]`` around 128 and scales ``[N, K / block]``."""
    K, N = weight.shape
    padded = np.zeros((N, -(-K // block) * block), np.float32)
    padded[:, :K] = weight.T
    blocks = padded.reshape(N, -1, block)
    scale = np.maximum(np.abs(blocks).max(-1, keepdims=True), 1e-20).astype(np.float32) / 127
    return (np.rint(blocks / scale) + 128).astype(np.uint8), scale[..., 0]


def _is_lookup(node: onnx.NodeProto, graph: Graph) -> bool:
    if node.op_type != "Gather" or node.input[0] not in graph.tensors:
        return False
    table = graph.tensors[node.input[0]]
    axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
    whole = table.ndim == 2 and table.dtype == np.float32 and table.shape[1] % block_of(table.shape[1], BLOCK) == 0
    return bool(axis == 0 and whole and table.size >= _SMALLEST)


def _lookup(graph: Graph, node: onnx.NodeProto) -> None:
    table = graph.tensors[node.input[0]]
    block = block_of(table.shape[1], BLOCK)
    q, scale = _in_blocks(table.T, block, 8)
    name = node.input[0]
    inputs = [
        graph.weight(f"{name}.rows8", q.reshape(table.shape)),
        node.input[1],
        graph.weight(f"{name}.scale", scale),
    ]
    graph.node(
        "GatherBlockQuantized", inputs, domain=MICROSOFT, out=node.output[0], bits=8, block_size=block, gather_axis=0,
        quantize_axis=1,
    )  # fmt: skip


def _plain_gemms(graph: Graph) -> None:
    """Write ``Gemm`` with a constant weight as product and sum, and transposed weights as weights."""
    before, graph.nodes = graph.nodes, []
    for node in before:
        if node.op_type == "Transpose" and node.input[0] in graph.tensors and graph.tensors[node.input[0]].ndim == 2:
            graph.weight(node.output[0], graph.tensors[node.input[0]].T)
            continue
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        plain = attributes.get("alpha", 1.0) == 1.0 and attributes.get("beta", 1.0) == 1.0
        if node.op_type != "Gemm" or node.input[1] not in graph.tensors or attributes.get("transA") or not plain:
            graph.nodes.append(node)
            continue
        weight, name = graph.tensors[node.input[1]], node.input[1]
        if attributes.get("transB"):
            name = graph.weight(f"{name}.T", weight.T)
        bias = node.input[2] if len(node.input) > 2 else ""
        y = graph.node("MatMul", [node.input[0], name], out="" if bias else node.output[0])
        if bias:
            graph.node("Add", [y, bias], out=node.output[0])
