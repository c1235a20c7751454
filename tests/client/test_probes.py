"""What clients tell of their routes when a run asks for it."""

from __future__ import annotations

import pytest

PROBES = {"probes": ["load", "coactivation"]}


def test_probes_add_up_what_the_personalised_model_did_with_the_held_out_rows(house):
    """Counted here by the model itself: the gate mass of every expert, over sites."""
    h = house(evaluate=PROBES)
    reply = h.client(0).evaluate(h.plan(0))
    assert reply.probes.keys() == {"load", "coactivation"}
    mass = {f"e{e}": sum(sums[e] for sums in reply.probes["load"].values()) for e in range(2)}
    assert mass == pytest.approx(reply.tokens, rel=1e-5)
    for site, sums in reply.probes["load"].items():
        assert len(sums) == 6
        together = reply.probes["coactivation"][site]
        assert [together[0], together[3]] == pytest.approx(sums[2:4])  # its diagonal counts every expert's choices


def test_looking_changes_no_score(house):
    with_probes, without = (home.client(0).evaluate(home.plan(0)) for home in (house("a", evaluate=PROBES), house("b")))
    assert with_probes.stages == without.stages
    assert without.probes == {}


@pytest.mark.parametrize(
    "privacy",
    [
        {"secure_aggregation": True},
        {"clip": 1.0, "noise": 1.0, "epsilon": 8.0, "delta": 1e-5},
    ],
)
def test_nothing_is_told_where_the_server_may_learn_nothing_of_one_client(house, privacy):
    h = house(evaluate=PROBES, privacy=privacy)
    assert h.client(0).evaluate(h.plan(0, clip=privacy.get("clip"))).probes == {}
