"""The parts of secure aggregation: shares, keys, masks, fixed point, and the vector that is summed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st
from toy_federation import config, initial

from molehill.errors import ConfigError, MessageError
from molehill.secure import keys, shamir
from molehill.secure.company import needed
from molehill.secure.fixed import FIGURE, FixedPoint
from molehill.secure.masks import add_common_mask, add_mask
from molehill.secure.messages import threshold
from molehill.secure.vector import Form, figures_of
from molehill.wire.tree import Tree

OCCASION = keys.Occasion("run", 3, 0)


@given(st.binary(min_size=32, max_size=32), st.integers(2, 6), st.integers(0, 4))
def test_any_threshold_of_shares_gives_the_secret_back(secret, threshold, more):
    shares = dict(enumerate(shamir.split(secret, threshold, threshold + more), start=1))
    assert {len(share) for share in shares.values()} == {shamir.SHARE}
    for holders in itertools.islice(itertools.combinations(shares, threshold), 10):
        assert shamir.join({holder: shares[holder] for holder in holders}) == secret


def test_fewer_shares_give_something_else():
    """Something else is nearly always no secret at all, since the field is much larger."""
    shares = dict(enumerate(shamir.split(bytes(32), 3, 5), start=1))
    with pytest.raises(MessageError, match="do not belong together"):
        shamir.join({1: shares[1], 2: shares[2]})
    with pytest.raises(MessageError, match="do not belong together"):
        shamir.join({1: shares[1], 2: shares[2], 3: shares[4]})


def test_shares_are_a_polynomial_over_the_field(monkeypatch):
    monkeypatch.setattr(shamir.secrets, "randbelow", lambda below: below - 2)
    p = 2**521 - 1
    shares = shamir.split((7).to_bytes(32), 3, 3)
    assert [int.from_bytes(share) for share in shares] == [(7 - 2 * x - 2 * x * x) % p for x in (1, 2, 3)]


def test_two_clients_agree_on_a_key_and_nobody_else_does():
    one, two, three = (keys.new_key() for _ in range(3))
    label = OCCASION.label("shares", "a", "b")
    secret = keys.agree(one, keys.public(two), label)
    assert secret == keys.agree(two, keys.public(one), label)
    others = [
        keys.agree(three, keys.public(one), label),
        keys.agree(one, keys.public(two), keys.Occasion("run", 3, 1).label("shares", "a", "b")),
        keys.agree(one, keys.public(two), OCCASION.label("shares", "b", "a")),
    ]
    assert len({secret, *others}) == 4
    sealed = keys.seal(b"told", secret, label)
    assert keys.unseal(sealed, secret, label) == b"told"
    for wrong in (
        (sealed, others[0], label),
        (sealed, secret, b"other"),
        (sealed[:-1], secret, label),
        (b"", secret, label),
    ):
        with pytest.raises(MessageError, match="cannot be opened"):
            keys.unseal(*wrong)


def test_a_public_key_that_leads_nowhere_is_refused():
    with pytest.raises(MessageError, match="a public key is none"):
        keys.agree(keys.new_key(), bytes(32), b"label")


def test_a_mask_is_aes_in_counter_mode_and_comes_off_again():
    numbers = np.arange(300_001, dtype=np.uint64)  # three chunks
    masked = numbers.copy()
    add_mask(masked, bytes(range(32)))
    stream = Cipher(algorithms.AES256(bytes(range(32))), modes.CTR(bytes(16))).encryptor().update(bytes(8 * 300_001))
    assert np.array_equal(masked - numbers, np.frombuffer(stream, "<u8"))
    add_mask(masked, bytes(range(32)), subtract=True)
    assert np.array_equal(masked, numbers)


def test_common_masks_cancel_and_can_be_undone():
    secret = {name: keys.new_key() for name in "abc"}
    public = {name: keys.public(key) for name, key in secret.items()}
    masked = {name: np.zeros(1000, np.uint64) for name in "abc"}
    for one, other in itertools.permutations("abc", 2):
        add_common_mask(masked[one], secret[one], one, public[other], other, OCCASION)
    assert all(vector.any() for vector in masked.values())
    assert not (masked["a"] + masked["b"] + masked["c"]).any()
    for other in "ab":  # c is lost
        add_common_mask(masked["a"], secret["c"], "c", public[other], other, OCCASION)
    assert not (masked["a"] + masked["b"]).any()
    add_common_mask(masked["a"], secret["c"], "c", public["b"], "b", OCCASION, undo=True)
    assert (masked["a"] + masked["b"]).any()


@pytest.mark.parametrize(("clients", "cap", "bound"), [(3, 1, 0.5), (8, 400, 1e3), (1000, 2**20, 1e3)])
def test_the_largest_sum_does_not_overflow(clients, cap, bound):
    point = FixedPoint.of(config(round={"norm_bound": bound}), clients, cap)
    edge = cap * max(bound, FIGURE)
    total = np.zeros(2, np.uint64)
    for _ in range(min(clients, 1000)):
        total += point.encode(np.array([edge, -edge]))
    np.testing.assert_allclose(point.decode(total), [clients * edge, -clients * edge])
    assert point.bits >= 16


def test_fixed_point_cuts_towards_zero():
    point = FixedPoint(3, 10.0)
    assert point.decode(point.encode(np.array([1.3, -1.3, 0.124]))).tolist() == [1.25, -1.25, 0.0]
    for wrong in (10.1, np.nan, np.inf):
        with pytest.raises(MessageError, match="not finite, or above 10"):
            point.encode(np.array([0.0, wrong]))


def test_what_leaves_no_places_is_refused():
    with pytest.raises(MessageError, match="leaves 3 binary places"):
        FixedPoint.of(config(round={"norm_bound": 1e12}), 8, 2**16)


def test_a_threshold_is_more_than_two_thirds_and_three_or_more():
    """Whatever the fraction: two lists that each have so many signatures have more than a third in common."""
    assert [threshold(count, 0.1) for count in (3, 4, 6, 9, 10, 100)] == [3, 3, 5, 7, 7, 67]
    assert [threshold(count, 0.8) for count in (3, 4, 5, 50, 100)] == [3, 4, 4, 40, 80]
    assert threshold(5, 1.0) == 5
    for count in range(3, 200):
        assert 3 * (2 * threshold(count, 2 / 3) - count) > count


@pytest.mark.parametrize("fraction", [0.5, 0.51, 0.66, 0.0])
def test_a_threshold_below_two_thirds_is_refused(fraction):
    with pytest.raises(ConfigError, match=r"privacy\.threshold: it must be two thirds \(0\.67\) or more"):
        config(privacy={"secure_aggregation": True, "threshold": fraction})
    assert config(privacy={"threshold": 2 / 3}).privacy.threshold == 2 / 3


@pytest.mark.parametrize(
    ("clients", "select", "floor"),
    [
        (3, "all", 3),
        (100, "all", 67),
        (100, {"name": "random", "fraction": 0.1}, 7),
        (100, {"name": "random", "fraction": 0.01}, 3),
        (100, {"name": "round_robin", "count": 20}, 14),
    ],
)
def test_the_smallest_company_is_a_part_of_those_that_take_part(clients, select, floor):
    settings = config(data={"clients": clients}, federation={"select": select})
    assert needed(settings) == needed(settings, floor) == floor
    assert needed(settings, 2 * clients) == threshold(2 * clients, 0.67)  # more came


def test_the_mean_is_that_of_rule_mean():
    """Weights by examples, per expert times its part of the tokens; experts that nobody used stay."""
    rng = np.random.default_rng(0)
    layout = initial().layout
    form = Form(layout, 1)
    site = form.pairs[0][0]
    changes = [Tree(layout, rng.normal(size=layout.size).astype(np.float32)) for _ in range(2)]
    tokens = [{(site, "e0"): 3.0, (site, "e1"): 1.0}, {(site, "e0"): 5.0, (site, "e1"): 0.0}]
    vectors = [form.fill(*given) for given in zip(changes, (10, 30), tokens, ([0.5], [1e9]), strict=True)]
    sums = form.read(vectors[0] + vectors[1])
    assert sums.weight == 40
    assert sums.experts == {(site, "e0"): 37.5, (site, "e1"): 2.5}
    assert sums.figures == (10 * 0.5 + 30 * FIGURE,)
    mean = Tree(layout, sums.mean(layout).astype(np.float32))
    for key in layout:
        w = {"e0": (7.5, 30.0), "e1": (2.5, 0.0), "-": (10, 30)}[key.expert]
        wanted = (w[0] * changes[0][key] + w[1] * changes[1][key]) / sum(w)
        np.testing.assert_allclose(mean[key], wanted, rtol=1e-5, atol=1e-7)


def test_figures_are_the_loss_and_the_routing_losses():
    assert figures_of(config()) == ["loss"]
    assert figures_of(config(molora={"losses": [{"name": "z_loss", "coef": 0.1}]})) == ["loss", "z_loss"]
