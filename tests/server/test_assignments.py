"""Who leans on which experts: clusters of owners, and what becomes of the plan."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from toy_federation import BASE, LEANS, LEASE, SITE, config, initial

from molehill import registry
from molehill.wire.keys import Key
from molehill.wire.tree import Layout, Tree
from molehill_server.check import check
from molehill_server.planning.assigning import Leaning, Seen, added, routed
from molehill_server.planning.clustering import clusters, distances, silhouette
from molehill_server.planning.planner import Planner, expected, looked_at, trained

HEAD = Key("head", "-", "head.weight")
EXPERTS = ("e0", "e1", "e2", "e3")


def rays(groups, noise=0.3, seed=0):
    """Unit vectors around one direction a group, ``[K, 40]``."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(max(groups) + 1, 40))
    found = np.stack([centres[group] + noise * rng.normal(size=40) for group in groups])
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def seen(groups, number=2, known=None, seed=0):
    changes = {
        f"c{n:02d}": Tree.of({HEAD: 5 * ray[None].astype(np.float32)}) for n, ray in enumerate(rays(groups, seed=seed))
    }
    return Seen(number, 6, changes, dict.fromkeys(changes, 10), known or {}, EXPERTS)


def alike(labels, groups):
    """Whether two partitions are the same but for their names."""
    return len(set(zip(labels, groups, strict=True))) == len(set(labels)) == len(set(groups))


@pytest.mark.parametrize("groups", [(0, 0, 1, 1), (0, 1, 2, 0, 1, 2), (0, 1, 0, 2, 3, 3, 2, 1)])
def test_planted_clusters_are_found_whatever_the_order(groups):
    labels, score = clusters(distances(rays(groups)), 4)
    assert alike(labels.tolist(), groups)
    assert score > 0.5
    order = np.random.default_rng(1).permutation(len(groups))
    again, same = clusters(distances(rays(groups)[order]), 4)
    assert alike(again.tolist(), np.array(groups)[order].tolist())
    assert same == pytest.approx(score)
    assert labels[0] == again[0] == 0


def test_the_silhouette_is_that_of_its_definition():
    apart, labels = distances(rays((0, 0, 1, 1, 1, 2))), np.array([0, 0, 1, 1, 1, 2])
    each = []
    for n, own in enumerate(labels):
        others = [m for m in range(6) if labels[m] == own and m != n]
        if not others:
            each.append(0.0)
            continue
        a = np.mean([apart[n, m] for m in others])
        b = min(np.mean([apart[n, m] for m in range(6) if labels[m] == other]) for other in {0, 1, 2} - {own})
        each.append((b - a) / max(a, b))
    assert silhouette(apart, labels) == pytest.approx(np.mean(each))
    assert silhouette(apart, np.zeros(6, int)) == 0


def test_who_cannot_be_told_apart_is_one_cluster():
    same = np.ones((5, 3)) / np.sqrt(3)
    assert clusters(distances(same), 4)[0].tolist() == [0] * 5
    assert clusters(distances(rays((0, 1))), 4)[0].tolist() == [0, 0]  # of two nobody knows what is far


def test_clusters_lean_after_the_warm_up_on_experts_of_their_own():
    assign = registry.build("assignment", "clusters", {"warmup": 2, "bias": 3.0})
    assert assign.assign(seen((0, 0, 1, 1), number=1)) == {}
    found = assign.assign(seen((0, 0, 0, 1, 1)))
    assert found["c00"] == found["c01"] == found["c02"] == Leaning({"e0": 3.0, "e2": 3.0})
    assert found["c03"] == found["c04"] == Leaning({"e1": 3.0, "e3": 3.0})


def test_owners_with_nothing_in_common_do_not_lean():
    groups = tuple(range(8))
    found = registry.build("assignment", "clusters", {"least": 0.3}).assign(seen(groups))
    assert found == {f"c{n:02d}": Leaning() for n in range(8)}


def test_what_was_decided_stays_and_who_comes_later_joins_the_nearest():
    assign = registry.build("assignment", "clusters", {})
    groups = (0, 0, 1, 1, 1, 0)
    whole = seen(groups)
    first = replace(whole, changes={name: whole.changes[name] for name in ("c00", "c01", "c02", "c03")})
    known = assign.assign(first)
    later = assign.assign(replace(whole, round=3, known=known))
    assert {name: later[name] for name in known} == known
    assert later["c04"] == known["c02"]
    assert later["c05"] == known["c00"]
    assert assign.assign(replace(whole, round=4, known=later)) == later


