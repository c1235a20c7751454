"""Strategies that need more than the run: another model beside it, or rows."""

from __future__ import annotations

import json

import pytest
import tiny_world
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from molehill_simulation.commands.chat import chat
from molehill_simulation.commands.generate import generate
from molehill_simulation.loaded import load
from molehill_simulation.simulate import simulate

TEXT = "the scene was very good"
MOLORA = {"targets": "all-linear", "experts": 2, "rank": 2, "scope": "layer"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A causal run and a classifier, larger bases beside them, and rows that name experts."""
    folder = tmp_path_factory.mktemp("strategies")
    for kind, task in (("llama", "causal-lm"), ("bert", "classification")):
        base = tiny_world.save_base(folder / kind, kind, initializer_range=0.2)
        rows = tiny_world.rows(24, kind)
        data = tiny_world.write_rows(folder / f"{kind}.jsonl", rows)
        config = tiny_world.config(
            base, data, task={"kind": task, "max_length": 48}, molora=MOLORA, run={"rounds": 1}, train={"lr": 5e-2}
        )
        simulate(config, folder / f"{kind}-run")
        named = [{**row, "expert": f"e{number % 2}"} for number, row in enumerate(rows)]
        tiny_world.write_rows(folder / f"{kind}-named.jsonl", named)
    tiny_world.save_base(folder / "big", "llama", seed=5, hidden_size=32, num_hidden_layers=3, initializer_range=0.2)
    tiny_world.save_base(folder / "short", "llama", seed=5, max_position_embeddings=48)
    other = AutoTokenizer.from_pretrained(tiny_world.save_base(folder / "other", "llama"))
    other.add_tokens(["zebra"])
    other.save_pretrained(folder / "other")
    return folder


def ask(verb, *words, stdin=None):
    app = typer.Typer()
    app.command()(verb)
    return CliRunner().invoke(app, list(map(str, words)), input=stdin)


def answered(result, key="answers"):
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)[key]


def test_a_large_base_is_steered_by_what_the_run_has_learnt(folder):
    run, big = folder / "llama-run", folder / "big"
    words = [
        generate,
        run,
        "--prompt",
        TEXT,
        "--max-new-tokens",
        6,
        "--strategy",
        "emulated_ft",
        "--large",
        big,
        "--json",
    ]
    (plain,) = answered(ask(*words, "--set", "beta=0"))
    (steered,) = answered(ask(*words, "--set", "beta=4", "--set", "top_p=1"))
    assert plain["answer"] != steered["answer"]
    with load(run, others={"large": str(big)}) as model:
        ids = model.encode(TEXT)
        alone = AutoModelForCausalLM.from_pretrained(big).generate(
            model.source.tokenizer(TEXT, return_tensors="pt")["input_ids"].new_tensor([ids]), max_new_tokens=6,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip
        assert model.source.tokenizer.decode(alone[0, len(ids) :], skip_special_tokens=True) == plain["answer"]
        keys = {"strategy": "emulated_ft", "params": {"beta": 4.0, "top_p": 1.0}, "max_new_tokens": 6}
        assert model.generate(TEXT, **keys).text == steered["answer"]
        assert model.instead("base").generate(TEXT, **keys).text == plain["answer"]  # nothing was learnt there
    talk = ask(chat, run, "--max-new-tokens", 4, "--strategy", "emulated_ft", "--large", big, stdin=f"{TEXT}\n")
    assert talk.exit_code == 0, talk.output


@pytest.mark.parametrize(
    ("words", "code", "what"),
    [
        (("--large", "big"), 16, "strategy own_logits asks no large model"),
        (("--strategy", "emulated_ft"), 16, "there is no large model beside this one"),
        (("--strategy", "emulated_ft", "--large", "other"), 16, "has another vocabulary than"),
        (("--strategy", "emulated_ft", "--large", "bert"), 4, "is an encoder and cannot write"),
        (("--strategy", "emulated_ft", "--large", "nowhere"), 4, "nowhere"),
        (("--strategy", "emulated_ft", "--large", "short", "--max-new-tokens", "45"), 16, "where 48 fit together"),
        (("--strategy", "ensemble", "--set", "rows=nowhere.jsonl"), 3, "nowhere.jsonl"),
        (("--strategy", "ensemble", "--set", "rows=llama.jsonl"), 16, "row 1 has no column 'expert'"),
    ],
)
def test_what_cannot_be_asked(folder, monkeypatch, words, code, what):
    monkeypatch.chdir(folder)
    result = ask(generate, "llama-run", "--prompt", TEXT, *words)
    assert what in " ".join(result.stderr.split()), result.output
    assert result.exit_code == code
    assert "Traceback" not in result.output


def test_experts_are_weighed_by_rows_for_writers_and_classifiers(folder):
    rows = ("--set", f"rows={folder / 'llama-named.jsonl'}", "--set", "temperature=0.001")
    words = (generate, folder / "llama-run", "--prompt", TEXT, "--max-new-tokens", 6, "--json", "--strategy")
    found = [answered(ask(*words, "ensemble", *rows, "--set", "own=false"))[0]["answer"]]
    alone = [answered(ask(*words, "own_logits", "--as", who))[0]["answer"] for who in ("e0", "e1")]
    assert found[0] in alone
    words = (generate, folder / "bert-run", "--prompt", TEXT, "--json", "--strategy")
    rows = ("--set", f"rows={folder / 'bert-named.jsonl'}")
    mixed = [answered(ask(*words, "ensemble", *more), "predictions")[0]["probabilities"] for more in ((), rows)]
    own = answered(ask(*words, "own_logits"), "predictions")[0]["probabilities"]
    assert all(sum(each.values()) == pytest.approx(1) for each in mixed)
    assert mixed[0] != mixed[1] != own
    refused = ask(*words, "reroute")
    assert "is for models that write text" in refused.output
    assert refused.exit_code == 16


def test_biases_move_with_the_text(folder):
    words = (generate, folder / "llama-run", "--prompt", TEXT, "--max-new-tokens", 6, "--json", "--strategy")
    own = answered(ask(*words, "own_logits"))
    assert answered(ask(*words, "reroute", "--set", "steps=0")) == own
    for by in ("spsa", "gradient"):
        assert len(answered(ask(*words, "reroute", "--set", f"by={by}", "--set", "every=2"))) == 1
    assert answered(ask(*words, "own_logits")) == own
