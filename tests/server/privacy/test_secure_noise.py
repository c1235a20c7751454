"""Secure aggregation with differential privacy: noise on the sum, and a budget."""

from __future__ import annotations

import numpy as np
import pytest
from toy_secure import SECURE, mute, plain, settings, silent

from molehill.errors import FederationError
from molehill.secure.fixed import FixedPoint
from molehill_server.privacy.draw import Round

PRIVATE = {"clip": 0.3, "noise": 4.0, "epsilon": 30.0, "delta": 1e-5}


def test_with_differential_privacy_the_sum_is_noised(toy):
    """Almost without noise, it is the mean of clipped changes; the weights are equal, and tokens do not count."""
    private = {**PRIVATE, "noise": 1e-7, "epsilon": 1e20}
    sections = {"run": {"rounds": 1}, "federation": {"preset": "ffa"}}
    hidden = toy(settings(**sections, privacy={**SECURE, **private}), "hidden")
    open_ = toy(plain(**sections, privacy=private), "open")
    np.testing.assert_allclose(hidden.run().flat, open_.run().flat, atol=1e-6)


@pytest.mark.parametrize("cap", [12, 18])
def test_with_differential_privacy_and_capped_examples(toy, cap):
    private = {**PRIVATE, "noise": 1e-7, "epsilon": 1e20, "max_examples": cap}
    sections = {"run": {"rounds": 1}, "federation": {"preset": "ffa"}}
    hidden = toy(settings(**sections, privacy={**SECURE, **private}), "hidden")
    open_ = toy(plain(**sections, privacy=private), "open")
    np.testing.assert_allclose(hidden.run(mute("client-1")).flat, open_.run(mute("client-1")).flat, atol=1e-6)


def test_with_differential_privacy_noise_and_budget_are_those_of_a_run_in_the_open(toy):
    sections = {"federation": {"preset": "ffa"}, "run": {"rounds": 2}}
    hidden = toy(settings(**sections, privacy={**SECURE, **PRIVATE}), "hidden")
    open_ = toy(plain(**sections, privacy=PRIVATE), "open")
    hidden.run()
    open_.run()
    for one, other in zip(hidden.events("round"), open_.events("round"), strict=True):
        assert one["report"]["epsilon"] == other["report"]["epsilon"]
        assert one["report"]["noise"] == other["report"]["noise"] == pytest.approx(0.3 * 4.0 / 4)


def test_a_resumed_sum_is_paid_once(toy):
    run = toy(settings(federation={"preset": "ffa"}, run={"rounds": 2}, privacy={**SECURE, **PRIVATE}))
    with pytest.raises(FederationError):
        run.run(meddle=silent("client-0", "client-1", kind="query.unmask"))
    run.run()
    assert run.start()._record.saved.privacy.rounds == (Round(4, 4),) * 2


def test_what_is_cut_off_by_fixed_point_does_not_grow_the_sensitivity():
    rng = np.random.default_rng(0)
    point = FixedPoint.of(settings(privacy={**SECURE, **PRIVATE}), 8, 1)
    for _ in range(20):
        change = rng.normal(size=1000)
        change *= 0.3 / np.linalg.norm(change)
        assert np.linalg.norm(point.decode(point.encode(change))) <= np.linalg.norm(change)
