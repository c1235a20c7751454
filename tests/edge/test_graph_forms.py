"""Forms of a graph that compute the same with less."""

from __future__ import annotations

import edge_export
import numpy as np
import onnx
import onnxruntime as ort
import pytest

from molehill_edge.manifest import LOGITS_FROM
from molehill_export import joined
from molehill_export.graph import write_weights
from molehill_export.guards import drop_nan_guards
from molehill_export.head import cut_head
from molehill_export.molora import choose_slots, gate_values, insert


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


def _inserted(architecture, block=128, **molora):
    """The graph of an adapter in 4 bits, opened, and what its experts' file has."""
    keys = {"targets": "all-linear", "scope": "layer", **molora}
    model, section = edge_export.adapted(architecture, **keys)
    base, external, place = edge_export.quantised(architecture, "int4", block)
    graph = base.copy()
    found = insert(graph, model, section.scorer, choose_slots(model, None, 1), "int4")
    graph.tensors.update(gate_values(model, found))
    return model, edge_export.opened(graph, external, place), found, graph


@pytest.mark.parametrize(
    ("architecture", "molora"),
    [
        ("wide", {"experts": 4, "rank": 4}),
        ("wide", {"experts": 4, "rank": 16}),  # two blocks in one product
        ("wide", {"experts": 3, "rank": 3}),  # odd ranks cannot share
        ("wide", {"experts": 7, "rank": 20}),  # more than one block of ranks
        ("wide", {"experts": 3, "rank": 8, "targets": ["q_proj", "v_proj"]}),
        ("wide-qwen2", {"experts": 3, "rank": 8}),
        ("minilm", {"experts": 3, "rank": 8}),
        ("wider", {"experts": 4, "rank": 8, "block": 256}),  # of the base: where 256 do not fit there are blocks of 128
        ("wider", {"experts": 7, "rank": 40, "block": 256}),
    ],
)
def test_experts_inside_the_products_of_the_base_are_those_beside_it(architecture, molora, monkeypatch):
    model, joint, found, _ = _inserted(architecture, **molora)
    ids, mask = edge_export.batch(architecture)
    together = edge_export.exported(joint, ids, mask)
    monkeypatch.setattr(joined, "product_of", lambda *_: None)
    _, apart, beside, _ = _inserted(architecture, **molora)
    assert found.sites == beside.sites
    assert _bytes(found) == _bytes(beside)  # the files are the same; only the graph says where B goes
    assert edge_export.error(edge_export.exported(apart, ids, mask), together) < 0.01
    assert edge_export.error(edge_export.original(model, ids, mask), together) < 0.25


def _bytes(found):
    return {name: value.tobytes() for name, value in found.experts.items()}


def test_a_runtime_puts_them_together_once_when_it_opens_the_graph(tmp_path):
    _, _, _, graph = _inserted("wide-qwen2", experts=4, rank=4)
    layers = sum(node.op_type == "GroupQueryAttention" for node in graph.nodes)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    path = tmp_path / "model.onnx"
    path.write_bytes(graph.model(write_weights(graph.tensors, tmp_path / "base.bin")).SerializeToString())
    ort.InferenceSession(path, options)
    model = onnx.load(tmp_path / "optimised.onnx")
    constant = {tensor.name for tensor in model.graph.initializer}
    products = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    assert all(set(node.input[1:3]) <= constant for node in products)
    # of each layer: queries, keys and values; what follows attention; two and one of the block; and four A
    assert len(products) == layers * (1 + 1 + 2 + 1 + 4)
    attention = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]
    assert [list(node.input[1:3]) for node in attention] == [["", ""]] * layers


@pytest.mark.parametrize("architecture", ["wide", "wide-qwen2"])
def test_attention_without_experts_gets_one_product(architecture):
    graph, external, place = edge_export.quantised(architecture, "int4")
    ids, mask = edge_export.batch(architecture)
    wanted = edge_export.exported(edge_export.opened(graph.copy(), external, place), ids, mask)
    packed = graph.copy()
    assert joined.pack_attention(packed) == 2
    assert (edge_export.exported(edge_export.opened(packed, external, place), ids, mask) == wanted).all()


def test_a_base_in_blocks_of_256_has_half_as_many_scales_and_is_about_as_close():
    ids, mask = edge_export.batch("wider")
    wanted = edge_export.exported(edge_export.opened(edge_export.traced("wider").copy()), ids, mask)
    errors = {}
    for block in (128, 256):
        graph, external, place = edge_export.quantised("wider", "int4", block)
        scales = {name: value.shape for name, value in graph.tensors.items() if name.endswith(".scale")}
        assert {shape[1] for name, shape in scales.items() if "q_proj" in name} == {256 // block}
        assert {shape[1] for name, shape in scales.items() if "down_proj" in name} == {3}  # of 384 inputs
        found = edge_export.exported(edge_export.opened(graph.copy(), external, place), ids, mask)
        errors[block] = edge_export.error(wanted, found)
    assert 0.8 * errors[128] < errors[256] < 1.5 * errors[128] < 0.4
