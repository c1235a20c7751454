"""What single messages of secure aggregation say, and those that are malformed or lie."""

from __future__ import annotations

import json

import numpy as np
import pytest
from toy_federation import EXPERTS, SITE
from toy_secure import mute, plain, settings

from molehill.errors import FederationError
from molehill.plan import ClientPlan, ClientReply
from molehill.wire.message import decode_delta
from molehill_protos.v1 import masked_pb2


def masked_round(toy, name="run", fault=None, **sections):
    """The masked numbers of every client in one round, and the run."""
    run = toy(settings(run={"rounds": 1}, **sections), name)
    seen = {}

    def watch(client, plan, reply):
        message = masked_pb2.Masked.FromString(run.exchange.get(reply.delta))
        seen[client.name] = np.frombuffer(message.numbers, "<u8")
        return reply.model_dump_json()

    run.run(watch)
    return seen, run


def test_a_message_alone_looks_uniform_and_says_nothing_of_the_delta(toy):
    """Chi-square over the bytes: 255 degrees of freedom, so below 400 but once in 10^8."""
    seen, _ = masked_round(toy)
    counts = np.bincount(np.concatenate([numbers.view(np.uint8) for numbers in seen.values()]), minlength=256)
    expected = counts.sum() / 256
    assert ((counts - expected) ** 2 / expected).sum() < 400
    open_ = toy(plain(run={"rounds": 1}), "open")
    deltas = {}

    def watch(client, plan, reply):
        deltas[client.name] = decode_delta(open_.exchange.get(reply.delta), 2**24).tree.flat
        return reply.model_dump_json()

    open_.run(watch)
    for name, numbers in seen.items():
        values = numbers.view(np.int64)[: deltas[name].size].astype(np.float64)
        assert abs(np.corrcoef(values, deltas[name])[0, 1]) < 5 / np.sqrt(deltas[name].size)


def test_the_same_round_again_is_masked_anew(toy):
    one, _ = masked_round(toy, "one")
    other, _ = masked_round(toy, "other")
    for name in one:
        assert (one[name] != other[name]).all()


def test_nobody_sees_who_used_which_expert(toy):
    """All messages are of one size, and neither replies nor events tell counts or losses of a client."""
    seen, run = masked_round(toy)
    assert len({numbers.size for numbers in seen.values()}) == 1
    (event,) = run.events("round")
    assert event["tokens"] == {}
    assert event["loss_by_client"] == {}
    assert event["loss"] > 0
    text = (run.out / "metrics.jsonl").read_text() + (run.out / "audit.jsonl").read_text()
    assert not any(f'"{expert}"' in text for expert in EXPERTS)
    assert SITE not in text


def test_a_client_that_tells_its_loss_is_quarantined(toy):
    run = toy(settings(run={"rounds": 1}))

    def fault(client, plan, reply):
        if client.number == 1:
            reply = reply.model_copy(update={"loss": 0.5})
        return reply.model_dump_json()

    run.run(fault)
    (event,) = run.events("round")
    assert "tells its losses" in event["quarantined"]["client-1"]
    assert event["report"]["updates"] == 3


@pytest.mark.parametrize("kind", ["query.keys", "query.shares"])
def test_malformed_answers_are_quarantined(toy, kind):
    run = toy(settings(run={"rounds": 1}, data={"clients": 7}))

    def meddle(client, message, text):
        if message.kind != kind or client.number > 1:
            return text
        if client.number == 0:
            return text.replace("client-0", "client-3")
        return "{}"

    run.run(meddle=meddle)
    (event,) = run.events("round")
    assert event["quarantined"]["client-0"] == "the answer is of client 'client-3'."
    assert "malformed answer" in event["quarantined"]["client-1"]


def test_a_client_that_masks_with_other_secrets_is_noticed(toy):
    run = toy(settings(run={"rounds": 1}))

    def fault(client, plan, reply):
        if client.number == 0:
            blob = bytearray(run.exchange.get(reply.delta))
            blob[-16] ^= 1  # its weight, the last number but one
            reply = ClientReply.model_validate({**reply.model_dump(), "delta": run.exchange.put(bytes(blob))})
        return reply.model_dump_json()

    for _ in range(2):  # the sum is kept, and no better when the client is
        with pytest.raises(FederationError, match=r"masks do not cancel.*begin a run with another name"):
            run.run(fault)
        fault = mute()
    (run.out / "masked-sum").unlink()
    with pytest.raises(FederationError, match="it has already helped to unmask round 1"):
        run.run()


def test_a_wrong_share_is_noticed(toy):
    run = toy(settings(run={"rounds": 1}, data={"clients": 5}))

    def meddle(client, message, text):
        if message.kind == "query.unmask" and client.number == 0:
            said = json.loads(text)
            said["own"]["client-2"] = "1" * 132
            text = json.dumps(said)
        return text

    with pytest.raises(FederationError, match="round 1: the sum cannot be unmasked: the shares do not belong together"):
        run.run(meddle=meddle)


def test_the_plan_tells_a_client_nothing_of_the_others_but_their_sealed_shares(toy):
    run = toy(settings(run={"rounds": 1}))
    run.run()
    plans = [ClientPlan.model_validate_json(m.text) for m in run.transport.pushed if m.kind == "train"]
    for plan in plans:
        assert plan.company.inbox.keys() == {f"client-{n}" for n in range(4)} - {plan.client}
        assert plan.company.cap == 25  # of the largest client
