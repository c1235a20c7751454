"""Strategies on a device: passes of a bundle under settings are those of the model it was made from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import edge_export
import edge_graphs
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from molehill import catalogue
from molehill.catalogue import Method, NoParams
from molehill.decoding.interfaces import BASE, OWN, Setting, Strategy
from molehill.decoding.settings import only_of
from molehill.errors import AnswerError, DataError
from molehill.molora.decode import TorchPasses
from molehill_edge import Bundle, InsecureLocal, generate
from molehill_edge.commands.group import app
from molehill_simulation.prompts import examples_of
from molehill_simulation.source import open_source

TRUST = InsecureLocal(lambda _: None)
MOLORA = {"targets": "all-linear", "experts": 4, "rank": 4, "scope": "layer", "selector": {"name": "top_k", "k": 2}}
PROMPT = [5, 9, 14, 3, 22]
BIAS = Setting(bias=tuple(np.linspace(-3, 3, 8)))
SAYS = "yes, cat!"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A decoder, its adapter and its bundle, which has an empty slot."""
    folder = tmp_path_factory.mktemp("made")
    keys = {"router_ranks": True, "spare": 1, "adapter": folder / "adapter"}
    return edge_export.write(folder / "bundle", "llama", "fp32", **keys, **MOLORA), folder


@pytest.fixture
def bundle(made):
    with Bundle.open(made[1] / "bundle", trust=TRUST, threads=1) as found:
        yield found


@pytest.fixture(scope="module")
def talk(tmp_path_factory):
    """A bundle of an earlier version: it cannot choose experts by their places."""
    folder = tmp_path_factory.mktemp("talk")
    edge_graphs.causal(folder / "talk", says=SAYS)
    return folder / "talk"


def test_settings_are_those_of_the_model(made, bundle):
    host, device = TorchPasses(made[0]), bundle.passes()
    assert device.size == host.size == 8  # the empty slot has no number
    assert device.experts == host.experts
    for setting in (OWN, BIAS, host.only(["e1"]), Setting(ranks=(2, 3)), Setting(bias=BIAS.bias, ranks=(1, 4))):
        for ids in (PROMPT, [*PROMPT, 7], [*PROMPT, 7, 8, 30], PROMPT[:2]):
            found = device.logits(ids, setting, str(setting))
            assert np.abs(found - host.logits(ids, setting, str(setting))).max() < 1e-4
        assert np.abs(device.losses(PROMPT, setting) - host.losses(PROMPT, setting)).max() < 1e-4
    assert device.only(["e1"]) == host.only(["e1"]) == only_of([device.experts] * 2, ["e1"])
    assert device.losses(PROMPT[:1]).shape == (0,)


def test_lanes_keep_what_they_have_read(bundle):
    passes = bundle.passes()
    passes.logits(PROMPT)
    passes.logits([1, 2], Setting(ranks=(2, 3)), "weak")
    assert passes.kept([*PROMPT, 7]) == len(PROMPT)
    assert passes.kept([1, 2, 3], "weak") == 2
    assert passes.kept([1, 2, 3], "none") == 0
    passes.logits([1, 2], BIAS, "weak")  # another setting begins anew
    assert np.abs(passes.logits([1, 2], BIAS, "weak") - bundle.passes().logits([1, 2], BIAS)).max() < 1e-5
    bundle.choose_experts(["e0", "e1"])
    assert passes.kept([*PROMPT, 7]) == 0
    assert np.abs(passes.logits(PROMPT) - bundle.passes().logits(PROMPT)).max() < 1e-5


def test_losses_of_a_long_text_are_read_in_parts(bundle, monkeypatch):
    passes, ids = bundle.passes(), np.random.default_rng(0).integers(3, 40, 30).tolist()
    whole = passes.losses(ids).copy()
    monkeypatch.setattr(generate, "_LOGITS", 48 * 7)
    assert passes.losses(ids) == pytest.approx(whole, abs=1e-5)
    assert bundle.passes().losses(ids) == pytest.approx(whole, abs=1e-5)
    wanted = [-np.log(_softmax(passes.logits(ids[:n], OWN))[ids[n]]) for n in range(1, 30)]
    assert whole == pytest.approx(wanted, abs=1e-4)


