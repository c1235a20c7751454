"""What sets each space and each lower apart."""

from __future__ import annotations

import numpy as np
import pytest

from molehill.errors import ConfigError
from molehill.wire.keys import Key
from molehill_server.aggregation.interfaces import Weight
from molehill_server.aggregation.spaces.product import Product
from molehill_server.aggregation.spaces.stack import Stack

PAIR = ("layer.0.ffn", "e0")


def test_flexlora_error_is_the_tail_energy(kit):
    glob = kit.model(patched=False)
    updates = [kit.client(glob, seed) for seed in range(4)]
    new, report = kit.preset("flexlora")(glob, updates)
    tail = whole = 0.0
    for pair, product in kit.dense.products(glob, updates).items():
        s = np.linalg.svd(product, compute_uv=False)
        error = np.linalg.norm(kit.dense.effective(new)[pair] - product)
        assert error == pytest.approx(np.linalg.norm(s[3:]), rel=1e-4)
        tail, whole = tail + np.sum(s[3:] ** 2), whole + np.sum(s**2)
    assert report["residual"] == pytest.approx(np.sqrt(tail / whole), rel=1e-4)
    assert report["rank"] == 3


def test_flexlora_equals_the_dense_svd(kit):
    glob = kit.model()
    updates = [kit.client(glob, seed) for seed in range(6)]  # 18 columns, more than d_out or d_in
    new, _ = kit.preset("flexlora")(glob, updates)
    for pair, product in kit.dense.products(glob, updates).items():
        u, s, v = np.linalg.svd(product)
        b, a = new.tree[Key(*pair, "B")], new.tree[Key(*pair, "A")]
        np.testing.assert_allclose(b @ a, (u[:, :3] * s[:3]) @ v[:3], atol=2e-5)
        np.testing.assert_allclose(a @ a.T, np.eye(3), atol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(b, axis=0), s[:3], rtol=1e-5)


def test_fedsvd_keeps_the_mean_of_products_and_makes_a_orthonormal(kit):
    glob = kit.model()
    updates = [kit.client(glob, seed, roles=kit.sent("fedsvd")) for seed in range(4)]
    new, report = kit.preset("fedsvd")(glob, updates)
    for pair, product in kit.dense.products(glob, updates).items():
        b, a = new.tree[Key(*pair, "B")], new.tree[Key(*pair, "A")]
        np.testing.assert_allclose(b @ a, product, atol=2e-5)
        np.testing.assert_allclose(a @ a.T, np.eye(len(a)), atol=1e-6)
        assert not np.allclose(a, glob.tree[Key(*pair, "A")], atol=1e-2)  # which tells it from FFA
    assert report["residual"] < 1e-6


def test_flexlora_truncation_is_nested(kit):
    glob = kit.model(rank=5)
    updates = [kit.client(glob, seed) for seed in range(4)]
    new, _ = kit.preset("flexlora")(glob, updates)
    for pair, product in kit.dense.products(glob, updates).items():
        u, s, v = np.linalg.svd(product)
        for rank in range(1, 6):
            cut = new.tree[Key(*pair, "B")][:, :rank] @ new.tree[Key(*pair, "A")][:rank]
            np.testing.assert_allclose(cut, (u[:, :rank] * s[:rank]) @ v[:rank], atol=2e-5)


def test_svd_leaves_unused_directions_able_to_learn(kit):
    glob = kit.model()
    new, _ = kit.preset("flexlora")(glob, [kit.client(glob, 0, rank=1)])
    b, a = new.tree[Key(*PAIR, "B")], new.tree[Key(*PAIR, "A")]
    assert np.all(b[:, 1:] == 0)
    assert np.all(np.linalg.norm(a[1:], axis=1) > 0)


@pytest.mark.parametrize("tau", [0.5, 0.8, 0.95, 0.999])
def test_energy_threshold_keeps_the_fewest_columns_that_reach_it(kit, tau):
    glob = kit.model(rank=9)
    updates = [kit.client(glob, seed) for seed in range(3)]
    new, report = kit.preset("flexlora", lower={"name": "svd", "tau": tau})(glob, updates)
    used = []
    for pair, product in kit.dense.products(glob, updates).items():
        energy = np.cumsum(np.linalg.svd(product, compute_uv=False) ** 2)
        columns = int(np.count_nonzero(np.linalg.norm(new.tree[Key(*pair, "B")], axis=0)))
        want = min(9, next(n for n, e in enumerate(energy, 1) if e >= tau * energy[-1]))
        assert columns == want
        used.append(columns)
    assert report["rank"] == pytest.approx(np.mean(used))
    assert min(used) < 9


def test_energy_threshold_outside_its_range_is_refused(kit):
    with pytest.raises(ConfigError, match="tau"):
        kit.preset("flexlora", lower={"name": "svd", "tau": 0.0})


def test_fedex_residual_has_the_rank_of_a_covariance(kit):
    glob = kit.model(rank=2, patched=False)
    for clients in (1, 2, 3):
        updates = [kit.client(glob, seed) for seed in range(clients)]
        new, _ = kit.preset("fedex")(glob, updates)
        ranks = [patch.rank for patch in new.patches.values()]
        assert ranks == [2 * (clients - 1)] * (6 if clients > 1 else 0)


