"""The head of a language model for the last positions only: nobody reads what it says of the rest of a prompt."""

from __future__ import annotations

import numpy as np

from molehill_edge.manifest import LOGITS_FROM
from molehill_export.graph import Graph

_PRODUCTS = {"MatMul", "MatMulNBits", "MatMulIntegerToFloat"}
_BY_NUMBER = {"Add", "Cast", "Div", "Mul", "Tanh"}  # biases and soft caps, which come after the product
_END = np.iinfo(np.int64).max


def cut_head(graph: Graph) -> bool:
    """Give a decoder's graph the input ``logits_from`` [1], 0 when it is not given: logits begin at that position.

    Negative ones count from the end. What is cut is the input of the product, in whatever it is quantised to: the
    logits that are left are those of the whole.

    Args:
        graph: With the output ``logits``; changed in place.

    Returns:
        Whether the head is a product, and nothing but numbers one by one between it and the logits.
    """
    producers, name = graph.producers(), "logits"
    while (node := producers.get(name)) is not None and node.op_type not in _PRODUCTS:
        computed = [each for each in node.input if each and each not in graph.tensors]
        if node.op_type not in _BY_NUMBER or len(computed) != 1:
            return False
        name = computed[0]
    if node is None:
        return False
    begin = graph.default_input(LOGITS_FROM, np.zeros(1, np.int64))
    bounds = [begin, graph.const([_END], np.int64), graph.const([1], np.int64)]
    node.input[0] = graph.node("Slice", [node.input[0], *bounds])
    return True