def _softmax(logits):
    found = np.exp(logits.astype(np.float64) - logits.max())
    return found / found.sum()


def test_what_a_bundle_cannot_do_is_refused(bundle, talk):
    passes = bundle.passes()
    for setting, what in (
        (BASE, "no pass of its base alone"),
        (Setting(ranks=(4, 5)), "no router has an expert at place 5"),  # the empty slot is none
        (Setting(bias=(1.0,)), "a setting has 1 numbers, the routers have 8"),
        (Setting(mask=(False,) * 8), "a router is left without an expert"),
    ):
        with pytest.raises(AnswerError, match=what):
            passes.logits(PROMPT, setting)
        with pytest.raises(AnswerError, match=what):
            passes.losses(PROMPT, setting)
    assert passes.logits(PROMPT).shape == (48,)  # the same lane, afterwards
    bundle.choose_experts(["e0", "e1"])
    with pytest.raises(AnswerError, match="a router is left without an expert"):
        passes.logits(PROMPT, passes.only(["e2"]))
    with pytest.raises(AnswerError, match="no router has an expert at place 3"):
        passes.logits(PROMPT, Setting(ranks=(2, 3)))
    with Bundle.open(talk, trust=TRUST) as old, pytest.raises(AnswerError, match="--router-ranks"):
        old.generate("hello", strategy="self_contrast")


def test_a_strategy_answers_in_python(made, bundle):
    host = TorchPasses(made[0])
    strategy = bundle.strategy("self_contrast", {"beta": 3.0})
    scores, ids = strategy.begin(host, PROMPT), list(PROMPT)
    for _ in range(8):
        ids.append(int(scores(ids).argmax()))
    scores, found = strategy.begin(bundle.passes(), PROMPT), list(PROMPT)
    for _ in range(8):
        found.append(int(scores(found).argmax()))
    assert found == ids
    assert len(set(ids[5:])) > 1
    plain = bundle.generate("the scene", max_new_tokens=6)
    assert bundle.generate("the scene", max_new_tokens=6, strategy="own_logits") == plain
    assert bundle.generate("the scene", max_new_tokens=6, strategy="self_contrast", params={"beta": 0}) == plain
    chats = [bundle.chat(strategy=each) for each in (None, "own_logits", strategy)]
    for text in ("the scene", "and the plot"):
        said = [chat.say(text, max_new_tokens=4).text for chat in chats]
        assert said[0] == said[1]
    with pytest.raises(AnswerError, match="takes no parameters"):
        bundle.strategy(strategy, {"beta": 1})


class _Host(Strategy):
    on_device = False

    def begin(self, passes, prompt):
        return passes.logits


class _Learner(Strategy):
    """Says again what its rows say."""

    rows = "rows.jsonl"

    def learn(self, passes, examples, through):
        self.examples = examples

    def begin(self, passes, prompt):
        return lambda ids: np.eye(passes.answers)[self.examples[0].answer[0]]


def test_what_only_hosts_can_do_is_refused(bundle):
    with pytest.raises(AnswerError, match="strategy _Host is host_only: it asks for more of a model than a bundle"):
        bundle.generate("hello", strategy=_Host())
    with pytest.raises(AnswerError, match="unknown key 'beta'"):
        bundle.strategy("own_logits", {"beta": 1})


def test_a_strategy_reads_its_rows_on_the_device(bundle, tmp_path, monkeypatch):
    method = Method("decoding", "learner", _Learner, NoParams, "house", "", (), "")
    monkeypatch.setitem(catalogue._registry.methods, ("decoding", "learner"), method)
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"instruction": "the scene", "output": "good", "expert": "e1"}\n')
    strategy = bundle.strategy("learner")
    assert strategy.examples[0].columns == {"instruction": "the scene", "output": "good", "expert": "e1"}
    assert bundle.generate("the scene", strategy=strategy, max_new_tokens=2).text == "good good"


