"""The accountant against exact and published bounds, written out here."""

from __future__ import annotations

import math

import numpy as np
import pytest
from toy_federation import config

from molehill.errors import PrivacyError
from molehill_server.check import check
from molehill_server.privacy.accountant import Accountant, Ledger
from molehill_server.privacy.draw import Draw, Round

DELTA = 1e-5
ALL = Round(8, 8)


def root(falls, low=0.0, high=500.0):
    """Where a falling function is 0."""
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if falls(middle) > 0 else (low, middle)
    return high


def exact(noise, rounds, delta=DELTA):
    """Epsilon of composed Gaussian mechanisms (Balle & Wang 2018, theorem 8): a Gaussian of noise / sqrt(rounds)."""
    mu = rounds**0.5 / noise

    def cdf(x):
        return math.erfc(-x / math.sqrt(2)) / 2

    return root(lambda e: cdf(mu / 2 - e / mu) - math.exp(e) * cdf(-mu / 2 - e / mu) - delta)


def numeric(noise, rate, rounds, delta=DELTA, step=5e-4, size=2**18):
    """Epsilon of Poisson-sampled Gaussians: privacy losses on a grid, composed by FFT; with and without the client."""
    x = np.linspace(-14 * noise, 1 + 14 * noise, 2**20)
    without = np.exp(-(x**2) / (2 * noise**2))
    without /= without.sum()
    ratio = 1 - rate + rate * np.exp((2 * x - 1) / (2 * noise**2))
    worst = 0.0
    for mass, loss in ((without * ratio, np.log(ratio)), (without, -np.log(ratio))):
        cells = np.rint(loss / step).astype(int)
        one = np.bincount(cells % size, mass, size)
        several = np.fft.irfft(np.fft.rfft(one) ** rounds, size)
        losses = step * np.fft.fftfreq(size, 1 / size)  # the upper half stands for negative losses

        def gap(epsilon, losses=losses, several=several):
            return float((several * -np.expm1(np.minimum(epsilon - losses, 0))).sum()) - delta

        worst = max(worst, root(gap, high=60.0))
    return worst


def sampled(noise, population, sample, rounds, delta=DELTA):
    """Wang, Balle & Kasiviswanathan 2019, theorem 9 with the Gaussian's curve, and the plain conversion (Mironov)."""
    q = sample / population

    def curve(order):
        return order / (2 * noise**2)

    def one(order):
        terms = [q**2 * math.comb(order, 2) * min(4 * math.expm1(curve(2)), 2 * math.exp(curve(2)))]
        terms += [q**j * math.comb(order, j) * 2 * math.exp((j - 1) * curve(j)) for j in range(3, order + 1)]
        return math.log1p(sum(terms)) / (order - 1)

    return min(rounds * one(order) + math.log(1 / delta) / (order - 1) for order in range(2, 20))


@pytest.mark.parametrize(("noise", "rounds"), [(0.5, 1), (1.0, 1), (1.0, 10), (2.0, 6), (4.0, 8), (10.0, 1000)])
def test_without_sampling_it_is_the_exact_value_of_gaussians(noise, rounds):
    assert Accountant(noise, DELTA, 1).epsilon([ALL] * rounds) == pytest.approx(exact(noise, rounds), rel=1e-6)


def test_published_values_without_sampling():
    """One release at z = 1 is 4.38 (4.73 by Renyi accounting); eight at z = 4 are 2.94 (3.19)."""
    assert Accountant(1, DELTA, 1).epsilon([ALL]) == pytest.approx(4.377, abs=1e-3)
    assert Accountant(4, DELTA, 1).epsilon([ALL] * 8) == pytest.approx(2.943, abs=1e-3)


@pytest.mark.parametrize(
    ("noise", "rate", "rounds", "delta", "value"),
    [
        (1.2, 0.1, 50, 1e-5, 3.68),
        (2.0, 0.5, 20, 1e-5, 5.69),
        (4.0, 0.02, 200, 1e-6, 0.289),
        (0.8, 0.01, 100, 1e-5, 1.51),
    ],
)
def test_with_poisson_sampling_it_is_the_numeric_value(noise, rate, rounds, delta, value):
    found = Accountant(noise, delta, 1).epsilon([Round(100, 100, rate)] * rounds)
    assert found == pytest.approx(numeric(noise, rate, rounds, delta), rel=5e-3)
    assert found == pytest.approx(value, rel=2e-2)


