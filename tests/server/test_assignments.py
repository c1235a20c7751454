"""Who leans on which experts: clusters of owners, and what becomes of the plan."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from toy_federation import BASE, SITE, config, initial

from molehill import evidence, registry
from molehill.errors import MessageError
from molehill.plan import ClientReply
from molehill.wire.keys import Key
from molehill.wire.tree import Layout, Tree
from molehill_server.check import check
from molehill_server.planning.assigning import Leaning, Seen, added, embedded, routed
from molehill_server.planning.assignments.reverse import ReverseParams, choose, fits
from molehill_server.planning.clustering import clusters, distances, silhouette
from molehill_server.planning.planner import Planner, expected, looked_at, trained
from molehill_server.validation import parse_reply, require_embeddings, require_places

HEAD = Key("head", "-", "head.weight")
EXPERTS = ("e0", "e1", "e2", "e3")
LEANS = {"molora": {"scorer": "leaning"}, "federation": {"assign": "clusters"}}


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


LEASE = {"molora": {"scorer": "own_alias", "selector": "dense"}, "federation": {"preset": "fedlease"}}


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


# ---- experts choose their clients --------------------------------------------------------------------------------

REVERSE = {
    "molora": {"experts": 6, "shared": 1, "scorer": "lowrank_dot", "selector": "top_k"},
    "federation": {"preset": "fedamole"},
    "personal": {"gate": "split"},
}


def told(rng, clients=5, experts=6, rank=4, site="s"):
    """Embeddings of some clients, of which each had half of the experts."""
    found = {}
    for n in range(clients):
        values = rng.normal(size=(1 + experts, rank)).astype(np.float32)
        values[1 + rng.permutation(experts)[: experts // 2]] = 0
        found[f"c{n}"] = Tree.of({Key(site, "-", "gate.embeddings"): values})
    return found


def reverse(changes, number=1, **values):
    ids = tuple(f"e{n}" for n in range(6))
    state = Seen(number, 4, changes, dict.fromkeys(changes, 10), {}, ids, 3)
    return registry.build("assignment", "reverse", values).assign(state)


@pytest.mark.parametrize(("experts", "clients"), [(30, 10), (6, 3), (4, 9), (3, 1), (2, 2)])
def test_the_choice_is_within_its_bounds_and_no_other_is_better(experts, clients):
    rng = np.random.default_rng(experts)
    fit = rng.random((experts, clients))
    chosen = choose(fit, ReverseParams())
    places = 2 if clients > 1 else 1
    assert (chosen.sum(1) == places).all()
    if clients * 2 <= experts * places <= clients * 8:
        assert chosen.sum(0).min() >= 2
        assert chosen.sum(0).max() <= 8
    for _ in range(200):  # two experts trade a client each, which keeps all sums
        one, two = rng.integers(experts, size=2)
        mine, yours = chosen[one] & ~chosen[two], chosen[two] & ~chosen[one]
        if mine.any() and yours.any():
            a, b = rng.choice(np.flatnonzero(mine)), rng.choice(np.flatnonzero(yours))
            assert fit[one, a] + fit[two, b] >= fit[one, b] + fit[two, a] - 1e-9


def test_experts_fit_clients_by_a_softmax_over_these_at_every_site():
    rng = np.random.default_rng(0)
    one, two = told(rng), told(rng, site="t")
    both = [Tree.of({**one[name], **two[name]}) for name in one]
    expected = np.zeros((6, 5))
    for trees in (one, two):
        values = [next(iter(trees[name].values())).astype(float) for name in one]
        for e in range(6):
            had = [value[1 + e] for value in values if value[1 + e].any()]
            z = [np.mean(had, axis=0) @ value[0] / 2 if had else 0.0 for value in values]
            expected[e] += np.exp(z) / np.exp(z).sum() / 2
    np.testing.assert_allclose(fits(both), expected, rtol=1e-5)


def test_clients_under_other_names_get_the_same_experts():
    changes = told(np.random.default_rng(1))
    names = dict(zip(sorted(changes), ("z", "y", "k", "b", "a"), strict=True))
    found, renamed = reverse(changes), reverse({names[name]: tree for name, tree in changes.items()})
    assert {names[name]: leaning for name, leaning in found.items()} == renamed
    assert len(set(map(repr, found.values()))) > 1


def test_who_has_an_expert_trains_it_and_nothing_is_left_of_others():
    changes = told(np.random.default_rng(1))
    found = reverse(changes)
    for leaning in found.values():
        assert {expert for expert, bias in leaning.bias.items() if bias == 0} == leaning.trains
        assert {bias for expert, bias in leaning.bias.items() if expert not in leaning.trains} == {-100.0}
        assert len(leaning.bias) == 6  # or what was shut before would stay so
    assert reverse(changes, number=4) == {}  # what is scored is what was trained
    rows = Seen(0, 4, {}, dict.fromkeys(changes, 10), {}, ("e0", "e1", "e2", "e3", "e4", "e5"), 3)
    assign = registry.build("assignment", "reverse")
    assert assign.assign(rows).keys() == changes.keys()
    assert assign.assign(rows) != assign.assign(replace(rows, seed=4))


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ({"privacy": {"secure_aggregation": True}}, "privacy.secure_aggregation"),
        ({"privacy": {"clip": 1.0, "noise": 4.0, "epsilon": 8.0, "delta": 1e-3}}, "privacy.clip"),
        ({"molora": {"scorer": "leaning"}}, "molora.scorer"),
        ({"personal": {"gate": "global"}}, "personal.gate"),
    ],
)
def test_embeddings_where_they_cannot_be_are_refused(more, key):
    refused = [each for each in check(config(**{**REVERSE, **more})) if each.verdict == "refuse"]
    assert ("federation.assign", key) in [each.keys for each in refused]
    assert not [each for each in check(config(**REVERSE)) if each.verdict == "refuse"]
    private = config(**{**REVERSE, "privacy": {"secure_aggregation": True}})
    assert evidence.embedded(config(**REVERSE)) > evidence.embedded(private) == evidence.embedded(config(**LEANS))


def test_a_scorer_that_reads_experts_needs_low_rank_ones():
    for other in ({"expert": "bottleneck"}, {"allocation": "hetero_rank"}):
        refused = check(config(**{**REVERSE, "molora": {**REVERSE["molora"], **other}}))
        assert "molora.scorer" in {key for each in refused if each.verdict == "refuse" for key in each.keys}


ROWS = {"-": [1.0, 2.0, 3.0], "e0": [0.5] * 3}


@pytest.mark.parametrize(
    ("embeddings", "fits_in"),
    [
        ({SITE: ROWS}, True),
        ({}, False),
        ({SITE: ROWS, "elsewhere": ROWS}, False),
        ({SITE: {**ROWS, "e1": [0.5] * 3}}, False),  # which its plan does not let it train
        ({SITE: {"e0": [0.5] * 3}}, False),
        ({SITE: {**ROWS, "e0": [0.5] * 4}}, False),
    ],
)
def test_embeddings_that_this_model_cannot_have_are_refused(embeddings, fits_in):
    layout = initial().layout
    plan = Planner(config(), BASE).plan("c00", 1, layout, {}, 0, leaning=Leaning({}, frozenset({"e0"})))
    values = {"client": "c00", "round": 1, "delta": "", "bytes_up": 0, "bytes_down": 0, "examples": 1, "loss": 0.0}
    reply = ClientReply(**values, seconds=0, embeddings=embeddings)
    if fits_in:
        require_embeddings(reply, plan, layout, asked=True)
    else:
        with pytest.raises(MessageError, match="embeddings"):
            require_embeddings(reply, plan, layout, asked=True)
    if embeddings:
        with pytest.raises(MessageError, match="not of 0"):
            require_embeddings(reply, plan, layout, asked=False)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e31"])
def test_embeddings_are_finite(number):
    text = '{"client": "c", "round": 1, "delta": "", "bytes_up": 0, "bytes_down": 0, "examples": 1, "loss": 0, '
    text += f'"seconds": 0, "embeddings": {{"s": {{"-": [{number}]}}}}}}'
    with pytest.raises(MessageError, match="embeddings"):
        parse_reply(text)


def test_what_is_told_has_one_shape_for_all_clients():
    tree = embedded({"s": {"e1": [3.0, 4.0], "-": [1.0, 2.0]}}, ["e0", "e1"])
    assert tree[Key("s", "-", "gate.embeddings")].tolist() == [[1, 2], [0, 0], [3, 4]]


# ---- experts of tasks --------------------------------------------------------------------------------------------

ROUTER = {
    "molora": {"scorer": "nearest_centroid", "selector": {"name": "top_k", "k": 1}, "scope": "model"},
    "federation": {"preset": "fedrouter"},
    "personal": {"gate": "split"},
}
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
