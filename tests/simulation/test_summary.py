"""The summary of a run, from its events."""

from __future__ import annotations

import json
import math
from io import StringIO

import pytest
from rich.console import Console
from told_runs import BASE, CLIENTS, causal, make_events, make_run, without_scores

from molehill.errors import DataError
from molehill_server import events as events_file
from molehill_simulation.report import write_report
from molehill_simulation.summary import read_summary, summarise
from molehill_simulation.ui import show_summary


def test_summary_has_the_promised_shape_and_figures():
    events = make_events(CLIENTS)
    summary = json.loads(summarise(events, BASE, "cd").to_json())
    assert set(summary) == {
        "task", "clients", "mean", "worst", "token_accuracy", "macro_f1", "loss", "perplexity", "exact_match",
        "normalised_match", "rouge_l", "chrf", "figures", "classes", "confusion", "recall", "type_f1", "gains",
        "lengths", "probes", "rounds", "seconds", "bytes_up", "bytes_down",
        "base_model", "config_digest", "unscored", "anew", "remembered", "machine", "split",
    }  # fmt: skip
    assert set(summary["clients"][0]) == {
        "id", "n_train", "n_test", "aside", "chosen", "cut", "lost", "unlearnt",
        "base", "local", "global", "personalised",
        "token_accuracy", "macro_f1", "recall", "type_f1", "loss", "perplexity", "answered", "exact_match",
        "normalised_match", "rouge_l", "chrf", "figures", "gains", "interval",
    }  # fmt: skip
    assert summary["rounds"] == 6
    assert summary["seconds"] == 161.2
    assert summary["base_model"] == {"id": "sample:minilm", "revision": None, "digest": "3f" * 32, "remarks": []}
    assert summary["bytes_up"] == sum(event["bytes_up"] for event in events if event["event"] == "round")
    for stage in ("base", "local", "global", "personalised"):
        values = [client[stage] for client in summary["clients"]]
        assert summary["mean"][stage] == pytest.approx(sum(values) / len(values))
        assert summary["worst"][stage] == min(values)


def test_a_causal_lm_has_loss_perplexity_and_token_accuracy_by_their_names(tmp_path):
    events = causal(make_events(CLIENTS))
    told = json.loads(summarise(events, BASE, "cd", "causal-lm").to_json())
    assert told["macro_f1"] is None
    losses = [e["stages"]["global"]["loss"] for e in events if "global" in e.get("stages", {})]
    mean = sum(losses) / len(losses)
    assert told["loss"]["mean"]["global"] == pytest.approx(mean)
    assert told["loss"]["worst"]["global"] == max(losses)
    assert [client["perplexity"]["global"] for client in told["clients"]] == pytest.approx([*map(math.exp, losses)])
    assert told["perplexity"]["mean"]["global"] == pytest.approx(math.exp(mean))
    assert told["perplexity"]["worst"]["global"] == pytest.approx(math.exp(max(losses)))
    assert told["token_accuracy"]["mean"] == told["mean"]
    assert told["clients"][0]["token_accuracy"]["base"] == told["clients"][0]["base"]
    events[-2]["stages"]["global"]["loss"] = 1e30  # a client may say so
    huge = summarise(events, BASE, "cd", "causal-lm")
    assert (huge.clients[-1].loss.global_, huge.clients[-1].perplexity.global_) == (1e30, None)
    folder = make_run(tmp_path, events)
    (folder / "summary.json").write_text(huge.to_json())
    assert read_summary(folder / "summary.json") == huge


def test_the_summary_of_an_older_version_is_read_and_shown(tmp_path):
    events = make_events(CLIENTS)
    folder = make_run(tmp_path, events)
    old = json.loads((folder / "summary.json").read_text())
    for part in (old, *old["clients"]):
        for name in ("token_accuracy", "loss", "perplexity"):
            del part[name]
    for task in ("classification", "causal-lm"):
        (folder / "summary.json").write_text(json.dumps({**old, "task": task}))
        found = read_summary(folder / "summary.json")
        assert found.mean.personalised == old["mean"]["personalised"]
        console = Console(file=StringIO(), width=100)
        show_summary(found, console)
        assert f"{found.clients[0].personalised:.3f}"[1:] in console.file.getvalue()
        assert f"{found.mean.personalised:.3f}" in write_report(folder).read_text("utf-8")


