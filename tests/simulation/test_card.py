"""What a run says to others: figures, counts and names are those of its files, and what is private stays out."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import tiny_world
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from molehill.cli import app
from molehill.config import load
from molehill.errors import DataError, ResumeError
from molehill.evidence import KINDS
from molehill.wire.store import load_tree
from molehill_server import audit
from molehill_simulation.card import render, write_cards
from molehill_simulation.simulate import simulate
from molehill_simulation.summary import read_summary, summarise


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder of a base and rows, and a finished run in the open."""
    folder = tmp_path_factory.mktemp("run")
    tiny_world.save_base(folder / "bert", "bert")
    tiny_world.write_rows(folder / "rows.jsonl", tiny_world.rows(30))
    settings = tiny_world.config(folder / "bert", folder / "rows.jsonl")
    (folder / "plain.toml").write_text(settings.to_toml(), encoding="utf-8")
    simulate(str(folder / "plain.toml"), str(folder / "plain"))  # as people call it from Python
    return folder


@pytest.fixture
def run(made, tmp_path):
    """A copy of the run, to be spoilt."""
    return shutil.copytree(made / "plain", tmp_path / "run")


def rewrite(path, change):
    """Change every line of a file of JSON objects."""
    lines = [json.dumps(change(json.loads(line))) for line in path.read_text().splitlines()]
    path.write_text("\n".join(lines) + "\n")


def test_the_model_card_has_the_figures_of_the_summary_and_names_no_owner(run):
    done = CliRunner().invoke(app, ["card", str(run), "--json"])
    assert done.exit_code == 0, done.output
    names = [run / "card" / name for name in ("README.md", "data-card.md", "privacy.md")]
    assert json.loads(done.stdout)["written"] == list(map(str, names))
    assert all(path.stat().st_mode & 0o077 == 0 for path in names)
    summary = read_summary(run / "summary.json")
    card = ModelCard.load(names[0])
    said = {each.metric_name: each.metric_value for each in card.data.eval_results}
    assert said == {
        "accuracy, global": round(summary.mean.global_, 4),
        "accuracy, personalised": round(summary.mean.personalised, 4),
        "macro-F1, global": round(summary.macro_f1.mean.global_, 4),
        "macro-F1, personalised": round(summary.macro_f1.mean.personalised, 4),
    }
    assert (card.data.library_name, card.data.pipeline_tag) == ("peft", "text-classification")
    assert card.data.base_model is None  # a folder of this machine says nothing elsewhere
    assert summary.base_model.digest in card.text
    assert not [client.id for client in summary.clients if client.id in card.content]
    assert str(run.parent.parent) not in "".join(path.read_text() for path in names)


@pytest.mark.parametrize(
    ("task", "scores", "first", "second", "headed"),
    [
        ("classification", {"accuracy": 0.5, "macro_f1": 0.4}, "accuracy", "macro-F1", True),
        ("causal-lm", {"accuracy": 0.5}, "token accuracy", "perplexity", False),
        (
            "regression",
            {"figures": {"rmse": {"value": 2.0, "interval": [1.0, 3.0]}, "pearson": {"value": -0.5, "interval": None}}},
            *("root mean squared error", "Pearson r", True),
        ),
    ],
)
def test_the_figures_are_those_of_the_task_with_their_intervals(run, task, scores, first, second, headed):
    scores = {"n": 9, "loss": 1.0, "accuracy_interval": [0.25, 0.75], **scores}
    told = {"client": "a", "n_train": 9, "n_test": 9, "stages": dict.fromkeys(("base", "personalised"), scores)}
    events = [{"event": "evaluation", "time": 0.0, "tokens": {}, **told}]
    summary = summarise(events, read_summary(run / "summary.json").base_model, "cd", task)
    (run / "summary.json").write_text(summary.to_json())
    text = render(run)["README.md"]
    value = summary.mean.told("personalised", summary.measure)
    assert value in {"0.500 (0.250 to 0.750)", "2.00 (1.00 to 3.00)"}
    assert f"| {first}, mean over owners | {value} | {value} |" in text
    assert f"| {second}, worst over owners | " in text
    figures = text.split("## Figures")[1].split("##")[0]
    assert "In brackets is what a figure is in with 95% confidence." in figures
    assert ("head" in figures) == headed


def test_a_base_of_the_hub_is_named(run):
    path = run / "adapter/molora.json"
    said = json.loads(path.read_text())
    said["base"] |= {"id": "org/small", "revision": "abc"}
    said["files"] = {}
    path.write_text(json.dumps(said))
    text = render(run)["README.md"]
    assert "\nbase_model: org/small\n" in text
    assert "on the frozen base org/small at revision abc, trained by 3 data owners in 2 rounds" in text


def test_the_data_card_counts_and_quotes_no_row(run, made):
    summary, text = read_summary(run / "summary.json"), render(run)["data-card.md"]
    for client in summary.clients:
        assert f"| {client.id} | {client.n_train} | {client.n_test} | 0 |" in text
        cells = [summary.classes[client.id].get(label, (0, 0)) for label in sorted(tiny_world.LABELS)]
        assert f"| {client.id} | {' | '.join(f'{a} and {b}' for a, b in cells)} |" in text
    trained = sum(client.n_train for client in summary.clients)
    assert f"{trained} rows to train on and {30 - trained} held out." in text
    assert not [row["text"] for row in tiny_world.rows(30) if row["text"] in "".join(render(run).values())]


