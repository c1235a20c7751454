"""Low-rank experts inside the products of a base in 4 bits: ``[x, g (A x)] [W; B]`` is ``x W`` and what they add.

One product streams W and B in one go, where a product and a sum beside it would run cold after every W. On disk W and B
lie apart and are what they are without this: the graph says how they are put together, which a runtime does once, when
it opens the graph, before its kernels pack what they multiply by.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper

from molehill_export.graph import MICROSOFT, Graph

_PRODUCT = "MatMulNBits"
_ZEROS = 0x88  # two weights of zero
_BLOCKS = (128, 256)  # sizes that experts may fill; smaller ones are of inputs too few for them


def product_of(graph: Graph, y: str) -> onnx.NodeProto | None:
    """The product in 4 bits behind a linear's output, where experts can go into it.

    Args:
        graph: A quantised base.
        y: Output of the linear, bias included.

    Returns:
        The node; None where it is another product, or its inputs do not end with a block.
    """
    producers = graph.producers()
    node = producers.get(y)
    if node is not None and node.op_type == "Add":
        computed = [name for name in node.input if name not in graph.tensors]
        node = producers.get(computed[0]) if len(computed) == 1 else None
    if node is None or node.op_type != _PRODUCT or len(node.input) > 3:
        return None
    said = attributes(node)
    fits = said["block_size"] in _BLOCKS and said["K"] % said["block_size"] == 0
    return node if said["bits"] == 4 and fits else None


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """A node's attributes."""
    return {each.name: helper.get_attribute_value(each) for each in node.attribute}


def _blocks(ranks: int, block: int) -> int:
    """How many blocks so many ranks fill."""
    return -(-ranks // block)


def widened(graph: Graph, node: onnx.NodeProto, x: str, h: str, ranks: int) -> str:
    """``[x, h]`` with whole blocks behind x: kernels of some processors want nothing less.

    Args:
        graph: Receives the nodes.
        node: Of `product_of`, that reads it.
        x: ``[..., K]``.
        h: ``[..., ranks]``.
        ranks: Width of h.
    """
    short = -ranks % attributes(node)["block_size"]
    if short % ranks == 0:  # what meets weights of zero may be any number of like size
        return graph.node("Concat", [x, *[h] * (1 + short // ranks)], axis=-1)
    pads, axes = graph.const([0, short], np.int64), graph.const([-1], np.int64)
    return graph.node("Concat", [x, graph.node("Pad", [h, pads, "", axes])], axis=-1)


def join(graph: Graph, node: onnx.NodeProto, x: str, b: str, begin: int, ranks: int) -> None:
    """Put the experts of a linear into its product.

    Args:
        graph: Has the tensors of B, `molehill_protos.v1.bundle_pb2.GEMM_INT4`, all blocks of an output with one scale.
        node: Of `product_of`; changed in place.
        x: Of `widened`.
        b: Name of B.
        begin: Where the linear's ranks begin among those of x; even.
        ranks: All of those of x.
    """
    (rows, *block), scale, said = graph.tensors[b].shape, f"{b}.scale", attributes(node)
    n, size = _blocks(ranks, said["block_size"]), said["block_size"] // 2
    flat = graph.node("Reshape", [b, graph.const([rows, -1], np.int64)])
    ends = [begin // 2, n * size - begin // 2 - math.prod(block)]
    if any(ends):
        pads = graph.const([0, ends[0], 0, ends[1]], np.int64)
        flat = graph.node("Pad", [flat, pads, graph.const(_ZEROS, np.uint8)])
    whole = graph.node("Reshape", [flat, graph.const([rows, n, size], np.int64)])
    scales = graph.node("Gather", [scale, graph.const([0] * n, np.int64)], axis=1)
    node.input[0] = x
    node.input[1] = graph.node("Concat", [node.input[1], whole], axis=1)
    node.input[2] = graph.node("Concat", [node.input[2], scales], axis=1)
    _set(node, K=said["K"] + n * said["block_size"])


def pack_attention(graph: Graph) -> int:
    """Give grouped-query attention its queries, keys and values as one product, where they read one tensor.

    Args:
        graph: A base in 4 bits, with experts or without; changed in place.

    Returns:
        How often that was possible.
    """
    consumers, packed = graph.consumers(), 0
    for attention in [node for node in graph.nodes if node.op_type == "GroupQueryAttention"]:
        outputs = list(attention.input[:3])
        found = [product_of(graph, y) for y in outputs if y]
        nodes = [node for node in found if node is not None]
        if len(nodes) < 3 or any(len(consumers[y]) != 1 for y in outputs) or not _alike(nodes):
            continue
        biases = [_bias(graph, y, node) for y, node in zip(outputs, nodes, strict=True)]
        if any(biases) and not all(biases):
            continue
        said = [attributes(node) for node in nodes]
        inputs = [graph.node("Concat", [node.input[i] for node in nodes], axis=0) for i in (1, 2)]
        both = said[0] | {"N": sum(each["N"] for each in said)}
        y = graph.node(_PRODUCT, [nodes[0].input[0], *inputs], domain=MICROSOFT, **both)
        if all(biases):
            y = graph.node("Add", [y, graph.node("Concat", biases, axis=0)])
        attention.input[0], attention.input[1], attention.input[2] = y, "", ""
        packed += 1
    graph.drop_unused()
    return packed


def share(graph: Graph, nodes: Sequence[onnx.NodeProto], outputs: Sequence[str], sizes: Sequence[int]) -> bool:
    """Whether linears that read one tensor read the ranks of all of them too.

    That spares a split and, for queries, keys and values, all products but one (`pack_attention`). But zeros stand for
    the ranks of the others: more than one block of them costs more than it spares.

    Args:
        graph: A quantised base.
        nodes: Of `product_of`, one a linear.
        outputs: Of the linears.
        sizes: Ranks of each.
    """
    block = attributes(nodes[0])["block_size"]
    more = _blocks(sum(sizes), block) - _blocks(max(sizes), block)
    if any(size % 2 for size in sizes) or more > 1:  # there are two weights to a byte
        return False
    readers = {id(node): node for y in outputs for node in graph.consumers()[y]}
    attention = [set(node.input[:3]) for node in readers.values() if node.op_type == "GroupQueryAttention"]
    return more == 0 or (len(readers) == 1 and attention == [set(outputs)])


def _alike(nodes: Sequence[onnx.NodeProto]) -> bool:
    """Whether products read one tensor in blocks of one size."""
    said = [{**attributes(node), "N": 0, "x": node.input[0]} for node in nodes]
    return all(each == said[0] for each in said)


def _bias(graph: Graph, y: str, node: onnx.NodeProto) -> str:
    """Name of what is added to a product before it is an output; empty for nothing."""
    if y in node.output:
        return ""
    return next(name for name in graph.producers()[y].input if name in graph.tensors)


def _set(node: onnx.NodeProto, **values: int) -> None:
    """Change a node's attributes."""
    for each in node.attribute:
        if each.name in values:
            each.i = values[each.name]