def test_a_plan_says_what_is_leant_on_and_leaves_others_experts_frozen():
    settings, layout = config(), initial().layout
    leaning = Leaning({"e1": 2.0}, frozenset({"e1"}))
    plan = Planner(settings, BASE).plan("c00", 2, layout, {}, 0, leaning=leaning)
    assert plan.lean == {"e1": 2.0}
    assert {key.expert for key in expected(plan, layout)} == {"e1", "-"}
    assert plan.scope(Key(SITE, "e0", "A")) == "frozen"
    assert Planner(settings, BASE).plan("c00", 2, layout, {}, 0).lean == {}
    assert routed([Key(SITE, name, "A") for name in ("e10", "e2", "shared0")]) == ["e2", "e10"]


def test_what_is_looked_at_is_the_first_kind_that_clients_send():
    layout = initial().layout
    assert {key.kind for key in looked_at(config(**LEANS), layout)} == {"head"}
    own = {**LEANS, "personal": {"head": "personal"}}
    assert {key.kind for key in looked_at(config(**own), layout)} == {"B"}
    assert not looked_at(config(), layout)
    assert set(looked_at(config(**LEANS), layout)) < set(trained(config(**LEANS), layout))


def test_changes_add_up_and_what_is_not_sent_counts_nothing():
    layout = Tree.of({HEAD: np.zeros((2, 3)), Key(SITE, "e0", "B"): np.zeros((2, 2))}).layout
    low = {Key(SITE, "e0", "B"): np.ones((2, 1), np.float32)}
    total = added(added(None, low, layout), {**low, HEAD: np.full((2, 3), 2, np.float32)}, layout)
    assert total[Key(SITE, "e0", "B")].tolist() == [[2, 0], [2, 0]]
    assert total[HEAD].tolist() == [[2] * 3] * 2


def learnt(groups, number=5, known=None):
    """What clients of planted groups learnt alone of one LoRA and a head."""
    B, rng = rays(groups), np.random.default_rng(3)
    names = [Key(site, "e0", "B") for site in ("one", "two")]
    changes, model = {}, {}
    for n, ray in enumerate(B):
        parts = {key: (n + 1) * ray.reshape(8, 5).astype(np.float32) for key in names}
        A = {key._replace(role="A"): rng.normal(size=(5, 6)).astype(np.float32) for key in names}
        changes[f"c{n:02d}"] = Tree.of({**parts, **A, HEAD: np.full((2, 3), n, np.float32)})
    for expert in EXPERTS:
        for key in changes["c00"]:
            model[key if key == HEAD else key._replace(expert=expert)] = np.full_like(
                changes["c00"][key], key.role == "A"
            )
    return Seen(number, 9, changes, dict.fromkeys(changes, 10), known or {}, EXPERTS, model=Tree.of(model))


def test_leases_wait_for_the_warm_up_then_planted_clusters_own_an_expert_each():
    assign, groups = registry.build("assignment", "lease", {}), (0, 1, 0, 2, 1, 2)
    assert assign.assign(learnt(groups, number=4)) == {}
    found = assign.assign(learnt(groups))
    own = [min(found[f"c{n:02d}"].trains) for n in range(6)]
    assert own == ["e0", "e1", "e0", "e2", "e1", "e2"]  # whatever the lengths of what they learnt
    assert found["c00"] == Leaning({"e0": 2.0, "e1": 1.0, "e2": 1.0}, frozenset({"e0"}))  # and e3 is closed


def test_experts_are_formed_as_unweighted_means_of_clusters_once():
    assign, groups = registry.build("assignment", "lease", {}), (0, 1, 0, 1, 1)
    seen = learnt(groups)
    found = assign.assign(seen)
    formed = assign.form(seen, found)
    for expert, members in {"e0": (0, 2), "e1": (1, 3, 4), "e2": range(5), "e3": range(5)}.items():
        for key in (Key("two", "e0", "A"), Key("one", "e0", "B")):
            mean = np.mean([seen.changes[f"c{n:02d}"][key] for n in members], axis=0)
            np.testing.assert_allclose(formed[key._replace(expert=expert)], mean + (key.role == "A"), rtol=1e-5)
    assert formed[HEAD].tolist() == [[2.0] * 3] * 2
    assert formed.keys() == seen.model.layout.keys()
    assert assign.form(replace(seen, known=found), found) == {}


