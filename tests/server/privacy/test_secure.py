"""Rounds of secure aggregation: the sum is the plain one, whoever drops out, and a message alone says nothing."""

from __future__ import annotations

import json

import numpy as np
import pytest
from toy_federation import EXPERTS, SITE, config, initial

from molehill.errors import FederationError, ResumeError
from molehill.plan import ClientPlan, ClientReply
from molehill.secure.fixed import FixedPoint
from molehill.secure.messages import AskUnmask
from molehill.wire.message import decode_delta
from molehill_protos.v1 import masked_pb2
from molehill_server.privacy.draw import Round
from molehill_server.privacy.secure import SecureRound

SECURE = {"secure_aggregation": True}
PRIVATE = {"clip": 0.3, "noise": 4.0, "epsilon": 30.0, "delta": 1e-5}


def settings(**sections):
    return config(**{"privacy": SECURE, **sections})


def plain(**sections):
    return config(**{"privacy": {}, **sections})


def silent(*names, kind):
    """Clients whose answers to one kind of question never arrive."""

    def meddle(client, message, text):
        return None if message.kind == kind and client.name in names else text

    return meddle


def mute(*names):
    """Clients whose deltas never arrive."""
    return lambda client, plan, reply: None if client.name in names else reply.model_dump_json()


@pytest.mark.parametrize(
    "federation",
    [{"preset": "fedit"}, {"preset": "ffa"}, {"preset": "fedsa"}, {"preset": "rolora"}, {"server_opt": "adam"}],
    ids=lambda section: next(iter(section.values())),
)
def test_the_result_is_that_of_a_plain_run(toy, federation):
    hidden = toy(settings(federation=federation), "hidden")
    open_ = toy(plain(federation=federation), "open")
    np.testing.assert_allclose(hidden.run().flat, open_.run().flat, rtol=1e-5, atol=1e-6)
    for one, other in zip(hidden.events("round"), open_.events("round"), strict=True):
        assert one["accepted"] == other["accepted"]
        assert one["loss"] == pytest.approx(other["loss"])
        assert one["report"]["updates"] == 4


@pytest.mark.parametrize("lost", [("client-1",), ("client-0", "client-3"), ("client-0", "client-4")])
def test_without_clients_that_drop_out_before_they_send(toy, lost):
    """They have given away their keys, and the others have masked with them."""
    sections = {"data": {"clients": 7}, "run": {"rounds": 2}}
    hidden, open_ = toy(settings(**sections), "hidden"), toy(plain(**sections), "open")
    np.testing.assert_allclose(hidden.run(mute(*lost)).flat, open_.run(mute(*lost)).flat, rtol=1e-5, atol=1e-6)
    for event in hidden.events("round"):
        assert set(event["missing"]) == set(lost)
        assert event["report"]["updates"] == 7 - len(lost)


@pytest.mark.parametrize("kind", ["query.keys", "query.shares"])
def test_without_clients_that_drop_out_before_the_training(toy, kind):
    sections = {"data": {"clients": 5}, "run": {"rounds": 2}}
    hidden, open_ = toy(settings(**sections), "hidden"), toy(plain(**sections), "open")
    result = hidden.run(meddle=silent("client-2", kind=kind))
    np.testing.assert_allclose(result.flat, open_.run(mute("client-2")).flat, rtol=1e-5, atol=1e-6)
    trained = {m.group for m in hidden.transport.pushed if m.kind == "train" and m.node == 12}
    assert trained == set()


@pytest.mark.parametrize("kind", ["query.agree", "query.unmask"])
def test_with_clients_that_drop_out_before_they_agree_or_unmask(toy, kind):
    """They are in the sum: it is complete, and the others can take their masks off."""
    hidden, open_ = toy(settings(), "hidden"), toy(plain(), "open")
    result = hidden.run(meddle=silent("client-2", kind=kind))
    np.testing.assert_allclose(result.flat, open_.run().flat, rtol=1e-5, atol=1e-6)
    assert [event["report"]["updates"] for event in hidden.events("round")] == [4, 4, 4]


def test_all_at_once(toy):
    sections = {"data": {"clients": 13}, "run": {"rounds": 1}}
    hidden, open_ = toy(settings(**sections), "hidden"), toy(plain(**sections), "open")

    def meddle(client, message, text):
        lost = {"query.keys": 0, "query.shares": 1, "query.agree": 3, "query.unmask": 4}[message.kind]
        return None if client.number == lost else text

    result = hidden.run(mute("client-2"), meddle)
    gone = mute("client-0", "client-1", "client-2")
    np.testing.assert_allclose(result.flat, open_.run(gone).flat, rtol=1e-5, atol=1e-6)