def test_a_hundred_clients_ten_a_round():
    """What is gained: of so many at random without replacement only a loose bound is known."""
    accountant = Accountant(1.2, DELTA, 1)
    assert accountant.epsilon([Round(100, 10)] * 50) == pytest.approx(24.07, abs=0.01)
    assert accountant.epsilon([Round(100, 100)] * 50) == pytest.approx(exact(1.2, 50), rel=1e-6)
    assert accountant.epsilon([Round(100, 100, 0.1)] * 50) == pytest.approx(3.675, abs=0.01)


def test_poisson_sampling_is_about_the_rate_and_not_about_who_is_there():
    accountant = Accountant(2.0, DELTA, 1)
    mixed = [Round(100, 100, 0.1), Round(40, 40, 0.1), Round(3, 3, 0.1)]
    assert accountant.epsilon(mixed) == accountant.epsilon([Round(100, 100, 0.1)] * 3)
    assert accountant.epsilon([Round(9, 9, 1.0)] * 3) == pytest.approx(exact(2.0, 3), rel=1e-6)


def test_with_next_to_no_noise_sampling_is_not_counted():
    assert Accountant(0.1, DELTA, 1).epsilon([Round(100, 100, 0.01)]) == pytest.approx(exact(0.1, 1), rel=1e-6)
    assert Accountant(0.3, DELTA, 1).epsilon([Round(100, 100, 0.01)]) < exact(0.3, 1)


@pytest.mark.parametrize(("noise", "population", "sample", "rounds"), [(4.0, 1000, 10, 100), (2.0, 100, 1, 10)])
def test_with_so_many_at_random_it_is_within_the_bound_of_the_paper(noise, population, sample, rounds):
    found = Accountant(noise, DELTA, 1).epsilon([Round(population, sample)] * rounds)
    assert 0 < found <= sampled(noise / 2, population, sample, rounds)  # replacing a client moves twice the clip
    assert found < Accountant(noise, DELTA, 1).epsilon([Round(population, population)] * rounds)


@pytest.mark.parametrize("spent", [Round(10, 9), Round(10, 10, 0.999)])
def test_sampling_never_counts_for_worse_than_none(spent):
    accountant = Accountant(0.5, DELTA, 1)
    assert accountant.epsilon([spent]) <= accountant.epsilon([Round(10, 10)])


def test_epsilon_grows_with_rounds_and_falls_with_noise_and_delta():
    values = [Accountant(1, DELTA, 1).epsilon([ALL] * n) for n in range(5)]
    assert values[0] == 0
    assert values == sorted(set(values))
    assert Accountant(2, DELTA, 1).epsilon([ALL]) < values[1]
    assert Accountant(1, 1e-3, 1).epsilon([ALL]) < values[1]


def test_the_budget_lasts_as_long_as_it_says():
    accountant = Accountant(1.0, DELTA, 12.0)
    rounds = accountant.lasts(ALL, 50)
    assert accountant.require([ALL] * rounds) <= 12
    with pytest.raises(PrivacyError, match=rf"round {rounds + 1}: it would bring epsilon to .* budget of 12; .* spent"):
        accountant.require([ALL] * (rounds + 1))
    assert accountant.lasts(ALL, rounds) == rounds
    assert Accountant(0.1, DELTA, 1.0).lasts(ALL, 50) == 0


@pytest.mark.parametrize(
    ("select", "counted", "divisor"),
    [
        ("all", Round(8, 8), 2),
        ({"name": "round_robin", "count": 2}, Round(8, 8), 2),
        ({"name": "random", "fraction": 0.25}, Round(8, 2), 2),
        ({"name": "poisson", "rate": 0.3}, Round(8, 8, 0.3), 2.4),
    ],
)
def test_only_a_draw_at_random_counts(select, counted, divisor):
    draw = Draw.of(config(privacy=PRIVATE, federation={"preset": "ffa", "select": select}))
    assert draw.spent(8, 2) == counted
    assert draw.expected(8, 2) == divisor


def test_under_secure_aggregation_no_draw_counts():
    """A masked sum needs a threshold of those that were drawn, so that it exists tells who they were."""
    chosen = {"preset": "ffa", "select": {"name": "random", "fraction": 0.5}}
    draw = Draw.of(config(privacy={**PRIVATE, "secure_aggregation": True}, federation=chosen))
    assert (draw.secret, draw.spent(8, 4)) == (False, Round(8, 8))


def test_every_run_has_a_secret_of_its_own():
    assert Ledger().secret != Ledger().secret
    assert Ledger(5).after(Round(8, 2)).after(Round(7, 2)) == Ledger(5, (Round(8, 2), Round(7, 2)))