def test_the_report_says_who_sent_what_in_which_round(run):
    text, events = render(run)["privacy.md"], tiny_world.events(run, "round")
    for event in events:
        up, down = event["bytes_up"], event["bytes_down"]
        assert f"| {event['round']} | 3 owners | {up:,} bytes | 0 | {down:,} bytes |" in text
    for client in events[0]["accepted"]:
        assert f"| {client} | 2 | 1-2 | 2 | 0 | 0 |" in text
    assert "It was a simulation: all rows lay on one machine, and nothing left it." in text
    assert "There was no differential privacy, so nothing bounds what the model tells" in text
    assert "There was no secure aggregation" in text
    assert "its own addition to the shared router and its own addition to the shared classification head" in text
    assert f"`{audit.verify(run / 'audit.jsonl').head}`" in text


def test_the_report_says_all_that_clients_tell(run):
    """Every kind of evidence that this run has them tell, and no other; of experts all factors are one."""
    text, settings = render(run)["privacy.md"], load(run / "config.toml")
    told = text.partition("## What left each machine\n")[2].partition("\n## ")[0]
    assert [kind.name for kind in KINDS if f": {kind.meaning}.\n" in told] == [
        kind.name for kind in KINDS if kind.asked(settings)
    ]
    trained = sum(value.size for value in load_tree(run / "final.safetensors")[0].values())
    assert sum(int(each.replace(",", "")) for each in re.findall(r"\(([\d,]+) numbers\)", told)) == trained
    assert told.count("numbers)") == 3  # experts, routers, the classifier


def test_a_sum_is_called_a_sum(made, tmp_path):
    secure = {"privacy": {"secure_aggregation": True}, "data": {"clients": 4}, "wire": {"up": "fp32"}}
    settings = tiny_world.config(made / "bert", made / "rows.jsonl", run={"rounds": 1}, **secure)
    simulate(settings, tmp_path / "run")
    text = render(tmp_path / "run")["privacy.md"]
    assert "Secure aggregation: the coordinator could read the sum" in text
    assert "In a simulation nobody vouches for the keys." in text
    left = text.partition("## What left each machine\n")[2].partition("\n## ")[0]
    assert "mean training loss" not in left
    assert "encrypted shares of the secrets that masks are made of" in text


def test_the_epsilon_is_what_was_spent_and_a_deployment_is_told_as_one(run):
    section = "[privacy]\nclip = 0.5\nnoise = 2.0\nepsilon = 8.0\ndelta = 1e-6\n"
    whole = (run / "config.toml").read_text()
    before, _, rest = whole.partition("[privacy]")
    (run / "config.toml").write_text(before + section + rest[rest.index("\n[") :])
    late = {"late <b>|": "no"}

    def spent(event):
        more = {"report": {"epsilon": 1.25 * event["round"]}, "quarantined": late} if event["event"] == "round" else {}
        return event | more

    rewrite(run / "metrics.jsonl", spent)
    said = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(said | {"machine": None, "classes": {}}))
    texts = render(run)
    spent_of = "epsilon 2.5 of a budget of 8, at delta\n1e-06, with changes clipped to 0.5 and noise of 2 times that"
    assert spent_of in texts["privacy.md"]
    assert "at most 12.2 times as likely" in texts["privacy.md"]
    assert "Owners took part from machines of their own" in texts["privacy.md"]
    assert r"| late &lt;b&gt;\| | 0 | 1-2 | 0 | 2 | 0 |" in texts["privacy.md"]
    assert "The rows are on the owners' machines" in texts["data-card.md"]
    assert "How many rows each class has is not in the run folder" in texts["data-card.md"]
    assert "| 1 | 4 owners |" in texts["privacy.md"]


def test_names_of_others_are_words_and_no_markup(run):
    name = "<b>|[x](y)"
    asked = {"selected": [name], "accepted": [name]}
    rewrite(run / "metrics.jsonl", lambda event: event | (asked if event["event"] == "round" else {}))
    assert r"| &lt;b&gt;\|\[x\]\(y\) | 2 | 1-2 | 2 | 0 | 0 |" in render(run)["privacy.md"]


def test_a_log_that_does_not_hold_is_said_to_be_one(run):
    lines = (run / "audit.jsonl").read_text().splitlines(keepends=True)
    (run / "audit.jsonl").write_text("".join([lines[0], *lines[2:]]))
    assert "**The audit log does not hold**" in render(run)["privacy.md"]
    (run / "audit.jsonl").unlink()
    assert "The run folder has no audit log" in render(run)["privacy.md"]


def test_what_cannot_be_told_is_refused_and_nothing_is_written_over(run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/README.md").write_text("mine")
    done = CliRunner().invoke(app, ["card", str(run), "--out", str(tmp_path / "mine")])
    assert (done.exit_code, (tmp_path / "mine/README.md").read_text()) == (2, "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["README.md"]
    assert write_cards(run) == write_cards(run)  # its own place is written anew
    rewrite(run / "metrics.jsonl", lambda event: event | ({"accepted": 3} if event["event"] == "round" else {}))
    with pytest.raises(DataError, match="an event is not as Molehill writes it"):
        render(run)
    (run / "summary.json").unlink()
    with pytest.raises(ResumeError, match="this run has not ended yet"):
        render(run)
    with pytest.raises(ResumeError, match="not a run folder"):
        render(tmp_path)
