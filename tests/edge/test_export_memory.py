"""What an export holds in memory changes nothing of what it writes."""

from __future__ import annotations

import contextlib
import io

import edge_export
import numpy as np
import onnx
import pytest
import torch

from molehill.tasks.weights import look_up
from molehill_export import base_quantise
from molehill_export.base import decoder
from molehill_export.deferred import Deferred
from molehill_export.trace import quiet


@pytest.mark.parametrize("family", ["llama", "tied", "qwen2"])
def test_a_built_graph_is_the_one_that_the_builder_writes(family, tmp_path):
    from onnxruntime_genai.models import builder

    folder = str(edge_export.folder(family))
    where = ("", folder, str(tmp_path), "fp32", "cpu", str(tmp_path))
    with quiet(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        builder.create_model(*where, **builder.parse_extra_options(*where, ["fuse_qkv=false"]))
    wanted = onnx.load(tmp_path / "model.onnx").graph
    sites = ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"]
    found = decoder(edge_export.base(family), look_up(edge_export.folder(family), family), sites)
    assert [(node.name, node.op_type, list(node.input), list(node.output)) for node in found.nodes] == [
        (node.name, node.op_type, list(node.input), list(node.output)) for node in wanted.node
    ]
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in wanted.initializer}
    assert values.keys() == found.tensors.keys()
    for name, value in values.items():
        np.testing.assert_array_equal(np.asarray(found.tensors[name]), value, err_msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_rounded_in_parts_are_those_rounded_at_once(dtype, monkeypatch):
    tensor = torch.randn(210, 150, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight, whole = Deferred(tensor.T), tensor.float().numpy().T
    assert (weight.shape, weight.size, weight.nbytes) == (whole.shape, whole.size, whole.nbytes)
    np.testing.assert_array_equal(np.asarray(weight[3:9, 100:]), whole[3:9, 100:])
    wanted = [base_quantise.int8_columns(whole), *(base_quantise._in_blocks(whole, 128, bits) for bits in (4, 8))]
    assert len(base_quantise._parts(weight)) == 1
    monkeypatch.setattr(base_quantise, "_PART", 4000)
    assert len(base_quantise._parts(weight)) == 7
    found = [base_quantise.int8_columns(weight), *(base_quantise._in_blocks(weight, 128, bits) for bits in (4, 8))]
    for pair, other in zip(wanted, found, strict=True):
        for one, two in zip(pair, other, strict=True):
            np.testing.assert_array_equal(one, two)
