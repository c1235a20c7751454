"""What an export holds in memory changes nothing of what it writes."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import shutil
import tempfile
from types import SimpleNamespace

import edge_export
import numpy as np
import onnx
import pytest
import tiny_models
import tiny_world
import torch
import transformers
from typer.testing import CliRunner

from molehill import config
from molehill.cli import app
from molehill.errors import DeployError
from molehill.molora.adapter import Manifest, save_adapter
from molehill.molora.build import wrap
from molehill.outputs import READINGS
from molehill.tasks import base_model
from molehill.tasks.base_model import load_base
from molehill.tasks.batches import Example
from molehill.tasks.streamed import stream
from molehill.tasks.weights import look_up
from molehill_edge import manifest as manifests
from molehill_edge.manifest import GRAPH
from molehill_export import base_quantise, parity
from molehill_export.base import decoder, is_built
from molehill_export.deferred import Deferred
from molehill_export.export import Options, export, export_experts
from molehill_export.gguf_lora import Wanted, export_lora
from molehill_export.trace import quiet
from molehill_simulation.source import open_source

TASK = config.Task(kind="causal-lm", max_length=32)


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


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A folder with an adapter of a Llama in bfloat16, and its base."""
    folder = tmp_path_factory.mktemp("lean")
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 256}
    path = tiny_world.save_base(folder / "base", "llama", **sizes, initializer_range=0.1)
    transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).save_pretrained(path)
    loaded = load_base(config.Base(model=str(path), precision="fp32", device="cpu"), TASK)
    section = config.parse({"molora": {"targets": "all-linear", "experts": 3, "rank": 2, "scope": "layer"}}).molora
    model = tiny_models.shake(wrap(loaded.model, section), scale=0.05)
    about = {"id": str(path), "digest": loaded.info.digest}
    save_adapter(folder / "adapter", model, Manifest(base=about, task="causal-lm", molora=section, ranks={}))
    return folder


def test_weights_that_stay_in_their_files_give_the_same_bundle(adapter, tmp_path):
    told = []
    for name, streamed in (("loaded", False), ("lean", True)):
        source = open_source(
            adapter / "adapter", str(adapter / "base"), streamed=is_built if streamed else lambda _: False
        )
        assert ({each.dtype for each in source.model.base.lm_head.parameters()} == {torch.bfloat16}) == streamed
        steps = []
        export(source, tmp_path / name, Options(scheme="int4", id="one", force=True), progress=steps.append)
        told.append([step for step in steps if step.startswith("Writing")])
    loaded, lean = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("loaded", "lean")
    )
    assert loaded == lean
    assert told[1][0].startswith(f"Writing 0 MB to {tmp_path / '.lean.'}")
    runner, ids = parity.Runner(tmp_path / "lean" / GRAPH, manifests.load(tmp_path / "lean")[0]), [5, 9, 17, 21, 8]
    np.testing.assert_array_equal(runner(ids, 3)[0], runner(ids)[0][3:])


def test_a_lora_for_llama_cpp_is_made_of_weights_that_stay_in_their_files(adapter, tmp_path, monkeypatch):
    streamed = []
    monkeypatch.setattr(base_model, "stream", lambda *given: streamed.append(stream(*given)) or streamed[-1])
    words = ["export", str(adapter / "adapter"), "--base", str(adapter / "base"), "--force"]
    done = CliRunner().invoke(app, [*words, "--gguf", str(tmp_path / "lean.gguf"), "--gate", "global"])
    assert done.exit_code == 0, done.output
    assert streamed == [True]
    source = open_source(adapter / "adapter", str(adapter / "base"))
    export_lora(source, tmp_path / "loaded.gguf", Wanted(gate="global", force=True))
    assert (tmp_path / "lean.gguf").read_bytes() == (tmp_path / "loaded.gguf").read_bytes()


