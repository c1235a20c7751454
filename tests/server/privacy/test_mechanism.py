"""Sensitivity by brute force, the size of the noise, and what is released."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molehill.config import Privacy
from molehill.errors import MessageError
from molehill.wire.keys import Key
from molehill.wire.tree import Tree
from molehill_server.privacy.mechanism import Mechanism
from molehill_server.privacy.noise import Noise
from molehill_server.records import Global, Update

CLIP, SIZE = 0.5, 30
KEYS = [Key("layer.0.query", "e0", "A"), Key("layer.0.query", "e1", "B"), Key("head", "-", "head.bias")]
QUIET = 1e-12


def model():
    rng = np.random.default_rng(0)
    return Global(Tree.of({key: rng.normal(size=(SIZE // 3,)) for key in KEYS}))


def client(glob, change, examples=10, tokens=None, name="c"):
    return Update(name, Tree(glob.tree.layout, (glob.tree.flat + change).astype(np.float32)), examples, tokens or {})


vectors = st.tuples(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 1e-6, 0.1, 1.0, 1e3, 1e20])).map(
    lambda drawn: drawn[1] * np.random.default_rng(drawn[0]).normal(size=SIZE)
)
people = st.lists(st.tuples(vectors, st.integers(1, 10**9)), min_size=1, max_size=6)


@given(everybody=people, other=st.tuples(vectors, st.integers(1, 10**9)), cap=st.sampled_from([None, 1, 50, 10**6]))
@settings(max_examples=150, deadline=None)
def test_no_client_moves_the_sum_by_more_than_the_clip(everybody, other, cap):
    glob, mechanism = model(), Mechanism(CLIP, 1.0, cap)

    def total(rows):
        return mechanism.sum(glob, [client(glob, change, n) for change, n in rows], glob.tree.layout)[0]

    whole = total(everybody)
    for number in range(len(everybody)):
        without = [row for k, row in enumerate(everybody) if k != number]
        replaced = [other if k == number else row for k, row in enumerate(everybody)]
        assert np.linalg.norm(whole - total(without)) <= CLIP * (1 + 1e-9)
        assert np.linalg.norm(whole - total(replaced)) <= 2 * CLIP * (1 + 1e-9)


def test_the_bound_is_reached():
    glob, mechanism = model(), Mechanism(CLIP, 1.0)
    far = np.full(SIZE, 100.0)
    one, other = (mechanism.sum(glob, [client(glob, s * far)], glob.tree.layout)[0] for s in (1, -1))
    assert np.linalg.norm(one) == pytest.approx(CLIP)
    assert np.linalg.norm(one - other) == pytest.approx(2 * CLIP)


def test_means_by_examples_would_break_it():
    """Why the weights and the denominator are fixed: with n = 10, 10, 10, 970 the mean moves almost by the clip."""
    rows = np.array([10, 10, 10, 970])
    assert CLIP * rows.max() / rows.sum() > 3.8 * CLIP / len(rows)
    glob, mechanism = model(), Mechanism(CLIP, QUIET)
    far = np.full(SIZE, 100.0)
    updates = [client(glob, far if n == 970 else 0 * far, n) for n in rows]
    released, _ = mechanism.release(glob, updates, glob.tree.layout, len(rows))
    assert np.linalg.norm(released.tree.flat - glob.tree.flat) == pytest.approx(CLIP / len(rows), rel=1e-4)


@pytest.mark.parametrize(
    ("cap", "examples", "weight"), [(None, 3, 1), (None, 10**9, 1), (100, 25, 0.25), (100, 100, 1), (100, 970, 1)]
)
def test_weights_are_equal_or_capped(cap, examples, weight):
    assert Mechanism(CLIP, 1.0, cap).weight(examples) == weight


def test_without_noise_it_is_the_mean_of_clipped_changes_over_all_who_were_asked():
    glob, mechanism = model(), Mechanism(CLIP, QUIET, 20)
    rng = np.random.default_rng(1)
    changes = [0.01 * rng.normal(size=SIZE), 5 * rng.normal(size=SIZE), np.zeros(SIZE)]
    updates = [client(glob, change, n) for change, n in zip(changes, (10, 20, 40), strict=True)]
    released, report = mechanism.release(glob, updates, glob.tree.layout, planned=5)  # two did not answer
    big = changes[1] * CLIP / np.linalg.norm(changes[1])
    np.testing.assert_allclose(released.tree.flat - glob.tree.flat, (0.5 * changes[0] + big) / 5, atol=1e-6)
    assert report["updates"] == 3


def test_tokens_do_not_weigh():
    glob, mechanism = model(), Mechanism(CLIP, QUIET)
    change = np.full(SIZE, 0.01)
    routed = {("layer.0.query", "e0"): 900.0, ("layer.0.query", "e1"): 0.0}
    released, _ = mechanism.release(glob, [client(glob, change, tokens=routed)], glob.tree.layout, 1)
    np.testing.assert_allclose(released.tree.flat - glob.tree.flat, change, atol=1e-6)
    assert released.tokens == {}


def test_the_noise_has_the_size_it_is_accounted_with():
    layout = Tree.of({Key("head", "-", "head.weight"): np.zeros((300, 400))}).layout
    glob = Global(Tree(layout))
    updates = [Update(f"c{k}", Tree(layout), 10) for k in range(4)]
    released, report = Mechanism(2.0, 1.5).release(glob, updates, layout, 6, Noise(bytes(32)))
    assert report["noise"] == pytest.approx(2.0 * 1.5 / 6)
    assert released.tree.flat.std() == pytest.approx(0.5, rel=0.01)  # of 120,000 numbers
    assert abs(released.tree.flat.mean()) < 0.5 * 5 / 120_000**0.5
    assert report["signal_to_noise"] < 0.1


@pytest.mark.parametrize("ratio", [0.5, 1.0, 4.0])
def test_signal_to_noise_is_estimated_from_what_is_released(ratio):
    layout = Tree.of({Key("head", "-", "head.weight"): np.zeros((300, 400))}).layout
    glob, size = Global(Tree(layout)), layout.size
    mechanism = Mechanism(1e3, 1e-2)
    flat = np.random.default_rng(0).normal(size=size)
    flat *= ratio * 1e-2 * 1e3 * size**0.5 / np.linalg.norm(flat)
    mean = Update("c", Tree(layout, flat.astype(np.float32)), 10)
    assert np.linalg.norm(flat) > 1e3  # so it would be clipped
    _, report = Mechanism(1e5, 1e-4).release(glob, [mean], layout, 1, Noise(bytes(32)))
    assert mechanism.clip * mechanism.noise == pytest.approx(1e5 * 1e-4)
    assert report["signal_to_noise"] == pytest.approx(ratio, rel=0.02)


def test_two_releases_differ_everywhere():
    glob, mechanism = model(), Mechanism(CLIP, 1.0)
    one, other = (mechanism.release(glob, [client(glob, 0)], glob.tree.layout, 1)[0].tree.flat for _ in range(2))
    assert (one != other).all()


def test_an_update_of_other_tensors_is_refused():
    glob = model()
    part = glob.tree.select(lambda key: key.kind != "head")
    with pytest.raises(MessageError, match="c: it shares other tensors"):
        Mechanism(CLIP, 1.0).sum(glob, [Update("c", part, 1)], glob.tree.layout)


def test_it_is_off_unless_all_is_given():
    assert Mechanism.of(Privacy()) is None
    assert Mechanism.of(Privacy(clip=1, noise=2, epsilon=3, delta=1e-5)) == Mechanism(1, 2, None)
    for name in ("clip", "noise", "epsilon", "delta"):
        given = {"clip": 1, "noise": 2, "epsilon": 3, "delta": 1e-5, "max_examples": 9}
        del given[name]
        with pytest.raises(ValueError, match=f"privacy needs {name} as well"):
            Privacy.model_validate(given)
    with pytest.raises(ValueError, match="privacy needs clip, noise, epsilon, delta"):
        Privacy(max_examples=9)
