"""Memory: one update at a time where the rule allows it."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

from molehill.config import Federation
from molehill.wire.keys import Key
from molehill.wire.tree import Tree
from molehill_server.aggregate import Aggregator
from molehill_server.records import Global, Update


def watched(kit, glob, roles, alive, most):
    for seed in range(6):
        update = kit.client(glob, seed, roles=roles)
        weakref.finalize(update.tree, alive.discard, seed)
        alive.add(seed)
        most.append(len(alive))
        yield update
        del update


@pytest.mark.parametrize("name", ["fedit", "ffa", "fedsa", "rolora", "fedpeft", "hetlora"])
def test_at_most_one_update_is_alive(kit, name):
    glob = kit.model()
    alive, most = set(), []
    gc.disable()  # reference counts alone must do
    try:
        kit.preset(name)(glob, watched(kit, glob, kit.sent(name), alive, most))
    finally:
        gc.enable()
    assert most == [1] * 6


def test_folded_products_let_go_of_updates(kit):
    glob = kit.model(rank=9)  # two clients already exceed min(d_out, d_in)
    alive, most = set(), []
    kit.preset("flexlora")(glob, watched(kit, glob, ("A", "B"), alive, most))
    assert max(most) <= 3


def test_read_only_values_are_accepted(kit):
    glob = kit.model()
    update = kit.client(glob, 0)
    want, _ = kit.preset("fedit")(glob, [update])
    update.tree.flat.flags.writeable = False
    got, _ = kit.preset("fedit")(glob, [update])
    assert np.array_equal(got.tree.flat, want.tree.flat)


def test_scattered_subsets_of_the_keys(kit):
    """Neighbours in an update need not be neighbours in the model, and the other way round."""
    rng = np.random.default_rng(0)
    keys = [Key(f"s{i:02d}", "-", "dense.w") for i in range(12)]
    glob = Global(Tree.of({key: rng.normal(size=(2, 3)) for key in keys}))
    updates = []
    for k in range(5):
        sent = [key for i, key in enumerate(keys) if (i * (k + 1)) % 3 != 1]
        updates.append(Update(f"c{k}", Tree.of({key: rng.normal(size=(2, 3)) for key in sent}), 10 + k))
    new, _ = kit.preset("fedit")(glob, updates)
    for key in keys:
        sent = [u for u in updates if key in u.tree]
        if sent:
            want = sum(u.examples * u.tree[key] for u in sent) / sum(u.examples for u in sent)
            np.testing.assert_allclose(new.tree[key], want, atol=1e-6)
        else:
            assert np.array_equal(new.tree[key], glob.tree[key])


def test_every_expert_takes_its_own_step_also_in_a_block_of_many():
    rng = np.random.default_rng(0)
    shapes = {"q": (2, 3), "up": (2, 7), "v": (2, 3)}  # sites of other sizes in between
    experts = [f"e{e}" for e in range(3)]
    keys = {Key(site, e, "A"): shape for site, shape in shapes.items() for e in experts}
    keys |= {Key(site, e, "B"): shape[::-1] for site, shape in shapes.items() for e in experts}
    glob = Global(Tree.of({key: rng.normal(size=shape) for key, shape in keys.items()}))
    updates = [
        Update(
            f"c{k}",
            Tree.of({key: rng.normal(size=shape) for key, shape in keys.items() if k != 2 or key.role == "A"}),
            10 + k,
            {(site, e): float(rng.integers(4)) for site in ("q", "up") for e in experts},  # of v nothing is told
        )
        for k in range(5)
    ]
    updates.append(Update("c5", updates[0].tree, 3, {("q", "e1"): 1.0, ("up", "e2"): 2.0}))
    new, _ = Aggregator.from_config(Federation())(glob, updates)
    for key in keys:
        told = [(u, sum(n for (site, _), n in u.tokens.items() if site == key.site)) for u in updates if key in u.tree]
        weights = [u.examples * (u.tokens.get((key.site, key.expert), 0) / n if n else 1.0) for u, n in told]
        want = sum(w * u.tree[key] for w, (u, _) in zip(weights, told, strict=True)) / sum(weights)
        np.testing.assert_allclose(new.tree[key], want, atol=1e-6)
