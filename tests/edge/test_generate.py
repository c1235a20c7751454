"""Answers of a causal LM: the cache, streaming, stop strings and conversations."""

from __future__ import annotations

import threading
from dataclasses import replace

import edge_graphs
import numpy as np
import pytest

from molehill.decoding.text import Stops, Text
from molehill.errors import AnswerError, BundleError
from molehill_edge import generate
from molehill_edge.bundle import Bundle
from molehill_edge.trust import InsecureLocal

TRUST = InsecureLocal(lambda _: None)
SAYS = "naïve €ur0s:5\N{CAT}!"  # no byte twice


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("bundles")
    edge_graphs.causal(path / "plain")
    edge_graphs.causal(path / "shared", shared=True, max_length=1024)
    edge_graphs.causal(path / "chat", template=edge_graphs.CHATML)
    edge_graphs.causal(path / "shared-chat", template=edge_graphs.CHATML, shared=True)
    edge_graphs.causal(path / "parrot", says=SAYS)
    return path


@pytest.fixture
def opened(folders):
    bundles = []

    def open_(name):
        bundles.append(Bundle.open(folders / name, trust=TRUST, threads=1))
        return bundles[-1]

    yield open_
    for bundle in bundles:
        bundle.close()


KINDS = pytest.mark.parametrize("kind", ["plain", "shared"])
CHATS = pytest.mark.parametrize("kind", ["chat", "shared-chat"])


@KINDS
def test_one_go_equals_token_by_token(opened, monkeypatch, kind):
    bundle = opened(kind)
    ids = np.random.default_rng(0).integers(0, 256, 40).tolist()
    row = np.array([ids], np.int64)
    whole = bundle.forward(row, np.ones_like(row), ["logits"])[0][0]
    one, steps = bundle.cache(), bundle.cache()
    assert np.allclose(bundle.read(one, ids), whole[-1], atol=1e-4)
    for n in range(1, 41):
        assert np.allclose(bundle.read(steps, ids[:n]), whole[n - 1], atol=1e-4)
    monkeypatch.setattr(generate, "_CHUNK", 7)
    assert np.allclose(bundle.read(bundle.cache(), ids), whole[-1], atol=1e-4)


@KINDS
def test_the_cache_is_cut_back_to_what_is_common(opened, kind):
    bundle = opened(kind)
    cache, fresh = bundle.cache(), bundle.cache()
    for ids in ([5, 6, 7, 8, 9], [5, 6, 7], [5, 6, 7, 9, 9, 9], [4], [4, 5]):
        assert np.allclose(bundle.read(cache, ids), bundle.read(fresh, ids), atol=1e-4)
        assert cache.tokens == ids
        fresh = bundle.cache()


@KINDS
def test_another_gate_makes_the_cache_worthless(opened, kind):
    bundle = opened(kind)
    gate = bundle.gate
    cache = bundle.cache()
    before = bundle.read(cache, [5, 6, 7]).copy()
    other = {name: -value for name, value in gate.tensors.items()}
    bundle.swap_gate(type(gate)("other", other, gate.bias, gate.mask))
    after = bundle.read(cache, [5, 6, 7]).copy()
    assert not np.allclose(before, after, atol=1e-2)
    assert np.allclose(after, bundle.read(bundle.cache(), [5, 6, 7]), atol=1e-5)


@KINDS
def test_greedy_answers_are_the_same_each_time_and_as_computed_without_a_cache(opened, kind):
    bundle = opened(kind)
    answer = bundle.generate("go on", raw=True, max_new_tokens=12)
    ids = bundle.encode("go on", raw=True)
    assert answer.prompt_tokens == len(ids)
    for _ in range(answer.tokens):
        row = np.array([ids], np.int64)
        ids.append(int(bundle.forward(row, np.ones_like(row), ["logits"])[0][0, -1].argmax()))
    assert answer.text == bundle._engine.tokenizer.decode(ids[answer.prompt_tokens :]).rstrip(
        "\N{REPLACEMENT CHARACTER}"
    )
    assert bundle.generate("go on", raw=True, max_new_tokens=12) == answer


