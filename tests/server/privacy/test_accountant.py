"""The accountant against exact and published bounds, written out here."""

from __future__ import annotations

import math

import pytest
from scipy.optimize import brentq
from scipy.stats import norm
from toy_federation import config

from molehill.errors import PrivacyError
from molehill_server.check import check
from molehill_server.privacy.accountant import Accountant, Ledger, drawn

DELTA = 1e-5


def exact(noise, rounds, delta=DELTA):
    """Epsilon of composed Gaussian mechanisms (Balle & Wang 2018, theorem 8): a Gaussian of noise / sqrt(rounds)."""
    mu = rounds**0.5 / noise

    def gap(epsilon):
        return norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu) - delta

    return brentq(gap, 0, 500)


def classic(noise, rounds, delta=DELTA):
    """From zero-concentrated privacy (Bun & Steinke 2016, proposition 1.3): looser than any Renyi accountant."""
    rho = rounds / (2 * noise**2)
    return rho + 2 * math.sqrt(rho * math.log(1 / delta))


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


@pytest.mark.parametrize(("noise", "rounds"), [(0.5, 1), (1.0, 1), (1.0, 10), (2.0, 6), (5.0, 100), (10.0, 1000)])
def test_without_sampling_it_is_close_to_the_exact_value_of_gaussians(noise, rounds):
    found = Accountant(noise, DELTA, 1).epsilon([(8, 8)] * rounds)
    assert exact(noise, rounds) <= found <= 1.12 * exact(noise, rounds)
    assert found < classic(noise, rounds)


def test_a_published_value():
    """z = 1, delta = 1e-5, one release: 4.38 exactly, 4.73 by Renyi accounting, 5.30 by concentrated privacy."""
    assert exact(1, 1) == pytest.approx(4.377, abs=1e-2)
    assert Accountant(1, DELTA, 1).epsilon([(8, 8)]) == pytest.approx(4.729, abs=1e-3)
    assert classic(1, 1) == pytest.approx(5.298, abs=1e-2)


@pytest.mark.parametrize(("noise", "population", "sample", "rounds"), [(4.0, 1000, 10, 100), (2.0, 100, 1, 10)])
def test_with_sampling_it_is_within_the_bound_of_the_paper(noise, population, sample, rounds):
    found = Accountant(noise, DELTA, 1).epsilon([(population, sample)] * rounds)
    assert 0 < found <= sampled(noise / 2, population, sample, rounds)  # replacing a client moves twice the clip
    assert found < Accountant(noise, DELTA, 1).epsilon([(population, population)] * rounds)


def test_sampling_never_counts_for_worse_than_none():
    accountant = Accountant(0.5, DELTA, 1)
    assert accountant.epsilon([(10, 9)]) == accountant.epsilon([(10, 10)])


def test_epsilon_grows_with_rounds_and_falls_with_noise_and_delta():
    values = [Accountant(1, DELTA, 1).epsilon([(8, 8)] * n) for n in range(5)]
    assert values[0] == 0
    assert values == sorted(set(values))
    assert Accountant(2, DELTA, 1).epsilon([(8, 8)]) < values[1]
    assert Accountant(1, 1e-3, 1).epsilon([(8, 8)]) < values[1]


def test_the_budget_lasts_as_long_as_it_says():
    accountant = Accountant(1.0, DELTA, 12.0)
    rounds = accountant.lasts((8, 8), 50)
    assert accountant.require([(8, 8)] * rounds) <= 12
    with pytest.raises(PrivacyError, match=rf"round {rounds + 1}: it would bring epsilon to .* budget of 12; .* spent"):
        accountant.require([(8, 8)] * (rounds + 1))
    assert accountant.lasts((8, 8), rounds) == rounds
    assert Accountant(0.1, DELTA, 1.0).lasts((8, 8), 50) == 0


def test_only_a_random_draw_amplifies():
    for select, counted in (
        ("all", (8, 8)),
        ({"name": "round_robin", "count": 2}, (8, 8)),
        ({"name": "random", "fraction": 0.25}, (8, 2)),
    ):
        assert drawn(config(federation={"select": select}), 8, 2) == counted


def test_every_run_has_a_secret_of_its_own():
    assert Ledger().secret != Ledger().secret
    assert Ledger(5).after((8, 2)).after((7, 2)) == Ledger(5, ((8, 2), (7, 2)))


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
    lasts = Accountant(1.0, DELTA, 8.0).lasts((8, 8), 50)
    assert f"lasts for {lasts} of 50 rounds" in refused.why
    assert conflicts(privacy={**PRIVATE, "noise": 1.0}, run={"rounds": lasts}) == []