def test_below_the_threshold_before_the_sum_the_round_is_tried_again_and_then_failed(toy):
    run = toy(settings(data={"clients": 5}, run={"rounds": 1}))
    with pytest.raises(FederationError, match="2 of 5 clients answered; with a usable update, 4 are needed"):
        run.run(mute("client-0", "client-1", "client-2"))
    assert [event["attempt"] for event in run.events("retry")] == [0, 1]
    assert not any(message.kind == "query.unmask" for message in run.transport.pushed)
    assert np.array_equal(run.start()._record.saved.glob.tree.flat, initial().flat)


def test_a_second_attempt_has_keys_of_its_own(toy):
    hidden, open_ = toy(settings(round={"quorum": 1.0}), "hidden"), toy(plain(), "open")
    lost = ["client-1"]

    def fault(client, plan, reply):
        if client.name in lost:
            lost.clear()
            return None
        return reply.model_dump_json()

    np.testing.assert_allclose(hidden.run(fault).flat, open_.run().flat, rtol=1e-5, atol=1e-6)
    assert len(hidden.events("retry")) == 1
    assert {m.group for m in hidden.transport.pushed if m.kind == "query.keys"} == {"1.0", "1.1", "2.0", "3.0"}


def test_two_clients_are_too_few(toy):
    run = toy(settings(data={"clients": 3}, run={"rounds": 1}))
    with pytest.raises(FederationError, match="3 are needed"):
        run.run(meddle=silent("client-0", kind="query.keys"))


def test_of_three_none_may_drop_out(toy):
    """A sum of two is what each of them knows the other by."""
    run = toy(settings(data={"clients": 3}, run={"rounds": 1}))
    with pytest.raises(FederationError, match="2 of 3 clients answered; with a usable update, 3 are needed"):
        run.run(mute("client-0"))
    assert not any(message.kind == "query.unmask" for message in run.transport.pushed)


def test_too_few_of_those_that_the_configuration_promises_are_not_asked(toy):
    run = toy(settings(data={"clients": 8}, run={"rounds": 1}))
    server = run.start()
    for node in [10, 11, 12, 13]:
        del run.transport.clients[node]
    with pytest.raises(FederationError, match="6 are needed"):
        server.run()
    assert not any(message.kind.startswith(("query.keys", "train")) for message in run.transport.pushed)


def test_below_the_threshold_after_the_sum_it_waits_for_the_clients(toy):
    """Nobody helps with two sums of a round, so the sum is kept until enough of its clients are back."""
    hidden, open_ = toy(settings(run={"rounds": 2}), "hidden"), toy(plain(run={"rounds": 2}), "open")
    names = [f"client-{number}" for number in (0, 1)]
    with pytest.raises(
        FederationError, match=r"round 1: 2 of 4 clients helped to unmask the sum, 3 are needed.*--resume"
    ):
        hidden.run(meddle=silent(*names, kind="query.unmask"))
    assert hidden.events("round") == []
    np.testing.assert_allclose(hidden.run().flat, open_.run().flat, rtol=1e-5, atol=1e-6)
    one, other = (run.events("round")[0] for run in (hidden, open_))
    for name in ("round", "selected", "accepted", "missing", "quarantined", "loss"):
        assert one[name] == (pytest.approx(other[name]) if name == "loss" else other[name])
    assert one["bytes_up"] > 0
    assert not (hidden.out / "masked-sum").exists()


def test_clients_that_come_back_in_time_are_waited_for(toy):
    hidden, open_ = toy(settings(run={"rounds": 1}), "hidden"), toy(plain(run={"rounds": 1}), "open")
    away = ["client-0", "client-1"]

    def meddle(client, message, text):
        if message.kind == "query.unmask" and client.name in away:
            away.remove(client.name)
            return None
        return text

    np.testing.assert_allclose(hidden.run(meddle=meddle).flat, open_.run().flat, rtol=1e-5, atol=1e-6)
    (event,) = hidden.events("retry")
    assert event["missing"] == ["client-0", "client-1"]
    assert hidden.transport.time < 100


