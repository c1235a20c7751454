"""A run with differential privacy: budget, resume, refusals, and nothing of it when it is off."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
from toy_federation import config, initial

from molehill.config import MethodRef
from molehill.errors import PrivacyError, ResumeError
from molehill.plan import ClientPlan
from molehill.wire.clipping import clip, norm
from molehill.wire.message import decode_delta, encode_delta
from molehill.wire.tree import Tree
from molehill_server.privacy.accountant import Accountant
from molehill_server.privacy.draw import Round

DELTA = 1e-5
PRIVATE = {"clip": 0.3, "noise": 4.0, "epsilon": 8.0, "delta": DELTA}
FFA = {"preset": "ffa"}


def settings(**sections):
    return config(**{"privacy": PRIVATE, "federation": FFA, **sections})


def reports(run):
    return [event["report"] for event in run.events("round")]


def test_every_round_says_what_is_spent_and_what_comes_through(toy):
    run = toy(settings())
    run.run()
    accountant = Accountant(4.0, DELTA, 8.0)
    assert [report["epsilon"] for report in reports(run)] == [accountant.epsilon([Round(4, 4)] * n) for n in (1, 2, 3)]
    for report in reports(run):
        assert report["updates"] == 4
        assert report["noise"] == pytest.approx(0.3 * 4.0 / 4)
        assert report["signal_to_noise"] >= 0


def test_the_result_is_noisy_and_no_two_runs_are_alike(toy):
    one, other = (toy(settings(), name).run().flat for name in ("one", "other"))
    shared = one != initial().flat
    assert 0 < shared.sum() < len(shared)  # A is frozen
    assert (one[shared] != other[shared]).all()


def test_clients_are_told_the_clip_and_keep_to_it(toy):
    run = toy(settings())
    sizes = []

    def watch(client, plan, reply):
        assert plan.clip == 0.3
        sizes.append(norm(decode_delta(run.exchange.get(reply.delta), 2**24).tree.flat))
        return reply.model_dump_json()

    run.run(watch)
    assert max(sizes) == pytest.approx(0.3, rel=1e-5)
    assert max(sizes) <= 0.3


def test_almost_without_noise_it_is_the_mean_of_clipped_changes(toy):
    tiny = {**PRIVATE, "noise": 1e-7, "epsilon": 1e20}
    run = toy(settings(privacy=tiny, run={"rounds": 1}, federation={"preset": "fedit"}))
    deltas = []

    def watch(client, plan, reply):
        deltas.append(decode_delta(run.exchange.get(reply.delta), 2**24).tree.flat)
        return reply.model_dump_json()

    final = run.run(watch)
    np.testing.assert_allclose(final.flat, initial().flat + np.mean(deltas, axis=0), atol=1e-6)


def test_a_client_that_does_not_clip_is_quarantined(toy):
    run = toy(settings(run={"rounds": 1}))

    def fault(client, plan, reply):
        if client.number == 0:
            delta = decode_delta(run.exchange.get(reply.delta), 2**24)
            blob = encode_delta(
                replace(delta, tree=Tree(delta.tree.layout, 9 * delta.tree.flat)), MethodRef(name="fp32")
            )
            reply = reply.model_copy(update={"delta": run.exchange.put(blob), "bytes_up": len(blob)})
        return reply.model_dump_json()

    run.run(fault)
    (event,) = run.events("round")
    assert "above the bound of 0.6" in event["quarantined"]["client-0"]
    assert event["report"]["noise"] == pytest.approx(0.3)  # over the four that were asked, not the three that count


@pytest.mark.parametrize("codec", ["int4", "int8", "fp16", "bf16"])
def test_codecs_that_round_are_neither_refused_nor_trusted(toy, codec):
    run = toy(settings(wire={"up": codec}, privacy={**PRIVATE, "noise": 1e-7, "epsilon": 1e20}, run={"rounds": 1}))
    deltas = []

    def watch(client, plan, reply):
        deltas.append(decode_delta(run.exchange.get(reply.delta), 2**24).tree)
        return reply.model_dump_json()

    final = run.run(watch)
    assert run.events("round")[0]["quarantined"] == {}
    layout = deltas[0].layout
    moved = final.select(layout).flat - initial().select(layout).flat
    np.testing.assert_allclose(moved, np.mean([clip(delta, 0.3).flat for delta in deltas], axis=0), atol=1e-6)


SAMPLED = {"preset": "ffa", "select": {"name": "random", "fraction": 0.05, "at_least": 2}}


def test_the_run_stops_before_the_round_that_would_exceed_the_budget(toy):
    """Forty clients, two a round, until all but four leave: the draw then hides nobody any more."""
    run = toy(settings(federation=SAMPLED, privacy={**PRIVATE, "epsilon": 0.5}, data={"clients": 40}))

    answered = []

    def leave(client, plan, reply):
        answered.append(client.name)
        if len(answered) == 4:  # the second round is done
            for node in [node for node in run.transport.clients if node >= 14]:
                del run.transport.clients[node]
        return reply.model_dump_json()

    with pytest.raises(PrivacyError, match=r"round 3: it would bring epsilon to .*, above the budget of 0.5; 0\.4"):
        run.run(leave)
    assert [event["round"] for event in run.events("round")] == [1, 2]
    assert not any(message.group.startswith("3.") for message in run.transport.pushed)
    few = run.transport.clients
    again = run.start()
    run.transport.clients = few
    with pytest.raises(PrivacyError, match="round 3"):  # a resume knows what was spent
        again.run()


def test_a_resume_restores_what_was_spent_and_the_secret_draw(toy):
    chosen = {"preset": "ffa", "select": {"name": "random", "fraction": 0.5}}
    run = toy(settings(federation=chosen, run={"rounds": 5}, privacy={**PRIVATE, "epsilon": 50.0}))
    run.run_until_killed(3)
    secret = run.start()._record.saved.privacy.secret
    run.run()
    accountant = Accountant(4.0, DELTA, 50.0)
    assert [r["epsilon"] for r in reports(run)] == [accountant.epsilon([Round(4, 2)] * n) for n in range(1, 6)]
    ledger = run.start()._record.saved.privacy
    assert ledger.secret == secret
    assert ledger.rounds == (Round(4, 2),) * 5


@pytest.mark.parametrize("private", [True, False])
def test_what_a_round_spent_is_not_forgotten_with_its_checkpoint(toy, private):
    """Its noisy mean was released, and one more with other noise says more."""
    run = toy(settings() if private else config())
    final = run.run()
    shutil.rmtree(run.out / "checkpoints" / "round-00003")
    if private:
        with pytest.raises(ResumeError, match=r"the checkpoint of round 3 is gone, .* spent of the privacy budget"):
            run.start()
        return
    assert run.run().flat.tolist() == final.flat.tolist()


def test_the_draw_does_not_follow_from_the_seed(toy):
    chosen = {"preset": "ffa", "select": {"name": "random", "fraction": 0.25}}
    private = settings(federation=chosen, data={"clients": 16})
    draws = []
    for name in ("one", "other"):
        run = toy(private, name)
        run.run()
        draws.append([event["selected"] for event in run.events("round")])
    assert draws[0] != draws[1]  # by chance once in 1820 ** 3


def test_a_round_that_is_tried_again_is_paid_once(toy):
    run = toy(settings(run={"rounds": 1}, round={"quorum": 1.0}))
    silent = ["client-3"]

    def fault(client, plan, reply):
        if client.name in silent:
            silent.clear()
            return None
        return reply.model_dump_json()

    run.run(fault)
    assert len(run.events("retry")) == 1
    assert reports(run)[0]["epsilon"] == Accountant(4.0, DELTA, 8.0).epsilon([Round(4, 4)])


def poisson(rate, **sections):
    return settings(federation={"preset": "ffa", "select": {"name": "poisson", "rate": rate}}, **sections)


def test_a_poisson_round_is_counted_and_divided_by_its_rate(toy):
    """Not by how many were drawn: that would tell."""
    run = toy(poisson(0.4, data={"clients": 8}, run={"rounds": 4}))
    run.run()
    accountant = Accountant(4.0, DELTA, 8.0)
    for number, report in enumerate(reports(run), start=1):
        assert report["epsilon"] == accountant.epsilon([Round(8, 8, 0.4)] * number)
        assert report["epsilon"] < accountant.epsilon([Round(8, 8)] * number)
        assert report["noise"] == pytest.approx(0.3 * 4.0 / (0.4 * 8))
    assert run.start()._record.saved.privacy.rounds == (Round(8, 8, 0.4),) * 4


def test_rounds_of_nobody_are_rounds_all_the_same(toy):
    run = toy(poisson(1e-9))
    final = run.run()
    shared = final.flat != initial().flat
    assert 0 < shared.sum() < len(shared)  # noise on all that is shared, and on nothing else
    for event, report in zip(run.events("round"), reports(run), strict=True):
        assert (event["selected"], event["accepted"], event["loss"], report["updates"]) == ([], [], None, 0)
        assert report["epsilon"] == 0  # below delta
    assert run.events("retry") == []
    assert len(run.start()._record.saved.privacy.rounds) == 3


@pytest.mark.parametrize("select", [{"name": "poisson", "rate": 0.5}, {"name": "random", "fraction": 0.5}])
def test_a_secret_draw_decides_and_is_decided_by_nothing(toy, select):
    """Of eight clients only one ever answers. It must be in half of the rounds, and not only in those that count."""
    sections = {"data": {"clients": 8}, "run": {"rounds": 16}, "round": {"quorum": 1.0, "retries": 3}}
    private = {**PRIVATE, "epsilon": 100.0}
    run = toy(settings(**sections, privacy=private, federation={"preset": "ffa", "select": select}))
    run.run(lambda client, plan, reply: reply.model_dump_json() if client.number == 5 else None)
    rounds = run.events("round")
    assert run.events("retry") == []
    assert len(rounds) == 16
    assert all(set(event["accepted"]) == {"client-5"} & set(event["selected"]) for event in rounds)
    assert 0 < sum(bool(event["accepted"]) for event in rounds) < 16  # by chance once in 30,000
    assert [report["noise"] for report in reports(run)] == pytest.approx([0.3 * 4.0 / 4] * 16)


@pytest.mark.parametrize(("select", "waits"), [({"name": "poisson", "rate": 1.0}, True), ("all", False)])
def test_a_secret_draw_is_waited_for_to_the_deadline(toy, select, waits):
    """Else who else is drawn would decide when a round closes, and so who is in it."""
    run = toy(settings(run={"rounds": 1}, federation={"preset": "ffa", "select": select}))
    run.run(lambda client, plan, reply: None if client.number == 0 else reply.model_dump_json())
    assert (run.transport.time >= 60) == waits
    assert len(run.events("round")[0]["accepted"]) == 3


def test_after_a_kill_the_same_clients_are_drawn_whoever_else_has_come(toy):
    run = toy(poisson(0.75, data={"clients": 16}, run={"rounds": 1}))
    asked = []

    def dies(client, plan, reply):
        asked.append(client.name)
        raise KeyboardInterrupt

    server = run.start(dies)
    away = {node: run.transport.clients.pop(node) for node in list(run.transport.clients) if node % 2}
    with pytest.raises(KeyboardInterrupt):
        server.run()
    first = {m.node for m in run.transport.pushed if m.kind == "train"}
    run.run()
    again = {m.node for m in run.transport.pushed if m.kind == "train"}
    assert first == again - set(away)
    assert run.events("round")[0]["report"]["noise"] == pytest.approx(0.3 * 4.0 / 12)
    assert run.start()._record.saved.privacy.rounds == (Round(16, 16, 0.75),)


def test_without_privacy_a_round_of_nobody_changes_nothing(toy):
    run = toy(config(federation={**FFA, "select": {"name": "poisson", "rate": 1e-9}}))
    assert np.array_equal(run.run().flat, initial().flat)
    assert [event["selected"] for event in run.events("round")] == [[], [], []]


def test_nothing_is_noisy_when_it_is_off(toy):
    plain = config(federation=FFA)
    run = toy(plain, "one")
    one, other = run.run(), toy(plain, "other").run()
    assert np.array_equal(one.flat, other.flat)
    assert all({"epsilon", "noise", "signal_to_noise"}.isdisjoint(report) for report in reports(run))
    plans = [message.text for message in run.transport.pushed if message.kind == "train"]
    assert {ClientPlan.model_validate_json(text).clip for text in plans} == {None}
    assert run.start()._record.saved.privacy is None
