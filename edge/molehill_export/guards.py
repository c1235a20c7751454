"""Guards against what cannot be, in a traced graph."""

from __future__ import annotations

import numpy as np
import onnx

from molehill_export.graph import Graph


def drop_nan_guards(graph: Graph) -> int:
    """Let attention go without ``Where(IsNaN(p), 0, p)``, where ``p = Softmax(scores + mask)`` is a number anyway.

    Torch writes it for rows that are masked as a whole by minus infinity, whose softmax is not a number. Where the mask
    is a choice between finite numbers, such a row gets equal parts, guard or not.

    Args:
        graph: Changed in place.

    Returns:
        How many guards there were.
    """
    producers, consumers = graph.producers(), graph.consumers()
    found = 0
    for node in graph.nodes:
        if node.op_type != "Where" or not _is(producers.get(node.input[0]), "IsNaN"):
            continue
        test, p = producers[node.input[0]], node.input[2]
        softmax = producers.get(p)
        if test.input[0] != p or softmax is None or not _is(softmax, "Softmax"):
            continue
        add = producers.get(softmax.input[0])
        if add is not None and _is(add, "Add") and any(_is_finite(graph, producers.get(each)) for each in add.input):
            graph.rewire(node.output[0], p, consumers[node.output[0]])
            found += 1
    graph.drop_unused()
    return found


def _is_finite(graph: Graph, mask: onnx.NodeProto | None) -> bool:
    """Whether a mask is a choice between numbers that are finite."""
    values = [graph.tensors.get(name) for name in mask.input[1:]] if mask is not None and _is(mask, "Where") else []
    return bool(values) and all(value is not None and np.isfinite(np.asarray(value)).all() for value in values)


def _is(node: onnx.NodeProto | None, op: str) -> bool:
    return node is not None and node.op_type == op and not node.domain
