"""Norms of deltas: what a round tells of them, and the bound that follows what most clients send."""

from __future__ import annotations

import tomllib
from dataclasses import replace

import numpy as np
import pytest
from toy_federation import config

from molehill.config import Config, MethodRef, parse
from molehill.errors import FederationError
from molehill.wire.clipping import norm
from molehill.wire.message import decode_delta, encode_delta
from molehill.wire.tree import Tree
from molehill_server import checkpoint
from molehill_server.norms import RoundNorms

FP32 = MethodRef(name="fp32")


def scaled(run, factors, rounds=None):
    """Clients whose deltas are multiplied on their way, in these rounds or in all."""

    def fault(client, plan, reply):
        factor = factors.get(client.name, factors.get("all", 1.0))
        if factor == 1.0 or (rounds and plan.round not in rounds):
            return reply.model_dump_json()
        delta = decode_delta(run.exchange.get(reply.delta), 2**24)
        flat = np.float32(factor) * delta.tree.flat
        run.exchange.drop(reply.delta)
        blob = encode_delta(replace(delta, tree=Tree(delta.tree.layout, flat)), FP32)
        return reply.model_copy(update={"delta": run.exchange.put(blob), "bytes_up": len(blob)}).model_dump_json()

    return fault


@pytest.mark.parametrize("rounds", [None, {1}, {2}, {3}])
def test_an_outlier_is_refused_from_the_first_round_on_and_its_norm_is_told(toy, rounds):
    run = toy(config(data={"clients": 5}))
    run.run(scaled(run, {"client-4": 100.0}, rounds))
    for event in run.events("round"):
        refused = rounds is None or event["round"] in rounds
        assert list(event["quarantined"]) == (["client-4"] if refused else [])
        assert set(event["accepted"]) == {f"client-{n}" for n in range(4 if refused else 5)}
        assert set(event["norms"]) == {f"client-{n}" for n in range(5)}
        assert (event["norms"]["client-4"] > event["norm_bound"]) is refused
        assert max(event["norms"][client] for client in event["accepted"]) <= event["norm_bound"]
        if refused:
            reason = event["quarantined"]["client-4"]
            assert f"norm {event['norms']['client-4']:.3g}, above the bound of {event['norm_bound']:.3g}" in reason
            assert "round.norm_bound" in reason
    assert not run.exchange._blobs  # also of those that were held back


def test_liars_below_half_do_not_move_the_bound(toy):
    honest = toy(config(data={"clients": 7}, run={"rounds": 4}), "honest")
    honest.run()
    run = toy(config(data={"clients": 7}, run={"rounds": 4}), "attacked")
    run.run(scaled(run, {f"client-{n}": 50.0 for n in (0, 1, 2)}))
    most = max(event["norm_bound"] for event in honest.events("round"))
    for event in run.events("round"):
        assert set(event["quarantined"]) == {"client-0", "client-1", "client-2"}
        assert event["norm_bound"] <= 2 * most


@pytest.mark.parametrize("bound", ["auto", 5.0])
def test_a_plan_tells_a_norm_that_is_never_refused(toy, bound):
    """Whoever owes more than is let through, say after rounds in which its deltas came too late, must not be stuck."""
    sections = {"round": {"norm_bound": bound}, "federation": {"policy": {"name": "mixed_rank", "ranks": [1, 3, 3]}}}
    run = toy(config(data={"clients": 6}, run={"rounds": 4}, **sections))
    told = {}

    def fault(client, plan, reply):
        told.setdefault(plan.round, {})[client.name] = plan.norm_bound
        if client.name != "client-0" or plan.norm_bound is None:
            return reply.model_dump_json()
        delta = decode_delta(run.exchange.get(reply.delta), 2**24)
        return scaled(run, {client.name: (1 - 1e-6) * plan.norm_bound / norm(delta.tree.flat)})(client, plan, reply)

    run.run(fault)
    first = set(told[1].values())
    assert first == ({None} if bound == "auto" else {5.0})  # before anything is known nothing is told
    for event in run.events("round")[1:]:
        assert event["quarantined"] == {}
        assert told[event["round"]]["client-5"] <= event["norm_bound"]


def test_a_norm_up_to_what_is_told_does_not_wait_for_the_others():
    norms = RoundNorms(running=2.0)
    assert norms.safe(1.5) == 4.0
    assert [norms.held("a", size, 1.5) for size in (4.0, 4.1)] == [False, True]


def test_when_all_send_more_than_before_none_is_refused(toy):
    run = toy(config(run={"rounds": 4}))
    run.run(scaled(run, {"all": 20.0}, {3}))
    assert [event["quarantined"] for event in run.events("round")] == [{}] * 4


@pytest.mark.parametrize("clients", [1, 2])
def test_of_one_or_two_first_deltas_none_is_refused(toy, clients):
    run = toy(config(data={"clients": clients}, run={"rounds": 1}))
    run.run(scaled(run, {"client-0": 100.0}))
    assert run.events("round")[0]["quarantined"] == {}


def test_rounds_that_send_other_tensors_have_a_median_of_their_own(toy):
    run = toy(config(federation={"preset": "rolora"}, run={"rounds": 4}))
    run.run(scaled(run, {"all": 3.0}, {1, 3}))
    assert [event["quarantined"] for event in run.events("round")] == [{}] * 4
    assert len(run.start()._record.saved.norms) == 2


