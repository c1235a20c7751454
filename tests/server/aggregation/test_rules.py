"""Weight rules."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molehill import registry
from molehill.errors import FederationError, MessageError
from molehill.wire.keys import Key
from molehill.wire.tree import Tree
from molehill_server.aggregate import Aggregator
from molehill_server.aggregation.interfaces import Weight
from molehill_server.aggregation.lowers.none import NoLower
from molehill_server.aggregation.lowrank import distance
from molehill_server.aggregation.server_opts.none import NoOpt
from molehill_server.aggregation.shares import shares
from molehill_server.aggregation.spaces.factor import Factor
from molehill_server.aggregation.sums import factors
from molehill_server.records import Update, pairs


@given(seeds=st.lists(st.integers(0, 999), min_size=1, max_size=6, unique=True), tokens=st.booleans())
@settings(max_examples=25, deadline=None)
def test_fedit_is_the_dense_mean(kit, seeds, tokens):
    glob = kit.model()
    updates = [kit.client(glob, seed, tokens=tokens) for seed in seeds]
    new, _ = kit.preset("fedit")(glob, updates)
    for key, value in kit.dense.mean(glob, updates).items():
        np.testing.assert_allclose(new.tree[key], value, atol=5e-6)


@given(seed=st.integers(0, 999), factor=st.integers(2, 50))
@settings(max_examples=15, deadline=None)
def test_only_the_proportions_of_tokens_and_examples_count(kit, seed, factor):
    glob = kit.model()
    updates = [kit.client(glob, seed + k) for k in range(3)]
    louder = [
        Update(u.client, u.tree, u.examples * factor, {pair: n * (k + 2) for pair, n in u.tokens.items()})
        for k, u in enumerate(updates)
    ]
    one, other = (kit.preset("fedit")(glob, us)[0].tree.flat for us in (updates, louder))
    np.testing.assert_allclose(one, other, atol=2e-6)


def test_an_expert_is_averaged_over_the_clients_that_used_it(kit):
    glob = kit.model()
    updates = [kit.client(glob, seed, examples=100) for seed in range(2)]
    site = "layer.0.ffn"
    updates[0].tokens.update({(site, "e0"): 30.0, (site, "e1"): 10.0})
    updates[1].tokens.update({(site, "e0"): 0.0, (site, "e1"): 700.0})
    new, _ = kit.preset("fedit")(glob, updates)
    e0, e1, shared = (Key(site, expert, "A") for expert in ("e0", "e1", "shared0"))
    assert np.array_equal(new.tree[e0], updates[0].tree[e0])
    np.testing.assert_allclose(new.tree[e1], 0.2 * updates[0].tree[e1] + 0.8 * updates[1].tree[e1], atol=1e-6)
    np.testing.assert_allclose(new.tree[shared], (updates[0].tree[shared] + updates[1].tree[shared]) / 2, atol=1e-6)


def test_shares_of_routed_and_always_on_experts(kit):
    update = kit.client(kit.model(), 0)
    update.tokens.clear()
    update.tokens.update({("layer.0.query", "e0"): 3.0, ("layer.0.query", "shared0"): 4.0})
    got = shares(update)
    assert got["layer.0.query", "e0"] == 1
    assert got["layer.0.query", "e1"] == 0
    assert got["layer.0.query", "shared0"] == 1
    assert got["layer.0.ffn", "e1"] == 1  # a site without a report counts as evenly used


def test_hetlora_weights_are_norms_of_products_times_shares(kit):
    glob = kit.model()
    updates = [kit.client(glob, seed, rank=rank) for seed, rank in enumerate((1, 3, 2))]
    new, _ = kit.preset("hetlora")(glob, updates)

    def weight(update, key):
        if key.expert == "-":
            return update.examples
        a, b = Key(key.site, key.expert, "A"), Key(key.site, key.expert, "B")
        product = kit.dense.product(update.tree, glob.tree, a, b)
        return kit.dense.weight(update, key) / update.examples * np.linalg.norm(product)

    for key, value in kit.dense.mean(glob, updates, weight).items():
        np.testing.assert_allclose(new.tree[key], value, atol=5e-6)


def test_hetlora_with_equal_norms_and_examples_is_fedit(kit):
    glob = kit.model()
    updates = [kit.client(glob, seed, examples=50) for seed in range(3)]
    for update in updates:
        for site, expert in pairs(update.tree):
            a, b = Key(site, expert, "A"), Key(site, expert, "B")
            update.tree[b][...] /= np.linalg.norm(update.tree[b] @ update.tree[a])
    one, other = (kit.preset(name)(glob, updates)[0].tree.flat for name in ("hetlora", "fedit"))
    np.testing.assert_allclose(one, other, atol=2e-6)


class Loneliest:
    """Takes only the update whose products are farthest from those of all others: it must see the whole round."""

    additive = False
    needs_products = False
    least = 1

    def weights(self, updates, glob, /):
        chosen = {}
        for pair in pairs(glob.tree):
            points = [factors(update.tree, glob.tree, pair) for update in updates]
            chosen[pair] = int(np.argmax([sum(distance(p, q) for q in points) for p in points]))
        return [Weight(1.0, {pair: float(k == i) for pair, i in chosen.items()}) for k in range(len(updates))]


def test_a_rule_that_needs_all_updates_gets_them_at_once(kit):
    glob = kit.model()
    updates = [kit.client(glob, seed, far=100.0 if seed == 2 else 0.1) for seed in range(4)]
    new, report = Aggregator(Factor(), Loneliest(), NoLower(), NoOpt())(glob, iter(updates))
    for key in glob.tree:
        if key.expert != "-":
            assert np.array_equal(new.tree[key], updates[2].tree[key])
    assert report["updates"] == 4


@pytest.mark.parametrize("name", ["fedit", "hetlora", "flexlora", "fedex"])
def test_rows_beyond_every_rank_can_still_learn(kit, name):
    glob = kit.model()
    updates = [kit.client(glob, seed, rank=rank) for seed, rank in enumerate((1, 1 if name == "flexlora" else 2))]
    new, _ = kit.preset(name)(glob, updates)
    for site, expert in pairs(glob.tree):
        a, b = Key(site, expert, "A"), Key(site, expert, "B")
        assert np.array_equal(new.tree[a][2], glob.tree[a][2])
        assert not np.any(new.tree[b][:, 2])
        assert np.any(new.tree[b][:, 1])


def test_no_update_is_an_error(kit):
    with pytest.raises(FederationError, match="no update"):
        kit.preset("fedit")(kit.model(), [])


@pytest.mark.parametrize("name", ["fedit", "flexlora"])
def test_foreign_and_oversized_tensors_are_refused(kit, name):
    glob = kit.model()
    key = Key("layer.9.query", "e0", "A")
    with pytest.raises(MessageError, match=r"c: the model has no tensor layer.9.query/e0/A"):
        kit.preset(name)(glob, [Update("c", Tree.of({key: np.ones((2, 2), np.float32)}), 1)])
    for key, shape in ((Key("layer.0.query", "e0", "A"), (4, 10)), (Key("head", "-", "head.bias"), (2,))):
        with pytest.raises(MessageError, match="does not fit"):
            kit.preset(name)(glob, [Update("c", Tree.of({key: np.ones(shape, np.float32)}), 1)])


def test_even_counts_clients_and_neither_their_rows_nor_their_tokens(kit):
    glob, (site, e0, e1) = kit.model(), ("layer.0.ffn", "e0", "e1")
    updates = [kit.client(glob, seed, examples=10 ** (seed + 1)) for seed in range(3)]
    for update, tokens in zip(updates, (30.0, 0.0, 700.0), strict=True):
        update.tokens.update({(site, e0): tokens, (site, e1): 5.0})
    (first, idle, last) = registry.build("rule", "even").weights(updates, glob)
    assert first.rest == idle.rest == last.rest == 1
    assert [each.experts[site, e0] for each in (first, idle, last)] == [1, 0, 1]
    assert [each.experts[site, e1] for each in (first, idle, last)] == [1, 1, 1]


def test_the_even_rule_knows_neither_rows_nor_how_many_tokens(kit):
    glob = kit.model()
    updates = [kit.client(glob, seed, examples=10 ** (1 + seed)) for seed in range(3)]
    site = "layer.0.ffn"
    updates[2].tokens.update({(site, "e0"): 0.0})
    new, _ = kit.preset("fedamole")(glob, updates)
    for key, count in ((Key(site, "e0", "A"), 2), (Key(site, "e1", "B"), 3), (Key(site, "shared0", "A"), 3)):
        expected = np.mean([update.tree[key] for update in updates[:count]], axis=0)
        np.testing.assert_allclose(new.tree[key], expected, atol=1e-6)
    gate = Key(site, "-", "gate.weight")
    np.testing.assert_allclose(new.tree[gate], np.mean([u.tree[gate] for u in updates], axis=0), atol=1e-6)
