"""``molehill init``: a first configuration for rows of every shape, which `molehill check` takes."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from molehill.cli import app
from molehill.config import load

ROWS = {
    "classes": [{"Review": f"word {i}", "stars": i % 3, "shop": f"s{i % 4}"} for i in range(24)],
    "plain": [{"text": f"word {i}", "label": "ab"[i % 2]} for i in range(24)],
    "asked": [{"question": f"word {i}", "answer": "yes"} for i in range(24)],
    "talks": [
        {"messages": [{"role": "user", "content": f"w {i}"}, {"role": "assistant", "content": "y"}]} for i in range(24)
    ],
    "share": [
        {"conversations": [{"from": "human", "value": f"w {i}"}, {"from": "gpt", "value": "y"}]} for i in range(24)
    ],
    "pairs": [{"prompt": f"word {i}", "completion": "yes", "label": "x"} for i in range(24)],
    "both": [{"prompt": f"word {i}", "completion": "yes", "instruction": "say", "output": "no"} for i in range(24)],
    "inferred": [{"premise": f"word {i}", "hypothesis": f"other {i}", "label": i % 3, "idx": i} for i in range(24)],
    "asked_of": [{"question": f"word {i}", "sentence": f"other {i}", "label": i % 2} for i in range(24)],
    "alike": [{"sentence1": f"word {i}", "sentence2": f"other {i}", "score": i / 5} for i in range(24)],
    "topics": [{"text": f"word {i}", "labels": ["a", "b"][: i % 3], "shop": f"s{i % 4}"} for i in range(24)],
    "names": [{"words": ["a", f"b{i}"], "ner_tags": ["B-PER", "O"], "user": f"u{i % 3}"} for i in range(24)],
    "prose": [{"content": f"word {i}", "user": f"u{i % 3}"} for i in range(24)],
}


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def write(folder, name):
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[name]))
    return path


@pytest.mark.parametrize(
    ("name", "kind", "columns", "clients", "partition"),
    [
        ("classes", "classification", {"text": "Review", "label": "stars"}, 4, "by_column"),
        ("plain", "classification", {}, 4, "iid"),
        ("asked", "causal-lm", {"instruction": "question", "output": "answer"}, 4, "iid"),
        ("talks", "causal-lm", {}, 4, "iid"),
        ("share", "causal-lm", {}, 4, "iid"),
        ("pairs", "causal-lm", {}, 4, "iid"),
        ("both", "causal-lm", {"prompt": "prompt", "completion": "completion"}, 4, "iid"),
        ("inferred", "classification", {"text": "premise", "text_pair": "hypothesis"}, 4, "iid"),
        ("asked_of", "classification", {"text": "question", "text_pair": "sentence"}, 4, "iid"),
        ("alike", "regression", {"text": "sentence1", "text_pair": "sentence2", "label": "score"}, 4, "iid"),
        ("topics", "multi-label", {}, 4, "by_column"),
        ("names", "token-classification", {"tokens": "words", "tags": "ner_tags"}, 3, "by_column"),
        ("prose", "causal-lm", {"text": "content"}, 3, "by_column"),
    ],
)
def test_what_is_written_is_what_the_rows_are(tmp_path, name, kind, columns, clients, partition):
    out = tmp_path / "run.toml"
    done = run("init", write(tmp_path, name), "--out", out, "--base", "someone/some-model")
    assert done.exit_code == 0, done.output
    assert "24" in done.stdout
    found = load(out)
    assert (found.task.kind, found.base.model, found.run.name) == (kind, "someone/some-model", name)
    assert dict(found.data.columns) == columns
    assert (found.data.clients, found.data.partition.name) == (clients, partition)
    assert "#" in out.read_text()
    checked = run("check", out)
    assert checked.exit_code == 0, checked.output


@pytest.mark.parametrize(
    ("rows", "words", "what"),
    [
        ([{"a": 1}], (), "none of the columns looks like questions and answers"),
        ([{"text": "x"}], ("--kind", "classification"), "none of the columns looks like a label"),
        ([{"text": "x"}], ("--kind", "token-classification"), "none of the columns looks like words and their tags"),
    ],
)
def test_rows_that_look_like_nothing(tmp_path, rows, words, what):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run("init", path, "--out", tmp_path / "run.toml", *words)
    assert done.exit_code == 3, done.output
    assert what in " ".join(done.stderr.split())
    assert not (tmp_path / "run.toml").exists()


LABELLED = [{"text": f"word {i}", "label": "ab"[i % 2]} for i in range(24)]


@pytest.mark.parametrize(
    ("rows", "words", "clients", "told"),
    [
        (LABELLED[:5], (), None, "so rows are dealt at random to"),
        ([{**row, "user": "many" if i else "one"} for i, row in enumerate(LABELLED)], (), 2, "Client 'one' has 1 rows"),
        (LABELLED, ("--clients", 3), 3, "No column looks like owners"),
    ],
)
def test_what_is_written_deals_rows_to_everybody(tmp_path, rows, words, clients, told):
    path, out = tmp_path / "rows.jsonl", tmp_path / "new" / "run.toml"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run("init", path, "--out", out, "--base", "someone/some-model", *words)
    assert done.exit_code == 0, done.output
    assert told in " ".join(done.stdout.split())
    assert clients in (None, load(out).data.clients)
    assert load(out).data.partition.name == "iid"
    checked = run("check", out)
    assert checked.exit_code == 0, checked.output


@pytest.mark.parametrize(
    ("rows", "words", "code", "what"),
    [
        ([{**row, "label": "a"} for row in LABELLED], (), 3, "every row has the label 'a'"),
        (LABELLED, ("--clients", 100), 3, "there are 24 rows for 100 clients"),
        (LABELLED, ("--base", " "), 2, "names no base model"),
    ],
)
def test_what_no_check_would_take_is_not_written(tmp_path, rows, words, code, what):
    path, out = tmp_path / "rows.jsonl", tmp_path / "run.toml"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run("init", path, "--out", out, *words)
    assert done.exit_code == code, done.output
    assert what in " ".join(done.stderr.split())
    assert not out.exists()


def test_answers_are_asked_for_where_somebody_can_give_them(tmp_path, monkeypatch):
    monkeypatch.setattr("molehill_simulation.commands.init._somebody", lambda: True)
    words = ["init", write(tmp_path, "plain"), "--out", tmp_path / "run.toml"]
    done = CliRunner().invoke(app, list(map(str, words)), input="someone/some-model\n0\nmany\n3\n")
    assert done.exit_code == 0, done.output
    assert done.output.count("Owners [4]:") == 3  # 0 and many are no numbers of owners
    found = load(tmp_path / "run.toml")
    assert (found.base.model, found.data.clients) == ("someone/some-model", 3)


def test_nothing_is_written_over(tmp_path):
    (tmp_path / "run.toml").write_text("mine")
    done = run("init", write(tmp_path, "plain"), "--out", tmp_path / "run.toml")
    assert done.exit_code == 2
    assert (tmp_path / "run.toml").read_text() == "mine"
