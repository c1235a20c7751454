"""Laws that hold for every federation preset, against the dense reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from molehill import registry
from molehill.config import Federation
from molehill.wire.keys import Key

PRESETS = [method.name for method in registry.methods("federation")]
BY_EXAMPLES = [name for name in PRESETS if registry.build("federation", name)["rule"] != "even"]
EXACT = {"flora": {}, "fedex": {}, "ffa": {}, "rolora": {}, "fedsvd": {}}


def updates_for(kit, glob, name, count, **options):
    return [kit.client(glob, seed, roles=kit.sent(name), **options) for seed in range(count)]


def outcome(kit, glob):
    """Everything a preset may decide: products with patches, and the tensors of no expert."""
    rest = {key: value for key, value in glob.tree.items() if key.expert == "-"}
    return {**kit.dense.effective(glob), **rest}


def same(left, right, tol):
    for key, value in left.items():
        np.testing.assert_allclose(value, right[key], atol=tol, err_msg=str(key))


def test_the_presets_are_the_promised_ones():
    assert set(PRESETS) >= {
        "fedit", "ffa", "fedsa", "rolora", "fedpeft", "flora", "flexlora", "fedex", "hetlora", "local",
    }  # fmt: skip
    for name in PRESETS:
        Federation.model_validate({"preset": name, **registry.build("federation", name)})


@pytest.mark.parametrize("name", PRESETS)
def test_one_client_comes_back_unchanged(kit, name):
    glob = kit.model()
    (update,) = updates_for(kit, glob, name, 1)
    new, report = kit.preset(name)(glob, [update])
    alone = {**glob.tree, **update.tree}
    want = {pair: value + kit.dense.patch(glob, pair) for pair, value in kit.dense.products(glob, [update]).items()}
    same(want, kit.dense.effective(new), 2e-5)
    refactored = name in ("flora", "flexlora", "fedsvd")
    for key, value in new.tree.items():
        if key.expert == "-" or not refactored:
            assert np.array_equal(value, alone[key]), key
    assert new.round == glob.round + 1
    assert report["updates"] == 1


@pytest.mark.parametrize("name", PRESETS)
def test_the_order_of_clients_does_not_matter(kit, name):
    glob = kit.model()
    updates = updates_for(kit, glob, name, 5)
    one, _ = kit.preset(name)(glob, updates)
    other, _ = kit.preset(name)(glob, [updates[i] for i in (3, 0, 4, 1, 2)])
    same(outcome(kit, one), outcome(kit, other), 5e-5)
    np.testing.assert_allclose(one.tree.flat, other.tree.flat, atol=2e-4)  # gauges agree too


@pytest.mark.parametrize("name", PRESETS)
def test_nothing_that_was_given_is_changed(kit, name):
    glob = kit.model()
    updates = updates_for(kit, glob, name, 3)
    before = [glob.tree.flat.copy(), *(update.tree.flat.copy() for update in updates)]
    patches = {pair: (p.B.copy(), p.A.copy()) for pair, p in glob.patches.items()}
    kit.preset(name)(glob, updates)
    after = [glob.tree.flat, *(update.tree.flat for update in updates)]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(np.array_equal(b, glob.patches[pair].B) for pair, (b, _) in patches.items())
    assert set(glob.patches) == set(patches)


@pytest.mark.parametrize("name", BY_EXAMPLES)
def test_router_and_head_are_means_by_examples(kit, name):
    glob = kit.model()
    updates = updates_for(kit, glob, name, 4)
    if name == "fedamole":  # for which every client counts alike
        updates = [replace(update, examples=7) for update in updates]
    new, _ = kit.preset(name)(glob, updates)
    want = kit.dense.mean(glob, updates)
    for key, value in new.tree.items():
        if key.expert == "-":
            np.testing.assert_allclose(value, want[key], atol=2e-6)


@pytest.mark.parametrize("name", PRESETS)
def test_an_expert_without_tokens_keeps_every_bit(kit, name):
    glob = kit.model()
    updates = updates_for(kit, glob, name, 3)
    site = "layer.0.query"
    for update in updates:
        update.tokens[site, "e1"] = 0.0
    new, report = kit.preset(name)(glob, updates)
    for role in ("A", "B"):
        key = Key(site, "e1", role)
        assert np.array_equal(new.tree[key], glob.tree[key])
        moved = Key(site, "e0", role)
        assert np.array_equal(new.tree[moved], glob.tree[moved]) == (
            name in ("fedpeft", "local") or (role not in kit.sent(name) and name != "fedsvd")
        )
    assert (site, "e1") not in new.patches
    assert report["experts_kept"] == (1 if "A" in kit.sent(name) or "B" in kit.sent(name) else 6)


@pytest.mark.parametrize("name", PRESETS)
def test_what_nobody_sent_keeps_every_bit(kit, name):
    glob = kit.model()
    new, _ = kit.preset(name)(glob, updates_for(kit, glob, name, 3))
    for key, value in new.tree.items():
        if key.kind not in kit.sent(name) and (name, key.kind) != ("fedsvd", "A"):  # which is made anew from B A
            assert np.array_equal(value, glob.tree[key])


@pytest.mark.parametrize("name", [*EXACT, "flexlora-wide"])
def test_exact_methods_match_the_dense_mean_of_products(kit, name):
    wide = name == "flexlora-wide"  # as many columns as all clients have together
    glob = kit.model(rank=9 if wide else 3)
    name = name.removesuffix("-wide")
    updates = updates_for(kit, glob, name, 3, rank=3 if wide else None)
    new, report = kit.preset(name)(glob, updates)
    want = kit.dense.products(glob, updates)
    effective = kit.dense.effective(new)
    for pair, product in want.items():
        scale = np.abs(product).max()
        np.testing.assert_allclose(effective[pair], product + kit.dense.patch(glob, pair), atol=1e-5 * scale)
    assert report["residual"] < 1e-6
    assert len(want) == 6


def test_rolora_is_exact_in_the_other_half_too(kit):
    glob = kit.model()
    updates = [kit.client(glob, seed, roles=("A", "gate")) for seed in range(4)]
    new, report = kit.preset("rolora")(glob, updates)
    same(
        kit.dense.products(glob, updates),
        {k: v - kit.dense.patch(glob, k) for k, v in kit.dense.effective(new).items()},
        2e-5,
    )
    assert report["residual"] < 1e-6


@pytest.mark.parametrize("name", ["fedit", "hetlora"])
def test_factor_means_are_biased_unless_a_factor_is_common(kit, name):
    glob = kit.model(patched=False)
    aggregate = kit.preset(name, rule="mean")
    for roles, biased in ((("A", "B"), True), (("B",), False), (("A",), False)):
        updates = [kit.client(glob, seed, roles=roles) for seed in range(4)]
        effective = kit.dense.effective(aggregate(glob, updates)[0])
        for pair, product in kit.dense.products(glob, updates).items():
            error = np.linalg.norm(effective[pair] - product) / np.linalg.norm(product)
            assert error > 0.1 if biased else error < 1e-6


def test_the_reported_bias_is_that_of_fedit(kit):
    glob = kit.model(patched=False)
    updates = [kit.client(glob, seed) for seed in range(4)]
    fedit = kit.dense.effective(kit.preset("fedit")(glob, updates)[0])
    want = kit.dense.products(glob, updates)
    size = np.sqrt(sum(np.sum(product**2) for product in want.values()))
    bias = np.sqrt(sum(np.sum((fedit[pair] - product) ** 2) for pair, product in want.items())) / size
    for name in ("flora", "flexlora", "fedex"):
        new, report = kit.preset(name)(glob, updates)
        assert report["factor_bias"] == pytest.approx(bias, rel=1e-5)
        got = kit.dense.effective(new)
        residual = np.sqrt(sum(np.sum((got[pair] - product) ** 2) for pair, product in want.items())) / size
        assert report["residual"] == pytest.approx(residual, abs=1e-6)


@pytest.mark.parametrize("name", BY_EXAMPLES)
def test_clients_of_mixed_rank(kit, name):
    glob = kit.model()
    updates = [kit.client(glob, seed, rank=rank, roles=kit.sent(name)) for seed, rank in enumerate((1, 2, 3, 3))]
    new, _ = kit.preset(name)(glob, updates)
    if name in ("flora", "fedex"):
        same(
            kit.dense.products(glob, updates),
            {k: v - kit.dense.patch(glob, k) for k, v in kit.dense.effective(new).items()},
            5e-5,
        )
    elif name not in ("flexlora", "hetlora", "fedsvd", "fedamole"):  # which have other weights
        same(kit.dense.mean(glob, updates), new.tree, 5e-6)


@pytest.mark.parametrize("name", ["flora", "fedex", "ffa"])
def test_exact_methods_are_linear_in_the_products(kit, name):
    """agg(a x) = a agg(x), and two halves of the clients average to the whole."""
    glob = kit.model(patched=False)
    updates = [kit.client(glob, seed, roles=kit.sent(name), tokens=False, examples=10) for seed in range(4)]
    aggregate = kit.preset(name)
    whole = kit.dense.effective(aggregate(glob, updates)[0])
    halves = [kit.dense.effective(aggregate(glob, part)[0]) for part in (updates[:2], updates[2:])]
    same(whole, {pair: (halves[0][pair] + halves[1][pair]) / 2 for pair in whole}, 2e-5)
    for update in updates:
        for key in update.tree:
            if key.role == "B":
                update.tree[key][...] *= 3
    same(kit.dense.effective(aggregate(glob, updates)[0]), {pair: 3 * value for pair, value in whole.items()}, 1e-4)