def test_clients_of_lower_rank_are_compared_as_if_of_full_rank():
    norms = RoundNorms()
    for client, size, scale in (("a", 1.0, 3.0), ("b", 3.0, 1.0), ("c", 2.9, 1.0), ("d", 3.5, 3.0)):
        assert norms.held(client, size, scale)
    assert norms.bound == 9.0
    assert [client for client in "abcd" if norms.refusal(client)] == ["d"]
    assert "norm 3.5, above the bound of 3," in norms.refusal("d")


@pytest.mark.parametrize("kill", [1, 3, 5, 6, 9, 11])
def test_the_bound_survives_a_kill(toy, kill):
    settings = config(federation={"select": {"name": "random", "fraction": 0.75}}, run={"rounds": 4})
    whole = toy(settings, "whole")
    final = whole.run(scaled(whole, {"client-1": 40.0}))
    run = toy(settings, "killed")
    seen = []
    inner = scaled(run, {"client-1": 40.0})

    def fault(client, plan, reply):
        seen.append(client.name)
        if len(seen) == kill:
            raise KeyboardInterrupt
        return inner(client, plan, reply)

    with pytest.raises(KeyboardInterrupt):
        run.run(fault)
    again = run.run(inner)
    assert np.array_equal(again.flat, final.flat)
    for one, other in zip(run.events("round"), whole.events("round"), strict=True):
        for name in ("accepted", "quarantined", "norms", "norm_bound"):
            assert one[name] == other[name]


def test_the_medians_of_the_last_five_rounds_are_kept(toy, tmp_path):
    run = toy(config(run={"rounds": 7}))
    run.run()
    (medians,) = run.start()._record.saved.norms.values()
    assert len(medians) == 5
    saved = run.start()._record.saved
    checkpoint.save(tmp_path / "checkpoints", saved)
    assert checkpoint.load(tmp_path / "checkpoints", saved.identity, 2**24).norms == dict(saved.norms)


def test_a_number_is_a_bound_and_off_is_none(toy):
    for bound, refused, name in ((50.0, {"client-0"}, "fixed"), ("off", set(), "off"), (None, set(), "null")):
        run = toy(config(round={"norm_bound": bound}, run={"rounds": 1}), name)
        run.run(scaled(run, {"client-0": 1000.0}))
        (event,) = run.events("round")
        assert set(event["quarantined"]) == refused
        assert event["norm_bound"] == (50.0 if refused else None)
        assert len(event["norms"]) == (3 if refused else 4)  # of what is refused by a fixed bound the reason tells it


def test_off_is_still_off_when_a_configuration_is_read_again():
    settings = parse({"round": {"norm_bound": None}})
    assert settings.round.norm_bound == "off"
    assert Config.model_validate(tomllib.loads(settings.to_toml())).round.norm_bound == "off"
    assert Config().round.norm_bound == "auto"


def test_under_differential_privacy_the_clip_is_the_bound(toy):
    """A bound that follows other clients' data would let one of them change who counts."""
    private = {"clip": 0.3, "noise": 4.0, "epsilon": 30.0, "delta": 1e-5}
    run = toy(config(federation={"preset": "ffa"}, privacy=private, run={"rounds": 2}))
    run.run(scaled(run, {"client-0": 0.01, "client-1": 0.01, "client-2": 0.01}))  # a median of almost nothing
    assert [event["quarantined"] for event in run.events("round")] == [{}, {}]
    assert [event["norm_bound"] for event in run.events("round")] == [0.6, 0.6]


def test_under_secure_aggregation_no_norm_is_known(toy):
    run = toy(config(privacy={"secure_aggregation": True}, run={"rounds": 1}))
    run.run()
    (event,) = run.events("round")
    assert (event["norms"], event["norm_bound"]) == ({}, None)


def test_a_model_that_cannot_be_trained_is_no_fault_of_its_clients(toy):
    run = toy(config(run={"rounds": 2}))
    reason = "the loss is nan at step 1: it learnt nothing from what it was sent"

    def fault(client, plan, reply):
        if client.number == 1 and plan.round == 2:
            reply = reply.model_copy(update={"unusable": reason, "delta": "", "bytes_up": 0, "loss": None})
        return reply.model_dump_json()

    run.run(fault)
    event = run.events("round")[1]
    assert event["unusable"] == {"client-1": reason}
    assert (event["quarantined"], event["missing"]) == ({}, [])
    assert event["accepted"] == ["client-0", "client-2", "client-3"]
    audit = (run.out / "audit.jsonl").read_text()
    assert '"unusable":{"client-1":"the loss is nan' in audit


@pytest.mark.parametrize("privacy", [{}, {"secure_aggregation": True}], ids=["open", "masked"])
def test_a_run_whose_model_is_ruined_says_so(toy, privacy):
    run = toy(config(privacy=privacy, run={"rounds": 2}))

    def fault(client, plan, reply):
        update = (
            {"unusable": "the loss is nan", "delta": "", "bytes_up": 0} if plan.round == 2 and client.number else {}
        )
        return reply.model_copy(update=update).model_dump_json()

    with pytest.raises(
        FederationError,
        match=r"client-1, client-2, client-3 cannot train the model they were sent \(client-1: the loss is nan\)\. "
        "What was merged in round 1 may have ruined the model",
    ):
        run.run(fault)
    assert [set(event["unusable"]) for event in run.events("retry")] == [{f"client-{n}" for n in (1, 2, 3)}] * 2
