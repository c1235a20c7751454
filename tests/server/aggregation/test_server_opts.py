"""Server optimisers against a hand-written reference."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from molehill.errors import ConfigError
from molehill.wire.keys import Key
from molehill.wire.tree import Tree
from molehill_server.records import Global, Update

B1, B2, TAU = 0.9, 0.99, 1e-3


def reference(name, theta, means):
    """The trajectory of one tensor; Reddi et al. 2021, algorithm 2, and Hsu et al. 2019."""
    m, v = np.zeros_like(theta), np.full_like(theta, TAU**2)
    for mean in means:
        delta = mean - theta
        if name == "momentum":
            m = B1 * m + delta
            theta = theta + m
            continue
        m = delta if name == "adagrad" else B1 * m + (1 - B1) * delta
        if name == "adagrad":
            v = v + delta**2
        elif name == "adam":
            v = B2 * v + (1 - B2) * delta**2
        else:
            v = v - (1 - B2) * delta**2 * np.sign(v - delta**2)
        theta = theta + 1e-3 * m / (np.sqrt(v) + TAU)
    return theta


OPTS = ["momentum", "adam", "yogi", "adagrad"]


@pytest.mark.parametrize("name", OPTS)
def test_trajectory_equals_the_reference(kit, name):
    rng = np.random.default_rng(0)
    key = Key("head", "-", "head.weight")
    start = rng.normal(size=(4, 3))
    means = [start + rng.normal(size=(4, 3)) * scale for scale in (0.1, 1e-4, 2.0, 0.5, 1e-3)]
    glob = Global(Tree.of({key: start}))
    aggregate = kit.preset("fedit", server_opt=name)
    for mean in means:
        glob, _ = aggregate(glob, [Update("c", Tree.of({key: mean}), 7)])
    np.testing.assert_allclose(glob.tree[key], reference(name, start, means), rtol=2e-5, atol=1e-6)


def test_the_optimisers_differ(kit):
    results = {}
    for name in OPTS:
        glob = kit.model()
        for seed, far in enumerate((1.0, 0.1, 0.01, 0.01)):  # a shrinking change tells Yogi from Adam
            opt = {"name": name, "lr": 0.1}
            glob, _ = kit.preset("fedit", server_opt=opt)(glob, [kit.client(glob, seed, far=far)])
        results[name] = glob.tree.flat
    for one, other in itertools.combinations(OPTS, 2):
        assert np.abs(results[one] - results[other]).mean() > 1e-5, (one, other)


@pytest.mark.parametrize("name", OPTS)
def test_momentum_never_moves_what_nobody_trained(kit, name):
    aggregate = kit.preset("fedit", server_opt=name)
    glob = kit.model()
    glob, _ = aggregate(glob, [kit.client(glob, 0)])
    update = kit.client(glob, 1)
    site = "layer.0.query"
    update.tokens.update({(site, "e0"): 0.0, (site, "e1"): 5.0})
    new, _ = aggregate(glob, [update])
    idle, busy = Key(site, "e0", "A"), Key(site, "e1", "A")
    assert np.array_equal(new.tree[idle], glob.tree[idle])
    assert not np.array_equal(new.tree[busy], glob.tree[busy])
    for tree in new.state.values():
        assert isinstance(tree, Tree)
    for moment in new.state:
        assert np.array_equal(new.state[moment][idle], glob.state[moment][idle])


@pytest.mark.parametrize("name", OPTS)
def test_state_is_not_shared_between_rounds(kit, name):
    aggregate = kit.preset("fedit", server_opt=name)
    glob, _ = aggregate(kit.model(), [kit.client(kit.model(), 0)])
    before = {moment: tree.flat.copy() for moment, tree in glob.state.items()}
    one, _ = aggregate(glob, [kit.client(glob, 1)])
    assert all(np.array_equal(before[moment], glob.state[moment].flat) for moment in before)
    rebuilt = Global(
        glob.tree.copy(), glob.patches, {k: Tree(t.layout, t.flat.copy()) for k, t in glob.state.items()}, glob.round
    )
    other, _ = aggregate(rebuilt, [kit.client(glob, 1)])
    assert np.array_equal(one.tree.flat, other.tree.flat)


def test_momentum_without_memory_is_the_mean(kit):
    glob = kit.model()
    updates = [kit.client(glob, seed) for seed in range(3)]
    plain, _ = kit.preset("fedit")(glob, updates)
    opt, _ = kit.preset("fedit", server_opt={"name": "momentum", "beta": 0.0})(glob, updates)
    np.testing.assert_allclose(opt.tree.flat, plain.tree.flat, atol=1e-6)


def test_an_adaptive_step_is_bounded_by_its_learning_rate(kit):
    glob = kit.model()
    updates = [kit.client(glob, seed, far=1e3) for seed in range(3)]
    opt = {"name": "adagrad", "lr": 0.01}
    new, _ = kit.preset("fedit", server_opt=opt)(glob, updates)
    assert np.abs(new.tree.flat - glob.tree.flat).max() <= 0.01 + 1e-6


@pytest.mark.parametrize("bad", [{"lr": 0.0}, {"beta1": 1.0}, {"tau": -1.0}, {"beta2": 2.0}])
def test_values_outside_their_range_are_refused(kit, bad):
    with pytest.raises(ConfigError):
        kit.preset("fedit", server_opt={"name": "adam", **bad})
