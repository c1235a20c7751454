"""Rounds of secure aggregation: the sum is the plain one, whoever drops out, and a server that lies gets none."""

from __future__ import annotations

import json

import numpy as np
import pytest
from toy_federation import initial
from toy_secure import mute, plain, settings, silent

from molehill.errors import FederationError, ResumeError
from molehill.secure.messages import AskUnmask
from molehill_server.privacy.secure import SecureRound


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
