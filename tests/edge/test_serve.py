"""``molehill edge serve``: the real server in a process of its own, called by OpenAI's own client."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time

import anyio
import edge_graphs
import httpx
import openai
import pytest

from molehill_edge.bundle import Bundle
from molehill_edge.serving import app, replies
from molehill_edge.trust import InsecureLocal

KEY = "a-key-of-32-letters-and-more-than"
SAYS = "naïve €ur0s:5\N{CAT}!"  # no byte twice
MAIN = "from molehill.cli import main; main()"
HELLO = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bundles")
    for name, keys in {"talk": {}, "parrot": {"says": SAYS}, "long": {"shared": True, "max_length": 1 << 15}}.items():
        manifest = edge_graphs.causal(path / name, template=edge_graphs.CHATML, **keys)
        edge_graphs.write_gate(path / name / "gates/ann.safetensors", manifest, scale=3.0)
        edge_graphs.sign(path / name, manifest)
    edge_graphs.classifier(path / "reviews")
    (path / "key").write_text(f"{KEY}\n")
    (path / "key").chmod(0o600)
    return path


class Server:
    """A server and how to reach it."""

    def __init__(self, folder, name, *options):
        words = ["edge", "serve", str(folder / name), "--insecure-local", "--port", "0", "--threads", "1", *options]
        self.process = subprocess.Popen(
            [sys.executable, "-c", MAIN, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        line = self.process.stdout.readline()
        assert line.startswith("http://"), self.process.communicate()
        self.url = line.split()[0]
        self.root = self.url.removesuffix("/v1")

    def client(self, key="none"):
        return openai.OpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=30)

    def end(self):
        self.process.send_signal(signal.SIGTERM)
        _, said = self.process.communicate(timeout=30)
        return self.process.returncode, said


def serving(name, *options):
    @pytest.fixture(scope="module")
    def started(folder):
        server = Server(folder, name, *options)
        yield server
        code, said = server.end()
        assert code == 0
        assert "Traceback" not in said

    return started


talk = serving("talk", "--max-tokens", "64", "--body-kb", "4")
parrot = serving("parrot")
reviews = serving("reviews", "--experts", "dogs,cats")
committee = serving("talk", "--strategy", "ensemble", "--set", "temperature=0.5")


@pytest.fixture(scope="module")
def local(folder):
    with Bundle.open(folder / "talk", trust=InsecureLocal(lambda _: None), threads=1) as bundle:
        yield bundle


def said_locally(view, messages, **options):
    chat = view.chat()
    chat.messages = messages[:-1]
    return chat.say(messages[-1]["content"], **options)


def test_models(talk):
    client = talk.client()
    names = [model.id for model in client.models.list()]
    assert names == ["tiny-causal", "tiny-causal@default", "tiny-causal@ann"]
    assert client.models.retrieve("tiny-causal@ann").owned_by == "molehill"
    with pytest.raises(openai.NotFoundError, match="only tiny-causal, tiny-causal@default"):
        client.models.retrieve("tiny-causal@bob")


@pytest.mark.parametrize("gate", ["", "@default", "@ann"])
def test_an_answer_is_what_the_bundle_says_with_that_gate(talk, local, gate):
    view = local.with_gate(gate[1:] or "default")
    want = said_locally(view, HELLO, max_new_tokens=24)
    found = talk.client().chat.completions.create(
        model=f"tiny-causal{gate}", messages=HELLO, temperature=0, max_completion_tokens=24
    )
    (choice,) = found.choices
    assert (choice.message.content, choice.message.role) == (want.text, "assistant")
    assert choice.finish_reason == {"end": "stop", "length": "length"}[want.reason]
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (want.prompt_tokens, want.tokens)
    assert found.model == f"tiny-causal{gate}"


def test_gates_differ_and_do_not_meet(talk, local):
    want = {name: said_locally(local.with_gate(name), HELLO, max_new_tokens=24).text for name in ("default", "ann")}
    assert want["ann"] != want["default"]
    found = []

    def ask(gate):
        client = talk.client()
        for _ in range(4):
            answer = client.chat.completions.create(
                model=f"tiny-causal@{gate}", messages=HELLO, temperature=0, max_tokens=24
            )
            found.append((gate, answer.choices[0].message.content))

    threads = [threading.Thread(target=ask, args=(gate,)) for gate in want]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert set(found) == set(want.items())


def test_a_stream_has_whole_characters_and_tells_the_tokens(parrot):
    with parrot.client().chat.completions.create(
        model="tiny-causal", messages=HELLO, temperature=0, stream=True, stream_options={"include_usage": True}
    ) as stream:
        *chunks, last = stream
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content for chunk in chunks[1:-1]]
    assert "".join(pieces) == SAYS
    assert len(pieces) == len(SAYS)
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert (last.choices, last.usage.completion_tokens) == ([], len(SAYS.encode()) + 1)
    assert {chunk.id for chunk in chunks} == {last.id}


def test_texts_go_on(parrot, talk, local):
    client = parrot.client()
    found = client.completions.create(model="tiny-causal", prompt=["x", "y"], temperature=0, stop=["s:"])
    assert [(c.index, c.text, c.finish_reason) for c in found.choices] == [(i, "naïve €ur0", "stop") for i in (0, 1)]
    with client.completions.create(model="tiny-causal", prompt="x", temperature=0, max_tokens=6, stream=True) as stream:
        chunks = [chunk.choices[0] for chunk in stream]
    assert "".join(chunk.text for chunk in chunks) == "naïve"
    assert chunks[-1].finish_reason == "length"
    want = local.generate("go on", raw=True, max_new_tokens=20, temperature=2.0, seed=5, top_p=0.9)
    found = talk.client().completions.create(
        model="tiny-causal", prompt="go on", max_tokens=20, temperature=2, seed=5, top_p=0.9
    )
    assert found.choices[0].text == want.text


def test_contents_may_come_in_parts_and_developers_are_the_system(talk):
    client = talk.client()
    texts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    parts = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": texts}]
    one, other = (
        client.chat.completions.create(model="tiny-causal", messages=messages, temperature=0, max_tokens=9)
        for messages in (HELLO, parts)
    )
    assert one.choices == other.choices
    again = [*HELLO, one.choices[0].message.model_dump(), {"role": "user", "content": "and?"}]
    assert client.chat.completions.create(model="tiny-causal", messages=again, max_tokens=1).choices


def test_a_turn_reads_only_what_is_new_whoever_asks_between(talk, local):
    client = talk.client()

    def ask(messages, gate="default"):
        found = client.chat.completions.create(
            model=f"tiny-causal@{gate}", messages=messages, temperature=0, max_tokens=12
        )
        return found.choices[0].message.content, found.usage.prompt_tokens, found.usage.prompt_tokens_details

    first = [{"role": "user", "content": "a conversation of its own"}]
    said, *_ = ask(first)
    second = [*first, {"role": "assistant", "content": said}, {"role": "user", "content": "and now?"}]
    others = [[{"role": "user", "content": "z"}], HELLO]
    for messages, gate in ((others[0], "ann"), (others[1], "default")):  # two caches: one of them is taken
        assert ask(messages, gate)[0] == said_locally(local.with_gate(gate), messages, max_new_tokens=12).text
    want = said_locally(local, second, max_new_tokens=12)
    assert ask(second)[:2] == (want.text, want.prompt_tokens)
    third = [*second, {"role": "assistant", "content": want.text}, {"role": "user", "content": "more"}]
    answer, tokens, details = ask(third)
    assert answer == said_locally(local, third, max_new_tokens=12).text
    assert want.prompt_tokens <= details.cached_tokens < tokens
    assert ask(third, "ann")[2].cached_tokens < 10  # what another gate has read counts for nothing


ASK = {"model": "tiny-causal", "messages": HELLO}


@pytest.mark.parametrize(
    ("change", "status", "field"),
    [
        ({"model": "other"}, 404, "model"),
        ({"model": "tiny-causal@bob"}, 404, "model"),
        ({"model": "tiny-causal@"}, 404, "model"),
        ({"model": None}, 400, "model"),
        ({"model": 3}, 400, "model"),
        ({"messages": "hello"}, 400, "messages"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "user"}]}, 400, "messages[0].content"),
        ({"messages": [*HELLO, {"role": "tool", "content": "x"}]}, 400, "messages[2].role"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "x"}]}, 400, "messages[2].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": "x", "name": "ann"}]}, 400, "messages[0].name"),
        ({"messages": [{"role": "user", "content": "x" * 400}]}, 400, "messages"),  # longer than its context
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "messages"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"temperature": 3}, 400, "temperature"),
        ({"temperature": True}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"max_tokens": 65}, 400, "max_tokens"),
        ({"max_completion_tokens": 1.5}, 400, "max_completion_tokens"),
        ({"seed": -1}, 400, "seed"),
        ({"stop": ["a", 1]}, 400, "stop"),
        ({"stop": list("abcde")}, 400, "stop"),
        ({"stop": 0}, 400, "stop"),
        ({"stop": ""}, 400, "stop"),
        ({"stream": "yes"}, 400, "stream"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, 400, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": "yes"}}, 400, "stream_options"),
        ({"stream": True, "stream_options": []}, 400, "stream_options"),
        ({"n": 2}, 400, "n"),
        ({"n": True}, 400, "n"),
        ({"logprobs": 0}, 400, "logprobs"),
        ({"logprobs": True}, 400, "logprobs"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"tools": [{"type": "function"}]}, 400, "tools"),
        ({"temprature": 1}, 400, "temprature"),
        ({"half \ud800": 1}, 400, "half \ud800"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_name_of_the_field(talk, change, status, field):
    found = httpx.post(f"{talk.url}/chat/completions", content=json.dumps({**ASK, **change}),
                       headers={"Content-Type": "application/json"})  # fmt: skip
    said = found.json()["error"]
    assert (found.status_code, said["param"]) == (status, field)
    assert said["type"] == "invalid_request_error"
    assert said["message"]


def test_an_answer_of_no_said_length_is_as_long_as_fits(talk):
    client = talk.client()
    for prompt, most in (("x", 64), ("x" * 240, 16)):
        found = client.completions.create(model="tiny-causal", prompt=prompt, temperature=0)
        assert (found.choices[0].finish_reason, found.usage.completion_tokens) == ("length", most)
    with pytest.raises(openai.BadRequestError, match="the prompt has 300 tokens, where 256 fit together"):
        client.completions.create(model="tiny-causal", prompt="x" * 300)


def test_what_changes_nothing_may_be_asked_for(talk):
    found = talk.client().chat.completions.create(
        **ASK, max_tokens=2, n=1, frequency_penalty=0, logprobs=False, response_format={"type": "text"}, user="ann"
    )
    assert len(found.choices) == 1


def test_other_requests_are_refused_in_the_same_shape(talk):
    post = {"Content-Type": "application/json"}
    asked = [
        (404, httpx.get(f"{talk.root}/nowhere")),
        (405, httpx.get(f"{talk.url}/completions")),
        (415, httpx.post(f"{talk.url}/completions", content="{}", headers={"Content-Type": "text/plain"})),
        (400, httpx.post(f"{talk.url}/completions", content="{", headers=post)),
        (400, httpx.post(f"{talk.url}/completions", content="[" * 4000, headers=post)),
        (400, httpx.post(f"{talk.url}/completions", content="[]", headers=post)),
        (413, httpx.post(f"{talk.url}/completions", content="x" * 5000, headers=post)),
        (403, httpx.get(f"{talk.url}/models", headers={"Host": "evil.example"})),
        (400, httpx.post(f"{talk.url}/classifications", json={"model": "tiny-causal", "input": "x"})),
    ]
    for status, found in asked:
        assert (found.status_code, set(found.json())) == (status, {"error"})
    assert httpx.get(f"{talk.root}/health").json() == {"status": "ok"}


def test_classes(reviews, folder):
    texts = ["the film was great", "awful plot"]
    with Bundle.open(folder / "reviews", trust=InsecureLocal(lambda _: None), threads=1) as bundle:
        view = bundle.with_gate("ann")
        view.choose_experts(["dogs", "cats"])
        want = view.classify(texts)
    client = reviews.client()
    asked = {"model": "tiny-classifier@ann", "input": texts}
    found = client.post("/classifications", cast_to=object, body=asked)
    assert [row["label"] for row in found["data"]] == [each.label for each in want]
    for row, each in zip(found["data"], want, strict=True):
        assert row["probabilities"] == pytest.approx(each.probabilities)
    assert found["usage"]["prompt_tokens"] == 10
    for wrong, field in (({"input": [1]}, "input"), ({"input": "the " * 40}, "input"), ({"truncate": 1}, "truncate")):
        with pytest.raises(openai.BadRequestError) as caught:
            client.post("/classifications", cast_to=object, body={**asked, **wrong})
        assert caught.value.body["param"] == field
    assert client.post("/classifications", cast_to=object, body={**asked, "input": "the " * 40, "truncate": True})
    with pytest.raises(openai.BadRequestError, match="for classification"):
        client.chat.completions.create(model="tiny-classifier", messages=HELLO)


def test_a_strategy_answers_whole_in_pieces_and_turn_by_turn(committee, folder):
    keys, client, said = {"strategy": "ensemble", "params": {"temperature": 0.5}}, committee.client(), []
    with Bundle.open(folder / "talk", trust=InsecureLocal(lambda _: None), threads=1) as bundle:
        for gate in ("default", "ann"):
            view, messages = bundle.with_gate(gate), HELLO
            for turn in range(2):
                chat = view.chat(**keys)
                chat.messages = messages[:-1]
                want = chat.say(messages[-1]["content"], max_new_tokens=12).text
                asked = {"model": f"tiny-causal@{gate}", "messages": messages, "temperature": 0, "max_tokens": 12}
                whole = client.chat.completions.create(**asked)
                with client.chat.completions.create(**asked, stream=True) as stream:
                    pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
                assert whole.choices[0].message.content == "".join(pieces) == want
                assert (whole.usage.prompt_tokens_details.cached_tokens > len("Be brief.")) == bool(turn)
                said += [want, said_locally(view, messages, max_new_tokens=12).text]
                messages = [*messages, {"role": "assistant", "content": want}, {"role": "user", "content": "and?"}]
        assert len(set(said)) == len(said)
        want = bundle.generate("go on", raw=True, max_new_tokens=9, **keys).text
        found = client.completions.create(model="tiny-causal", prompt=["x", "go on"], temperature=0, max_tokens=9)
        assert found.choices[1].text == want


def test_a_strategy_says_classes(folder):
    texts = ["the film was great", "awful plot"]
    with Bundle.open(folder / "reviews", trust=InsecureLocal(lambda _: None), threads=1) as bundle:
        models = app.Models(bundle, None, lambda view: view.strategy("ensemble", {"own": False}))
        application = app.make(models, app.Limits(body=1 << 12, answer=8, at_once=1, waiting=1), None)

        async def ask(name):
            calls = httpx.ASGITransport(application)
            async with httpx.AsyncClient(transport=calls, base_url="http://127.0.0.1") as client:
                return (await client.post("/v1/classifications", json={"model": name, "input": texts})).json()

        for gate in ("default", "ann"):
            found = anyio.run(ask, f"tiny-classifier@{gate}")["data"]
            want = bundle.with_gate(gate).classify(texts, strategy="ensemble", params={"own": False})
            for row, each in zip(found, want, strict=True):
                assert row["probabilities"] == pytest.approx(each.probabilities)
        assert [each.probabilities for each in want] != [each.probabilities for each in bundle.classify(texts)]


def free(client, asked):
    """Wait until there is a place."""
    end = time.monotonic() + 20
    while True:
        try:
            return client.completions.create(**asked)
        except openai.InternalServerError:
            assert time.monotonic() < end
            time.sleep(0.05)


def test_a_key_a_full_room_and_a_quiet_end(folder):
    """One place, nobody waits: who comes meanwhile is turned away, until the first has gone."""
    server = Server(
        folder, "long", "--key-file", str(folder / "key"), "--at-once", "1", "--queue", "0", "--max-tokens", "20000"
    )
    with pytest.raises(openai.AuthenticationError):
        server.client("another").models.list()
    assert httpx.get(f"{server.url}/models").status_code == 401
    assert httpx.get(f"{server.root}/health").status_code == 200
    client = server.client(KEY)
    long = {"model": "tiny-causal", "prompt": "x", "temperature": 2, "seed": 0, "extra_body": {"top_k": 200}}
    short = {**long, "max_tokens": 1}
    stream = client.completions.create(**long, max_tokens=20000, stream=True)
    next(stream)
    with pytest.raises(openai.InternalServerError) as caught:
        client.completions.create(**short)
    assert (caught.value.status_code, caught.value.body["code"]) == (503, "overloaded")
    stream.close()
    free(client, short)
    silent = {**long, "temperature": 0}  # soon its bytes are no characters any more: there is nothing to send
    stream = client.completions.create(**silent, max_tokens=20000, stream=True)
    next(stream)
    stream.close()
    free(client, short)
    with client.completions.create(**long, max_tokens=300, stream=True) as stream:
        next(stream)
        server.process.send_signal(signal.SIGTERM)
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] in {"length", "stop"}  # it may end
    _, said = server.process.communicate(timeout=30)
    assert (server.process.returncode, said.count("Traceback")) == (0, 0)
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", int(server.root.rpartition(":")[2])), 1)


def test_answers_that_the_end_of_the_server_cuts_say_so(folder):
    """The second signal leaves them no time."""
    server = Server(folder, "long", "--max-tokens", "20000")
    asked = {"model": "tiny-causal", "prompt": "x", "temperature": 0, "max_tokens": 20000}
    whole = []
    thread = threading.Thread(
        target=lambda: whole.append(httpx.post(f"{server.url}/completions", json=asked, timeout=60))
    )
    thread.start()
    with httpx.stream("POST", f"{server.url}/completions", json={**asked, "stream": True}, timeout=60) as answer:
        events = answer.iter_lines()
        next(events)
        time.sleep(0.3)  # both are computed
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        server.process.send_signal(signal.SIGINT)
        *_, last = filter(None, events)
    thread.join()
    _, said = server.process.communicate(timeout=30)
    assert (server.process.returncode, said.count("Traceback")) == (0, 0)
    assert whole[0].status_code == 503
    for document in (json.loads(last.removeprefix("data: ")), whole[0].json()):
        assert (document["error"]["type"], document["error"]["code"]) == ("server_error", "server_ends")


def test_events_are_closed_before_their_reader_is_let_go():
    closed = []

    async def events():
        try:
            yield b"one"
            yield b"two"
        finally:
            closed.append(True)

    async def stuck(message):
        if message.get("body") == b"one":
            await anyio.sleep_forever()

    async def main():
        with anyio.move_on_after(0.05):
            await replies.Events(events())({"type": "http"}, anyio.sleep_forever, stuck)
        return list(closed)

    assert anyio.run(main) == [True]


@pytest.mark.parametrize(
    ("options", "code", "what"),
    [
        (["--host", "0.0.0.0"], 2, "--host: without a key anybody could ask what is served on 0.0.0.0"),
        (["--host", "a host"], 2, "neither a host name nor an address"),
        (["--key-file", "nothing"], 2, "cannot read the key"),
        (["--key-file", "@open"], 2, "others can read the key"),
        (["--key-file", "@short"], 2, "a key is one line of 16 ASCII characters or more"),
        (["--port", "@taken"], 11, "the system refuses it: Address already in use"),
        (["--gate", "bob"], 13, "no gate 'bob'"),
        (["--experts", "lions"], 13, "no expert 'lions'"),
        (["--strategy", "clever"], 2, "unknown decoding 'clever'"),
        (["--strategy", "emulated_ft"], 16, "strategy emulated_ft is host_only"),
        (["--strategy", "fuse_outputs"], 16, "is for models that classify"),
        (["--strategy", "self_contrast"], 16, "cannot choose experts by their places. Export it with --router-ranks"),
        (["--strategy", "ensemble", "--experts", "dogs"], 16, "a router is left without an expert"),
        (["--set", "beta=1"], 16, "unknown key 'beta' for decoding own_logits"),
    ],
)
def test_a_server_that_cannot_be_does_not_start(folder, tmp_path, monkeypatch, options, code, what):
    from typer.testing import CliRunner

    from molehill.cli import app as molehill

    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for name, text, mode in (("open", KEY, 0o644), ("short", "secret", 0o600)):
            (tmp_path / name).write_text(text)
            (tmp_path / name).chmod(mode)
        places = {"@taken": str(taken.getsockname()[1]), "@open": "open", "@short": "short"}
        words = [places.get(word, word) for word in options]
        done = CliRunner().invoke(molehill, ["edge", "serve", str(folder / "talk"), "--insecure-local", *words])
    assert done.exit_code == code, done.output
    assert what in done.stderr
    assert "Traceback" not in done.output