PRIVATE = {"clip": 1.0, "noise": 4.0, "epsilon": 8.0, "delta": DELTA}


def conflicts(**sections):
    return check(config(**{"privacy": PRIVATE, "federation": {"preset": "ffa"}, **sections}))


def test_presets_with_one_common_factor_go_with_privacy():
    assert conflicts() == []
    assert conflicts(federation={"preset": "rolora"}) == []
    (warned,) = conflicts(federation={"preset": "fedit"})
    assert (warned.verdict, warned.keys) == ("warn", ("privacy", "federation.policy"))


@pytest.mark.parametrize(
    ("sections", "key", "why"),
    [
        ({"federation": {"preset": "hetlora"}}, "federation.rule", "norm_weights"),
        ({"federation": {"policy": "ffa", "space": "common", "rule": "geometric_median"}}, "federation.rule", "single"),
        ({"federation": {"preset": "flexlora"}}, "federation.space", "bound"),
        ({"federation": {"preset": "flora"}}, "federation.space", "bound"),
        ({"federation": {"policy": "mixed_rank"}}, "federation.policy", "lower rank"),
        ({"federation": {"preset": "local"}}, "federation.policy", "nothing to protect"),
        ({"wire": {"up": "compeft"}}, "wire.up", "error feedback"),
    ],
)
def test_what_breaks_the_sensitivity_is_refused(sections, key, why):
    found = [conflict for conflict in conflicts(**sections) if conflict.verdict == "refuse" and key in conflict.keys]
    assert [conflict.keys for conflict in found] == [("privacy", key)]
    assert why in found[0].why
    assert not [c for c in check(config(**sections)) if "privacy" in c.keys]  # it is privacy that does not fit


def test_more_rounds_than_the_budget_lasts_for_are_refused():
    (refused,) = conflicts(privacy={**PRIVATE, "noise": 1.0}, run={"rounds": 50})
    assert refused.keys == ("privacy.epsilon", "run.rounds")
    lasts = Accountant(1.0, DELTA, 8.0).lasts(Round(4, 4), 50)
    assert f"lasts for {lasts} of 50 rounds" in refused.why
    assert conflicts(privacy={**PRIVATE, "noise": 1.0}, run={"rounds": lasts}) == []


HUNDRED = {
    "data": {"clients": 100},
    "run": {"rounds": 50},
    "privacy": {**PRIVATE, "noise": 1.2, "epsilon": 4.0},
}


def test_poisson_sampling_lasts_where_others_are_refused():
    chosen = {"name": "poisson", "rate": 0.1}
    assert conflicts(**HUNDRED, federation={"preset": "ffa", "select": chosen}) == []
    (refused,) = conflicts(**HUNDRED, federation={"preset": "ffa", "select": {"name": "random", "fraction": 0.1}})
    assert "which together spend 24.1" in refused.why


@pytest.mark.parametrize(
    ("sections", "verdict", "keys", "why"),
    [
        (
            {"privacy": {**PRIVATE, "secure_aggregation": True}, "federation": {"select": {"name": "poisson"}}},
            "refuse",
            ("privacy.secure_aggregation", "federation.select"),
            "leaves to chance how many clients take part",
        ),
        (
            {"privacy": {"secure_aggregation": True}, "federation": {"select": {"name": "poisson"}}},
            "refuse",
            ("privacy.secure_aggregation", "federation.select"),
            "leaves to chance how many clients take part",
        ),
        (
            {"privacy": {**PRIVATE, "secure_aggregation": True}, "federation": {"select": {"name": "random"}}},
            "warn",
            ("privacy.secure_aggregation", "federation.select"),
            "is not counted for privacy",
        ),
        (
            {"round": {"min_clients": 3}, "federation": {"select": {"name": "poisson"}}},
            "warn",
            ("round.min_clients", "federation.select"),
            "would tell who was drawn",
        ),
        (
            {"federation": {"select": {"name": "poisson", "rate": 0.01}}},
            "warn",
            ("federation.select", "data.clients"),
            "draws 0.08 of 8 clients a round on average",
        ),
    ],
)
def test_draws_that_are_not_what_they_are_counted_as(sections, verdict, keys, why):
    sections = {**sections, "federation": {"preset": "ffa", **sections["federation"]}}
    found = [c for c in conflicts(**{"data": {"clients": 8}, "wire": {"up": "fp32"}, **sections}) if c.keys == keys]
    assert [conflict.verdict for conflict in found] == [verdict]
    assert why in found[0].why
