"""From a run to a bundle: same bytes twice, the right gate, the right experts, nothing of an owner, and refusals."""

from __future__ import annotations

import dataclasses
import json

import edge_export
import numpy as np
import pytest
import tiny_world
import torch
from typer.testing import CliRunner

from molehill.cli import app
from molehill.errors import AdapterError, BundleError, ConfigError, ModelError
from molehill.tasks.weights import Stored
from molehill.wire.store import load_tree
from molehill_edge import Bundle, InsecureLocal
from molehill_edge import generate as bundle_generate
from molehill_edge import manifest as manifests
from molehill_edge.tensors import read
from molehill_export import trace
from molehill_export.export import Options, export, export_experts, traced
from molehill_simulation.simulate import simulate
from molehill_simulation.source import open_source

TRUST = InsecureLocal(lambda _: None)
TEXTS = ["the scene was very good", "it was a dull page and so poor", "plain author saw all"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A federation of three with gates of their own."""
    folder = tmp_path_factory.mktemp("encoder")
    base = tiny_world.save_base(folder / "base", "bert", hidden_size=32, initializer_range=0.2)
    source = tiny_world.write_rows(folder / "rows.jsonl", tiny_world.rows(90))
    molora = {"targets": "all-linear", "experts": 3, "rank": 2, "scope": "layer", "alpha": 16.0}
    molora["scorer"] = {"name": "linear", "init": "normal", "std": 0.5}
    config = tiny_world.config(
        base, source, molora=molora, personal={"steps": 30, "gate_lr": 0.3, "head_lr": 0.3},
        train={"steps": 20, "lr": 2e-2, "batch_size": 8},
    )  # fmt: skip
    simulate(config, folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def opened(run):
    return open_source(run)


def _causal_run(folder, kind, **sizes):
    base = tiny_world.save_base(folder / "base", kind, **edge_export.SIZES, **sizes)
    source = tiny_world.write_rows(folder / "rows.jsonl", tiny_world.rows(60, "llama"))
    config = tiny_world.config(
        base, source, task={"kind": "causal-lm", "max_length": 48},
        molora={"targets": "all-linear", "experts": 4, "scope": "layer", "rank": 4, "selector": "top_k"},
        train={"steps": 60, "lr": 2e-2, "batch_size": 8},
    )  # fmt: skip
    simulate(config, folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    """A causal run."""
    return _causal_run(tmp_path_factory.mktemp("llama"), "llama", num_key_value_heads=2, head_dim=16)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """The same of a base that is traced."""
    return _causal_run(tmp_path_factory.mktemp("gpt2"), "gpt2", bos_token_id=1, eos_token_id=2)


@torch.no_grad()
def _logits(model, tokenizer, texts):
    rows = []
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        rows.append(edge_export.original(model, ids, torch.ones_like(ids, dtype=torch.bool))[0])
    return np.stack(rows)


def test_two_exports_have_the_same_bytes_and_nothing_of_this_machine(run, opened, tmp_path):
    options = Options(gates=("global", "client-2"), scheme="int8", force=True)
    for name, source in (("one", opened), ("two", open_source(run))):
        trace._cache.clear()
        export(source, tmp_path / name, options)
    found = (tmp_path / "one").rglob("*")
    files = sorted(path.relative_to(tmp_path / "one") for path in found if path.is_file())
    assert [str(path) for path in files] == [
        "base.bin", "experts.safetensors", "gate.safetensors", "gates/client-2.safetensors", "manifest.pb",
        "model.onnx", "tokenizer.json",
    ]  # fmt: skip
    rows = [row["text"].encode() for row in tiny_world.rows(90)]
    for path in files:
        data = (tmp_path / "one" / path).read_bytes()
        assert data == (tmp_path / "two" / path).read_bytes(), path
        assert str(run.parent).encode() not in data, path
        assert b"site-packages" not in data, path
        assert not any(row in data for row in rows), path
    manifest, _ = manifests.load(tmp_path / "one")
    manifests.check_files(tmp_path / "one", manifest)
    assert manifest.created == int(tiny_world.events(run, "end")[-1]["time"])
    assert (manifest.provenance.run, manifest.provenance.rounds) == ("tiny", 2)
    assert manifest.parity.rows > 0


@pytest.mark.parametrize("scheme", ["fp32", "int8"])
def test_gates_of_two_owners_on_one_bundle(opened, tmp_path, scheme):
    source = opened
    names = ("global", "client-1", "client-3")
    export(source, tmp_path / "bundle", Options(gates=names, scheme=scheme, force=True))
    wanted = {}
    for name in names:
        with source.gate(name) as model:
            wanted[name] = _logits(model, source.tokenizer, TEXTS)
    assert np.abs(wanted["client-1"] - wanted["client-3"]).max() > 0.1
    with Bundle.open(tmp_path / "bundle", trust=TRUST, threads=1) as bundle:
        for name in names:
            view = bundle.with_gate("default" if name == "global" else name)
            found = np.concatenate([view.logits([ids]) for ids in view.encode_all(TEXTS)])
            if scheme == "fp32":
                assert np.abs(found - wanted[name]).max() < 1e-4
            labels = [manifests.load(tmp_path / "bundle")[0].task.labels[i] for i in wanted[name].argmax(-1)]
            assert [each.label for each in view.classify(TEXTS)] == labels


def test_a_choice_of_experts_is_the_model_with_the_others_masked(opened, tmp_path):
    source = opened
    export(source, tmp_path / "two", Options(scheme="fp32", experts=("e0", "e2")))
    manifest, _ = manifests.load(tmp_path / "two")
    assert [slot.id for slot in manifest.slots] == ["e0", "e2"]
    with source.gate("global") as model:
        for group in model.routers.values():
            group.overrides.expert_mask = torch.tensor([True, False, True])
        wanted = _logits(model, source.tokenizer, TEXTS)
        for group in model.routers.values():
            group.overrides.expert_mask = None
    with Bundle.open(tmp_path / "two", trust=TRUST, threads=1) as bundle:
        found = np.concatenate([bundle.logits([ids]) for ids in bundle.encode_all(TEXTS)])
    assert np.abs(found - wanted).max() < 1e-4


@pytest.mark.parametrize("scheme", ["fp32", "int8", "int4"])
def test_an_expert_that_is_added_later_is_the_expert_exported_at_once(opened, tmp_path, scheme):
    source = opened
    export(source, tmp_path / "whole", Options(scheme=scheme, force=True))
    export(source, tmp_path / "part", Options(scheme=scheme, experts=("e0", "e1"), spare=1, force=True))
    export_experts(source, tmp_path / "experts")
    texts = TEXTS[:1]
    with Bundle.open(tmp_path / "whole", trust=TRUST, threads=1) as bundle:
        wanted = bundle.logits(bundle.encode_all(texts))
    with Bundle.open(tmp_path / "part", trust=TRUST, threads=1) as bundle:
        before = bundle.logits(bundle.encode_all(texts))
        bundle.add_expert(tmp_path / "experts" / "e2.expert.safetensors")
        found = bundle.logits(bundle.encode_all(texts))
    # the scale per output was chosen without the new expert, so rounding differs a little
    assert np.abs(found - wanted).max() < {"fp32": 1e-5, "int8": 0.05, "int4": 0.5}[scheme] * np.abs(wanted).max()
    assert np.abs(found - wanted).max() < np.abs(before - wanted).max() or scheme == "int4"


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """A federation of bottlenecks of two widths under a router, whose changes travel as int4."""
    folder = tmp_path_factory.mktemp("bottlenecks")
    base = tiny_world.save_base(folder / "base", "bert", hidden_size=32, initializer_range=0.2)
    source = tiny_world.write_rows(folder / "rows.jsonl", tiny_world.rows(90))
    molora = {"preset": "houlsby", "experts": 3, "rank": 3, "selector": {"name": "dense"}, "scope": "layer",
              "allocation": {"name": "hetero_rank", "kind": "explicit", "ranks": [2, 3, 4]}}  # fmt: skip
    config = tiny_world.config(
        base, source, molora=molora, wire={"up": "int4"}, train={"steps": 20, "lr": 2e-2, "batch_size": 8}
    )
    simulate(config, folder / "run")
    return folder / "run"


def test_experts_of_another_kind_go_all_the_way(others, tmp_path):
    """Trained, sent as int4, merged, saved, read again, exported, and added on a device."""
    before, after = (load_tree(others / f"{moment}.safetensors")[0] for moment in ("initial", "final"))
    moved = {key.role for key in after if key.kind == "dense" and np.abs(after[key] - before[key]).max() > 1e-3}
    assert moved == {"dense.down", "dense.bias", "dense.up", "dense.shift"}
    assert not any(key.kind in "AB" for key in after)
    source = open_source(others)
    for key, value in source.model.tree(lambda key: key.kind == "dense").items():
        np.testing.assert_array_equal(value, after[key])
    export(source, tmp_path / "whole", Options(scheme="int8", force=True))
    export(source, tmp_path / "part", Options(scheme="int8", experts=("e0", "e2"), spare=1, force=True))
    export_experts(source, tmp_path / "experts")
    assert manifests.load(tmp_path / "whole")[0].quantisation.experts == "fp32"  # as they are stored
    with source.gate("global") as model:
        original = _logits(model, source.tokenizer, TEXTS[:1])
    with Bundle.open(tmp_path / "whole", trust=TRUST, threads=1) as bundle:
        wanted = bundle.logits(bundle.encode_all(TEXTS[:1]))
    assert np.abs(wanted - original).max() < 0.05 * np.abs(original).max()
    with Bundle.open(tmp_path / "part", trust=TRUST, threads=1) as bundle:
        ids = bundle.encode_all(TEXTS[:1])
        alone = bundle.logits(ids)
        with pytest.raises(BundleError, match=r"dense\.\w+ of .* has shape"):  # its width is 3, the slot's 4
            bundle.add_expert(tmp_path / "experts" / "e1.expert.safetensors")
        bundle.remove_expert("e2")
        assert np.abs(bundle.logits(ids) - alone).max() > 1e-3
        bundle.add_expert(tmp_path / "experts" / "e2.expert.safetensors")
        assert np.array_equal(bundle.logits(ids), alone)


def test_tensors_of_all_experts_are_trained_sent_and_exported(tmp_path):
    base = tiny_world.save_base(tmp_path / "base", "bert", hidden_size=32, initializer_range=0.2)
    source = tiny_world.write_rows(tmp_path / "rows.jsonl", tiny_world.rows(90))
    molora = {"preset": "mumoe", "experts": 5, "rank": 4}
    train = {"steps": 20, "lr": 2e-2, "batch_size": 8}
    simulate(tiny_world.config(base, source, molora=molora, train=train), tmp_path / "run")
    before, after = (load_tree(tmp_path / f"run/{moment}.safetensors")[0] for moment in ("initial", "final"))
    moved = {(key.expert, key.role) for key in after if np.abs(after[key] - before[key]).max() > 1e-3}
    assert moved >= {("-", "dense.down"), ("-", "dense.up"), *((f"e{e}", "dense.f") for e in range(5))}
    source = open_source(tmp_path / "run")
    for key, value in source.model.tree(lambda key: key.kind == "dense").items():
        np.testing.assert_array_equal(value, after[key])
    export(source, tmp_path / "bundle", Options(scheme="fp32", experts=("e0", "e3"), force=True))
    with source.gate("global") as model:
        for group in model.routers.values():
            group.overrides.expert_mask = torch.tensor([True, False, False, True, False])
        wanted = _logits(model, source.tokenizer, TEXTS[:1])
    with Bundle.open(tmp_path / "bundle", trust=TRUST, threads=1) as bundle:
        found = bundle.logits(bundle.encode_all(TEXTS[:1]))
    assert np.abs(found - wanted).max() < 1e-4
    with pytest.raises(ModelError, match="none can be added to another bundle"):
        export_experts(source, tmp_path / "experts")


def test_accuracy_and_command_line(run, tmp_path):
    done = CliRunner().invoke(
        app, ["export", str(run), "--out", str(tmp_path / "b.molehill"), "--quantize", "fp32", "--json"]
    )
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["parity"]["accuracy_original"] == told["parity"]["accuracy_bundle"]
    assert told["parity"]["agreement"] == 1
    assert told["parity"]["rows"] > 10
    with Bundle.open(tmp_path / "b.molehill", trust=TRUST, threads=1) as bundle:
        assert bundle.classify(TEXTS[:1])[0].label in tiny_world.LABELS
    again = CliRunner().invoke(app, ["export", str(run), "--out", str(tmp_path / "b.molehill")])
    assert again.exit_code == ConfigError.exit_code
    done = CliRunner().invoke(app, ["export", str(run), "--out", str(tmp_path / "c"), "--gate", "nobody"])
    assert done.exit_code == ConfigError.exit_code
    assert "client-1, client-2, client-3" in done.stderr.replace("\n", " ")
    assert not (tmp_path / "c").exists()


def test_an_adapter_alone_needs_its_base(run, opened, tmp_path):
    with pytest.raises(AdapterError, match="--base"):
        open_source(run / "adapter")
    base = run.parent / "base"
    source = open_source(run / "adapter", str(base))
    source.made["graph"] = traced(opened)  # of the same base
    manifest = export(source, tmp_path / "bundle", Options(scheme="fp32"))
    assert manifest.created == 0
    with source.gate("global") as model:
        wanted = _logits(model, source.tokenizer, TEXTS)
    with Bundle.open(tmp_path / "bundle", trust=TRUST, threads=1) as bundle:
        assert np.abs(bundle.logits(bundle.encode_all(TEXTS)[:1]) - wanted[:1]).max() < 1e-4
    other = tiny_world.save_base(tmp_path / "other", "bert", 5, hidden_size=32)
    with pytest.raises(AdapterError, match="weight digest"):
        open_source(run / "adapter", str(other))


def test_rows_that_are_gone_cost_the_accuracy_only(run, opened, tmp_path, caplog):
    rows = run.parent / "rows.jsonl"
    kept = rows.rename(rows.with_suffix(".away"))
    try:
        manifest = export(opened, tmp_path / "bundle", Options(scheme="fp32"))
    finally:
        kept.rename(rows)
    assert manifest.parity.rows == 0
    assert "nothing is measured, since the rows of the run are not here" in caplog.text


def test_what_clients_keep_is_not_shipped_as_global(opened, tmp_path):
    source = open_source(opened.out / "adapter", str(opened.stored.folder))
    assert source.adapter.personal == {"gate": "anchored", "head": "anchored"}
    for part in ("gate", "head"):
        personal = {**source.adapter.personal, part: "personal"}
        other = dataclasses.replace(source, adapter=source.adapter.model_copy(update={"personal": personal}))
        with pytest.raises(ConfigError, match="all share"):
            export(other, tmp_path / "bundle")


def test_a_window_limits_the_context(tmp_path):
    from transformers import MistralConfig, Qwen2Config

    from molehill.tasks.devices import window
    from molehill_export.base import decoder

    settings = MistralConfig(**tiny_world.SIZES | edge_export.SIZES, sliding_window=24)
    assert window(settings) == 24
    assert window(Qwen2Config(**tiny_world.SIZES)) is None
    slides = Qwen2Config(**tiny_world.SIZES, use_sliding_window=True, sliding_window=24, max_window_layers=0)
    with pytest.raises(ModelError, match="slides over a window"):
        decoder(type("Base", (), {"config": slides})(), Stored(tmp_path, "qwen", {}, ()), [])


def test_a_bundle_that_differs_is_refused_unless_forced(opened, tmp_path, monkeypatch):
    from molehill_export import parity

    monkeypatch.setitem(parity.FLOORS, "int4", (1e-9, 0.99))
    source = opened
    with pytest.raises(BundleError, match=r"differs too much.*--force"):
        export(source, tmp_path / "bundle", Options(scheme="int4"))
    assert list(tmp_path.iterdir()) == []
    assert export(source, tmp_path / "bundle", Options(scheme="int4", force=True)).parity.logit_error > 1e-9


def test_what_cannot_be_exported(run, writer, tmp_path):
    source = open_source(run)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for options, out, words in (
        (Options(), tmp_path / "full", "something already"),
        (Options(experts=("e9",)), tmp_path / "a", "no expert 'e9'"),
        (Options(experts=()), tmp_path / "a", "no routed expert"),
        (Options(gates=("../x",)), tmp_path / "a", "no personal gate of"),
        (Options(gates=("client-1", "client-1")), tmp_path / "a", "twice"),
        (Options(id="a b"), tmp_path / "a", "cannot name a bundle"),
        (Options(block=256), tmp_path / "a", "only int4 has blocks"),
        (Options(expires=1), tmp_path / "a", "expired already"),
    ):
        with pytest.raises(ConfigError, match=words):
            export(source, out, options)
    causal = open_source(writer)
    router = next(iter(causal.model.routers.values())).router
    router.selector = type("Late", (), {"causal": False, "eval_form": lambda self: self})()
    with pytest.raises(ConfigError, match="later tokens"):
        export(causal, tmp_path / "a")
    with pytest.raises(AdapterError, match="no adapter"):
        open_source(tmp_path / "nothing")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


@pytest.mark.parametrize("kind", ["writer", "gpt2"])
def test_a_causal_bundle_writes_what_torch_writes_and_runs_in_genai(kind, request, tmp_path, monkeypatch):
    source = open_source(request.getfixturevalue(kind))
    export(source, tmp_path / "bundle", Options(scheme="fp32"))
    with Bundle.open(tmp_path / "bundle", trust=TRUST, threads=1) as bundle:
        ids = bundle.encode("the scene was very good")
    if kind == "writer":
        prompt = source.tokenizer.apply_chat_template(
            [{"role": "user", "content": "the scene was very good"}], add_generation_prompt=True, tokenize=False
        )
        assert source.tokenizer(prompt, add_special_tokens=False)["input_ids"] == ids
    wanted, eos = list(ids), source.tokenizer.eos_token_id
    with source.gate("global") as model:
        while len(wanted) < 60 and wanted[-1] != eos:
            row = torch.tensor([wanted])
            wanted.append(int(edge_export.original(model, row, torch.ones_like(row, dtype=torch.bool))[-1].argmax()))
    with Bundle.open(tmp_path / "bundle", trust=TRUST, threads=1) as bundle:
        answer = bundle.generate("the scene was very good", max_new_tokens=60 - len(ids))
        assert answer.text == source.tokenizer.decode(wanted[len(ids) :], skip_special_tokens=True)
        assert answer.tokens == len(wanted) - len(ids)
        row = np.array([wanted])
        last = bundle.forward(row, np.ones_like(row), ["logits"])[0][0, -1]
        monkeypatch.setattr(bundle_generate, "_CHUNK", 7)
        assert manifests.LOGITS_FROM in bundle._engine.session.overridable
        assert np.abs(bundle.read(bundle.cache(), wanted) - last).max() < 1e-4
    assert _genai(tmp_path / "bundle", ids, 60) == [token for token in wanted if token != eos]


def _genai(folder, ids, length):
    """The likeliest tokens from these on, as onnxruntime-genai finds them."""
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=length, do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(np.array([ids], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [*generator.get_sequence(0)]


@pytest.mark.parametrize(("block", "by_places"), [(128, False), (256, True)])
def test_genai_puts_experts_into_products_as_we_do(block, by_places, tmp_path):
    molora = {"targets": "all-linear", "experts": 4, "rank": 4, "scope": "layer"}
    edge_export.write(tmp_path / "bundle", "bytes", "int4", block, router_ranks=by_places, **molora)
    assert edge_export.joined(tmp_path / "bundle") == 2 * 7  # every linear of its layers
    with Bundle.open(tmp_path / "bundle", trust=TRUST, threads=1) as bundle:
        wanted = ids = bundle.encode("Tell me more")
        cache = bundle.cache()
        while len(wanted) < len(ids) + 40:
            wanted = [*wanted, int(bundle.read(cache, wanted).argmax())]
    assert _genai(tmp_path / "bundle", ids, len(wanted)) == wanted


def test_a_device_stops_where_the_template_ends_an_answer(writer):
    source = open_source(writer)
    user, eos = source.tokenizer.convert_tokens_to_ids(["<|user|>", "</s>"])
    assert source.ends() == [eos]
    source.tokenizer.chat_template = source.tokenizer.chat_template.replace("eos_token", "'<|user|>'")
    assert source.ends() == sorted([eos, user])


def test_spare_slots_change_nothing(writer, tmp_path):
    source = open_source(writer)
    found = []
    for name, spare in (("none", 0), ("two", 2)):
        options = dataclasses.replace(Options(scheme="fp32"), spare=spare)
        export(source, tmp_path / name, options)
        with Bundle.open(tmp_path / name, trust=TRUST, threads=1) as bundle:
            ids = np.array([[5, 9, 17, 21]])
            found.append(bundle.forward(ids, np.ones_like(ids), ["logits"])[0])
    assert np.abs(found[0] - found[1]).max() < 1e-5
    experts, about = read(tmp_path / "two" / manifests.EXPERTS)
    assert about["kind"] == "experts"
    assert any(not np.any(value) for value in np.split(experts[min(experts)], 6, axis=-1))
