"""Conversations in a real browser: the same tokens as Python's, piece by piece."""

from __future__ import annotations

import json
import shutil

import chromium
import edge_export
import edge_graphs
import numpy as np
import onnx
import pytest

from molehill_edge import Bundle
from molehill_edge import manifest as manifests
from molehill_edge.personalise import _Loss
from molehill_edge.trust import InsecureLocal
from molehill_web import site

TRUST = InsecureLocal(lambda _: None)
SAYS = "naïve €ur0s:5\N{CAT}!"  # no byte twice
KINDS = {
    "chat": {"template": edge_graphs.CHATML},
    "alpaca": {"shared": True, "max_length": 1024},
    "parrot": {"says": SAYS},
}


@pytest.fixture(scope="module", params=KINDS)
def opened(request, tmp_path_factory, libraries, browser):
    folder = tmp_path_factory.mktemp(request.param)
    edge_graphs.causal(folder / "bundle", **KINDS[request.param])
    with TRUST.admit(folder / "bundle") as admitted:
        site.of_bundle(admitted, folder / "site")
    server, page = chromium.Server(folder / "site"), browser.page()
    assert page.open(server.url) == "ready", page.text("#status")
    with Bundle.open(folder / "bundle", trust=TRUST, threads=1) as bundle:
        yield request.param, page, bundle
    server.stop()


def say(page, text, how):
    """What the page's own conversation answers, in pieces, by its functions."""
    return page.do(
        f"""(async () => {{
        const pieces = [];
        for await (const piece of globalThis.chat.say({json.dumps(text)}, {json.dumps(how)})) pieces.push(piece);
        return pieces;
        }})()"""
    )


def test_a_conversation_is_that_of_python(opened):
    kind, page, bundle = opened
    page.do(
        """Promise.all(['js/generate.js', 'js/prompts.js', 'vendor/jinja/index.js'].map((path) =>
        import(new URL(path, location.href)))).then(([{ Chat }, { Prompts }, { Template }]) => {
        const { engine } = molehill;
        globalThis.chat = new Chat(engine, new Prompts(engine.manifest.task.generation, Template));
        })"""
    )
    most = 12 if kind == "chat" else 24
    chat = bundle.chat(system="Be brief.")
    for text in ("Hello", "  And then?\n"):
        pieces = say(page, text, {"system": "Be brief.", "maxNewTokens": most})
        wanted = chat.say(text, max_new_tokens=most)
        assert "".join(pieces) == wanted.text
        assert page.do("globalThis.chat.cache.ids.length") >= wanted.prompt_tokens
        if kind == "parrot":
            assert wanted.text == SAYS
            assert pieces == list(SAYS)  # whole characters, as they come


def test_a_cache_is_checked_as_well(opened):
    _, page, bundle = opened
    ids = bundle.encode("Hello", raw=True)
    both = page.do(
        f"""Promise.all([molehill.engine.logits({ids}), molehill.engine.logitsAfterCache({ids})]).then((both) =>
        both.map((logits) => [...logits]))"""
    )
    wanted = bundle.read(bundle.cache(), ids)
    for logits in both:
        np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-4)


def test_a_visitor_talks(opened):
    _, page, bundle = opened
    page.fill("#most", "8")
    page.fill("#text", "Hello")
    page.click("#send")
    page.there("#route")
    assert page.text(".turn.user") == "Hello"
    wanted = bundle.chat().say("Hello", max_new_tokens=8).text
    assert page.do("document.querySelector('.turn.assistant').textContent") == wanted
    page.fill("#temperature", "-1")
    page.fill("#text", "And then?")
    page.click("#send")
    page.there("section.first", text="Temperature: a number from 0 to 2.")
    assert page.do("document.querySelector('#text').value") == "And then?"
    page.fill("#temperature", "0")
    page.click("#fresh")
    assert page.text("#talk") == ""
    if opened[0] == "chat":  # which has much to say
        page.fill("#most", "200")
        page.fill("#text", "Hello")
        page.click("#send")
        page.until("!document.querySelector('#stop').hidden")
        page.click("#fresh")
        page.until("!document.querySelector('#send').disabled")
        assert page.text("#talk") == page.text("#route") == ""
    assert page.do("document.documentElement.scrollWidth <= innerWidth")


def test_a_draw_of_a_seed_is_repeated(opened):
    kind, page, _ = opened
    page.do("globalThis.chat.messages = [], true")
    how = {"temperature": 1.5, "topK": 20, "topP": 0.9, "seed": 5, "maxNewTokens": 8}
    first = say(page, "Hello", how)
    page.do("globalThis.chat.messages = [], true")
    assert say(page, "Hello", how) == first
    page.do("globalThis.chat.messages = [], true")
    other = say(page, "Hello", {**how, "seed": 6})
    assert (other == first) == (kind == "parrot")  # which says one thing only


