"""The round loop, without Flower: a transport that calls toy clients."""

from __future__ import annotations

import numpy as np
import pytest
from toy_federation import EXPERTS, HEAD, SITE, client_name, config, data, initial, steps

from molehill.errors import ConfigError, FederationError
from molehill.wire.keys import Key
from molehill.wire.store import load_tree
from molehill_server.exchange.grants import Grants
from molehill_server.planning.planner import seed


def by_hand(settings, rounds):
    """FedIT written out: weights n_k per tensor, since all clients route tokens alike."""
    tree = dict(initial())
    for number in range(1, rounds + 1):
        trained = []
        for n in range(settings.data.clients):
            local = {key: value.copy() for key, value in tree.items()}
            steps(local, n, seed(settings, number, client_name(n)), settings.train.steps, lambda _: True)
            trained.append(local)
        rows = np.array([len(data(n)[0]) for n in range(settings.data.clients)], float)
        share = rows / rows.sum()
        tree = {
            key: sum(p * local[key].astype(np.float64) for p, local in zip(share, trained, strict=True)).astype(
                np.float32
            )
            for key in tree
        }
    return tree


def test_two_rounds_equal_a_hand_written_loop(toy):
    settings = config(run={"rounds": 2}, personal={"gate": "global", "head": "global"})
    final = toy(settings).run()
    for key, value in by_hand(settings, 2).items():
        np.testing.assert_allclose(final[key], value, rtol=2e-5, atol=2e-6)


def test_the_loss_falls_and_events_tell_the_story(toy):
    run = toy(config(run={"rounds": 4}, evaluate={"baselines": True}))
    run.run()
    kinds = [event["event"] for event in run.events()]
    assert kinds[0] == "start"
    assert kinds[-1] == "end"
    assert all(event["time"] > 0 for event in run.events())
    start = run.events("start")[0]
    assert start["clients"] == [client_name(n) for n in range(4)]
    assert start["parameters"] == initial().layout.size
    rounds = run.events("round")
    assert [event["round"] for event in rounds] == [1, 2, 3, 4]
    assert rounds[-1]["loss"] < rounds[0]["loss"]
    assert rounds[0]["accepted"] == rounds[0]["selected"] == start["clients"]
    assert rounds[0]["tokens"]["client-1"] == {"e0": 30.0, "e1": 15.0}
    assert rounds[0]["report"]["updates"] == 4
    progress = [(e["stage"], e["done"], e["total"]) for e in run.events("progress")]
    assert progress[:4] == [("train", n, 4) for n in (1, 2, 3, 4)]
    assert progress[-8:] == [(stage, n, 4) for stage in ("baseline", "evaluate") for n in (1, 2, 3, 4)]
    scores = run.events("evaluation")
    assert {frozenset(event["stages"]) for event in scores} == {frozenset({"base", "local", "global", "personalised"})}
    assert len(scores) == 4


def test_bytes_are_what_was_really_encoded_and_unchanged_groups_are_not_fetched_again(toy):
    run = toy(config(federation={"preset": "ffa"}))
    run.run()
    first, second, third = run.events("round")
    frozen = sum(4 * initial()[Key(SITE, e, "A")].size for e in EXPERTS)
    assert first["bytes_down"] - second["bytes_down"] > 4 * frozen  # A goes to each of four clients once
    assert second["bytes_down"] == third["bytes_down"]
    assert not run.exchange._blobs  # nothing is left behind
    assert run.events("end")[0]["bytes_up"] == sum(event["bytes_up"] for event in (first, second, third))


def test_the_final_state_is_saved_with_its_patches(toy):
    run = toy(config(federation={"preset": "flora"}))
    final = run.run()
    saved, meta = load_tree(run.out / "final.safetensors")
    assert meta["round"] == "3"
    assert {key.role for key in saved if key.kind == "patch"} == {"patch.A", "patch.B"}
    assert all(np.array_equal(saved[key], final[key]) for key in final)


def test_silent_clients_are_missing_and_failing_ones_are_quarantined(toy):
    run = toy(config(run={"rounds": 1}))

    def fault(client, plan, reply):
        if client.number == 0:
            return None
        return RuntimeError("disk full") if client.number == 1 else reply.model_dump_json()

    run.run(fault)
    (event,) = run.events("round")
    assert event["missing"] == ["client-0"]
    assert event["quarantined"] == {"client-1": "disk full."}
    assert event["accepted"] == ["client-2", "client-3"]


def test_below_quorum_tries_again_and_then_stops_with_the_reasons(toy):
    run = toy(config(round={"retries": 2, "quorum": 0.75}))

    def fault(client, plan, reply):
        return None if client.number < 2 else reply.model_dump_json()

    with pytest.raises(
        FederationError, match=r"round 1 is below its quorum: 2 of 4 .* no answer from client-0, client-1"
    ):
        run.run(fault)
    assert [event["attempt"] for event in run.events("retry")] == [0, 1, 2]
    assert run.transport.time < 4 * 60  # three deadlines, no more


def test_a_round_with_fewer_updates_than_its_rule_needs_is_below_its_quorum(toy):
    robust = {"space": "product", "rule": {"name": "trimmed_mean", "f": 1}, "lower": "svd"}
    run = toy(config(federation=robust, round={"quorum": 0.25, "retries": 1}))

    def fault(client, plan, reply):
        silent = client.number < (1 if plan.round == 1 else 2)
        return None if silent else reply.model_dump_json()

    with pytest.raises(FederationError, match=r"round 2 is below its quorum: 2 of 4 .* 3 are needed"):
        run.run(fault)
    assert [event["accepted"] for event in run.events("round")] == [["client-1", "client-2", "client-3"]]
    assert len(run.events("retry")) == 2