def test_where_too_few_agree_the_round_is_tried_again(toy):
    """Nothing was unmasked, so another sum of the round does no harm."""
    hidden, open_ = toy(settings(run={"rounds": 1}), "hidden"), toy(plain(run={"rounds": 1}), "open")

    def meddle(client, message, text):
        away = message.kind == "query.agree" and message.group.startswith("1.0.") and client.number < 2
        return None if away else text

    np.testing.assert_allclose(hidden.run(meddle=meddle).flat, open_.run().flat, rtol=1e-5, atol=1e-6)
    assert hidden.events("retry")[0]["missing"] == ["client-0", "client-1"]
    assert [m.group for m in hidden.transport.pushed if m.kind == "query.unmask"] == ["1.1.unmask.0"] * 4


def test_where_too_few_ever_agree_it_says_so_and_keeps_no_sum(toy):
    run = toy(settings(run={"rounds": 1}))
    two = silent("client-0", "client-1", kind="query.agree")
    with pytest.raises(FederationError, match=r"2 clients signed who is in the sum, 3 are needed; no answer from .*-1"):
        run.run(meddle=two)
    assert not (run.out / "masked-sum").exists()
    assert not any(message.kind == "query.unmask" for message in run.transport.pushed)
    assert run.start().run() is not None  # nobody has helped with a sum of it, so the round can be had


def test_a_wrong_signature_is_quarantined_and_the_sum_is_not_lost(toy):
    hidden, open_ = toy(settings(run={"rounds": 1}), "hidden"), toy(plain(run={"rounds": 1}), "open")

    def meddle(client, message, text):
        if message.kind == "query.agree" and client.number == 0:
            return json.dumps({"client": "client-0", "signature": "0" * 128})
        return text

    np.testing.assert_allclose(hidden.run(meddle=meddle).flat, open_.run().flat, rtol=1e-5, atol=1e-6)
    asks = [AskUnmask.model_validate_json(m.text) for m in hidden.transport.pushed if m.kind == "query.unmask"]
    assert [sorted(ask.signatures) for ask in asks] == [["client-1", "client-2", "client-3"]] * 4


