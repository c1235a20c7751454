"""Baselines that were trained before are not trained anew, unless something that they follow from has changed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from molehill.config import MethodRef
from molehill.plan import Scores
from molehill.tasks.batches import Example
from molehill_client import baselines
from molehill_client.remembered import key_of


@pytest.fixture
def home(house, tmp_path):
    home = house()
    evaluate = home.bench.config.evaluate.model_copy(update={"baselines": True})
    config = home.bench.config.model_copy(update={"evaluate": evaluate})
    home.bench = replace(home.bench, config=config, remembered=tmp_path / "baselines")
    return home


def no_training(*_, **__):
    raise AssertionError("it is trained again")


def test_the_second_run_trains_nothing_and_has_the_same_scores(home, monkeypatch):
    clients, plans = [home.client(n) for n in range(2)], [home.plan(n, 0) for n in range(2)]
    first = baselines.baseline_together(clients, plans)
    assert [reply.remembered for reply in first] == [False, False]
    monkeypatch.setattr(baselines, "fit", no_training)
    second = baselines.baseline_together(clients, plans)
    assert [reply.stages for reply in second] == [reply.stages for reply in first]
    assert [reply.remembered for reply in second] == [True, True]


def test_of_a_group_only_those_train_that_must(home, monkeypatch):
    baselines.baseline_together([home.client(1)], [home.plan(1, 0)])
    trained = []
    own = baselines.fit

    def fit(clients, *rest):
        trained.extend(client.name for client in clients)
        return own(clients, *rest)

    monkeypatch.setattr(baselines, "fit", fit)
    replies = baselines.baseline_together([home.client(n) for n in range(3)], [home.plan(n, 0) for n in range(3)])
    assert trained == ["client-1", "client-3"]
    assert [reply.remembered for reply in replies] == [False, True, False]
    assert [reply.client for reply in replies] == ["client-1", "client-2", "client-3"]


def test_anew_trains_and_replaces_what_was_there(home):
    client, plan = home.client(0), home.plan(0, 0)
    (reply,) = baselines.baseline_together([client], [plan])
    (path,) = home.bench.remembered.iterdir()
    wrong = json.loads(path.read_text())
    wrong["local"]["scores"]["accuracy"] = 0.125
    path.write_text(json.dumps(wrong))
    assert client.baseline(plan).stages["local"].accuracy == 0.125
    evaluate = home.bench.config.evaluate.model_copy(update={"baselines": "anew"})
    object.__setattr__(home.bench, "config", home.bench.config.model_copy(update={"evaluate": evaluate}))
    assert client.baseline(plan).stages == reply.stages
    assert json.loads(path.read_text())["local"]["scores"]["accuracy"] == reply.stages["local"].accuracy


def test_what_is_damaged_or_cannot_be_kept_is_trained(home, tmp_path):
    client, plan = home.client(0), home.plan(0, 0)
    (reply,) = baselines.baseline_together([client], [plan])
    (path,) = home.bench.remembered.iterdir()
    for damaged in (
        "[]",
        "{}",
        "{",
        "7",
        '{"base": {}, "local": {}}',
        json.dumps({"base": json.loads(path.read_text())["base"]}),
        json.dumps({stage: scores.model_dump() for stage, scores in reply.stages.items()}),  # of an older version
        path.read_text().replace('"above": [', '"above": [1.0, '),
    ):
        path.write_text(damaged)
        again = client.baseline(plan)
        assert (again.stages, again.remembered) == (reply.stages, False)
    (tmp_path / "file").write_text("")
    client.bench = replace(client.bench, remembered=tmp_path / "file")
    assert client.baseline(plan).stages == reply.stages


def test_what_was_remembered_tells_the_same_gain(home, monkeypatch):
    client = home.client(0)
    client.baseline(home.plan(0, 0))
    first = client.evaluate(home.plan(0))
    monkeypatch.setattr(baselines, "fit", no_training)
    (home.folder / client.name / "outcomes.sealed").unlink()
    again = home.client(0)
    assert again.baseline(home.plan(0, 0)).remembered
    assert again.evaluate(home.plan(0)).gains == first.gains
    assert first.gains.keys() == {"accuracy", "macro_f1", "loss"}


def test_no_text_is_kept(home):
    client = home.client(0)
    client.baseline(home.plan(0, 0))
    (path,) = home.bench.remembered.iterdir()
    assert path.stat().st_mode & 0o77 == 0
    kept = json.loads(path.read_text())
    assert kept.keys() == {"base", "local"}
    for each in kept.values():
        assert each.keys() == {"scores", "rows"}
        assert each["scores"].keys() == set(Scores.model_fields)
        assert each["rows"]["n"] == len(client.test_rows)
        assert each["rows"]["parts"].keys() == {"accuracy", "macro_f1", "loss"}


def test_the_key_is_of_all_that_they_follow_from_and_of_nothing_else(home):
    client, plan, config = home.client(0), home.plan(0, 0), home.bench.config

    def key(client=client, plan=plan, steps=8, config=config):
        client.bench = replace(home.bench, config=config)
        return key_of(client, plan, steps)

    def other(section, **keys):
        part = getattr(config, section).model_copy(update=keys)
        return config.model_copy(update={section: part})

    first = key()
    for same in (
        other("federation", rule=MethodRef(name="median")),
        other("wire", up=config.wire.down),
        other("round", deadline=77.0),
        other("engine", workers=2),
        other("run", name="another"),
    ):
        assert key(config=same) == first
    for changed in (
        other("train", lr=0.5),
        other("molora", rank=3),
        other("run", rounds=9),
        other("task", max_length=9),
    ):
        assert key(config=changed) != first
    assert key(steps=9) != first
    assert key(plan=plan.model_copy(update={"seed": 6})) != first
    assert key(client=home.client(1)) != first
    for name in ("train_rows", "test_rows"):
        moved = home.client(0)
        rows = getattr(moved, name)
        rows[0], rows[1] = rows[1], rows[0]
        assert key(client=moved) != first
        rows[0], rows[1] = rows[1], rows[0]
        assert key(client=moved) == first
        rows.units = (rows.units[-1], *rows.units[1:])
        assert key(client=moved) != first
        rows[0], rows[1] = rows[1], Example([*rows[0].input_ids, 5], rows[0].labels)
        assert key(client=moved) != first