def test_a_retry_that_succeeds_leaves_no_trace_of_the_first(toy):
    settings = config(run={"rounds": 1}, round={"quorum": 1.0})
    whole = toy(settings, "whole").run()
    run = toy(settings, "again")
    silent = ["client-3"]

    def fault(client, plan, reply):
        if client.name in silent:
            silent.clear()
            return None
        return reply.model_dump_json()

    assert np.array_equal(run.run(fault).flat, whole.flat)
    assert run.events("round")[0]["missing"] == []


def test_bytes_of_refused_updates_and_of_retries_count(toy):
    settings = config(run={"rounds": 1}, round={"quorum": 1.0, "retries": 2})
    clean, again = toy(settings, "clean"), toy(settings, "again")
    clean.run()
    lies = [{"round": 9}, {"bytes_up": 3, "bytes_down": 2**80}]

    def fault(client, plan, reply):
        change = lies.pop() if client.number == 1 and lies else {}
        return reply.model_copy(update=change).model_dump_json()

    again.run(fault)
    (one,), (three,) = clean.events("round"), again.events("round")
    assert three["bytes_up"] == pytest.approx(3 * one["bytes_up"], rel=0.01)  # names and counts are compressed
    assert three["bytes_down"] == one["bytes_down"]  # what was fetched once, for whichever attempt


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"client": "client-2"}, "is of client 'client-2'"),
        ({"round": 9}, "in round 9"),
        ({"delta": "0" * 64}, "no blob"),
        ({"bytes_up": 3}, "it reported 3"),
        ({"examples": 2**53}, "it trains on 9007199254740992 rows, and joined with 10"),
        ({"metrics": {"z_loss": float("nan")}}, "metrics.z_loss"),
        ({"loss": float("nan")}, "loss"),
    ],
)
def test_replies_that_do_not_fit_are_quarantined(toy, change, reason):
    run = toy(config(run={"rounds": 1}))

    def fault(client, plan, reply):
        return reply.model_copy(update=change if client.number == 0 else {}).model_dump_json()

    run.run(fault)
    (event,) = run.events("round")
    assert reason in event["quarantined"]["client-0"]
    assert len(event["accepted"]) == 3


def test_mixed_ranks_are_averaged_as_if_filled_with_zeros(toy):
    policy = {"name": "mixed_rank", "ranks": [1, 3]}
    run = toy(config(run={"rounds": 1}, federation={"policy": policy}))
    final = run.run()
    assert len(run.events("round")[0]["accepted"]) == 4
    assert run.events("round")[0]["quarantined"] == {}
    assert np.abs(final[Key(SITE, "e0", "B")][:, 2]).max() > 0


def test_what_is_personal_never_reaches_the_server(toy):
    run = toy(config(federation={"preset": "local"}, personal={"gate": "personal", "head": "personal"}))
    final = run.run()
    assert np.array_equal(final.flat, initial().flat)
    assert [event["bytes_up"] > 0 for event in run.events("round")] == [True] * 3
    run = toy(config(federation={"policy": {"name": "fedpeft", "group": "head"}}), "head")
    final = run.run()
    changed = {key for key in final if not np.array_equal(final[key], initial()[key])}
    assert changed == {HEAD}


def test_a_configuration_that_cannot_work_is_refused_before_anything_starts(toy):
    with pytest.raises(ConfigError, match="products"):
        toy(config(federation={"policy": "ffa", "space": "product", "lower": "svd"})).start()


def test_a_client_is_granted_what_its_plan_asks_for(toy, tmp_path):
    run, seen = toy(config(run={"rounds": 2}, data={"clients": 2})), []
    run.grants = Grants(tmp_path / "grants")

    def look(client, plan, reply):
        seen.append((client.name, plan, run.grants.all()))
        return reply.model_dump_json()

    run.run(look)
    assert [plan.round for _, plan, _ in seen] == [1, 1, 2, 2]
    for name, plan, grants in seen:
        grant = grants[name]
        assert (grant.run, grant.round, grant.attempt, grant.write) == (plan.run, plan.round, 0, True)
        assert set(grant.read) == set(plan.blobs.values())
        size = 4 * initial().layout.size
        assert size <= grant.max_bytes < size + 2**14 < run.config.wire.max_bytes
    assert [grant.write for grant in run.grants.all().values()] == [False, False]  # while they measure


def test_a_round_waits_for_its_minimum_of_clients(toy):
    run = toy(config(run={"rounds": 1}, data={"clients": 3}, round={"min_clients": 3, "deadline": 50.0}))
    coordinator = run.start()
    clients = run.transport.clients
    late = clients.pop(12)
    coordinator._crew.roster.gather(1, 1.0, 1)
    run.transport.wait = lambda seconds: (
        setattr(run.transport, "time", run.transport.time + seconds),
        clients.setdefault(12, late) if run.transport.time > 20 else None,
    )
    coordinator.run()
    assert run.events("round")[0]["accepted"] == ["client-0", "client-1", "client-2"]


def test_too_few_clients_are_waited_for_and_then_the_run_stops(toy):
    run = toy(config(run={"rounds": 1}, data={"clients": 2}, round={"min_clients": 3, "deadline": 50.0, "retries": 1}))
    with pytest.raises(
        FederationError, match=r"round 1 cannot begin: 2 clients are connected, 3 are needed\. Start the others"
    ):
        run.run()
    assert run.transport.time >= 100