@torch.no_grad()
def test_rows_are_right_where_their_labels_are_predicted(adapter):
    source = open_source(adapter / "adapter", str(adapter / "base"))
    texts = [[5, 9, 17, 21, 8], [3, 4], [7, 7, 7, 12, 6, 1], [30, 2, 11]]
    best = [source.model.base(input_ids=torch.tensor([ids])).logits[0].argmax(-1).tolist() for ids in texts]
    said = [best[0][1], (best[1][0] + 1) % 64, best[2][4], best[3][1]]  # of a position each; the second is wrong
    labels = [[-100, -100, said[0], -100, 63], [-100, said[1]], [*[-100] * 5, said[2]], [-100, 63, said[3]]]
    rows = [Example(*pair) for pair in zip(texts, labels, strict=True)]
    reading = READINGS["causal-lm"]
    right = 3 + (best[0][3] == 63) + (best[3][0] == 63)
    assert parity.originals(source.model, [], rows, reading).counts.tolist() == [right, 6]

    def runner(ids, begin):
        return source.model.base(input_ids=torch.tensor([ids])).logits[0, begin:].numpy(), []

    assert np.sum([parity._of_bundle(runner, row, reading) for row in rows], 0).tolist() == [right, 6]


@pytest.mark.parametrize("stage", ["Quantising", "Writing", "Comparing"])
def test_an_export_that_is_broken_off_leaves_nothing(adapter, tmp_path, monkeypatch, stage):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))

    def stop(step):
        if step.startswith(stage):
            raise KeyboardInterrupt

    source = open_source(adapter / "adapter", str(adapter / "base"), streamed=is_built)
    with pytest.raises(KeyboardInterrupt):
        export(source, tmp_path / "out" / "bundle", Options(force=True), progress=stop)
    assert [path.name for path in tmp_path.rglob("*")] == ["tmp", "out"]


@contextlib.contextmanager
def full_disk(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=1, free=0))
        yield


def test_what_there_is_no_room_for_is_not_written(adapter, tmp_path, monkeypatch):
    source = open_source(adapter / "adapter", str(adapter / "base"), streamed=is_built)

    def needed(name, **options):
        with full_disk(monkeypatch), pytest.raises(DeployError) as caught:
            export(source, tmp_path / name, Options(scheme="int4", force=True, **options))
        assert not list(tmp_path.iterdir())
        words = rf"{tmp_path}: the export needs ([\d,]+) bytes, and 0 are free\. Make room, or write to another disk\."
        return int(re.fullmatch(words, str(caught.value))[1].replace(",", ""))

    one, files, both = needed("b"), needed("b.molehill"), needed("b", expert_files=tmp_path / "e")
    export(source, tmp_path / "b", Options(scheme="int4", force=True, expert_files=tmp_path / "e"))
    bundle, experts = (sum(path.stat().st_size for path in (tmp_path / name).iterdir()) for name in ("b", "e"))
    assert files == 2 * one
    assert bundle < one < bundle + (8 << 20)
    assert experts < both - one < 2 * experts
    assert sorted(path.name for path in (tmp_path / "e").iterdir()) == [f"e{i}.expert.safetensors" for i in range(3)]
    with full_disk(monkeypatch), pytest.raises(DeployError, match=f"{tmp_path / 'f'}: the export needs"):
        export_experts(source, tmp_path / "f")
    assert not (tmp_path / "f").exists()


def test_a_disk_that_is_full_before_its_time_is_told_and_left_as_it_was(adapter, tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    words = ["export", str(adapter / "adapter"), "--base", str(adapter / "base"), "--out", str(tmp_path / "b")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 11
    said = f"error: {tmp_path / 'b'}: the system refuses it: No space left on device. Make room on that disk."
    assert done.stderr.strip() == said
    source = open_source(adapter / "adapter", str(adapter / "base"), streamed=is_built)
    with pytest.raises(OSError, match="No space left") as caught:
        export_experts(source, tmp_path / "e")
    assert caught.value.filename == str(tmp_path / "e")
    assert [path.name for path in tmp_path.rglob("*")] == ["e"]


def test_texts_at_once_are_answered_as_one_by_one(adapter, monkeypatch):
    model = open_source(adapter / "adapter", str(adapter / "base")).model
    texts = [[5, 9, 17, 21, 8], [3, 4], [7, 7, 7], [30, 2, 11, 6]]
    reading = READINGS["causal-lm"]
    together = parity.originals(model, texts, [], reading).answers
    assert len(parity.passes(model, [len(ids) for ids in texts])) == 1
    monkeypatch.setattr(parity, "_TOGETHER", (1, 1 << 25))
    assert [len(run) for run in parity.passes(model, [len(ids) for ids in texts])] == [1] * 4
    for (logits, routes), (one, its) in zip(together, parity.originals(model, texts, [], reading).answers, strict=True):
        np.testing.assert_allclose(logits, one, atol=1e-5)
        for each, other in zip(routes, its, strict=True):
            np.testing.assert_allclose(each, other, atol=1e-5)
            assert each.shape == other.shape
