"""The same ServerApp and ClientApp on both engines, in fair weather and foul."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import toy_app
from toy_federation import client_name, config, initial, write_initial

from molehill.config import MethodRef
from molehill.errors import FederationError, ResumeError
from molehill.wire.connect import connect
from molehill.wire.keys import Key
from molehill.wire.local import MemoryExchange
from molehill.wire.message import Delta, decode_delta, encode_delta
from molehill.wire.store import load_tree
from molehill.wire.tree import Tree
from molehill_server import app as server
from molehill_simulation import engine
from molehill_simulation.scenario import fate, poison, spoil


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda handle: None)


def run(settings, out, observer=None, how=engine.run_local):
    if not (out / "initial.safetensors").exists():
        write_initial(out)
    how(settings, out, toy_app.app, server.app, observer)
    return load_tree(out / "final.safetensors")[0]


def events(out, kind):
    return [e for e in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if e["event"] == kind]


def fates(settings, rounds=3, attempt=0):
    return {
        (n, client): fate(settings, f"{n}.{attempt}", str(client)) for n in range(1, rounds + 1) for client in range(4)
    }


def test_events_reach_the_observer_and_the_file(tmp_path):
    heard = []
    run(config(), tmp_path, heard.append)
    assert [e["event"] for e in heard] == [
        json.loads(line)["event"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert (tmp_path / "config.toml").read_text() == config().to_toml()
    left = connect(f"memory:{tmp_path.resolve()}")
    assert isinstance(left, MemoryExchange)
    assert left._blobs == {}


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("nan", "finite"), ("huge", "norm"), ("shape", "shape"), ("keys", "nobody asked"), ("bytes", "cut short")],
)
def test_garbage_is_quarantined_with_its_reason_and_the_round_goes_on(tmp_path, kind, reason):
    dirty, clean = tmp_path / "dirty", tmp_path / "clean"
    final = run(config(scenario={"garbage": {"client-1": kind}}), dirty)
    for event in events(dirty, "round"):
        assert list(event["quarantined"]) == ["client-1"]
        assert reason in event["quarantined"]["client-1"]
        assert event["accepted"] == ["client-0", "client-2", "client-3"]
    assert np.isfinite(final.flat).all()
    assert np.abs(final.flat).max() < 100
    run(config(), clean)
    sent = {out: sum(e["bytes_up"] for e in events(out, "round")) for out in (clean, dirty)}
    assert sent[dirty] > 0.8 * sent[clean]  # the fourth client's garbage was received, if only half a message


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_poison_is_what_a_client_learnt_times_a_number(codec):
    rng = np.random.default_rng(0)
    learnt = Tree.of({Key("head", "-", "head.bias"): rng.normal(size=50)})
    ref = MethodRef(name=codec)
    honest = encode_delta(Delta("run", 3, "client-1", "b" * 64, learnt, 10, {("site", "e0"): 4.0}), ref)
    spoilt = decode_delta(poison(honest, -5.0, ref, 2**20), 2**20)
    known = decode_delta(honest, 2**20)
    np.testing.assert_allclose(spoilt.tree.flat, -5 * known.tree.flat, rtol=1e-2, atol=1e-6)
    assert replace(spoilt, tree=known.tree) == known


def test_poison_is_accepted(tmp_path):
    dirty, clean = tmp_path / "dirty", tmp_path / "clean"
    final = run(config(scenario={"poison": {"client-1": -5.0}}, round={"norm_bound": "off"}), dirty).flat
    honest = run(config(), clean).flat
    assert [len(event["accepted"]) for event in events(dirty, "round")] == [4, 4, 4]
    assert np.abs(final - honest).max() > 0.01


def test_too_much_garbage_stops_the_run_and_says_why(tmp_path):
    garbage = {client_name(n): "nan" for n in range(3)}
    with pytest.raises(FederationError, match=r"below its quorum: 1 of 4 .*client-0: .*finite"):
        run(config(scenario={"garbage": garbage}), tmp_path)
    assert events(tmp_path, "round") == []


def test_misfortunes_are_those_of_the_seed(tmp_path):
    settings = config(
        scenario={"availability": 0.8, "dropout": 0.2, "stragglers": 0.3, "delay": 9.0}, round={"quorum": 0.25}
    )
    a, b = run(settings, tmp_path / "a"), run(settings, tmp_path / "b")
    assert np.array_equal(a.flat, b.flat)
    for event in events(tmp_path / "a", "round"):
        wanted = {
            client_name(client)
            for (number, client), one in fates(settings).items()
            if number == event["round"] and not (one.reachable and one.finishes and not one.delay)
        }
        assert set(event["missing"]) == wanted  # 9 s is more than the grace of 2 s
    assert any(event["missing"] for event in events(tmp_path / "a", "round"))
    drawn = fates(settings, 500).values()
    assert 0.75 < np.mean([one.reachable for one in drawn]) < 0.85
    assert 0.15 < np.mean([not one.finishes for one in drawn]) < 0.25
    assert 0.25 < np.mean([one.delay > 0 for one in drawn]) < 0.35


def test_stragglers_are_waited_for_within_the_grace(tmp_path):
    slow = {"stragglers": 0.5, "delay": 9.0}
    patient = run(config(scenario=slow, round={"grace": 10.0}), tmp_path / "patient")
    fair = run(config(round={"grace": 10.0}), tmp_path / "fair")
    np.testing.assert_allclose(patient.flat, fair.flat, rtol=1e-5, atol=1e-6)  # they only came in another order
    assert all(not event["missing"] for event in events(tmp_path / "patient", "round"))
    run(config(scenario=slow), tmp_path / "hasty")
    assert any(event["missing"] for event in events(tmp_path / "hasty", "round"))
    assert len(connect(f"memory:{(tmp_path / 'hasty').resolve()}")._blobs) <= 4  # only of the last round


@pytest.mark.parametrize("last", [1, 2])
def test_a_run_in_foul_weather_resumes_to_the_same_result(tmp_path, last):
    settings = config(scenario={"availability": 0.8, "stragglers": 0.3}, round={"quorum": 0.25})
    whole = run(settings, tmp_path / "whole")

    def stop(event):
        if event["event"] == "round" and event["round"] == last:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(settings, tmp_path / "killed", stop)
    assert np.array_equal(run(settings, tmp_path / "killed").flat, whole.flat)


def test_another_configuration_is_refused_and_named(tmp_path):
    run(config(), tmp_path)
    with pytest.raises(ResumeError, match=r"run\.seed, train\.lr differ"):
        run(config(run={"seed": 8}, train={"lr": 0.1}), tmp_path)


def test_spoiling_says_what_it_is_asked_to():
    blob = encode_delta(Delta("run", 1, "c", "b", initial(), 3, {}), config().wire.up)
    kinds = ("nan", "shape", "huge", "keys", "bytes")
    assert len({spoil(blob, kind, config().wire.up, 2**20) for kind in kinds}) == len(kinds)


@pytest.mark.parametrize("kind", ["nan", "shape", "huge"])
def test_where_nothing_is_shared_garbage_is_what_nobody_asked_for(tmp_path, kind):
    run(config(federation={"preset": "local"}, scenario={"garbage": {"client-1": kind}}), tmp_path)
    for event in events(tmp_path, "round"):
        assert "nobody asked" in event["quarantined"]["client-1"]


def test_a_run_on_ray_that_fails_leaves_no_exchange(tmp_path, monkeypatch):
    def fail(*_):
        (tmp_path / "exchange").mkdir()
        raise FederationError("it stops")

    monkeypatch.setattr(engine, "ray_engine", fail)
    with pytest.raises(FederationError, match="it stops"):
        run(config(), tmp_path, how=engine.run_ray)
    assert not (tmp_path / "exchange").exists()
