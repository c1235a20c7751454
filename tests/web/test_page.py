"""The page in a real browser: it answers as Python does, keeps what it needs, and refuses what was changed."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path

import chromium
import edge_graphs
import numpy as np
import pytest

from molehill_edge import Bundle, routes
from molehill_edge import manifest as manifests
from molehill_edge.personalise import _Loss, _targets
from molehill_edge.trust import InsecureLocal
from molehill_web import site

TRUST = InsecureLocal(lambda _: None)
TEXTS = ["the film was great", "awful plots!", "Lovely music, and a lovely plot", "boring", "très borING " * 20, "the"]
MINE = [
    (text, "good" if "film" in text else "odd") for text in (f"{a} {b}" for a in ("the film", "music") for b in "abcde")
]


def write(bundle, out):
    with TRUST.admit(bundle) as admitted:
        return site.of_bundle(admitted, out)


def change_kept(page, name):
    """Change one byte of what the browser keeps under a name."""
    page.do(
        f"""molehill.storage.get({name!r}).then((bytes) => {{
        bytes[bytes.length >> 1] ^= 1;
        return molehill.storage.put({name!r}, bytes);
        }})"""
    )


@pytest.fixture(scope="module")
def classifier(tmp_path_factory, libraries):
    folder = tmp_path_factory.mktemp("classifier")
    edge_graphs.classifier(folder / "bundle", tokenizer=edge_graphs.pieces_tokenizer())
    write(folder / "bundle", folder / "site")
    return folder


@pytest.fixture(scope="module")
def opened(classifier, browser):
    """A page that is open, and the same bundle in Python."""
    server, page = chromium.Server(classifier / "site"), browser.page()
    assert page.open(server.url) == "ready", page.text("#status")
    with Bundle.open(classifier / "bundle", trust=TRUST, threads=1) as bundle:
        yield server, page, bundle
    server.stop()


def ask(page, text):
    """What the page says of a text: label, tokens, probabilities and shares, by its own functions."""
    return page.do(
        f"""(async () => {{
        const {{ classify, routes }} = await import(new URL('js/classify.js', location.href));
        const {{ engine }} = molehill, found = await classify(engine, {json.dumps(text)});
        const {{ ids }} = engine.tokens.whole({json.dumps(text)}, engine.manifest.task.maxLength);
        return {{ ...found, ids, routes: await routes(engine, ids) }};
        }})()"""
    )


@pytest.mark.parametrize("gate", ["default", "ann", "bob"])
def test_it_answers_as_python_does(opened, gate):
    _, page, bundle = opened
    page.fill("#gate", gate)
    page.until(f"molehill.engine.gate.name === {json.dumps('global' if gate == 'default' else gate)}")
    view = bundle.with_gate(gate)
    for text in TEXTS:
        found, (wanted,) = ask(page, text), view.classify([text], truncate=True)
        assert found["ids"] == view.encode_all([text], truncate=True)[0]
        assert found["label"] == wanted.label
        np.testing.assert_allclose(found["probabilities"], list(wanted.probabilities.values()), atol=1e-6)
        reports = view.route_report(text, truncate=True)
        assert [each["experts"] for each in found["routes"]] == [list(each.experts) for each in reports]
        if not found["cut"]:
            np.testing.assert_allclose(
                [each["shares"] for each in found["routes"]], [each.shares for each in reports], atol=1e-6
            )


def test_what_a_visitor_sees(opened):
    _, page, bundle = opened
    page.fill("#gate", "ann")
    page.fill("#text", TEXTS[0])
    page.click("#classify")
    view = bundle.with_gate("ann")
    assert page.there("#label") == view.classify([TEXTS[0]])[0].label
    share = routes.usage(bundle.manifest, view.route_report(TEXTS[0]))["cats"]
    assert f"cats\n{share:.1%}" in page.text("#route")
    page.click("#experts input[value=cats]")  # one that may not be chosen any more
    view.choose_experts(["dogs", "newts"])
    assert page.there("#route", text="cats\n0.0%")
    assert page.text("#label") == view.classify([TEXTS[0]])[0].label
    page.click("#experts input[value=cats]")
    page.fill("#gate", "default")


@pytest.mark.parametrize("labelled", [True, False])
def test_a_gate_is_judged_as_in_python(opened, labelled):
    _, page, bundle = opened
    texts, labels = zip(*MINE, strict=True)
    for gate in ("ann", "bob"):
        page.fill("#gate", gate)
        page.until(f"molehill.engine.gate.name === {gate!r}")
        targets = _targets(bundle.manifest, texts, labels if labelled else None)
        wanted = _Loss(bundle, texts, targets).score(bundle.read_gate(gate))
        found = page.do(
            f"""import(new URL('js/personalise.js', location.href)).then(({{ Loss }}) =>
            new Loss(molehill.engine, {json.dumps([{"text": text, "label": label} for text, label in MINE])},
            {json.dumps(labelled)}).score(molehill.engine.gate))"""
        )
        assert found["loss"] == pytest.approx(wanted.loss, abs=1e-6)
        assert found["accuracy"] == wanted.accuracy


def test_a_gate_that_is_fitted_here_is_one_for_python_too(opened, tmp_path):
    _, page, bundle = opened
    page.fill("#gate", "default")
    for text, label in MINE:
        page.fill("#row-text", text)
        page.fill("#row-label", label)
        page.click("#add")
    page.click("#fit")
    said = page.there("#fitted", text="readings")
    assert "Fitted to 7 texts, judged on 3 held out" in said
    assert "The gate is yours now" in said
    data = page.do(
        """import(new URL('js/gates.js', location.href)).then(({ writeGate }) =>
        btoa(String.fromCharCode(...writeGate(molehill.own, molehill.engine.manifest))))"""
    )
    (tmp_path / "mine.safetensors").write_bytes(base64.b64decode(data))
    mine = bundle.with_gate(tmp_path / "mine.safetensors")
    assert (mine.gate.bias != 0).any() or not mine.gate.mask.all()
    for text in TEXTS:
        assert ask(page, text)["label"] == mine.classify([text], truncate=True)[0].label


def test_it_opens_without_a_network_as_it_was(opened):
    server, page, bundle = opened
    mine = page.do("molehill.engine.gate.name")
    server.stop()
    try:
        assert page.reload() == "ready", page.text("#status")
        assert page.do("molehill.engine.gate.name") == mine  # the visitor's own gate
        assert page.do("crossOriginIsolated")
        page.fill("#gate", "default")
        page.fill("#text", TEXTS[2])
        page.click("#classify")
        assert page.there("#label") == bundle.classify([TEXTS[2]])[0].label
    finally:
        server.start()


@pytest.mark.parametrize("way", ["fetch({0}, {{ mode: 'no-cors' }})", "import({0})"])
def test_it_asks_nobody_else(opened, browser, served, tmp_path, way):
    page = opened[1]
    script = way.format(json.dumps(served(tmp_path).url))
    assert page.do(f"{script}.then(() => 'came', () => 'refused')") == "refused"
    assert {
        url for url in browser.requests if url.startswith("http") and not url.startswith("http://localhost")
    } == set()


@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_a_phone_and_a_desk(opened, width, tmp_path):
    _, page, _ = opened
    page.fill("#text", TEXTS[0])
    page.click("#classify")
    page.there("#label")
    page.picture(tmp_path / "page.png", width)
    assert page.do("document.documentElement.scrollWidth") == width
    heights = page.do("[...document.querySelectorAll('button')].map((each) => each.offsetHeight)")
    assert min(height for height in heights if height) >= 32  # for fingers


def tensors_file(header):
    text = header.encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("name", "data", "what"),
    [
        ("a.txt", b"\xff\xfea", "a.txt is no text in UTF-8."),
        ("a.jsonl", b'{"text": "x", "label": "good"}\n{"text"', "a.jsonl, line 2, is no JSON."),
        ("a.jsonl", b'{"text": "x", "label": "great"}', "a.jsonl, line 1: no label great. There are: bad, good, odd."),
        ("a.jsonl", b'{"text": " "}', 'a.jsonl, line 1, has no "text".'),
        ("a.json", b'[{"text": "x"}]', "a.json is one JSON array: write an object a line."),
        *(
            ("a.safetensors", data, "a.safetensors is damaged, or no file of tensors.")
            for data in (
                b"",
                b"x" * 20,
                tensors_file("null"),
                tensors_file('{"a": {"shape": 3, "data_offsets": [0, 0]}}'),
            )
        ),
        ("a.safetensors", tensors_file("{}"), "a.safetensors: not a gate file."),
        ("a.safetensors", tensors_file('{"__metadata__": null}'), "a.safetensors: not a gate file."),
        ("a.safetensors", tensors_file("{"), "a.safetensors is no JSON."),
    ],
)
def test_files_that_are_none(opened, name, data, what):
    _, page, _ = opened
    accept = ".safetensors" if name.endswith(".safetensors") else ".jsonl,.txt"
    page.give(f"input[accept='{accept}']", name, data)
    place = "[...document.querySelectorAll('.notice.bad')].map((each) => each.innerText).join()"
    page.until(f"({place}).includes({json.dumps(what)})")
    page.do("document.querySelectorAll('.notice').forEach((each) => each.remove())")


def test_rows_of_a_file(opened):
    _, page, _ = opened
    data = b'{"text": "x y", "label": "good"}\r\n\nplain\n{"text": "z", "label": null}\n'
    page.give("input[accept='.jsonl,.txt']", "a.jsonl", data)
    shown = "[...document.querySelectorAll('#rows li')].map((each) => [...each.children].map((part) => part.innerText))"
    page.until(f"({shown}).some(([text]) => text === 'z')")
    assert [row[:2] for row in page.do(shown)][-3:] == [["x y", "good"], ["plain", ""], ["z", ""]]
    for _ in range(3):
        page.click("#rows li:last-child button")


@pytest.mark.parametrize("name", ["mixture", "vectors"])
def test_a_bundle_of_the_first_version(browser, served, tmp_path, name):
    """With a tokenizer that the page has; what its graph computes is what it did."""
    samples = Path(__file__).parents[1] / "samples/format_1"
    said = json.loads((samples / "logits.json").read_text(encoding="utf-8"))
    shutil.copytree(samples / name / "bundle", tmp_path / "bundle")
    manifest, _ = manifests.load(tmp_path / "bundle")
    edge_graphs.pieces_tokenizer().save(str(tmp_path / "bundle" / manifests.TOKENIZER))
    edge_graphs.sign(tmp_path / "bundle", manifest)
    write(tmp_path / "bundle", tmp_path / "site")
    page = browser.page()
    assert page.open(served(tmp_path / "site").url) == "ready", page.text("#status")
    for ids, wanted in zip(said["ids"], said[name]["bundle"], strict=True):
        found = page.do(f"molehill.engine.logits({ids}).then((logits) => [...logits])")
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_names_of_all_kinds(browser, served, tmp_path):
    """Long ones, some that look like HTML, and gates that are called like those of the page."""
    labels = ("<script>alert(1)</script>", "\"quoted\" 'label' & more", "l" * 120)
    long, kinds = "x" * 90, edge_graphs.pieces_tokenizer()
    manifest = edge_graphs.classifier(tmp_path / "bundle", gates=("default", "mine", long), tokenizer=kinds)
    manifest.task.labels[:] = labels
    edge_graphs.sign(tmp_path / "bundle", manifest)
    write(tmp_path / "bundle", tmp_path / "site")
    page = browser.page()
    assert page.open(served(tmp_path / "site").url) == "ready", page.text("#status")
    gates = page.do("[...document.querySelectorAll('#gate option')].map((each) => [each.value, each.textContent])")
    same = "gates/default.safetensors"
    assert sorted(gates) == [["default", "default (global)"], [same, f"{same} (default)"], ["mine", "mine"], [long] * 2]
    page.do("molehill.addGate('my own', molehill.engine.gate)")
    page.fill("#gate", "mine")
    page.until("molehill.engine.gate.name === 'mine'")
    page.fill("#text", TEXTS[0])
    page.click("#classify")
    with Bundle.open(tmp_path / "bundle", trust=TRUST, threads=1) as bundle:
        view = bundle.with_gate(tmp_path / "bundle/gates/mine.safetensors")
        assert page.there("#label") == view.classify([TEXTS[0]])[0].label
    for text in ("the film", "w" * 90):
        page.fill("#row-text", text)
        page.click("#add")
    page.picture(tmp_path / "page.png", 390)
    assert page.do("document.documentElement.scrollWidth") == 390


def test_a_file_that_was_changed_on_the_server_is_refused(classifier, browser, served, tmp_path):
    shutil.copytree(classifier / "site", tmp_path / "site")
    path = tmp_path / "site/bundle/experts.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    page = browser.page()
    assert page.open(served(tmp_path / "site").url) == "refused"
    assert page.text("#status") == "refused a file other than its manifest says: experts.safetensors."


def test_a_page_that_cannot_be_kept_works_and_says_so(classifier, browser, served, tmp_path):
    """Some hosts change what they serve."""
    shutil.copytree(classifier / "site", tmp_path / "site")
    with (tmp_path / "site/style.css").open("a") as file:
        file.write("/* smaller */")
    page = browser.page()
    assert page.open(served(tmp_path / "site").url) == "ready"
    assert page.text("#offline") == "needs the network"


def test_a_file_that_was_changed_in_the_browser_is_refused_and_got_anew(classifier, browser, served):
    page = browser.page()
    assert page.open(served(classifier / "site").url) == "ready"
    (graph,) = (file for file in manifests.load(classifier / "bundle")[0].files if file.path == manifests.GRAPH)
    change_kept(page, f"blob/{graph.sha256.hex()}")
    assert page.reload() == "refused"
    assert "it was changed in this browser" in page.text("#status")
    assert page.reload() == "ready"


def test_a_visitor_removes_all_of_it(classifier, browser, served):
    page = browser.page()
    assert page.open(served(classifier / "site").url) == "ready"
    assert len(page.do("caches.keys()")) == 2
    page.fill("#row-text", "the film")
    page.click("#add")
    assert page.there("#rows", text="the film")
    page.do("document.documentElement.dataset.state = ''")
    page.click("#remove")
    assert page.until("document.documentElement.dataset.state") == "ready"
    assert page.text("#rows") == ""
