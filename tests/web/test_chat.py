"""Conversations in a real browser: the same tokens as Python's, piece by piece."""

from __future__ import annotations

import json

import chromium
import edge_graphs
import numpy as np
import pytest

from molehill_edge import Bundle
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
