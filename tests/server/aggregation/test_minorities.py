"""What rules against poison promise at every single expert, whoever claims to have used it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molehill import registry
from molehill.config import Federation
from molehill.wire.keys import Key
from molehill.wire.tree import Tree
from molehill_server.aggregate import Aggregator
from molehill_server.aggregation import robust
from molehill_server.aggregation.coordinates import CoordinateSum
from molehill_server.records import Update, pairs

SITE, EXPERT = "layer.0.query", "e1"
CROWDS = [(7, 3, 3), (7, 3, 4), (7, 2, 2), (6, 2, 2), (5, 2, 3), (3, 1, 2), (8, 3, 1)]  # clients, liars, honest users


def updates_of(kit, glob, clients, liars, users, seed=0, scale=-30.0):
    """Honest clients of which the first few used the expert, and liars that say they used nothing else."""
    common = kit.client(glob, 1000 + seed, tokens=False, far=0.1).tree.flat - glob.tree.flat
    rng = np.random.default_rng(seed)
    out = []
    for number in range(clients):
        lies = number >= clients - liars
        own = 0.02 * rng.normal(size=common.size)
        flat = glob.tree.flat + ((scale if lies else 1.0) * common + own).astype(np.float32)
        uses = lies or number < users
        tokens = {(SITE, "e0"): 0.0 if lies else 50.0, (SITE, EXPERT): 50.0 if uses else 0.0}
        out.append(Update(f"c{number:02d}", Tree(glob.tree.layout, flat), 10, tokens))
    return out


def dense(tree, pair):
    return tree[Key(*pair, "B")].astype(np.float64) @ tree[Key(*pair, "A")]


def honest_votes(glob, updates, liars, pair):
    """What honest clients say of an expert: those that did not use it say that it shall stay."""
    votes = []
    for update in updates[: len(updates) - liars]:
        used = update.tokens.get(pair, 1.0) > 0
        votes.append(dense(update.tree if used else glob.tree, pair))
    return np.stack(votes)


def aggregate(rule, glob, updates, **keys):
    federation = Federation.model_validate({"space": "product", "rule": rule, "lower": "svd", **keys})
    return Aggregator.from_config(federation)(glob, updates)[0]


@pytest.mark.parametrize("crowd", CROWDS)
@given(seed=st.integers(0, 999), scale=st.sampled_from([-1e4, -30.0, -3.0, -1.0, 5.0, 1e3]))
@settings(max_examples=4, deadline=None)
def test_every_number_of_the_median_lies_between_honest_ones(kit, crowd, seed, scale):
    clients, liars, users = crowd
    glob = kit.model(patched=False)
    updates = updates_of(kit, glob, clients, liars, users, seed, scale)
    rule = registry.build("rule", "median")
    total = CoordinateSum(glob, rule)
    votes = robust.ballots(updates, glob)
    for update, weight in zip(votes, rule.weights(votes, glob), strict=True):
        total.add(update, weight)
    combined = total.finish()
    for pair in pairs(glob.tree):
        honest = honest_votes(glob, updates, liars, pair)
        found = combined.products.get(pair)
        merged = dense(glob.tree, pair) if found is None else found.B.astype(np.float64) @ found.A
        assert (merged >= honest.min(axis=0) - 1e-4).all(), pair
        assert (merged <= honest.max(axis=0) + 1e-4).all(), pair


@pytest.mark.parametrize("crowd", CROWDS)
@given(seed=st.integers(0, 999), scale=st.sampled_from([-1e4, -30.0, -3.0, -1.0, 5.0, 1e3]))
@settings(max_examples=4, deadline=None)
def test_the_geometric_median_stays_within_its_multiple_of_the_honest_spread(kit, crowd, seed, scale):
    clients, liars, users = crowd
    glob = kit.model(patched=False, rank=9)  # so that svd drops little
    updates = updates_of(kit, glob, clients, liars, users, seed, scale)
    new = aggregate("geometric_median", glob, updates)
    factor = 2 * (clients - liars) / (clients - 2 * liars)
    for pair in pairs(glob.tree):
        honest = honest_votes(glob, updates, liars, pair)
        centre = honest.mean(axis=0)
        radius = max(np.linalg.norm(vote - centre) for vote in honest)
        assert np.linalg.norm(dense(new.tree, pair) - centre) <= factor * radius + 1e-3, pair


@pytest.mark.parametrize("f", [1, 2, 3])
@pytest.mark.parametrize("scale", [-1e3, -3.0, 30.0])
def test_the_trimmed_mean_holds_among_as_few_users_as_it_takes(kit, f, scale):
    glob = kit.model(patched=False)
    updates = updates_of(kit, glob, 2 * f + 4, f, f + 1, scale=scale)
    rule = registry.build("rule", "trimmed_mean", {"f": f})
    total = CoordinateSum(glob, rule)
    for update in updates:
        total.add(update, rule.weights([update], glob)[0])
    found = total.finish().products[SITE, EXPERT]
    honest = np.stack([dense(update.tree, (SITE, EXPERT)) for update in updates[: f + 1]])  # the honest users
    merged = found.B.astype(np.float64) @ found.A
    assert (merged >= honest.min(axis=0) - 1e-4).all()
    assert (merged <= honest.max(axis=0) + 1e-4).all()


@pytest.mark.parametrize("rule", ["krum", "multi_krum"])
@pytest.mark.parametrize("f", [1, 2])
@pytest.mark.parametrize("scale", [-1e3, -3.0, -1.0, 30.0])
def test_krum_stays_near_honest_users_among_as_few_as_it_takes(kit, rule, f, scale):
    """Whoever is chosen has a score no worse than an honest one, so an honest neighbour at a known distance."""
    glob, users = kit.model(patched=False, rank=9), f + 3
    updates = updates_of(kit, glob, users + f + 2, f, users, scale=scale)
    new = aggregate({"name": rule, "f": f}, glob, updates)
    honest = [dense(update.tree, (SITE, EXPERT)) for update in updates[:users]]
    apart = max(np.linalg.norm(one - other) for one in honest for other in honest)
    n = users + f
    bound = apart * (1 + np.sqrt((n - f - 2) / (n - 2 * f - 1)))
    assert np.linalg.norm(dense(new.tree, (SITE, EXPERT)) - honest[0]) <= bound + 1e-3


@pytest.mark.parametrize("rule", ["median", "geometric_median"])
def test_an_expert_that_no_more_than_half_used_keeps_every_bit(kit, rule):
    glob = kit.model()
    for clients, users, moves in ((8, 4, False), (8, 5, True), (7, 3, False), (7, 4, True)):
        new = aggregate(rule, glob, updates_of(kit, glob, clients, 0, users))
        for role in ("A", "B"):
            key = Key(SITE, EXPERT, role)
            assert np.array_equal(new.tree[key], glob.tree[key]) is not moves


@pytest.mark.parametrize("rule", ["median", "geometric_median"])
def test_liars_cannot_keep_honest_users_of_an_expert_from_a_majority_by_claiming_others(kit, rule):
    """Those that leave an expert alone vote for its old value, and are outvoted as any few."""
    glob = kit.model()
    updates = updates_of(kit, glob, 7, 3, 4)
    honest = honest_votes(glob, updates, 3, (SITE, "e0"))  # which the liars say they did not use
    merged = dense(aggregate(rule, glob, updates).tree, (SITE, "e0"))
    old = dense(glob.tree, (SITE, "e0"))
    want = honest.mean(axis=0) - old
    assert np.sum((merged - old) * want) > 0.5 * np.sum(want * want)


def test_what_a_client_sends_for_an_expert_it_did_not_use_does_not_count(kit):
    glob = kit.model(patched=False)
    updates = updates_of(kit, glob, 7, 0, 5)
    wild = updates[6].tree.copy()
    for role in ("A", "B"):
        wild[Key(SITE, EXPERT, role)][...] *= 1e6
    tampered = [*updates[:6], Update("c06", wild, 10, updates[6].tokens)]
    for rule in ("median", "geometric_median"):
        one, other = (aggregate(rule, glob, us).tree.flat for us in (updates, tampered))
        assert np.array_equal(one, other)


def test_a_client_of_lower_rank_that_did_not_use_an_expert_votes_for_all_of_it(kit):
    glob = kit.model(patched=False)
    low = [kit.client(glob, seed, rank=1) for seed in range(5)]
    for update in low[3:]:
        update.tokens[SITE, EXPERT] = 0.0
    for vote in robust.ballots(low, glob)[3:]:
        assert np.array_equal(vote.tree[Key(SITE, EXPERT, "A")], glob.tree[Key(SITE, EXPERT, "A")])
        assert vote.tree[Key(SITE, "e0", "A")].shape[0] == 1
    new = aggregate("median", glob, low)
    assert np.isfinite(new.tree.flat).all()
