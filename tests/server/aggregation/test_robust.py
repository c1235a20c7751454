"""Rules against poisoned updates: laws that hold for all of them, and what sets each apart."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molehill import registry
from molehill.config import Federation
from molehill.errors import FederationError, MessageError
from molehill.wire.keys import Key
from molehill.wire.tree import Tree
from molehill_server.aggregate import Aggregator, conflicts
from molehill_server.aggregation import coordinates
from molehill_server.aggregation.interfaces import CoordRule
from molehill_server.aggregation.lowrank import approximate, gram, squared_distances
from molehill_server.aggregation.sums import factors
from molehill_server.records import Global, LowRank, Update, pairs

BUILT = {method.name: registry.build("rule", method.name) for method in registry.methods("rule")}
ROBUST = [name for name, rule in BUILT.items() if rule.needs_products]
COORDINATE = [name for name in ROBUST if isinstance(BUILT[name], CoordRule)]
WEIGHTED = [name for name in ROBUST if name not in COORDINATE]
WITH_F = ["krum", "multi_krum", "trimmed_mean"]
HONEST, F = 7, 2
ATTACKS = {
    "scaled": lambda change, rng: 1e4 * change,
    "flipped": lambda change, rng: -20 * change,
    "random": lambda change, rng: 1e3 * rng.normal(size=change.shape),
}


def rule_of(name, f=F):
    return {"name": name, "f": f} if name in WITH_F else name


def aggregator(name, f=F, **keys):
    federation = {"space": "product", "rule": rule_of(name, f), "lower": "svd", **keys}
    return Aggregator.from_config(Federation.model_validate(federation))


def honest(kit, glob, count=HONEST, far=0.05):
    """Clients that moved alike, and a little each on its own."""
    common = kit.client(glob, 99, far=0.1)
    clients = []
    for seed in range(count):
        own = kit.client(glob, seed, tokens=False, far=far)
        flat = own.tree.flat + common.tree.flat - glob.tree.flat
        clients.append(Update(own.client, Tree(own.tree.layout, flat), own.examples))
    return clients


def poisoned(kit, glob, attack, count=F):
    rng = np.random.default_rng(5)
    liars = []
    for number, update in enumerate(honest(kit, glob, count)):
        change = update.tree.flat - glob.tree.flat
        flat = (glob.tree.flat + ATTACKS[attack](change, rng)).astype(np.float32)
        liars.append(Update(f"a{number}", Tree(update.tree.layout, flat), 10**6))  # they claim many rows
    return liars


def away(kit, new, updates):
    """Distance of every product, and of router and head, from the mean of the honest ones."""
    products = kit.dense.effective(Global(new.tree))
    out = {}
    for pair in pairs(new.tree):
        want = np.mean([kit.dense.effective(Global(u.tree))[pair] for u in updates], axis=0)
        out[pair] = np.linalg.norm(products[pair] - want)
    rest = [key for key in new.tree if key.expert == "-"]
    want = {key: np.mean([u.tree[key] for u in updates], axis=0) for key in rest}
    out["rest"] = np.sqrt(sum(np.sum((new.tree[key] - want[key]) ** 2) for key in rest))
    return out


def spread(kit, updates):
    """Largest distance of an honest client from their mean."""
    worst = {}
    for update in updates:
        for place, value in away(kit, Global(update.tree), updates).items():
            worst[place] = max(worst.get(place, 0), value)
    return worst


def regauged(update, seed):
    """The same products from other factors: (B G, G^-1 A)."""
    rng = np.random.default_rng(seed)
    tree = update.tree.copy()
    for pair in pairs(tree):
        a, b = Key(*pair, "A"), Key(*pair, "B")
        g = np.linalg.qr(rng.normal(size=(3, 3)))[0] @ np.diag([0.5, 2.0, 4.0])
        tree[b][...], tree[a][...] = tree[b] @ g, np.linalg.inv(g) @ tree[a]
    return Update(update.client, tree, update.examples, update.tokens)


def close(kit, one, other, tol):
    for pair, value in kit.dense.effective(one).items():
        np.testing.assert_allclose(value, kit.dense.effective(other)[pair], atol=tol, err_msg=str(pair))
    for key in one.tree:
        if key.expert == "-":
            np.testing.assert_allclose(one.tree[key], other.tree[key], atol=tol)


def test_the_rules_are_the_promised_ones():
    assert set(WEIGHTED) == {"krum", "multi_krum", "geometric_median"}
    assert set(COORDINATE) == {"trimmed_mean", "median"}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("name", ROBUST)
def test_poisoned_clients_move_the_result_no_further_than_honest_ones_stand_apart(kit, name, attack):
    glob = kit.model(patched=False)
    good = honest(kit, glob)
    everybody = [*poisoned(kit, glob, attack), *good]
    bound = spread(kit, good)
    for place, value in away(kit, aggregator(name)(glob, everybody)[0], good).items():
        assert value <= 1.5 * bound[place], place
    for place, value in away(kit, aggregator("mean", space="product")(glob, everybody)[0], good).items():
        assert value > 1.5 * bound[place], place


@given(seed=st.integers(0, 999), attack=st.sampled_from(sorted(ATTACKS)))
@settings(max_examples=10, deadline=None)
def test_how_hard_the_attack_is_does_not_matter(kit, seed, attack):
    glob = kit.model(seed, patched=False)
    good, bad = honest(kit, glob), poisoned(kit, glob, attack)
    for name in ROBUST:
        bound = spread(kit, good)
        assert all(v <= 1.5 * bound[p] for p, v in away(kit, aggregator(name)(glob, [*good, *bad])[0], good).items())


@pytest.mark.parametrize("name", ROBUST)
def test_factors_may_be_chosen_freely(kit, name):
    glob = kit.model()
    updates = [kit.client(glob, seed, tokens=False) for seed in range(7)]
    one, _ = aggregator(name)(glob, updates)
    other, _ = aggregator(name)(glob, [regauged(update, seed) for seed, update in enumerate(updates)])
    close(kit, one, other, 1e-3)


@pytest.mark.parametrize("name", ROBUST)
def test_the_order_of_clients_does_not_matter(kit, name):
    glob = kit.model()
    updates = [kit.client(glob, seed, tokens=False) for seed in range(7)]
    one, _ = aggregator(name)(glob, updates)
    other, _ = aggregator(name)(glob, [updates[i] for i in (3, 6, 0, 4, 1, 5, 2)])
    close(kit, one, other, 2e-5)


@pytest.mark.parametrize("name", ROBUST)
def test_clients_that_agree_come_back_unchanged(kit, name):
    glob = kit.model()
    update = kit.client(glob, 0)
    same = [Update(f"c{k}", update.tree, 10 + k, update.tokens) for k in range(7)]
    new, report = aggregator(name)(glob, same)
    want = Global(Tree.of({**glob.tree, **update.tree}), glob.patches)
    close(kit, new, want, 2e-5)
    assert report["updates"] == 7
    assert report["residual"] < 1e-6


@pytest.mark.parametrize("name", ROBUST)
def test_numbers_of_examples_do_not_count(kit, name):
    glob = kit.model()
    updates = [kit.client(glob, seed, tokens=False, examples=5) for seed in range(7)]
    large = [Update(u.client, u.tree, 10**k, u.tokens) for k, u in enumerate(updates)]
    one, other = (aggregator(name)(glob, us)[0].tree.flat for us in (updates, large))
    assert np.array_equal(one, other)


@pytest.mark.parametrize("name", ROBUST)
def test_an_expert_that_too_few_used_keeps_every_bit(kit, name):
    glob = kit.model()
    updates = [kit.client(glob, seed) for seed in range(8)]
    site, least = "layer.0.query", aggregator(name).rule.least
    for update in updates[least - 1 :]:
        update.tokens[site, "e1"] = 0.0
    new, report = aggregator(name)(glob, updates)
    for role in ("A", "B"):
        assert np.array_equal(new.tree[Key(site, "e1", role)], glob.tree[Key(site, "e1", role)])
        assert not np.array_equal(new.tree[Key(site, "e0", role)], glob.tree[Key(site, "e0", role)])
    assert report["experts_kept"] == 1


@pytest.mark.parametrize("name", ROBUST)
def test_nothing_that_was_given_is_changed(kit, name):
    glob = kit.model()
    updates = [kit.client(glob, seed) for seed in range(7)]
    before = [glob.tree.flat.copy(), *(update.tree.flat.copy() for update in updates)]
    aggregator(name)(glob, updates)
    after = [glob.tree.flat, *(update.tree.flat for update in updates)]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("name", ROBUST)
def test_too_few_updates_end_the_round_with_the_reason(kit, name):
    glob, aggregate = kit.model(), aggregator(name)
    least = aggregate.rule.least
    assert least == {"krum": 7, "multi_krum": 7, "trimmed_mean": 5}.get(name, 3)
    aggregate(glob, [kit.client(glob, seed, tokens=False) for seed in range(least)])
    with pytest.raises(FederationError, match=f"round 3: {least - 1} updates, and the rule needs {least}"):
        aggregate(glob, [kit.client(glob, seed, tokens=False) for seed in range(least - 1)])


@pytest.mark.parametrize("name", ROBUST)
def test_tensors_of_experts_that_are_not_low_rank_are_judged_too(name):
    key = Key("layer.0.query", "e0", "dense.scale")
    glob = Global(Tree.of({key: np.ones(6)}))
    rng = np.random.default_rng(0)
    values = [1 + 0.1 * rng.normal(size=6) for _ in range(7)] + [np.full(6, 1e5), np.full(6, -1e5)]
    updates = [Update(f"c{k}", Tree.of({key: value}), 1) for k, value in enumerate(values)]
    new, _ = aggregator(name)(glob, updates)
    assert np.abs(new.tree[key] - 1).max() < 0.4
    assert not np.array_equal(new.tree[key], glob.tree[key])


@pytest.mark.parametrize("name", ROBUST)
def test_clients_of_lower_rank_take_part(kit, name):
    glob = kit.model()
    updates = [kit.client(glob, seed, rank=1 + seed % 3) for seed in range(7)]
    new, _ = aggregator(name)(glob, updates)
    assert np.isfinite(new.tree.flat).all()


@pytest.mark.parametrize("name", ROBUST)
def test_foreign_and_oversized_tensors_are_refused(kit, name):
    glob = kit.model()
    good = [kit.client(glob, seed, tokens=False) for seed in range(7)]
    for key, shape, what in (
        (Key("layer.9.query", "e0", "A"), (2, 2), "the model has no tensor"),
        (Key("layer.0.query", "e0", "A"), (4, 10), "does not fit"),
        (Key("head", "-", "head.bias"), (2,), "does not fit"),
    ):
        with pytest.raises(MessageError, match=what):
            aggregator(name)(glob, [*good, Update("c", Tree.of({key: np.ones(shape)}), 1)])


SPACES, LOWERS = ([method.name for method in registry.methods(axis)] for axis in ("space", "lower"))


@pytest.mark.parametrize(("name", "space", "lower"), list(itertools.product(ROBUST, SPACES, LOWERS)))
def test_only_spaces_that_know_the_products_are_accepted(name, space, lower):
    federation = Federation.model_validate(
        {"policy": "ffa", "rule": rule_of(name), "space": space, "lower": lower}  # ffa has a common factor
    )
    why = " ".join(reason for _, reason in conflicts(federation))
    if space == "factor":
        assert f"rule {name!r} with space 'factor'" in why
        assert "(B G, G^-1 A)" in why
    elif name in COORDINATE and (space, lower) != ("product", "svd"):
        assert "full rank" in why
    else:
        assert "rule" not in why


@pytest.mark.parametrize("name", WEIGHTED)
def test_in_common_space_they_judge_the_products_as_well(kit, name):
    glob = kit.model(patched=False)
    good = [kit.client(glob, seed, roles=("B",), tokens=False, far=0.1) for seed in range(7)]
    bad = [Update(f"a{k}", Tree(u.tree.layout, 1e3 * u.tree.flat), 1) for k, u in enumerate(good[:2])]
    new, report = aggregator(name, policy="ffa", space="common", lower="none")(glob, [*bad, *good])
    bound = spread_of_products(kit, glob, good)
    for pair, value in kit.dense.effective(new).items():
        want = np.mean([kit.dense.products(glob, [u])[pair] for u in good], axis=0)
        assert np.linalg.norm(value - want) <= 1.5 * bound[pair]
    assert report["residual"] < 1e-6


def spread_of_products(kit, glob, updates):
    dense = [kit.dense.products(glob, [update]) for update in updates]
    return {
        pair: max(np.linalg.norm(d[pair] - np.mean([e[pair] for e in dense], axis=0)) for d in dense)
        for pair in dense[0]
    }


# What sets each apart


def test_distances_from_inner_products_are_those_of_dense_matrices(kit):
    glob = kit.model()
    updates = [kit.client(glob, seed, rank=1 + seed % 3) for seed in range(5)]
    for pair in pairs(glob.tree):
        dense = [kit.dense.products(glob, [update])[pair] for update in updates]
        want = [[np.sum((p - q) ** 2) for q in dense] for p in dense]
        got = squared_distances(gram([factors(update.tree, glob.tree, pair) for update in updates]))
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-9)


def test_krum_is_the_paper_written_out(kit):
    glob = kit.model()
    updates = [kit.client(glob, seed, tokens=False, far=1 + seed) for seed in range(8)]
    new, _ = aggregator("krum", f=2)(glob, updates)
    several, _ = aggregator("multi_krum", f=2)(glob, updates)
    for pair in pairs(glob.tree):
        dense = [kit.dense.products(glob, [update])[pair] for update in updates]
        scores = [sum(sorted(np.sum((p - q) ** 2) for q in dense)[1 : 1 + 8 - 2 - 2]) for p in dense]
        order = np.argsort(scores)
        product = kit.dense.effective(Global(new.tree))[pair]
        np.testing.assert_allclose(product, dense[order[0]], atol=1e-4)
        u, s, v = np.linalg.svd(np.mean([dense[i] for i in order[:4]], axis=0))
        product = kit.dense.effective(Global(several.tree))[pair]
        np.testing.assert_allclose(product, (u[:, :3] * s[:3]) @ v[:3], atol=1e-3)


def test_multi_krum_of_one_is_krum(kit):
    glob = kit.model()
    updates = [kit.client(glob, seed) for seed in range(8)]
    one, _ = aggregator("krum")(glob, updates)
    other, _ = aggregator("multi_krum", rule={"name": "multi_krum", "f": F, "m": 1})(glob, updates)
    assert np.array_equal(one.tree.flat, other.tree.flat)


def test_the_geometric_median_has_the_smallest_sum_of_distances(kit):
    glob = kit.model(rank=9)  # so that svd drops nothing
    updates = [kit.client(glob, seed, tokens=False, rank=3) for seed in range(5)]
    new, _ = aggregator("geometric_median")(glob, updates)
    rng = np.random.default_rng(0)
    for pair in pairs(glob.tree):
        dense = [kit.dense.products(glob, [update])[pair] for update in updates]
        median = kit.dense.effective(Global(new.tree))[pair]

        def total(point, dense=dense):
            return sum(np.linalg.norm(point - each) for each in dense)

        assert all(total(median) <= total(each) + 1e-6 for each in [*dense, np.mean(dense, axis=0)])
        for _ in range(10):
            assert total(median) <= total(median + 0.1 * rng.normal(size=median.shape)) + 1e-6


def test_the_geometric_median_stays_at_a_point_that_most_clients_share(kit):
    glob = kit.model()
    update = kit.client(glob, 0, tokens=False)
    others = [kit.client(glob, seed, tokens=False, far=1e3) for seed in (1, 2)]
    same = [Update(f"s{k}", update.tree, 1) for k in range(4)]
    new, _ = aggregator("geometric_median")(glob, [*others, *same])
    for key in glob.tree:
        if key.expert == "-":
            np.testing.assert_allclose(new.tree[key], update.tree[key], atol=1e-2)


@pytest.mark.parametrize("name", COORDINATE)
@pytest.mark.parametrize("chunk", [1, 50, 2**22])
def test_coordinates_of_the_product_are_merged_and_brought_back_by_svd(kit, name, chunk, monkeypatch):
    monkeypatch.setattr(coordinates, "_CHUNK", chunk)
    glob = kit.model()
    updates = [kit.client(glob, seed, tokens=False) for seed in range(6)]
    new, report = aggregator(name, f=1)(glob, updates)
    tail = whole = 0.0
    for pair in pairs(glob.tree):
        stack = np.sort([kit.dense.products(glob, [update])[pair] for update in updates], axis=0)
        want = stack[1:-1].mean(axis=0) if name == "trimmed_mean" else np.median(stack, axis=0)
        u, s, v = np.linalg.svd(want)
        product = kit.dense.effective(Global(new.tree))[pair]
        np.testing.assert_allclose(product, (u[:, :3] * s[:3]) @ v[:3], atol=1e-4)
        tail, whole = tail + np.sum(s[3:] ** 2), whole + np.sum(s**2)
    assert report["residual"] == pytest.approx(np.sqrt(tail / whole), rel=1e-3)
    for key in glob.tree:
        if key.expert == "-":
            stack = np.sort([update.tree[key] for update in updates], axis=0)
            want = stack[1:-1].mean(axis=0) if name == "trimmed_mean" else np.median(stack, axis=0)
            np.testing.assert_allclose(new.tree[key], want, atol=1e-6)


def test_the_energy_threshold_counts_what_was_cut_before(kit):
    glob = kit.model()
    updates = [kit.client(glob, seed, tokens=False) for seed in range(5)]
    _, report = aggregator("median", lower={"name": "svd", "tau": 0.3})(glob, updates)
    ranks = []
    for pair in pairs(glob.tree):
        want = np.median([kit.dense.products(glob, [update])[pair] for update in updates], axis=0)
        energy = np.cumsum(np.linalg.svd(want, compute_uv=False) ** 2)
        ranks.append(min(3, int(np.searchsorted(energy, 0.3 * energy[-1])) + 1))
    assert report["rank"] == pytest.approx(np.mean(ranks))


@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (7, 9)])
def test_a_dense_matrix_as_factors(shape):
    rng = np.random.default_rng(0)
    u, _, v = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
    s = 10.0 * 0.8 ** np.arange(min(shape))
    matrix = ((u * s) @ v).astype(np.float32)
    point, tail = approximate(matrix, 4)
    assert point.rank == min(*shape, 12)
    product = point.B.astype(np.float64) @ point.A
    assert np.linalg.norm(matrix - product) == pytest.approx(tail, abs=1e-4)
    np.testing.assert_allclose(np.linalg.svd(product, compute_uv=False)[:4], s[:4], rtol=1e-4)
    low = LowRank(rng.normal(size=(shape[0], 3)).astype(np.float32), rng.normal(size=(3, shape[1])).astype(np.float32))
    point, tail = approximate(low.B @ low.A, 4)
    np.testing.assert_allclose(point.B @ point.A, low.B @ low.A, atol=1e-4)
    assert tail < 1e-3