def test_a_gate_is_judged_and_fitted_on_texts_without_labels(opened):
    kind, page, bundle = opened
    texts = ["the first of them", "another one", "and a third", "the last", "no more"]
    found = page.do(
        f"""import(new URL('js/personalise.js', location.href)).then(({{ Loss }}) =>
        new Loss(molehill.engine, {json.dumps([{"text": text} for text in texts])}, false)
        .score(molehill.engine.gate))"""
    )
    assert found["loss"] == pytest.approx(_Loss(bundle, texts, None).score(bundle.gate).loss, rel=1e-5)
    for text in texts:
        page.fill("#row-text", text)
        page.click("#add")
    page.click("#fit")
    said = page.there("#fitted", text="readings")
    assert "Fitted to 3 texts, judged on 2 held out" in said
    assert ("No gain" in said) or kind != "parrot"  # which no gate can change


@pytest.fixture(scope="module", params=[(128, False), (256, True)], ids=["128", "256 by places"])
def four_bits(request, tmp_path_factory, libraries, browser):
    """A bundle with experts inside products, by blocks, and its page, which keeps what its console is told.

    One of them may choose experts by their places, which a page never does.
    """
    folder = tmp_path_factory.mktemp("int4")
    molora = {"targets": "all-linear", "experts": 4, "rank": 4, "scope": "layer"}
    block, by_places = request.param
    edge_export.write(folder / "bundle", "bytes", "int4", block, router_ranks=by_places, **molora)
    assert edge_export.joined(folder / "bundle") == 2 * 7  # every linear of its layers
    with TRUST.admit(folder / "bundle") as admitted:
        site.of_bundle(admitted, folder / "site")
    server, page = chromium.Server(folder / "site"), browser.page()
    told = "globalThis.told = []; console.log = (...words) => { told.push(words.join(' ')); };"
    page.call("Page.addScriptToEvaluateOnNewDocument", source=told)
    assert page.open(server.url) == "ready", page.text("#status")
    yield folder / "bundle", page
    server.stop()


def _unrounded(folder, copy):
    """A bundle whose products of 4 bits take activations as they are, which WebAssembly always does."""
    shutil.copytree(folder, copy)
    model = onnx.load(copy / manifests.GRAPH, load_external_data=False)
    levels = [each for node in model.graph.node for each in node.attribute if each.name == "accuracy_level"]
    for level in levels:
        level.i = 0
    (copy / manifests.GRAPH).write_bytes(model.SerializeToString())
    edge_graphs.sign(copy, manifests.load(copy)[0])
    return copy


def test_experts_inside_products_of_four_bits_answer_as_in_python(four_bits, tmp_path):
    folder, page = four_bits
    assert "int4, which take several times as long" in page.text(".notice")
    with Bundle.open(_unrounded(folder, tmp_path / "copy"), trust=TRUST, threads=1) as bundle:
        ids = bundle.encode("Tell me more")
        wanted, logits, cache = list(ids), [], bundle.cache()
        for _ in range(24):
            logits.append(bundle.read(cache, wanted).copy())
            wanted.append(int(logits[-1].argmax()))
    found = page.do(
        f"""(async (ids) => {{
        const [{{ Cache }}, {{ argmax }}] = await Promise.all(['generate', 'classify'].map((name) =>
          import(new URL(`js/${{name}}.js`, location.href))));
        const [cache, logits] = [new Cache(molehill.engine), []];
        for (let i = 0; i < 24; i++) {{
          logits.push([...await cache.read(ids)]);
          ids.push(argmax(logits[i]));
        }}
        return {{ ids, logits }};
        }})({ids})"""
    )
    assert found["ids"] == wanted
    np.testing.assert_allclose(found["logits"], logits, atol=1e-4 * np.std(logits))


def test_it_answers_there_nearly_as_on_a_device(four_bits):
    """Whose processors round activations to 8 bits, which may turn the near ties of random weights."""
    _, page = four_bits
    checked = page.do(
        """import(new URL('js/classify.js', location.href)).then(({ check }) =>
        Promise.all([check(molehill.engine), check(molehill.engine, { written: true })]))"""
    )
    assert all(each["error"] < 0.02 and each["inputs"] for each in checked), checked


def test_a_browser_puts_experts_into_products_once(four_bits):
    _, page = four_bits
    lines = page.do(
        """(async () => {
        const parts = ['js/engine.js', 'vendor/tokenizers/tokenizers.min.js'];
        const [{ Engine }, how] = await Promise.all(parts.map((path) => import(new URL(path, location.href))));
        const { runtime } = molehill.engine;
        const session = runtime.InferenceSession;
        const create = (graph, options) => session.create(graph, { ...options, enableProfiling: true });
        const profiled = { ...runtime, InferenceSession: { create } };
        const engine = await Engine.open(profiled, await molehill.source.open(), { ...how, providers: ['wasm'] });
        await engine.logits([5, 6, 7]);
        engine.session.endProfiling();
        return told.join('\\n').split('\\n');
        })()"""
    )
    ran = [json.loads(line.rstrip(",")) for line in lines if line.startswith('{"cat" : "Node"')]
    bits = [event["args"]["op_name"] for event in ran if "uint8" in json.dumps(event["args"]["input_type_shape"])]
    assert set(bits) == {"GatherBlockQuantized", "MatMulNBits"}
    assert len(bits) == len([each for each in ran if each["args"]["op_name"] in bits])
    # of each layer: queries, keys and values; what follows attention; three of the block; and four A; and the head
    assert bits.count("MatMulNBits") == 2 * (1 + 1 + 3 + 4) + 1