ROWS = [
    {"instruction": "the scene", "input": "", "output": "good"},
    {"instruction": "the scene was", "input": "very dull", "output": "so poor and bad", "expert": "e2", "n": 3},
    {"instruction": "the", "input": "", "output": "fun " * 80},
]
TALKS = [
    {"messages": [{"role": role, "content": text} for role, text in turns]}
    for turns in (
        [("user", "the scene"), ("assistant", "good")],
        [("user", "the scene"), ("assistant", "good"), ("user", "and the plot"), ("assistant", "very dull")],
    )
]
SHARED = [
    {"conversations": [{"from": "human", "value": "the scene"}, {"from": "gpt", "value": "good"}]},
    {"conversations": [{"role": "developer", "content": "good"}, *TALKS[0]["messages"]]},
]
PAIRS = [
    {"prompt": "the scene", "completion": "good"},
    {"prompt": TALKS[1]["messages"][:3], "completion": TALKS[1]["messages"][3:]},
]
TEXTS = [{"text": "the scene was good"}]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("rows", [ROWS, TALKS, SHARED, PAIRS, TEXTS])
def test_rows_are_read_as_on_a_host(made, tmp_path, kind, rows):
    folder = made[1]
    if kind != "llama":  # without a chat template
        folder = made[1].parent / "gpt2"
        if not folder.exists():
            edge_export.write(folder / "bundle", kind, "fp32", adapter=folder / "adapter", **MOLORA)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    from molehill_edge import examples

    with Bundle.open(folder / "bundle", trust=TRUST, threads=1) as bundle:
        found = examples.read(bundle._engine, tmp_path / "rows.jsonl")
    wanted = examples_of(open_source(folder / "adapter"), tmp_path / "rows.jsonl")
    assert [(each.ids, each.answer) for each in found] == [(each.ids, each.answer) for each in wanted]
    assert all(each.columns.items() <= other.columns.items() for each, other in zip(wanted, found, strict=True))


def test_rows_that_do_not_fit_are_refused(bundle, tmp_path):
    from molehill_edge import examples

    for row, what in (
        ({"messages": "hello"}, "must be a list of messages"),
        ({"messages": [{"role": "assistant", "content": "good"}]}, "nothing is asked"),
        ({"instruction": "a", "output": "b", "tools": [{"name": "f"}]}, "does not know tools"),
        ({"question": "a"}, "the row has none of 'messages'"),
        ({"instruction": "the " * 90, "output": "good"}, "no token of the answer fits"),
    ):
        (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
        with pytest.raises(DataError, match=what):
            examples.read(bundle._engine, tmp_path / "rows.jsonl")


@pytest.fixture
def edge(talk, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    typed = typer.Typer()
    typed.add_typer(app, name="edge")

    def call(*words, stdin=None):
        return CliRunner().invoke(typed, ["edge", "run", str(talk), "--insecure-local", *words], input=stdin)

    return call


def test_a_strategy_on_the_command_line(edge):
    for words in (("--strategy", "own_logits"), ("--strategy", "self_contrast", "--set", "beta=0")):
        result = edge("--text", "hello", *words)
        assert (result.exit_code, result.stdout) == (0, f"{SAYS}\n"), result.output
        result = edge("--chat", *words, stdin="hello\nand now?\n")
        assert (result.exit_code, result.stdout) == (0, f"{SAYS}\n{SAYS}\n"), result.output


@pytest.mark.parametrize(
    ("words", "code", "what"),
    [
        (("--strategy", "self_contrast"), 16, "cannot choose experts by their places"),
        (("--strategy", "clever"), 2, "unknown decoding 'clever'"),
        (("--set", "beta=1"), 16, "unknown key 'beta' for decoding own_logits"),
        (("--strategy", "self_contrast", "--set", "beta"), 16, "no key=value"),
    ],
)
def test_what_cannot_be_asked(edge, words, code, what):
    result = edge("--text", "hello", *words)
    assert result.exit_code == code, result.output
    assert what in " ".join(result.stderr.split())
    assert "Traceback" not in result.output


def test_without_a_strategy_none_is_imported(talk):
    code = (
        "import sys; from molehill_edge import Bundle, InsecureLocal\n"
        "with Bundle.open(sys.argv[1], trust=InsecureLocal(lambda _: None), threads=1) as b: b.generate('hello')\n"
        "print(*(m for m in sys.modules if m.startswith('molehill.decoding.strategies.')), 'torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code, talk], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["False"]