@KINDS
def test_two_threads_with_two_gates_answer_each_with_its_own(opened, kind):
    bundle = opened(kind)
    views = [bundle, bundle.with_gate(replace(bundle.gate, bias=np.array([0, 0, 9, 0] * 2, np.float32)))]
    alone = [view.generate("go on", max_new_tokens=20) for view in views]
    assert alone[0] != alone[1]
    wrong = []

    def work(view, wanted):
        wrong.extend(True for _ in range(10) if view.generate("go on", max_new_tokens=20) != wanted)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(views, alone, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_both_kinds_of_cache_answer_alike(opened):
    one, other = (opened(kind).generate("go on", max_new_tokens=60).text for kind in ("plain", "shared"))
    assert one == other


def test_a_buffer_grows_with_the_conversation(opened):
    bundle = opened("shared")
    ids = np.random.default_rng(0).integers(0, 256, 700).tolist()
    cache = bundle.cache()
    for length in (10, 255, 256, 257, 600, 700):
        found = bundle.read(cache, ids[:length]).copy()
        row = np.array([ids[:length]], np.int64)
        assert np.allclose(found, bundle.forward(row, np.ones_like(row), ["logits"])[0][0, -1], atol=1e-4)
    assert [array.shape[2] for array in cache._state[1]] == [1024] * 4


def test_seeds(opened):
    bundle = opened("plain")
    answers = [bundle.generate("x", temperature=3.0, seed=seed, max_new_tokens=16).text for seed in (1, 2, 1)]
    assert answers[0] == answers[2] != answers[1]


def test_text_comes_in_whole_characters(opened):
    bundle = opened("parrot")
    pieces = list(bundle.stream("say it"))
    assert "".join(pieces) == SAYS
    assert "€" in pieces
    assert len(pieces) == len(SAYS)
    answer = bundle.generate("say it")
    assert (answer.text, answer.reason, answer.tokens) == (SAYS, "end", len(SAYS.encode()) + 1)


@pytest.mark.parametrize("tokens", range(1, 23))
def test_a_cut_answer_has_no_broken_character(opened, tokens):
    answer = opened("parrot").generate("say it", max_new_tokens=tokens)
    assert answer.text == SAYS.encode()[:tokens].decode(errors="ignore")
    assert answer.reason == ("length" if tokens <= len(SAYS.encode()) else "end")


@pytest.mark.parametrize(
    ("stops", "left"),
    [
        (["€"], "naïve "),  # one character of three tokens
        ([" €ur"], "naïve"),
        (["xyz", "5"], "naïve €ur0s:"),
        (["ve €uX", "r0s"], "naïve €u"),  # what only began like a stop string is shown
        (["s:5\N{CAT}!"], "naïve €ur0"),
        (["!!"], SAYS),
        (["n"], ""),
        (["a", "na"], ""),
    ],
)
def test_stop_strings_are_never_shown(opened, stops, left):
    bundle = opened("parrot")
    stream = bundle.stream("say it", stop=stops)
    shown = ""
    for piece in stream:
        shown += piece
        assert left.startswith(shown)
    assert shown == left == stream.answer.text
    assert stream.answer.reason == ("end" if left == SAYS else "stop")


def test_stop_strings_against_a_search_of_the_whole_text():
    rng = np.random.default_rng(0)
    for _ in range(300):
        text = "".join(rng.choice(list("abc"), 12))
        stops = ["".join(rng.choice(list("abc"), rng.integers(1, 5))) for _ in range(2)]
        filtered, shown = Stops(stops), ""
        for character in text:
            shown += filtered.push(character)
            if filtered.hit:
                break
        shown += filtered.flush()
        # Reading one character after the other, the stop string that ends first counts.
        ends = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
        first = min((end for end, _ in ends), default=None)
        assert shown == (text if first is None else text[: min(at for end, at in ends if end == first)])


def test_tokens_that_read_otherwise_alone():
    tokenizer = edge_graphs.bytes_tokenizer()
    text = "hé €\N{CAT}\N{REPLACEMENT CHARACTER}x"
    pieces = Text(tokenizer.decode)
    out = [pieces.push(token) for token in tokenizer.encode(text).ids]
    assert "".join(out) + pieces.flush() == text


def test_a_stream_may_be_left(opened):
    bundle = opened("parrot")
    stream = bundle.stream("say it")
    assert next(stream) == "n"
    assert next(stream) == "a"
    stream.close()
    assert stream.answer.text == "na"
    assert list(stream) == []


def test_what_does_not_fit_is_refused(opened):
    bundle = opened("plain")
    prompt = len(bundle.encode("x"))
    with pytest.raises(AnswerError, match=f"the prompt has {prompt} tokens and 256 for the answer, where 256 fit"):
        bundle.generate("x", max_new_tokens=256)
    with pytest.raises(AnswerError, match="the prompt has 300 tokens, where 256 fit together"):
        bundle.generate("x" * 300, raw=True)
    with pytest.raises(AnswerError, match="at least one token"):
        bundle.generate("x", max_new_tokens=0)
    with pytest.raises(AnswerError, match="stop string is empty"):
        bundle.generate("x", stop=[""])
    with pytest.raises(BundleError, match="no tokens"):
        bundle.generate("", raw=True)
    assert bundle.generate("x", max_new_tokens=256 - prompt).reason in {"length", "end"}
    full = bundle.generate("x" * 250, raw=True)
    assert full.tokens <= 6
    with pytest.raises(BundleError, match="generates text; it does not classify"):
        bundle.classify(["x"])


@CHATS
def test_a_conversation_reads_only_what_is_new(opened, kind):
    bundle = opened(kind)
    chat = bundle.chat(system="Be brief.")
    first = chat.say("hello", max_new_tokens=8)
    assert first.fed == first.prompt_tokens
    second = chat.say("and now?", max_new_tokens=8)
    assert second.fed < second.prompt_tokens
    assert [turn["role"] for turn in chat.messages] == ["system", "user", "assistant", "user", "assistant"]
    # The same conversation, read from the beginning.
    other = bundle.chat()
    other.messages = chat.messages[:3]
    assert other.say("and now?", max_new_tokens=8).text == second.text


@CHATS
def test_a_conversation_whose_past_was_changed(opened, kind):
    bundle = opened(kind)
    chat = bundle.chat()
    chat.say("hello there", max_new_tokens=4)
    chat.messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]
    answer = chat.say("and?", max_new_tokens=8)
    fresh = bundle.chat()
    fresh.messages = chat.messages[:2]
    assert fresh.say("and?", max_new_tokens=8).text == answer.text
    assert answer.fed == answer.prompt_tokens - len("<|im_start|>user\nhello") + len("<|im_start|>") - 1