class Liar(SecureRound):
    """A server that tells every client that others are lost, to get both secrets of some, and checks nothing."""

    def ask_agree(self):
        return {client: self._lie(client, ask) for client, ask in super().ask_agree().items()}

    def take_agreement(self, client, text):
        self.progress.signatures[client] = json.loads(text)["signature"]

    def _lie(self, client, ask):
        names = [*self.progress.arrived, *self.progress.arrived]
        lost = names[names.index(client) + 1 :][: len(ask.arrived) // 3 - 1 or 1]
        arrived = tuple(name for name in ask.arrived if name not in lost)
        return ask.model_copy(update={"arrived": arrived, "lost": tuple(sorted(lost))})


class WorseLiar(Liar):
    """It goes on with its story when it asks for shares."""

    def ask_unmask(self):
        asks = {client: self._lie(client, ask) for client, ask in super().ask_unmask().items()}
        for client, ask in asks.items():
            signed = {name: ask.signatures[name] for name in ask.arrived}
            asks[client] = ask.model_copy(update={"signatures": signed})
        return asks


@pytest.mark.parametrize(
    ("server", "why"), [(Liar, "signed another list"), (WorseLiar, "not for this list|fewer than")]
)
@pytest.mark.parametrize("clients", [4, 10])
def test_a_server_that_lies_about_who_is_in_the_sum_gets_none(toy, monkeypatch, server, why, clients):
    monkeypatch.setattr("molehill_server.rounds.masked.SecureRound", server)
    run = toy(settings(run={"rounds": 1}, data={"clients": clients}))
    with pytest.raises(FederationError, match=rf"0 of \d+ clients helped to unmask the sum.*({why})"):
        run.run()
    assert all(b'"seed":""' not in client.masker._vault.data for client in run.transport.clients.values())


@pytest.mark.parametrize("kind", ["query.agree", "query.unmask"])
@pytest.mark.parametrize("at", [1, 3])
def test_a_server_that_dies_while_it_unmasks_goes_on(toy, at, kind):
    hidden, open_ = toy(settings(run={"rounds": 2}), "hidden"), toy(plain(run={"rounds": 2}), "open")
    asked = []

    def killed(client, message, text):
        if message.kind == kind:
            asked.append(client.name)
            if len(asked) == 4 + at:  # in the second round
                raise KeyboardInterrupt
        return text

    with pytest.raises(KeyboardInterrupt):
        hidden.run(meddle=killed)
    np.testing.assert_allclose(hidden.run().flat, open_.run().flat, rtol=1e-5, atol=1e-6)
    trained = [message for message in hidden.transport.pushed if message.kind == "train"]
    assert trained == []  # all was there but the answers


def test_a_newcomer_in_the_sum_is_not_forgotten(toy):
    run = toy(settings(run={"rounds": 2}, data={"clients": 5}))
    late = {}

    def meddle(client, message, text):
        if message.kind == "query.keys" and message.group == "1.0" and late:
            run.transport.clients.update(late)
        if message.kind == "query.unmask" and message.group.startswith("2."):
            raise KeyboardInterrupt
        return text

    server = run.start(meddle=meddle)
    late[10] = run.transport.clients.pop(10)
    with pytest.raises(KeyboardInterrupt):
        server.run()
    run.run()
    assert run.events("round")[1]["selected"] == [f"client-{number}" for number in range(5)]


def test_a_server_that_dies_between_sum_and_commit_and_loses_the_sum_cannot_have_another(toy):
    run = toy(settings(run={"rounds": 1}))
    with pytest.raises(FederationError):
        run.run(meddle=silent("client-0", "client-1", kind="query.unmask"))
    (run.out / "masked-sum").unlink()
    with pytest.raises(FederationError, match="client-2: it has already helped to unmask round 1"):
        run.run()


def test_a_damaged_sum_is_refused(toy):
    run = toy(settings(run={"rounds": 1}))
    with pytest.raises(FederationError):
        run.run(meddle=silent("client-0", "client-1", kind="query.unmask"))
    (run.out / "masked-sum").write_bytes(b"{}\n")
    with pytest.raises(ResumeError, match="masked sum is damaged"):
        run.run()


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


def test_with_differential_privacy_the_sum_is_noised(toy):
    """Almost without noise, it is the mean of clipped changes; the weights are equal, and tokens do not count."""
    private = {**PRIVATE, "noise": 1e-7, "epsilon": 1e20}
    sections = {"run": {"rounds": 1}, "federation": {"preset": "ffa"}}
    hidden = toy(settings(**sections, privacy={**SECURE, **private}), "hidden")
    open_ = toy(plain(**sections, privacy=private), "open")
    np.testing.assert_allclose(hidden.run().flat, open_.run().flat, atol=1e-6)


@pytest.mark.parametrize("cap", [12, 18])
def test_with_differential_privacy_and_capped_examples(toy, cap):
    private = {**PRIVATE, "noise": 1e-7, "epsilon": 1e20, "max_examples": cap}
    sections = {"run": {"rounds": 1}, "federation": {"preset": "ffa"}}
    hidden = toy(settings(**sections, privacy={**SECURE, **private}), "hidden")
    open_ = toy(plain(**sections, privacy=private), "open")
    np.testing.assert_allclose(hidden.run(mute("client-1")).flat, open_.run(mute("client-1")).flat, atol=1e-6)


def test_with_differential_privacy_noise_and_budget_are_those_of_a_run_in_the_open(toy):
    sections = {"federation": {"preset": "ffa"}, "run": {"rounds": 2}}
    hidden = toy(settings(**sections, privacy={**SECURE, **PRIVATE}), "hidden")
    open_ = toy(plain(**sections, privacy=PRIVATE), "open")
    hidden.run()
    open_.run()
    for one, other in zip(hidden.events("round"), open_.events("round"), strict=True):
        assert one["report"]["epsilon"] == other["report"]["epsilon"]
        assert one["report"]["noise"] == other["report"]["noise"] == pytest.approx(0.3 * 4.0 / 4)


def test_a_resumed_sum_is_paid_once(toy):
    run = toy(settings(federation={"preset": "ffa"}, run={"rounds": 2}, privacy={**SECURE, **PRIVATE}))
    with pytest.raises(FederationError):
        run.run(meddle=silent("client-0", "client-1", kind="query.unmask"))
    run.run()
    assert run.start()._record.saved.privacy.rounds == (Round(4, 4),) * 2


def test_what_is_cut_off_by_fixed_point_does_not_grow_the_sensitivity():
    rng = np.random.default_rng(0)
    point = FixedPoint.of(settings(privacy={**SECURE, **PRIVATE}), 8, 1)
    for _ in range(20):
        change = rng.normal(size=1000)
        change *= 0.3 / np.linalg.norm(change)
        assert np.linalg.norm(point.decode(point.encode(change))) <= np.linalg.norm(change)


def test_the_plan_tells_a_client_nothing_of_the_others_but_their_sealed_shares(toy):
    run = toy(settings(run={"rounds": 1}))
    run.run()
    plans = [ClientPlan.model_validate_json(m.text) for m in run.transport.pushed if m.kind == "train"]
    for plan in plans:
        assert plan.company.inbox.keys() == {f"client-{n}" for n in range(4)} - {plan.client}
        assert plan.company.cap == 25  # of the largest client
