"""What a well-formed delta may not say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from toy_federation import BASE, SITE, config

from molehill.config import MethodRef
from molehill.wire.message import decode_delta, encode_delta
from molehill.wire.tree import Tree

PAIR = (SITE, "e0")


def sent(toy, change, codec="fp32", name="run", **sections):
    """The round in which the first client changes its delta before it sends it."""
    run = toy(config(run={"rounds": 1}, **sections), name)

    def fault(client, plan, reply):
        if client.number:
            return reply.model_dump_json()
        delta = change(decode_delta(run.exchange.get(reply.delta), 2**24))
        blob = encode_delta(delta, MethodRef(name=codec))
        update = {"delta": run.exchange.put(blob), "bytes_up": len(blob)}
        return reply.model_copy(update=update).model_dump_json()

    run.run(fault)
    (event,) = run.events("round")
    return event


@pytest.mark.parametrize(
    ("tokens", "fits"), [({PAIR: 0.0}, True), ({PAIR: 2 * 32 * 64.0}, True), ({PAIR: 2 * 32 * 64 * 1.1}, False)]
)
def test_no_expert_gets_more_tokens_than_there_are(toy, tokens, fits):
    event = sent(toy, lambda delta: replace(delta, tokens=tokens), task={"max_length": 64})
    assert ("client-0" in event["accepted"]) == fits
    assert fits or "it counts 4505.6 tokens" in event["quarantined"]["client-0"]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"base": "c" * 64}, f"base = '{'c' * 64}', not '{BASE}'"),
        ({"run": "another"}, "run = 'another', not 'molehill'"),
        ({"round": 7}, "round = 7, not 1"),
        ({"client": "client-3"}, "client = 'client-3', not 'client-0'"),
    ],
)
def test_a_delta_of_another_base_run_round_or_client_is_quarantined(toy, change, what):
    event = sent(toy, lambda delta: replace(delta, **change))
    assert event["quarantined"] == {"client-0": f"its delta says {what}."}
    assert event["accepted"] == ["client-1", "client-2", "client-3"]


def test_a_replay_of_an_old_round_is_quarantined(toy):
    run = toy(config(run={"rounds": 3}))
    kept = []

    def fault(client, plan, reply):
        if client.number:
            return reply.model_dump_json()
        kept.append(run.exchange.get(reply.delta))
        old = kept[0]
        return reply.model_copy(update={"delta": run.exchange.put(old), "bytes_up": len(old)}).model_dump_json()

    run.run(fault)
    assert [event["quarantined"] for event in run.events("round")] == [
        {},
        {"client-0": "its delta says round = 1, not 2."},
        {"client-0": "its delta says round = 1, not 3."},
    ]


@pytest.mark.parametrize(("bound", "fits"), [(1e9, True), (10.01, True), (9.99, False)])
def test_a_delta_farther_than_the_bound_is_quarantined(toy, bound, fits):
    def change(delta):
        flat = np.full(delta.tree.layout.size, 10 / delta.tree.layout.size**0.5, np.float32)  # of norm 10
        return replace(delta, tree=Tree(delta.tree.layout, flat))

    event = sent(toy, change, round={"norm_bound": bound})
    assert event["quarantined"] == ({} if fits else {"client-0": "its delta has norm 10, above the bound of 9.99."})


def test_tokens_of_a_foreign_expert_are_refused(toy):
    event = sent(toy, lambda delta: replace(delta, tokens={(SITE, "e9"): 1.0}))
    assert "foreign expert" in event["quarantined"]["client-0"]


def test_a_delta_comes_in_the_codec_that_was_asked_for(toy):
    event = sent(toy, lambda delta: delta, codec="fp16")
    assert event["quarantined"] == {"client-0": "its delta comes in codec 'fp16', not 'fp32'."}
    assert not sent(toy, lambda delta: delta, codec="fp16", name="asked", wire={"up": "fp16"})["quarantined"]


def test_a_delta_says_the_rows_that_its_reply_says(toy):
    event = sent(toy, lambda delta: replace(delta, examples=99))
    assert "its delta says examples = 99, not 10" in event["quarantined"]["client-0"]


def test_routing_losses_reach_the_events_as_means_over_rows(toy):
    run = toy(
        config(
            run={"rounds": 1},
            molora={"losses": [{"name": "z_loss", "coef": 0.1}, {"name": "switch_balance", "coef": 0.1}]},
        )
    )

    def fault(client, plan, reply):
        metrics = {"z_loss": float(client.number), "not asked for": 7.0}
        return reply.model_copy(update={"metrics": metrics}).model_dump_json()

    run.run(fault)
    (event,) = run.events("round")
    rows = [10, 15, 20, 25]
    assert event["routing"] == {"z_loss": pytest.approx(sum(n * r for n, r in enumerate(rows)) / sum(rows))}
