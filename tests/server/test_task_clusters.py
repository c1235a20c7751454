"""Experts of tasks: clients cluster their rows, and the server the clusters."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from toy_federation import BASE, LEANS, LEASE, REVERSE, ROUTER, SITE, config, initial

from molehill import evidence, registry
from molehill.errors import MessageError
from molehill.plan import ClientReply
from molehill.wire.keys import Key
from molehill.wire.tree import Layout, Tree
from molehill_server.check import check
from molehill_server.planning.assigning import Leaning, Seen
from molehill_server.planning.planner import Planner, expected, looked_at
from molehill_server.validation import require_places

EXPERTS = ("e0", "e1", "e2", "e3")
HEAD = Key("head", "-", "head.weight")


MINE, PLACE = Key(SITE, "-", "gate.own.mine"), Key(SITE, "-", "gate.places")
AT = np.diag([3.0, 4.0, 5.0, 6.0]).astype(np.float32)


def gathered(tasks, number=1, known=None):
    """What clients tell and learn alone, each with a place and an adapter of value for every task of its own."""
    changes, noise = {}, np.random.default_rng(0).normal(size=(9, 2, 4)).astype(np.float32) * 0.1
    for n, own in enumerate(tasks):
        mine = np.zeros((2, 4), np.float32)
        mine[: len(own)] = AT[list(own)] + noise[n, : len(own)]
        parts = {Key(SITE, f"e{at}", "B"): np.full((2, 3), 10 * n + task, np.float32) for at, task in enumerate(own)}
        parts = {Key(SITE, "e1", "B"): np.zeros((2, 3), np.float32), **parts}
        changes[f"c{n:02d}"] = Tree.of({**parts, HEAD: np.full((2, 3), n, np.float32), MINE: mine})
    model = {Key(SITE, expert, "B"): np.ones((2, 3), np.float32) for expert in EXPERTS}
    model |= {HEAD: np.ones((2, 3), np.float32), PLACE: np.zeros((4, 4), np.float32)}
    rows = {client: n + 1 for n, client in enumerate(changes)}
    return Seen(number, 9, changes, rows, known or {}, EXPERTS, model=Tree.of(model))


def test_clusters_of_clusters_are_experts_and_a_client_may_have_several():
    assign = registry.build("assignment", "task_clusters", {})
    assert assign.assign(gathered([(0, 1)], number=0)) == {}
    seen = gathered([(0, 1), (1, 2), (2,), (0,), (3, 1)])
    found = assign.assign(seen)
    task = dict(zip((0, 1, 2, 3), ("e0", "e1", "e2", "e3"), strict=True))  # in the order in which they were told
    for client, own in {"c00": (0, 1), "c01": (1, 2), "c02": (2,), "c03": (0,), "c04": (1, 3)}.items():
        mine = {task[each] for each in own}
        assert found[client] == Leaning({e: 2.0 * (e in mine) for e in EXPERTS}, frozenset(mine))
    wide = registry.build("assignment", "task_clusters", {"among": "all"}).assign(seen)
    assert wide["c02"] == Leaning({"e0": 1.0, "e1": 1.0, "e2": 2.0, "e3": 1.0}, frozenset({"e2"}))
    formed = assign.form(seen, found)
    members = {"e0": {0: 0, 3: 0}, "e1": {0: 1, 1: 1, 4: 1}, "e2": {1: 2, 2: 2}, "e3": {4: 3}}
    for expert, learnt_by in members.items():
        weights = [n + 1 for n in learnt_by]
        mean = np.average([10 * n + task for n, task in learnt_by.items()], weights=weights)
        np.testing.assert_allclose(formed[Key(SITE, expert, "B")], np.full((2, 3), 1 + mean), rtol=1e-6)
        told = [row for n in learnt_by for row in seen.changes[f"c{n:02d}"][MINE] if row[int(expert[1])] > 1]
        np.testing.assert_allclose(formed[PLACE][int(expert[1])], np.mean(told, axis=0), rtol=1e-6)
    np.testing.assert_allclose(formed[HEAD], 1 + np.average(range(5), weights=range(1, 6)))
    assert assign.form(replace(seen, known=found), found) == {}


def test_experts_that_no_cluster_has_are_closed_and_keep_their_values():
    assign = registry.build("assignment", "task_clusters", {"among": "all"})
    seen = gathered([(0,), (1,)])
    found = assign.assign(seen)
    assert found["c00"] == Leaning({"e0": 2.0, "e1": 1.0, "e2": 0.0, "e3": 0.0}, frozenset({"e0"}))
    formed = assign.form(seen, found)
    assert formed.keys() == {Key(SITE, "e0", "B"), Key(SITE, "e1", "B"), HEAD, PLACE}
    assert not formed[PLACE][2:].any()


def test_who_comes_later_joins_the_experts_of_the_nearest_centroids():
    assign = registry.build("assignment", "task_clusters", {})
    first = gathered([(0, 1), (2,)])
    known = assign.assign(first)
    model = Tree.of({**first.model, **assign.form(first, known)})
    whole = gathered([(0, 1), (2,), (2, 0)], number=2)
    later = assign.assign(replace(whole, changes={"c02": whole.changes["c02"]}, known=known, model=model))
    assert later.keys() == {"c00", "c01", "c02"}
    assert later["c02"].trains == known["c01"].trains | {"e0"}
    assert {client: later[client] for client in known} == known


def test_a_plan_trains_the_experts_of_ones_tasks_and_the_router_is_never_sent():
    lean = Key(SITE, "-", "gate.own.lean")
    shapes = {key: shape for key, shape in initial().layout.items() if key.kind != "gate"}
    layout = Layout({**shapes, PLACE: (2, 6), MINE: (2, 6), lean: (2,)})
    for gate in ("split", "anchored"):
        settings = config(**{**ROUTER, "personal": {"gate": gate}})
        planner = Planner(settings, BASE)
        plan = planner.plan("c00", 1, layout, {"gate": "x"}, 0)
        assert (plan.apart, plan.blobs, plan.lean) == (True, {}, {"e0": 2.0, "e1": 2.0})
        assert set(expected(plan, layout)) == set(looked_at(settings, layout)) == set(shapes)
        assert [plan.scope(key) for key in (PLACE, MINE, lean)] == ["frozen", "personal", "personal"]
        plan = planner.plan("c00", 2, layout, {}, 0, leaning=Leaning({"e1": 2.0}, frozenset({"e1"})))
        assert {key.expert for key in expected(plan, layout)} == {"e1", "-"}
        assert [plan.scope(key) for key in (PLACE, MINE, lean)] == ["frozen", "personal", "personal"]


@pytest.mark.parametrize(
    ("more", "keys"),
    [
        ({"privacy": {"secure_aggregation": True}}, ("federation.assign", "privacy.secure_aggregation")),
        (
            {"privacy": {"clip": 1.0, "noise": 4.0, "epsilon": 8.0, "delta": 1e-3}},
            ("federation.assign", "privacy.clip"),
        ),
        ({"molora": {"scorer": "own_alias"}}, ("federation.assign", "molora.scorer")),
        ({"personal": {"gate": "global"}}, ("federation.assign", "personal.gate")),
        ({"personal": {"gate": "personal"}}, ("federation.assign", "personal.gate")),
        ({**LEASE, "personal": {"gate": "personal"}}, ("federation.assign", "personal.gate")),
        ({"molora": {**ROUTER["molora"], "scope": "site"}}, ("molora.scorer", "molora.scope")),
        ({"federation": {"preset": "fedlease"}}, ("molora.scorer", "federation.assign")),
        ({"molora": {**ROUTER["molora"], "init": "lora"}}, ("federation.assign", "molora.init")),
        ({"molora": {**ROUTER["molora"], "selector": "dense"}}, ("molora.scorer", "molora.selector")),
        ({"molora": {**ROUTER["molora"], "selector": "top_k"}}, ("molora.scorer", "molora.selector")),
        ({"molora": {**ROUTER["molora"], "selector": "switch"}}, ("molora.scorer", "molora.selector")),
        (
            {"molora": {**ROUTER["molora"], "selector": {"name": "top_k", "k": 1, "renorm": "none"}}},
            ("molora.scorer", "molora.selector"),
        ),
        (
            {"molora": {**ROUTER["molora"], "selector": {"name": "gw", "k": 1}}},  # which has all for who is unsure
            ("molora.scorer", "molora.selector"),
        ),
        (
            {"molora": {**ROUTER["molora"], "allocation": {"name": "fine_grained", "m": 2}}},
            ("molora.scorer", "molora.allocation"),
        ),
        (
            {"federation": {"preset": "fedrouter", "policy": {"name": "mixed_k", "ks": [1, 2]}}},
            ("molora.scorer", "federation.policy"),
        ),
        (
            {"federation": {"preset": "fedrouter", "assign": {"name": "task_clusters", "local": 5}}},
            ("federation.assign", "molora.experts"),
        ),
        (
            {"federation": {"preset": "fedrouter", "assign": {"name": "task_clusters", "warmup": 4}}},
            ("federation.assign", "run.rounds"),
        ),
        ({**LEASE, "personal": {"gate": "split"}}, ("federation.assign", "run.rounds")),
        ({**LEASE, "molora": {**LEASE["molora"], "selector": "top_k"}}, ("molora.scorer", "molora.selector")),
    ],
)
def test_places_where_they_cannot_be_are_refused(more, keys):
    refused = [each.keys for each in check(config(**{**ROUTER, **more})) if each.verdict == "refuse"]
    assert keys in refused
    assert not check(config(**ROUTER))
    assert evidence.placed(config(**ROUTER))
    assert not evidence.placed(config(**{**ROUTER, "privacy": {"secure_aggregation": True}}))
    assert not evidence.placed(config(**LEASE))
    (alone,) = check(config(molora={"preset": "fedrouter"}))
    assert (alone.verdict, alone.why.rpartition("; ")[2]) == ("warn", "use assignment 'task_clusters'")


def test_what_works_at_the_edge_is_not_refused():
    assign = {"name": "task_clusters", "local": 4, "warmup": 3}  # which is decided after the last round
    assert not check(config(**{**ROUTER, "federation": {"preset": "fedrouter", "assign": assign}}))
    (found,) = check(config(**{**ROUTER, "molora": {**ROUTER["molora"], "selector": "dense"}}))
    assert found.why.endswith("; use selector 'top_k' with k = 1")
    (found,) = check(config(**{**LEASE, "molora": {**LEASE["molora"], "selector": "top_k"}, "run": {"rounds": 6}}))
    assert found.why.endswith("; use selector 'dense'")


@pytest.mark.parametrize("sections", [ROUTER, LEASE, REVERSE])
def test_of_whom_nothing_is_known_leans_on_nothing_whatever_it_did_before(sections):
    planner, layout = Planner(config(**sections), BASE), initial().layout
    assert planner.plan("c00", 3, layout, {}, 0, leaning=Leaning()).lean == {"e0": 0.0, "e1": 0.0}
    assert planner.plan("c00", 3, layout, {}, 0, leaning=Leaning({"e1": 2.0})).lean == {"e1": 2.0}
    learns = Planner(config(**LEANS), BASE)  # there its own part is learnt until something is decided
    assert learns.plan("c00", 3, layout, {}, 0, leaning=Leaning()).lean == {}
    alone = Planner(config(**{**sections, "federation": {"assign": "none"}}), BASE)
    assert alone.plan("c00", 3, layout, {}, 0).lean == {}


@pytest.mark.parametrize(("gate", "scope"), [("global", "frozen"), ("split", "personal"), ("personal", "personal")])
def test_what_no_training_moves_is_never_sent(gate, scope):
    own = Key(SITE, "-", "gate.own.lean")
    for scorer in ("own_alias", "lowrank_dot", "nearest_centroid"):
        settings = config(molora={"scorer": scorer}, personal={"gate": gate})
        assert Planner(settings, BASE).plan("c00", 1, initial().layout, {}, 0).scope(own) == scope


ROW = [1.0] * 6


@pytest.mark.parametrize(
    ("told", "fits_in"),
    [
        ({SITE: [ROW, ROW]}, True),
        ({SITE: [ROW, [0.0] * 6]}, True),
        ({}, False),
        ({SITE: [ROW]}, False),
        ({SITE: [ROW, ROW, ROW]}, False),
        ({SITE: [ROW, ROW[:5]]}, False),
        ({SITE: [[0.0] * 6, ROW]}, False),
        ({SITE: [ROW, ROW], "elsewhere": [ROW, ROW]}, False),
    ],
)
def test_places_that_this_model_cannot_have_are_refused(told, fits_in):
    shapes = {key: shape for key, shape in initial().layout.items() if key.kind != "gate"}
    layout = Layout({**shapes, PLACE: (2, 6), MINE: (2, 6)})
    plan = Planner(config(**ROUTER), BASE).plan("c00", 1, layout, {}, 0)
    values = {"client": "c00", "round": 1, "delta": "", "bytes_up": 0, "bytes_down": 0, "examples": 1, "loss": 0.0}
    reply = ClientReply(**values, seconds=0, places=told)
    if fits_in:
        require_places(reply, plan, layout, asked=True)
    else:
        with pytest.raises(MessageError, match=r"place|rows lie"):
            require_places(reply, plan, layout, asked=True)
    if told:
        with pytest.raises(MessageError, match="not at 0"):
            require_places(reply, plan, layout, asked=False)