def test_fedex_residual_is_precise_for_clients_that_hardly_moved(kit):
    glob = kit.model(patched=False)
    updates = [kit.client(glob, seed, far=1e-2) for seed in range(3)]
    new, _ = kit.preset("fedex")(glob, updates)
    means = kit.dense.mean(glob, updates)
    for pair in kit.dense.products(glob, updates):
        a, b = Key(*pair, "A"), Key(*pair, "B")
        total = sum(kit.dense.weight(u, a) for u in updates)
        want = sum(kit.dense.weight(u, a) / total * (u.tree[b] - means[b]) @ (u.tree[a] - means[a]) for u in updates)
        np.testing.assert_allclose(kit.dense.patch(new, pair), want, atol=5e-3 * np.abs(want).max())


def test_flora_restarts_as_lora_starts(kit):
    glob = kit.model()
    updates = [kit.client(glob, seed) for seed in range(3)]
    new, _ = kit.preset("flora", seed=5)(glob, updates)
    again, _ = kit.preset("flora", seed=5)(glob, updates)
    other, _ = kit.preset("flora", seed=6)(glob, updates)
    assert np.array_equal(new.tree.flat, again.tree.flat)
    fresh = []
    for pair in kit.dense.products(glob, updates):
        a = new.tree[Key(*pair, "A")]
        bound = a.shape[1] ** -0.5
        assert np.abs(a).max() <= bound
        assert a.std() == pytest.approx(bound / 3**0.5, rel=0.3)
        assert not np.array_equal(a, other.tree[Key(*pair, "A")])
        assert not np.any(new.tree[Key(*pair, "B")])
        fresh.append(a.ravel()[:8].tobytes())
    assert len(set(fresh)) == 6
    later, _ = kit.preset("flora", seed=5)(new, [kit.client(new, seed) for seed in range(3)])
    assert not np.array_equal(later.tree[Key(*PAIR, "A")], new.tree[Key(*PAIR, "A")])


@pytest.mark.parametrize("name", ["flora", "fedex"])
def test_patches_add_up_over_rounds_and_stay_bounded(kit, name):
    glob = kit.model()
    for rnd in range(4):
        updates = [kit.client(glob, 10 * rnd + seed) for seed in range(3)]
        want = {p: v + kit.dense.patch(glob, p) for p, v in kit.dense.products(glob, updates).items()}
        glob, _ = kit.preset(name)(glob, updates)
        for pair, value in want.items():
            got = kit.dense.effective(glob)[pair]
            np.testing.assert_allclose(got, value, atol=2e-5 * max(1, np.abs(value).max()))
    assert max(patch.rank for patch in glob.patches.values()) <= 10


def test_stack_keeps_bits_and_product_bounds_the_rank(kit):
    glob = kit.model()
    updates = [kit.client(glob, seed) for seed in range(5)]
    stack, product = Stack().start(glob), Product().start(glob)
    for update in updates:
        weight = Weight(1.0, dict.fromkeys([(key.site, key.expert) for key in update.tree], 1.0))
        stack.add(update, weight)
        product.add(update, weight)
    stacked, folded = stack.finish().products[PAIR], product.finish().products[PAIR]
    assert np.array_equal(stacked.A, np.vstack([update.tree[Key(*PAIR, "A")] for update in updates]))
    assert stacked.rank == 15
    assert folded.rank <= 9
    np.testing.assert_allclose(stacked.B @ stacked.A, folded.B @ folded.A, atol=2e-5)


def test_a_chain_freezes_its_links_and_the_function_goes_on_as_it_was(kit):
    glob = kit.model()  # two rounds are done
    updates = [kit.client(glob, seed) for seed in range(3)]
    plain, _ = kit.preset("fedit")(glob, updates)
    same, _ = kit.preset("cola", lower={"name": "chain_of_loras", "every": 4})(glob, updates)
    assert all(np.array_equal(same.tree[key], plain.tree[key]) for key in plain.tree)
    assert same.patches == glob.patches
    made, _ = kit.preset("cola", lower={"name": "chain_of_loras", "every": 3})(glob, updates)
    for pair, effective in kit.dense.effective(plain).items():
        np.testing.assert_allclose(kit.dense.effective(made)[pair], effective, atol=1e-5)
        assert not made.tree[Key(*pair, "B")].any()
        assert not np.array_equal(made.tree[Key(*pair, "A")], plain.tree[Key(*pair, "A")])
        assert made.patches[pair].rank == 3 + (glob.patches[pair].rank if pair in glob.patches else 0)
    flora, _ = kit.preset("flora")(glob, updates)  # which stacks, and so has all ranks of all clients
    assert flora.patches[PAIR].rank > made.patches[PAIR].rank
    last, _ = kit.preset("cola", lower={"name": "chain_of_loras", "every": 1, "links": 3})(glob, updates)
    assert last.patches == glob.patches  # the third link goes on to the end
