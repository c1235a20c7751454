"""A bundle opened, closed, and classifying, on ONNX Runtime."""

from __future__ import annotations

import json
import subprocess
import sys
import threading

import edge_graphs
import numpy as np
import pytest
from edge_bundles import make_bundle

from molehill.errors import BundleError
from molehill_edge import classify, golden, routes, tokens
from molehill_edge import manifest as manifests
from molehill_edge.bundle import Bundle
from molehill_edge.trust import InsecureLocal
from molehill_protos.v1.bundle_pb2 import Runtime

TEXTS = ["the film was great", "awful plot", "lovely music and lovely plot", "boring", "the the the"]
TRUST = InsecureLocal(lambda _: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bundles") / "classifier"
    edge_graphs.classifier(path)
    return path


@pytest.fixture
def bundle(folder):
    with Bundle.open(folder, trust=TRUST, threads=1) as opened:
        yield opened


def test_predictions_do_not_depend_on_what_else_is_in_the_batch(bundle):
    together = bundle.classify(TEXTS * 3)
    alone = [bundle.classify([text])[0] for text in TEXTS]
    for i, prediction in enumerate(together):
        assert prediction.label == alone[i % 5].label
        assert prediction.probabilities == pytest.approx(alone[i % 5].probabilities, abs=1e-6)
        assert sum(prediction.probabilities.values()) == pytest.approx(1)
        assert prediction.probability == max(prediction.probabilities.values())
        assert list(prediction.probabilities) == list(edge_graphs.LABELS)
        assert prediction.label == max(prediction.probabilities, key=prediction.probabilities.get)
    assert len({prediction.label for prediction in alone}) > 1


def test_no_text_is_no_prediction(bundle):
    assert bundle.classify([]) == []


def test_batches_hold_all_texts_once_and_little_padding():
    rng = np.random.default_rng(0)
    encoded = [[1] * int(n) for n in rng.integers(1, 400, 60)]
    seen = []
    for rows, ids, mask in classify.batches(encoded, 0):
        seen += rows
        assert ids.shape == mask.shape
        assert ids.size <= 256 or len(rows) == 1
        assert [int(n) for n in mask.sum(1)] == [len(encoded[i]) for i in rows]
    assert sorted(seen) == list(range(60))


def test_a_long_text_is_refused_or_loses_its_end(bundle):
    long = " ".join(["great"] * 30)
    with pytest.raises(BundleError, match="text 2 has 32 tokens, where 12 fit"):
        bundle.classify(["fine", long])
    (cut,) = bundle.encode_all([long], truncate=True)
    assert len(cut) == 12
    assert cut[-1] == 3  # [SEP] stays
    assert bundle.classify([long], truncate=True) == bundle.classify([" ".join(["great"] * 10)])
    with pytest.raises(BundleError, match="32 tokens"):
        bundle.route_report(long)


def test_two_threads_with_two_gates_get_each_its_own(bundle):
    alone = {name: bundle.with_gate(name).classify(TEXTS) for name in ("default", "ann", "bob")}
    assert alone["ann"] != alone["bob"] != alone["default"]
    wrong = []

    def work(name):
        view = bundle.with_gate(name)
        wrong.extend(name for _ in range(50) if view.classify(TEXTS) != alone[name])

    threads = [threading.Thread(target=work, args=(name,)) for name in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_route_report_is_the_mean_over_tokens(bundle):
    text = "the film was great"
    ids = bundle.encode(text)
    weights = bundle.forward(np.array([ids]), np.ones((1, len(ids)), np.int64), ["route.0", "route.1"])
    reports = bundle.route_report(text, per_token=True)
    assert [report.router for report in reports] == ["layers.0.up", "layers.1.up"]
    for report, found in zip(reports, weights, strict=True):
        assert report.experts == ("cats", "dogs", "newts")  # the empty slot is left out
        assert np.allclose(report.shares, found[0].mean(0)[:3])
        assert sum(report.shares) == pytest.approx(1)
        assert list(report.best) == [report.experts[i] for i in found[0].argmax(1)]
    assert bundle.route_report(text)[0].best == ()
    assert routes.usage(bundle.manifest, reports)["cats"] == pytest.approx(np.mean([r.shares[0] for r in reports]))


def test_weights_of_one_route_for_all_tokens_and_of_several_heads(bundle):
    weights = [np.full((1, 1, 2, 4), 0.25, np.float32), np.eye(4, dtype=np.float32)[None]]
    one, other = routes.report(bundle.manifest, weights, 4, per_token=True)
    assert one.shares == (0.25, 0.25, 0.25)
    assert one.best == ("cats",) * 4
    assert other.best == ("cats", "dogs", "newts", "cats")


def test_only_chosen_experts(bundle):
    bundle.choose_experts(["newts"])
    assert all(dict(zip(r.experts, r.shares, strict=True))["newts"] == 1 for r in bundle.route_report("fine"))
    with pytest.raises(BundleError, match=r"no expert 'owls'.*cats, dogs, newts"):
        bundle.choose_experts(["owls"])
    with pytest.raises(BundleError, match=r"leaves router layers.0.up without experts"):
        bundle.choose_experts([])


def test_golden_inputs(folder, tmp_path):
    manifest = edge_graphs.classifier(tmp_path / "own")
    with Bundle.open(tmp_path / "own", trust=TRUST) as bundle:
        assert golden.check(bundle).inputs == 0
        for text in TEXTS:
            ids = bundle.encode(text)
            logits = bundle.logits([ids])[0]
            manifest.golden.add(input_ids=ids, logits=logits, best=int(logits.argmax()))
    edge_graphs.sign(tmp_path / "own", manifest)
    with Bundle.open(tmp_path / "own", trust=TRUST) as bundle:
        found = golden.check(bundle)
        assert (found.inputs, found.agreement, found.passed) == (5, 1, True)
        bundle.swap_gate("ann")
        assert not golden.check(bundle).passed


def test_a_bundle_without_routers(tmp_path):
    edge_graphs.classifier(tmp_path / "plain", routed=False)
    with Bundle.open(tmp_path / "plain", trust=TRUST) as bundle:
        assert bundle.classify(TEXTS) != bundle.with_gate("ann").classify(TEXTS)
        assert bundle.route_report("fine") == []
        with pytest.raises(BundleError, match="no router to fit"):
            bundle.personalise(TEXTS)


def test_a_closed_bundle_says_so(folder):
    bundle = Bundle.open(folder, trust=TRUST)
    view = bundle.with_gate("ann")
    bundle.close()
    with pytest.raises(BundleError, match="the bundle was closed"):
        view.classify(["fine"])
    bundle.close()


def test_the_wrong_kind_of_work(bundle):
    with pytest.raises(BundleError, match="classifies; it does not generate"):
        bundle.generate("x")
    with pytest.raises(BundleError, match="classifies; it does not generate"):
        bundle.chat()


def _resigned(tmp_path, change):
    """A bundle whose files were changed before it was signed."""
    manifest = edge_graphs.classifier(tmp_path / "odd")
    change(tmp_path / "odd")
    edge_graphs.sign(tmp_path / "odd", manifest)
    return tmp_path / "odd"


def test_a_graph_that_runtime_refuses(tmp_path):
    folder = _resigned(tmp_path, lambda path: (path / manifests.GRAPH).write_bytes(b"no graph"))
    with pytest.raises(BundleError, match="ONNX Runtime cannot open the graph"):
        Bundle.open(folder, trust=TRUST)


def test_a_bundle_for_a_newer_runtime_is_refused_before_its_files_are_looked_at(tmp_path):
    make_bundle(tmp_path / "newer", runtime=Runtime(onnxruntime="99.1"))
    (tmp_path / "newer" / manifests.BASE).unlink()
    here = manifests.installed_runtime()
    what = rf"needs onnxruntime 99.1 or newer, and {here} is installed. Run: pip install 'onnxruntime>=99.1'"
    with pytest.raises(BundleError, match=what):
        Bundle.open(tmp_path / "newer", trust=TRUST)


def test_a_graph_that_is_not_what_the_manifest_says(tmp_path):
    manifest = edge_graphs.classifier(tmp_path / "odd")
    manifest.gate.add(name="head/-/head.bias", shape=[3], router=-1, expert_axis=-1)
    manifest.layout = manifests.layout_digest(manifest)
    edge_graphs.write_gate(tmp_path / "odd" / manifests.GATE, manifest)
    edge_graphs.sign(tmp_path / "odd", manifest)
    with pytest.raises(BundleError, match=r"the graph lacks head/-/head.bias"):
        Bundle.open(tmp_path / "odd", trust=TRUST)


def test_a_tokenizer_that_is_none(tmp_path):
    folder = _resigned(tmp_path, lambda path: (path / manifests.TOKENIZER).write_bytes(b"{}"))
    with pytest.raises(BundleError, match=r"tokenizer.json: the tokenizer cannot be read"):
        Bundle.open(folder, trust=TRUST)


def test_a_bundle_beyond_the_memory_allowed(folder):
    with pytest.raises(BundleError, match="may take 100 MB, more than the 64 MB allowed"):
        Bundle.open(folder, trust=TRUST, memory_mb=64)


def test_an_input_beyond_the_memory_allowed(folder):
    with Bundle.open(folder, trust=TRUST, memory_mb=101) as bundle:
        assert bundle.classify(["fine"])
        ids = np.full((64, 40000), 5, np.int64)
        with pytest.raises(BundleError, match="not enough memory for this input"):
            bundle.forward(ids, np.ones_like(ids), ["logits"])
        assert bundle.classify(["fine"])


def test_nothing_heavy_is_imported():
    heavy = {"torch", "transformers", "peft", "flwr", "grpc", "onnx", "pydantic", "typer"}
    code = (
        "import sys, molehill_edge; light = set(sys.modules); import molehill_edge.bundle, molehill_edge.bench;"
        "from molehill_edge import Bundle, InsecureLocal;"
        "print(*({m.split('.')[0] for m in sys.modules}), '/', 'onnxruntime' in light)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    modules, _, early = out.partition("/")
    assert not heavy & set(modules.split())
    assert early.strip() == "False"


def _with_tokenizer(tmp_path, change):
    def write(path):
        made = json.loads((path / manifests.TOKENIZER).read_text())
        change(made)
        (path / manifests.TOKENIZER).write_text(json.dumps(made))

    return _resigned(tmp_path, write)


def test_a_tokenizer_that_panics_is_refused_at_opening(tmp_path, capfd):
    """The library panics, which Python sees as no Exception."""
    odd = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "[X]", "type_id": 0}}], "pair": []}
    folder = _with_tokenizer(tmp_path, lambda made: made.update(post_processor=odd | {"special_tokens": {}}))
    with pytest.raises(BundleError, match=r"tokenizer.json: the tokenizer cannot be read"):
        Bundle.open(folder, trust=TRUST)
    capfd.readouterr()


def test_a_tokenizer_that_fails_later(bundle):
    class Odd:
        def encode(self, *_, **__):
            raise BaseException("called `Option::unwrap()`")  # noqa: TRY002  # like a panic

        encode_batch = to_str = decode = encode

    for use in (
        lambda: tokens.encode(Odd(), "x"),
        lambda: tokens.encode_all(Odd(), ["x"]),
        lambda: tokens.truncated(Odd(), 3),
        lambda: tokens.decode(Odd(), [1]),
    ):
        with pytest.raises(BundleError, match=r"the tokenizer of the bundle fails: called `Option::unwrap\(\)`"):
            use()
    with pytest.raises(BundleError, match="half a character"):
        bundle.classify(["\ud800"])