def test_gains_are_counted_by_whether_their_interval_has_0_in_it():
    events = make_events(CLIENTS[:4])
    ends = [(0.01, 0.05), (0.0, 0.06), (-0.09, -0.01)]
    told = [event for event in events if "global" in event.get("stages", {})]
    for event, (low, high) in zip(told, ends, strict=False):  # the last one is of an older version
        event["gains"] = {"accuracy": {"value": (low + high) / 2, "interval": [low, high]}}
    summary = summarise(events, BASE, "cd")
    over = summary.gains["accuracy"]
    assert (over.gained, over.lost, over.neither) == (1, 1, 1)
    assert (over.client, over.worst.value) == (CLIENTS[2], pytest.approx(-0.05))
    assert over.mean.value == pytest.approx(0.01 / 3)
    spread = math.hypot(0.02, 0.03, 0.04) / 3
    assert over.mean.interval == pytest.approx((0.01 / 3 - spread, 0.01 / 3 + spread))
    assert [client.gains.get("accuracy") is None for client in summary.clients] == [False, False, False, True]
    del told[0]["gains"]["accuracy"]["interval"]
    vague = summarise(events, BASE, "cd").gains["accuracy"]
    assert (vague.mean.interval, vague.neither) == (None, 2)
    assert summarise(make_events(CLIENTS), BASE, "cd").gains == {}


def test_summary_counts_a_repeated_round_once_and_allows_missing_stages():
    events = [event for event in make_events(CLIENTS) if "base" not in event.get("stages", {})]
    again = next(event for event in events if event["event"] == "round")
    summary = summarise([*events, again], BASE, "cd")
    assert summary.rounds == 6
    assert summary.mean.base is None
    assert summary.clients[0].personalised is not None
    assert summarise([], BASE, "cd").mean.personalised is None


def test_mean_and_worst_are_over_clients_that_have_every_figure():
    whole = summarise(make_events(CLIENTS), BASE, "cd")
    part = summarise(without_scores(make_events(CLIENTS), *CLIENTS[:2]), BASE, "cd")
    assert len(part.clients) == 8
    assert [client.id for client in part.complete] == CLIENTS[2:]
    for stage in ("base", "personalised"):
        values = [getattr(client, stage) for client in whole.clients[2:]]
        assert getattr(part.mean, stage) == pytest.approx(sum(values) / 6)
        assert getattr(part.worst, stage) == min(values)
    assert whole.complete == whole.clients
    console = Console(file=StringIO(), width=100)
    show_summary(part, console)
    text = " ".join(console.file.getvalue().split())
    assert f"mean and worst are over the 6 of 8 clients that have all figures; {CLIENTS[0]}: " in text
    none = summarise([{**e, "stages": {}} for e in make_events(CLIENTS) if e["event"] == "evaluation"], BASE, "cd")
    assert (len(none.clients), none.complete, none.mean.base) == (8, (), None)


def test_summary_reads_back(tmp_path):
    folder = make_run(tmp_path, make_events(CLIENTS))
    assert read_summary(folder / "summary.json") == summarise(make_events(CLIENTS), BASE, "ab" * 32)
    (folder / "summary.json").write_text("{}")
    with pytest.raises(DataError, match="not the summary"):
        read_summary(folder / "summary.json")
    with pytest.raises(DataError, match="No such file"):
        read_summary(folder / "absent.json")


def test_events_cut_off_by_a_kill_are_read_up_to_the_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "start"}\n{"event": "rou')
    assert events_file.read(path) == [{"event": "start"}]
    path.write_text('{"event": "start"}\nnonsense\n{"event": "end"}\n')
    with pytest.raises(DataError, match=r"metrics.jsonl:2"):
        events_file.read(path)


def test_summary_without_clients_still_prints():
    console = Console(file=StringIO(), width=100)
    show_summary(summarise([], BASE, "cd"), console)
    assert "0 rounds" in console.file.getvalue()
