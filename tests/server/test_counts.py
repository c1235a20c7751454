"""Numbers of rows are what clients say; what they say counts up to a cap, and never more than at first."""

from __future__ import annotations

import numpy as np
import pytest
from toy_federation import HEAD, config, initial

from molehill.config import parse
from molehill_server.counts import cap_of, counts_of

SECURE = {"privacy": {"secure_aggregation": True, "threshold": 0.67}}


def start(run, claims, **given):
    """A coordinator whose clients say that they have so many rows."""
    coordinator = run.start(**given)
    for client in run.transport.clients.values():
        client.rows = claims.get(client.name, client.rows)
    return coordinator


@pytest.mark.parametrize("sections", [{}, SECURE], ids=["open", "masked"])
@pytest.mark.parametrize("claim", [10**4, 10**9])
def test_a_claim_counts_for_three_medians_and_is_named(toy, sections, claim):
    """Honest clients have 10, 15, 20 and 25 rows: the lower median of all five is 20."""
    settings = config(data={"clients": 5}, run={"rounds": 1}, **sections)
    lying, capped = toy(settings, "lying"), toy(settings, "capped")
    got = start(lying, {"client-4": claim}).run()
    want = start(capped, {"client-4": 60}).run()
    np.testing.assert_allclose(got.flat, want.flat, rtol=1e-5, atol=1e-6)
    (event,) = lying.events("capped")
    assert (event["client"], event["rows"], event["counts"]) == ("client-4", claim, 60)
    assert "3 times the median (round.max_rows)" in event["reason"]
    assert f'"client":"client-4","counts":60,"reason":"{event["reason"]}","rows":{claim}' in audit(lying)
    assert lying.events("round")[0]["report"]["updates"] == 5
    assert capped.events("capped") == []


@pytest.mark.parametrize("sections", [{}, SECURE], ids=["open", "masked"])
def test_a_claim_that_cannot_be_is_refused_and_named_and_the_run_goes_on(toy, sections):
    settings = config(data={"clients": 5}, run={"rounds": 2}, **sections)
    run = toy(settings)
    start(run, {"client-4": 10**12}).run()
    (event,) = run.events("refused")
    assert event["client"] == "client-4"
    assert "it says it has 1,000,000,000,000 training rows" in event["reason"]
    assert "1,000,000,000,000 training rows" in audit(run)
    assert [len(event["accepted"]) for event in run.events("round")] == [4, 4]


@pytest.mark.parametrize("name", ["n_test", "cut", "lost", "unlearnt"])
def test_rows_of_other_kinds_are_believed_no_more(toy, name):
    run = toy(config(data={"clients": 5}, run={"rounds": 1}))
    coordinator = run.start()
    liar = run.transport.clients[14]
    said = liar.hello() | {name: 10**300}
    liar.hello = lambda: said
    coordinator.run()
    (event,) = run.events("refused")
    assert event["client"] == "client-4"
    assert "more than 1,000,000,000 rows are held out, set aside, cut, lost or not learnt" in event["reason"]


@pytest.mark.parametrize("sections", [{}, SECURE], ids=["open", "masked"])
def test_a_client_that_says_more_in_a_reply_than_at_its_hello_is_refused(toy, sections):
    run = toy(config(data={"clients": 5}, run={"rounds": 1}, **sections))

    def fault(client, plan, reply):
        rows = 10**12 if client.number == 4 else reply.examples
        return reply.model_copy(update={"examples": rows}).model_dump_json()

    run.run(fault)
    (event,) = run.events("round")
    assert "it trains on 1000000000000 rows, and joined with 30" in event["quarantined"]["client-4"]
    assert event["report"]["updates"] == 4


@pytest.mark.parametrize("sections", [{}, SECURE], ids=["open", "masked"])
@pytest.mark.parametrize("restart", [False, True], ids=["it", "the server"])
def test_who_comes_back_with_more_rows_counts_for_those_it_had(toy, sections, restart):
    settings = config(data={"clients": 5}, run={"rounds": 2}, **sections)
    plain, run = toy(settings, "plain"), toy(settings, "back")
    want = plain.run()
    more = {"client-0": 55}  # within the cap, and with 10 at first

    def killed(client, plan, reply):
        if plan.round == 2:
            raise KeyboardInterrupt
        return reply.model_dump_json()

    def grows(client, plan, reply):
        if plan.round == 1 and client.number == 4:
            run.transport.visit = lambda node: "again"
            run.transport.clients[10].rows = 55
        return reply.model_dump_json()

    if restart:
        with pytest.raises(KeyboardInterrupt):
            run.run(killed)
        got = start(run, more).run()
    else:
        got = run.run(grows)
    np.testing.assert_allclose(got[HEAD], want[HEAD], rtol=1e-5, atol=1e-6)
    assert (run.events("capped")[-1]["rows"], run.events("capped")[-1]["counts"]) == (55, 10)
    assert run.events("capped")[-1]["reason"] == "it first joined with 10"


def test_a_cap_can_be_given_and_can_be_off(toy):
    first = {"a": 10, "b": 20, "c": 30, "d": 5000}
    assert cap_of(parse({"round": {"max_rows": 25}}), first) == 25
    assert cap_of(parse({"round": {"max_rows": "off"}}), first) is None
    assert cap_of(parse({}), first) == 60
    counts = counts_of(parse({"round": {"max_rows": 25}}), first, first)
    assert [count.counts for count in counts.values()] == [10, 20, 25, 25]
    assert counts["d"].why == "25 are the most (round.max_rows)"


def test_under_differential_privacy_no_cap_follows_what_others_say():
    private = {"clip": 0.3, "noise": 4.0, "epsilon": 30.0, "delta": 1e-5}
    assert cap_of(parse({"privacy": private, "wire": {"up": "fp32"}}), {"a": 10, "b": 10, "c": 10**4}) is None


def test_a_large_honest_client_among_few_is_told_that_it_counts_for_less(toy):
    run = toy(config(data={"clients": 2}, run={"rounds": 1}))
    final = start(run, {"client-1": 100}).run()
    assert not np.array_equal(final.flat, initial().flat)
    (event,) = run.events("capped")
    assert (event["rows"], event["counts"]) == (100, 30)


def audit(run):
    return (run.out / "audit.jsonl").read_text()
