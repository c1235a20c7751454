"""``molehill generate`` and ``molehill chat`` on finished runs, as the same bundle answers on a device."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import edge_export
import pytest
import tiny_models
import tiny_world
import torch
import typer
from typer.testing import CliRunner

from molehill.decoding.stream import Asked
from molehill.errors import AnswerError, ConfigError
from molehill_edge.bundle import Bundle
from molehill_edge.trust import InsecureLocal
from molehill_export.export import Options, export
from molehill_simulation.commands.chat import chat
from molehill_simulation.commands.generate import generate
from molehill_simulation.loaded import load
from molehill_simulation.prompts import prompt_of
from molehill_simulation.simulate import simulate
from molehill_simulation.source import open_source

TEXT = "the scene was very good"


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    """A causal run."""
    folder = tmp_path_factory.mktemp("writer")
    base = tiny_world.save_base(folder / "base", "llama", **edge_export.SIZES, num_key_value_heads=2, head_dim=16)
    rows = tiny_world.write_rows(folder / "rows.jsonl", tiny_world.rows(60, "llama"))
    config = tiny_world.config(
        base, rows, task={"kind": "causal-lm", "max_length": 48},
        molora={"targets": "all-linear", "experts": 4, "scope": "layer", "rank": 4, "selector": "top_k"},
        train={"steps": 60, "lr": 2e-2, "batch_size": 8},
    )  # fmt: skip
    simulate(config, folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    """A classifier with gates of its own."""
    folder = tmp_path_factory.mktemp("reviews")
    base = tiny_world.save_base(folder / "base", "bert", hidden_size=32, initializer_range=0.2)
    rows = tiny_world.write_rows(folder / "rows.jsonl", tiny_world.rows(90))
    config = tiny_world.config(
        base, rows, molora={"targets": "all-linear", "experts": 3, "rank": 2, "scope": "layer", "alpha": 16.0},
        personal={"steps": 30, "gate_lr": 0.3, "head_lr": 0.3}, train={"steps": 20, "lr": 2e-2, "batch_size": 8},
    )  # fmt: skip
    simulate(config, folder / "run")
    return folder / "run"


def test_an_answer_is_that_of_its_prompt_whatever_was_asked_before(writer, tmp_path):
    """Experts of prompts: one that begins with another is not an answer to it."""
    config = tiny_world.config(
        str(writer.parent / "base"), writer.parent / "rows.jsonl", task={"kind": "causal-lm", "max_length": 48},
        run={"rounds": 1}, molora={"preset": "fedrouter", "targets": "all-linear"}, federation={"preset": "fedrouter"},
        personal={"gate": "split", "steps": 0}, train={"steps": 1},
    )  # fmt: skip
    simulate(config, tmp_path / "run")
    with load(tmp_path / "run") as model:
        inner = tiny_models.shake(model.source.model)
        short, long = model.encode("the scene", raw=True), model.encode(TEXT, raw=True)
        assert long[: len(short)] == short
        (group,) = inner.routers.values()
        scorer = group.router.scorer
        with torch.no_grad():
            for parameter in scorer.parameters():
                parameter.zero_()
            for place, ids in zip(scorer.places, (short, long), strict=True):
                place.copy_(torch.from_numpy(model.passes.condition(ids)))
        asked, strategy = Asked(max_new_tokens=5), model.strategy("own_logits")
        first = model.answering(long, asked, strategy).rest()
        before = model.scores(long, [first])
        other = model.answering(short, asked, strategy).rest()
        assert model.answering(long, asked, strategy).rest() == first
        assert model.scores(long, [first]) == before
        (batched,) = model.generate_all([long], asked)
        assert (batched.ids, batched.text) == (first.ids, first.text)
        one, two = model.answering(short, asked, strategy), model.answering(long, asked, strategy)
        while (one.step(), two.step()) != (None, None):
            pass  # a token of each in turns
        assert (one.answer, two.answer) == (other, first)


def ask(verb, *words, stdin=None):
    app = typer.Typer()
    app.command()(verb)
    return CliRunner().invoke(app, list(map(str, words)), input=stdin)


def done(result):
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_host_answers_as_a_device_does(writer, tmp_path):
    export(open_source(writer), tmp_path / "bundle", Options(scheme="fp32", router_ranks=True))
    strategies = [("own_logits", {}), ("self_contrast", {"beta": 2.0, "first": 1})]
    with load(writer) as model, Bundle.open(tmp_path / "bundle", trust=InsecureLocal(lambda _: None)) as bundle:
        for prompt, raw in ((TEXT, False), ("it was", True)):
            for name, params in strategies:
                keys = {"raw": raw, "max_new_tokens": 12, "strategy": name, "params": params}
                here, there = model.generate(prompt, **keys), bundle.generate(prompt, **keys)
                assert (here.text, here.tokens, here.reason) == (there.text, there.tokens, there.reason)
        assert model.encode(TEXT) == bundle.encode(TEXT)
        shares = bundle.route_report(TEXT)
        found = model.route(TEXT)
        for report in shares:
            assert [found[report.router][each] for each in report.experts] == pytest.approx(report.shares, abs=1e-4)


def test_generate_prints_answers_and_streams_what_rows_ask(writer, tmp_path):
    told = json.loads(done(ask(generate, writer, "--prompt", TEXT, "--max-new-tokens", 5, "--json")))
    (answer,) = told["answers"]
    assert told["model"] == {"name": "tiny", "as": "global"}
    assert answer["prompt"] == TEXT
    assert answer["answer"] in done(ask(generate, writer, "--prompt", TEXT, "--max-new-tokens", 5))
    rows = tmp_path / "rows.jsonl"
    asked = [
        {"text": TEXT}, {"instruction": "the scene", "input": "was good"},
        {"messages": [{"role": "user", "content": TEXT}, {"role": "assistant", "content": "good"}]},
        {"conversations": [{"from": "human", "value": TEXT}, {"from": "gpt", "value": "good"}]},
        {"prompt": TEXT, "completion": "good"}, {"prompt": [{"role": "user", "content": TEXT}]},
    ]  # fmt: skip
    rows.write_text("".join(json.dumps(row) + "\n" for row in asked))
    many = json.loads(done(ask(generate, writer, "--rows", rows, "--max-new-tokens", 5, "--json")))["answers"]
    assert [row["prompt"] for row in many] == [TEXT, "the scene\n\nwas good", *[TEXT] * 4]
    assert [row for row in many if row["prompt"] == TEXT] == [answer] * 5
    assert TEXT in done(ask(generate, writer, "--rows", rows, "--max-new-tokens", 5))


def test_rows_with_tools_go_through_the_template_or_are_refused(writer, tmp_path):
    rows, tools = tmp_path / "rows.jsonl", [{"name": "find"}]
    shows = "{% for t in tools or [] %}{{ t.name }} {% endfor %}"
    with load(writer) as model:
        template = model.source.tokenizer.chat_template
        plain = model.encode(TEXT)
        model.source.tokenizer.chat_template = shows + template
        asked = {"role": "user", "content": f" {TEXT} "}
        found = model.encode_messages([asked], tools)
        assert found == [*model.encode("find", raw=True), *plain]
        assert prompt_of(model, {"prompt": TEXT, "tools": tools}, "f:1", raw=False) == (TEXT, found)
        assert prompt_of(model, {"messages": [asked], "tools": tools}, "f:1", raw=False)[1] == found
        model.source.tokenizer.chat_template = template
    rows.write_text(json.dumps({"prompt": TEXT, "tools": tools}) + "\n")
    told = ask(generate, writer, "--rows", rows)
    assert told.exit_code == 3
    assert "rows.jsonl:1: the tokenizer's chat template does not show 'tools'" in " ".join(told.stderr.split())


def test_each_row_may_name_its_expert(writer, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": TEXT, "who": who}) + "\n" for who in ("e0", "e3", "", "e0")))
    told = json.loads(done(ask(generate, writer, "--rows", rows, "--column", "who", "--max-new-tokens", 8, "--json")))
    found = [row["answer"] for row in told["answers"]]
    for who, answer in zip(("e0", "e3", "base"), found, strict=False):
        alone = ask(generate, writer, "--prompt", TEXT, "--as", who, "--max-new-tokens", 8, "--json")
        assert json.loads(done(alone))["answers"][0]["answer"] == answer
    assert found[0] == found[3]


def test_the_best_of_many_answers_is_first(writer, tmp_path):
    words = [generate, writer, "--prompt", TEXT, "--prompt", "it was", "--max-new-tokens", 6, "--json"]
    draw = ["--temperature", 1.5, "--seed", 4, "--n", 4]
    plain = json.loads(done(ask(*words, *draw)))["answers"]
    for more in ((), ("--strategy", "self_contrast", "--set", "beta=0"), ("--route",)):
        drawn = json.loads(done(ask(*words, *draw, *more)))["answers"] if more else plain
        ranked = json.loads(done(ask(*words, *draw, *more, "--rank-by", "likelihood")))["answers"]
        for part in (slice(4), slice(4, 8)):
            found = [row.pop("score") for row in ranked[part]]
            assert found == sorted(found, reverse=True)
            assert max(found) < 0
            assert sorted(map(str, ranked[part])) == sorted(map(str, drawn[part]))
        assert [row["answer"] for row in drawn] == [row["answer"] for row in plain]  # several at once, or one by one
    assert len({row["answer"] for row in plain[:4]}) > 1
    greedy = json.loads(done(ask(*words)))["answers"]
    one = json.loads(done(ask(*words, "--n", 1, "--rank-by", "likelihood")))["answers"]
    assert [{key: row[key] for key in greedy[0]} for row in one] == greedy
    shown = done(ask(*words[:-1], "--rank-by", "likelihood"))
    assert f"> {TEXT} (likelihood {one[0]['score']:.3f})\n{one[0]['answer']}\n\n> it was (" in shown
    with load(writer) as model:
        answer = model.generate(TEXT, max_new_tokens=6)
        ids = model.encode(TEXT)
        mean = -model.passes.losses([*ids, *answer.ids])[-answer.tokens :].mean()
        assert one[0]["score"] == pytest.approx(mean, abs=1e-5)
        apart = [model.scores(ids, [answer], expert=who)[0] for who in ("e0", "")]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": TEXT, "who": who}) + "\n" for who in ("e0", "")))
    ranks = ("--max-new-tokens", 6, "--json", "--rank-by", "likelihood")
    for row, who in zip(
        json.loads(done(ask(generate, writer, "--rows", rows, "--column", "who", *ranks)))["answers"], ("e0", "base"),
        strict=True,
    ):  # fmt: skip
        alone = json.loads(done(ask(generate, writer, "--prompt", TEXT, "--as", who, *ranks)))["answers"][0]
        assert row["score"] == pytest.approx(alone["score"], abs=1e-5)
    assert apart[0] != apart[1]


def test_draws_strategies_and_routes(writer):
    words = [generate, writer, "--prompt", TEXT, "--max-new-tokens", 6]
    drawn = done(ask(*words, "--temperature", 1, "--seed", 4, "--n", 3, "--json"))
    assert drawn == done(ask(*words, "--temperature", 1, "--seed", 4, "--n", 3, "--json"))
    assert len(json.loads(drawn)["answers"]) == 3
    plain = json.loads(done(ask(*words, "--json")))["answers"]
    same = done(ask(*words, "--strategy", "self_contrast", "--set", "beta=0", "--json"))
    assert json.loads(same)["answers"] == plain
    done(ask(*words, "--strategy", "self_contrast", "--set", "beta=2.5"))
    routed = json.loads(done(ask(*words, "--route", "--json")))["answers"][0]
    assert routed["answer"] == plain[0]["answer"]
    assert all(sum(shares.values()) == pytest.approx(1) for shares in routed["routes"].values())
    assert "router" in done(ask(*words, "--route"))


def test_the_expert_that_suits_a_prompt_answers_it(writer, tmp_path, monkeypatch):
    words = [generate, writer, "--prompt", TEXT, "--max-new-tokens", 6, "--json"]
    alone = {
        who: json.loads(done(ask(*words, "--as", who)))["answers"][0]["answer"] for who in ("e0", "e1", "e2", "e3")
    }
    rows = tmp_path / "rows.jsonl"
    said = [
        {"instruction": text, "output": "good", "expert": who}
        for text, who in ((TEXT, "e2"), ("dull and poor", "e1"), ("a poor page", "e1"))
    ]
    rows.write_text("".join(json.dumps(row) + "\n" for row in said))
    for picker in ("ppl", "classifier", "centroid", "kshot", "tree"):
        learns = () if picker == "ppl" else ("--set", f"rows={rows}")
        found = json.loads(done(ask(*words, "--strategy", "pick", "--set", f"by={picker}", *learns)))["answers"]
        assert found[0]["answer"] in alone.values()
        done(ask(*words, "--strategy", "pick", "--set", f"by={picker}", "--set", "k=2", "--set", "weigh=mean", *learns))
    named = ("--set", "by=classifier", "--set", f"rows={rows}")
    found = json.loads(done(ask(*words, "--strategy", "pick", *named)))["answers"]
    assert found[0]["answer"] == alone["e2"]
    assert not ask(*words[:-1], "--strategy", "pick", *named).stderr
    monkeypatch.setenv("FORCE_COLOR", "1")  # as if standard error were a terminal
    for quiet, more in ((True, words), (False, words[:-1])):
        result = ask(*more, "--strategy", "pick", *named)
        assert ("Learning from rows" in result.stderr) != quiet, result.output


def test_what_experts_say_of_classes_is_fused(reviews, tmp_path):
    rows = tiny_world.write_rows(tmp_path / "rows.jsonl", tiny_world.rows(20))
    fuse = ("--strategy", "fuse_outputs", "--set", f"rows={rows}", "--set", "risk=0.2")
    told = json.loads(done(ask(generate, reviews, "--prompt", TEXT, *fuse, "--json")))["predictions"][0]
    assert sum(told["probabilities"].values()) == pytest.approx(1)
    assert told["label"] in told["probabilities"]


@pytest.mark.parametrize(
    ("words", "code", "what"),
    [
        ((), 16, "there is nothing to answer"),
        (("--prompt", "a", "--rows", "b"), 16, "exclude each other"),
        (("--prompt", "a", "--n", "2"), 16, "would be the same"),
        (("--prompt", "a", "--rank-by", "taste"), 16, "answers have no score 'taste'"),
        (("--prompt", "a", "--as", "nobody"), 2, "--as: there is no personal gate of 'nobody'"),
        (("--prompt", "a", "--as", "nobody"), 2, "Experts are e0, e1, e2, e3."),
        (("--prompt", "a", "--as", " "), 2, "--as: nobody is named"),
        (("--prompt", "a", "--column", "who"), 16, "--column: no rows are given"),
        (("--rows", "rows", "--column", "who", "--as", "e0"), 16, "--as: the rows say which expert answers"),
        (("--prompt", "a", "--truncate"), 16, "--truncate: the model writes"),
        (("--prompt", "a", "--as", "expert:e9"), 2, "no expert 'e9'"),
        (("--prompt", "a", "--strategy", "clever"), 2, "unknown decoding 'clever'"),
        (("--prompt", "a", "--set", "beta=1"), 16, "unknown key 'beta' for decoding own_logits"),
        (("--prompt", "a", "--strategy", "self_contrast", "--set", "alpha=2"), 16, "must be at most 1"),
        (("--prompt", "a", "--strategy", "self_contrast", "--set", "first=9"), 16, "no router has an expert at place"),
        (("--prompt", "a", "--set", "beta"), 16, "no key=value"),
        (("--prompt", "a", "--strategy", "fuse_outputs"), 16, "is for models that classify"),
        (("--prompt", "a", "--strategy", "pick", "--set", "by=tree"), 16, "picker tree learns from rows"),
        (("--prompt", "a", "--strategy", "pick", "--set", "k=5"), 16, "there are 4 experts, not 5"),
        (("--prompt", "good " * 70), 16, "where 64 fit together"),
        (("--rows", "nothing.jsonl"), 3, "nothing.jsonl"),
        (("--prompt", "a", "--state", "nowhere"), 2, "--state nowhere: there is no such folder"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked(writer, words, code, what):
    result = ask(generate, writer, *words)
    assert result.exit_code == code, result.output
    assert what in " ".join(result.stderr.split())
    assert "Traceback" not in result.output


def test_words_of_a_row_are_its_text_and_nothing_is_none(reviews, tmp_path):
    rows = tiny_world.write_rows(tmp_path / "rows.jsonl", [{"tokens": TEXT.split(), "tags": ["O"]}, {"text": TEXT}])
    of_words, of_text = json.loads(done(ask(generate, reviews, "--rows", rows, "--json")))["predictions"]
    assert of_words == of_text
    result = ask(generate, reviews, "--prompt", " ")
    assert result.exit_code == 16
    assert "text 1 is empty" in result.stderr


@pytest.mark.parametrize("who", [0, "e9"])
def test_a_row_that_names_no_expert_is_not_given_to_the_base(writer, tmp_path, who):
    rows = tiny_world.write_rows(tmp_path / "rows.jsonl", [{"text": TEXT, "who": "e0"}, {"text": TEXT, "who": who}])
    result = ask(generate, writer, "--rows", rows, "--column", "who")
    assert result.exit_code == 16
    assert f"rows.jsonl:2: 'who': there is no expert '{who}'" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    "words",
    [
        ("--column", "who"), ("--max-new-tokens", 3), ("--temperature", 1), ("--top-k", 2), ("--top-p", 0.5),
        ("--stop", "a"), ("--seed", 0), ("--raw",), ("--rank-by", "likelihood"), ("--n", 2, "--temperature", 1),
    ],
)  # fmt: skip
def test_what_classes_do_not_need_is_not_dropped_in_silence(reviews, tmp_path, words):
    rows = tiny_world.write_rows(tmp_path / "rows.jsonl", [{"text": TEXT, "who": "e0"}])
    result = ask(generate, reviews, "--rows", rows, *words)
    assert result.exit_code == 16
    assert f"{words[0]}: the model writes nothing" in " ".join(result.stderr.split())


def test_what_programs_ask_wrongly(writer, reviews):
    with load(reviews) as model:
        for wrong, what in (
            ("good", "texts are one string"),
            ([1], "must be a string, not int"),
            (["a\ud800"], "half"),
        ):
            with pytest.raises(AnswerError, match=what):
                model.classify(wrong)
    with load(str(writer), base=writer.parent / "base", state=None) as model:
        for wrong, what in ((["good"], "must be a string, not list"), (None, "not NoneType"), ("a\ud800", "half")):
            with pytest.raises(AnswerError, match=what):
                model.generate(wrong)
        for keys, what in (
            ({"stop": "good"}, "stop is one string"), ({"stop": [1]}, "must be text, not 1"),
            ({"max_new_tokens": 2.5}, "number of tokens, not 2.5"), ({"temperature": "1"}, "temperature must be"),
            ({"top_k": 1.5}, "top-k must be a number"), ({"seed": "x"}, "a seed must be a number"),
        ):  # fmt: skip
            with pytest.raises(AnswerError, match=what):
                model.generate(TEXT, **keys)
        assert model.generate(TEXT, max_new_tokens=2, stop=None).tokens
        with pytest.raises(AnswerError, match="half a character"):
            model.encode_messages([{"role": "user", "content": "a\udcff"}])  # as bytes of a pipe that are no UTF-8
    for client, what in (("", "nobody is named"), (3, "not by 3")):
        with pytest.raises(ConfigError, match=what):
            load(writer, client)
    with pytest.raises(ConfigError, match="not by NoneType"):
        simulate(None, writer)
    with pytest.raises(ConfigError, match="no engine 'clever'"):
        simulate(writer / "config.toml", writer, engine="clever")


def test_threads_take_turns(writer):
    prompts = [TEXT, "it was", "and so we saw it all then", "the dull author"] * 2
    with load(writer) as model:
        alone = [model.generate(prompt, max_new_tokens=10).text for prompt in prompts]
        with ThreadPoolExecutor(8) as threads:
            assert list(threads.map(lambda prompt: model.generate(prompt, max_new_tokens=10).text, prompts)) == alone


def test_what_is_closed_does_not_answer_by_anothers_gate(writer, reviews):
    model = load(reviews)
    other = model.instead("client-1")
    for ask_it in (lambda: model.classify([TEXT]), lambda: model.route(TEXT)):
        with pytest.raises(AnswerError, match="goes on with another gate"):
            ask_it()
    assert other.classify([TEXT])
    other.close()
    with pytest.raises(AnswerError, match="was closed"):
        other.classify([TEXT])
    model = load(writer)
    stream, ids = model.stream(TEXT, max_new_tokens=5), model.encode(TEXT)
    next(stream)
    model.close()
    for ask_it in (lambda: next(stream), lambda: next(model.generate_all([ids], Asked()))):
        with pytest.raises(AnswerError, match="was closed"):
            ask_it()


def test_classes_by_ones_own_gate(reviews, tmp_path):
    export(open_source(reviews), tmp_path / "bundle", Options(scheme="fp32", gates=("client-1",), force=True))
    texts = [TEXT, "it was a dull page and so poor"]
    words = [word for text in texts for word in ("--prompt", text)]
    told = json.loads(done(ask(generate, reviews, *words, "--as", "client-1", "--json")))["predictions"]
    with Bundle.open(tmp_path / "bundle", trust=InsecureLocal(lambda _: None)) as bundle:
        for row, there in zip(told, bundle.classify(texts), strict=True):
            assert row["label"] == there.label
            assert row["probabilities"] == pytest.approx(there.probabilities, abs=1e-4)
    shown = done(ask(generate, reviews, *words, "--as", "client-1", "--route"))
    assert told[0]["label"] in shown
    assert "router" in shown
    with load(reviews, "client-1") as model, pytest.raises(AnswerError, match="it does not write text"):
        model.generate("a")


def test_one_model_after_another_gate(reviews):
    with load(reviews) as model:
        first = model.classify([TEXT])
        one = model.expert("e1")
        with pytest.raises(ConfigError, match="no expert 'e9'"):
            one.expert("e9")
        assert one.classify([TEXT]) != first
        assert one.instead("global").classify([TEXT]) == first
        assert model.hf is one.hf


def test_chat_keeps_what_was_said(writer):
    talk = [TEXT, "/route", "and so it was", "/as e1", TEXT, "/system the author", TEXT, "/reset", TEXT, "/help"]
    shown = done(ask(chat, writer, "--max-new-tokens", 4, stdin="\n".join(talk) + "\n"))
    assert "router" in shown
    assert "/system TEXT" in shown
    with load(writer, "e1") as model:
        assert model.generate(TEXT, max_new_tokens=4).text in shown
    refused = ask(chat, writer, stdin="/as nobody\n")
    assert refused.exit_code == 2
    assert "no personal gate of 'nobody'" in " ".join(refused.stderr.split())
