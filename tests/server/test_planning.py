"""Policies, selectors and what a plan says."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from toy_federation import BASE, GATE, HEAD, RANK, SITE, config, initial

from molehill import registry
from molehill.errors import ConfigError
from molehill.wire.keys import KINDS, Key
from molehill.wire.tree import Layout
from molehill_server.planning.planner import Planner, expected, scopes, seed, select, trained
from molehill_server.planning.shares import Shares

A, B = Key(SITE, "e0", "A"), Key(SITE, "e0", "B")
RESIDUAL = Key(SITE, "-", "gate.residual")
POOL = [f"c{n:02d}" for n in range(10)]


def plan(settings, number=1, turn=0):
    return Planner(settings, BASE).plan("c00", number, initial().layout, {"e0": "0" * 64}, turn)


@pytest.mark.parametrize(
    ("policy", "number", "a", "b", "gate", "head"),
    [
        ("fedit", 1, "shared", "shared", "shared", "shared"),
        ("ffa", 1, "frozen", "shared", "shared", "shared"),
        ("share_a", 1, "shared", "personal", "shared", "personal"),
        ("rolora", 1, "frozen", "shared", "shared", "shared"),
        ("rolora", 2, "shared", "frozen", "shared", "shared"),
        ({"name": "fedpeft", "group": "experts"}, 1, "shared", "shared", "frozen", "frozen"),
        ({"name": "fedpeft", "group": "gate"}, 1, "frozen", "frozen", "shared", "frozen"),
        ({"name": "fedpeft", "group": "head"}, 1, "frozen", "frozen", "frozen", "shared"),
        ("local", 1, "personal", "personal", "personal", "personal"),
        ("mixed_rank", 1, "shared", "shared", "shared", "shared"),
        ("mixed_k", 1, "shared", "shared", "shared", "shared"),
    ],
)
def test_policies_share_what_their_paper_says(policy, number, a, b, gate, head):
    one = plan(config(federation={"policy": policy}), number)
    assert [one.scope(key) for key in (A, B, GATE, HEAD)] == [a, b, gate, head]
    assert one.scope(Key(SITE, "e0", "patch.A")) == "frozen"


@pytest.mark.parametrize(
    ("policy", "rounds", "kinds"),
    [
        ("fedit", 2, {"A", "B", "gate", "head"}),
        ("local", 2, {"A", "B", "gate", "head"}),
        ("ffa", 2, {"B", "gate", "head"}),
        ("rolora", 1, {"B", "gate", "head"}),
        ("rolora", 2, {"A", "B", "gate", "head"}),
        ({"name": "fedpeft", "group": "gate"}, 2, {"gate"}),
    ],
)
def test_what_clients_train_is_what_no_round_leaves_frozen(policy, rounds, kinds):
    layout = Layout({**initial().layout, RESIDUAL: (1,), Key(SITE, "e0", "patch.A"): (1, 1)})
    found = trained(config(federation={"policy": policy}, run={"rounds": rounds}), layout)
    assert {key.kind for key in found} == kinds
    assert found.size == sum(initial()[key].size for key in initial() if key.kind in kinds)


@pytest.mark.parametrize(
    ("gate", "weight", "residual", "sub", "main"),
    [
        ("anchored", "shared", "personal", "shared", "personal"),
        ("personal", "personal", "personal", "personal", "personal"),
        ("global", "shared", "frozen", "shared", "shared"),
        ("split", "shared", "frozen", "shared", "personal"),
        ("mixture", "shared", "frozen", "shared", "personal"),
    ],
)
def test_gates_follow_the_personal_section(gate, weight, residual, sub, main):
    one = plan(config(personal={"gate": gate}, molora={"scorer": "mixture"}))
    roles = ("gate.weight", "gate.residual.weight", "gate.sub", "gate.own.main")
    assert [one.scope(Key(SITE, "-", role)) for role in roles] == [weight, residual, sub, main]


def test_a_frozen_start_value_is_not_shared():
    assert plan(config(molora={"init": "orth"})).scope(A) == "frozen"
    assert plan(config(molora={"init": "orth"})).scope(B) == "shared"


def test_what_is_expected_of_a_reply():
    layout = initial().layout
    assert set(expected(plan(config(federation={"policy": "ffa"})), layout)) == {k for k in layout if k.role != "A"}
    ranks = {"name": "mixed_rank", "ranks": [2, 99]}
    small, large = (expected(plan(config(federation={"policy": ranks}), turn=turn), layout) for turn in (0, 1))
    assert small[A][0] == small[B][1] == 2
    assert large[A][0] == large[B][1] == RANK
    assert len(expected(plan(config(federation={"policy": "local"})), layout)) == 0


def test_numbers_of_experts_are_dealt_in_turn_and_change_no_shape():
    settings = config(federation={"policy": {"name": "mixed_k", "ks": [1, 3]}})
    plans = [plan(settings, turn=turn) for turn in range(3)]
    assert [one.k for one in plans] == [1, 3, 1]
    assert {one.rank for one in plans} == {None}
    assert expected(plans[0], initial().layout) == expected(plans[1], initial().layout)
    assert plan(config()).k is None


def test_seeds_depend_on_run_round_and_client_alone():
    settings = config()
    seeds = {seed(config(run={"seed": s}), number, client) for s in (0, 1) for number in (1, 2) for client in POOL}
    assert len(seeds) == 40
    assert plan(settings).seed == seed(settings, 1, "c00") < 2**63


def chosen(name, number, attempt=0, run_seed=7, **params):
    settings = config(run={"seed": run_seed}, federation={"select": {"name": name, **params}})
    return select(settings, POOL, number, attempt)


def test_all_selects_everyone():
    assert chosen("all", 3) == POOL


def test_random_draws_a_fraction_anew_each_round_attempt_and_seed():
    first = chosen("random", 1, fraction=0.3)
    assert len(first) == len(set(first)) == 3
    assert first == chosen("random", 1, fraction=0.3)
    assert first == sorted(first)
    others = [chosen("random", n, fraction=0.3) for n in range(2, 9)]
    assert any(first != other for other in others)
    assert chosen("random", 1, 1, fraction=0.3) != first or chosen("random", 1, 2, fraction=0.3) != first
    assert len(chosen("random", 1, fraction=0.01, at_least=4)) == 4
    hits = sum(client == "c03" for n in range(1, 201) for client in chosen("random", n, fraction=0.5))
    assert 70 < hits < 130


def test_poisson_throws_a_coin_for_every_client():
    draws = [chosen("poisson", n, rate=0.3) for n in range(1, 401)]
    assert all(draw == sorted(set(draw)) for draw in draws)
    counts = np.array([[client in draw for client in POOL] for draw in draws])
    assert abs(counts.mean() - 0.3) < 0.03
    assert (abs(counts.mean(axis=0) - 0.3) < 0.1).all()
    assert counts.sum(axis=1).var() == pytest.approx(10 * 0.3 * 0.7, rel=0.3)  # of a fixed number it would be 0
    together = np.corrcoef(counts.T) - np.eye(10)
    assert abs(together).max() < 0.2
    assert chosen("poisson", 1, rate=1.0) == POOL
    assert chosen("poisson", 1, rate=1e-9) == []


def test_a_poisson_coin_depends_on_round_and_seed_only():
    settings = config(federation={"select": {"name": "poisson", "rate": 0.5}})
    draw = select(settings, POOL, 4, 0, secret=2**127 + 5)
    assert draw == select(settings, POOL, 4, 3, secret=2**127 + 5)
    assert draw != select(settings, POOL, 5, 0, secret=2**127 + 5) != select(settings, POOL, 5, 0, secret=2**127 + 6)
    few = POOL[::2]
    assert select(settings, few, 4, 0, secret=2**127 + 5) == [client for client in draw if client in few]


def test_round_robin_takes_turns():
    assert chosen("round_robin", 1, count=4) == POOL[:4]
    assert chosen("round_robin", 3, count=4) == [*POOL[:2], *POOL[8:]]
    assert chosen("round_robin", 1, 1, count=4) == POOL[4:8]
    assert chosen("round_robin", 1, count=99) == POOL
    turns = [client for n in range(1, 6) for client in chosen("round_robin", n, count=2)]
    assert sorted(turns) == POOL


@pytest.mark.parametrize(
    ("axis", "ref"),
    [
        ("select", {"name": "random", "fraction": 0.0}),
        ("select", {"name": "random", "at_least": 0}),
        ("select", {"name": "poisson", "rate": 0.0}),
        ("select", {"name": "poisson", "rate": 1.5}),
        ("select", {"name": "round_robin", "count": 0}),
        ("policy", {"name": "mixed_rank", "ranks": []}),
        ("policy", {"name": "mixed_k", "ks": [2, 0]}),
        ("policy", {"name": "fedpeft", "group": "everything"}),
    ],
)
def test_bad_parameters_are_configuration_errors(axis, ref):
    with pytest.raises(ConfigError):
        config(federation={axis: ref})


def test_every_policy_gives_scopes():
    for method in registry.methods("policy"):
        patterns = scopes(config(federation={"policy": method.name}), 1)
        assert {scope for _, scope in patterns} <= {"shared", "personal", "frozen"}


def test_policies_decide_on_all_kinds_of_tensors():
    assert {field.name for field in fields(Shares)} == {*KINDS, "other", "ranks", "ks"}
    assert [Shares(A="frozen", other="personal").of(kind) for kind in ("A", "B", "coef")] == [
        "frozen",
        "shared",
        "personal",
    ]


@pytest.mark.parametrize(
    ("policy", "scope"), [("fedit", "shared"), ("ffa", "shared"), ("local", "personal"), ("fedpeft", "shared")]
)
def test_a_tensor_of_a_kind_that_no_policy_knows_is_never_left_untrained(policy, scope):
    layout = Layout({**initial().layout, Key(SITE, "e0", "scale"): (3,)})
    made = Planner(config(federation={"policy": policy}), BASE).plan("c00", 1, layout, {}, 0)
    assert made.scope(Key(SITE, "e0", "scale")) == scope
    assert made.scope(Key(SITE, "e0", "patch.A")) == "frozen"