def test_who_comes_after_the_warm_up_joins_the_expert_nearest_to_what_it_learnt_alone():
    assign, groups = registry.build("assignment", "lease", {}), (0, 1, 0, 1, 1, 0)
    whole = learnt(groups)
    first = replace(whole, changes={name: whole.changes[name] for name in ("c00", "c01", "c02", "c03")})
    known = assign.assign(first)
    model = Tree.of({**whole.model, **assign.form(first, known)})
    changes = {name: whole.changes[name] for name in ("c04", "c05")}
    later = assign.assign(replace(whole, round=6, changes=changes, known=known, model=model))
    assert later == {**known, "c04": known["c01"], "c05": known["c00"]}


def test_a_newcomer_trains_one_expert_apart_and_a_member_its_own_and_its_router():
    routers = [Key(SITE, "-", f"gate.of.{expert}.{part}") for expert in ("e0", "e1") for part in ("weight", "alias")]
    own = Key(SITE, "-", "gate.own.lean")
    shapes = {key: shape for key, shape in initial().layout.items() if key.kind != "gate"}
    settings, layout = config(**LEASE), Layout({**shapes, **dict.fromkeys(routers, (2, 6)), own: (2,)})
    planner = Planner(settings, BASE)
    plan = planner.plan("c00", 1, layout, {"gate": "x"}, 0)
    assert plan.apart
    assert plan.blobs == {}
    assert set(expected(plan, layout)) == set(looked_at(settings, layout))
    assert {(key.expert, key.kind) for key in expected(plan, layout)} == {("e0", "A"), ("e0", "B"), ("-", "head")}
    plan = planner.plan("c00", 6, layout, {"gate": "x"}, 0, leaning=Leaning({"e0": 1.0, "e1": 2.0}, frozenset({"e1"})))
    assert not plan.apart
    assert plan.blobs == {"gate": "x"}
    sent = {(key.expert, key.role) for key in expected(plan, layout) if key.kind != "head"}
    assert sent == {("e1", "A"), ("e1", "B"), ("-", "gate.of.e1.weight"), ("-", "gate.of.e1.alias")}


def test_leases_and_leanings_mean_different_things():
    def refused(scorer, preset):
        found = check(config(molora={"scorer": scorer, "selector": "dense"}, federation=preset, run={"rounds": 6}))
        return [each.keys for each in found if each.verdict == "refuse"]

    assert ("federation.assign", "molora.scorer") in refused("leaning", {"preset": "fedlease"})
    assert ("federation.assign", "molora.scorer") in refused("own_alias", {"assign": "clusters"})
    (alone,) = check(config(molora={"preset": "fedlease"}))
    assert (alone.verdict, alone.keys) == ("warn", ("molora.scorer", "federation.assign"))
    uneven = {"molora": {**LEASE["molora"], "allocation": "hetero_rank"}, "federation": LEASE["federation"]}
    assert ("federation.assign", "molora.allocation") in [each.keys for each in check(config(**uneven))]
    assert refused("own_alias", {"preset": "fedlease"}) == refused("leaning", {"assign": "clusters"}) == []


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ({"privacy": {"secure_aggregation": True}}, "privacy.secure_aggregation"),
        ({"privacy": {"clip": 1.0, "noise": 4.0, "epsilon": 8.0, "delta": 1e-3}}, "privacy.clip"),
        ({"molora": {"scorer": "linear"}}, "molora.scorer"),
        ({"personal": {"gate": "global"}}, "personal.gate"),
    ],
)
def test_leaning_where_it_cannot_be_is_refused(more, key):
    refused = [each for each in check(config(**{**LEANS, **more})) if each.verdict == "refuse"]
    assert ("federation.assign", key) in [each.keys for each in refused]
    assert not [each for each in check(config(**LEANS)) if each.verdict == "refuse"]