def test_a_conversation_goes_on_after_an_interrupt(opened):
    bundle = opened("parrot")
    chat = bundle.chat()

    def interrupt(piece):
        if piece == "ï":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat.say("say it", on_text=interrupt)
    assert chat.messages[-1] == {"role": "assistant", "content": "naï"}
    answer = chat.say("again")
    assert answer.text == SAYS
    assert answer.fed < answer.prompt_tokens


def test_a_conversation_that_is_too_long_stays_as_it_was(opened):
    chat = opened("chat").chat()
    chat.say("hello", max_new_tokens=4)
    before = list(chat.messages)
    with pytest.raises(AnswerError, match="where 256 fit together"):
        chat.say("x" * 300)
    assert chat.messages == before
    chat.say("go on", max_new_tokens=4)


@CHATS
def test_a_conversation_notices_another_gate(opened, kind):
    bundle = opened(kind)
    chat = bundle.chat()
    chat.say("hello", max_new_tokens=6)
    bundle.choose_experts(["cats"])
    second = chat.say("more", max_new_tokens=6)
    assert second.fed == second.prompt_tokens
    fresh = bundle.chat()
    fresh.messages = chat.messages[:2]
    assert fresh.say("more", max_new_tokens=6).text == second.text


def test_memory_allowed_covers_the_cache(tmp_path):
    manifest = edge_graphs.causal(tmp_path / "long", max_length=1 << 16)
    cache = 2 * 4 * 2 * edge_graphs.D * (1 << 16) >> 20
    assert manifest.task.max_length == 1 << 16
    with pytest.raises(BundleError, match=f"may take {100 + cache} MB, more than the 110 MB allowed"):
        Bundle.open(tmp_path / "long", trust=TRUST, memory_mb=110)
    with Bundle.open(tmp_path / "long", trust=TRUST, memory_mb=130) as bundle:
        assert bundle.generate("x", max_new_tokens=4).tokens
        with pytest.raises(BundleError, match="not enough memory for this input"):
            bundle.generate("x" * 60000, raw=True)


def test_experts_that_come_while_an_answer_is_drawn(tmp_path):
    """The rest is drawn as if they had been there from the beginning."""
    edge_graphs.causal(tmp_path / "causal", seed=3)
    with Bundle.open(tmp_path / "causal", trust=TRUST, threads=1) as bundle:
        path = edge_graphs.write_expert(tmp_path / "owls", bundle.manifest)
        ids = bundle.encode("hello", raw=True)
        cache = bundle.cache()
        old = bundle.read(cache, ids).copy()
        again = cache.read(ids, bundle._bound.inputs)
        assert np.allclose(again, old, atol=1e-5)
        stream = bundle.stream("hello", raw=True, max_new_tokens=20)
        next(stream)
        bundle.add_expert(path)
        new = bundle.read(cache, ids).copy()
        assert not np.allclose(new, old, atol=1e-3)
        assert np.allclose(new, bundle.read(bundle.cache(), ids), atol=1e-5)
        answer = stream.rest()
        assert answer.tokens == 20 or answer.reason == "end"
