"""Forms of a graph that compute the same with less."""

from __future__ import annotations

import edge_export
import numpy as np
import pytest

from molehill_edge.manifest import LOGITS_FROM
from molehill_export.guards import drop_nan_guards
from molehill_export.head import cut_head


def _opened(architecture, scheme, change):
    """A session of a base without experts, in fewer bits, after a change."""
    graph, external, place = edge_export.quantised(architecture, scheme)
    graph = graph.copy()
    change(graph)
    return edge_export.opened(graph, external, place)


@pytest.mark.parametrize("scheme", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "tied"])
def test_logits_from_a_position_on_are_those_of_the_whole(architecture, scheme):
    whole = _opened(architecture, scheme, lambda _: None)
    cut = _opened(architecture, scheme, cut_head)
    ids, mask = edge_export.batch(architecture, tokens=40)
    feed = {"input_ids": ids.numpy(), "attention_mask": mask.long().numpy(), **edge_export.no_past(whole, len(ids))}
    wanted = whole.run(["logits"], feed)[0]
    assert (cut.run(["logits"], feed)[0] == wanted).all()
    for begin in (0, 7, 38, -2):
        assert (cut.run(["logits"], {**feed, LOGITS_FROM: np.array([begin])})[0] == wanted[:, begin:]).all()
    last = cut.run(["logits"], {**feed, LOGITS_FROM: np.array([-1])})[0]
    assert last.shape == wanted[:, -1:].shape
    assert np.abs(last - wanted[:, -1:]).max() <= (1e-5 if scheme == "fp32" else 0)


def test_a_head_that_is_no_product_gives_all_logits():
    graph = edge_export.traced("llama").copy()
    graph.node("ReduceSum", [graph.move("logits"), graph.const([0], np.int64)], out="logits")
    assert not cut_head(graph)
    assert LOGITS_FROM not in {value.name for value in graph.inputs}


def _guarded():
    """The encoder with the guards that torch writes, and how many of them."""
    graph = edge_export.traced("minilm").copy()
    assert not any(node.op_type == "IsNaN" for node in graph.nodes)
    softmaxes = [node for node in graph.nodes if node.op_type == "Softmax"]
    for node in softmaxes:
        p = node.output[0]
        readers = graph.consumers()[p]
        zero = graph.const(0, np.float32)
        graph.rewire(p, graph.node("Where", [graph.node("IsNaN", [p]), zero, p]), readers)
    for value in graph.inputs:
        if value.name.startswith("head/"):
            shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
            graph.tensors[value.name] = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return graph, len(softmaxes)


def test_attention_without_the_guard_against_nan_is_the_same_to_the_bit():
    guarded, count = _guarded()
    ids, mask = edge_export.batch("minilm", tokens=24)
    mask[0, 1:] = False
    with_guards = edge_export.exported(edge_export.opened(guarded), ids, mask)
    assert drop_nan_guards(guarded) == count == 6
    assert not any(node.op_type == "IsNaN" for node in guarded.nodes)
    assert (edge_export.exported(edge_export.opened(guarded), ids, mask) == with_guards).all()


def test_a_guard_stays_where_a_row_may_be_masked_by_infinity():
    guarded, _ = _guarded()
    for name, value in guarded.tensors.items():
        if value.shape == () and value.dtype == np.float32 and value < -1e38:
            guarded.tensors[name] = np.float32(-np.inf) * np.ones_like(value)
    assert drop_nan_guards(guarded) == 0
