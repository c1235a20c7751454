"""Whole federations under secure aggregation end where plain ones do."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tiny_world import events

from molehill.errors import FederationError
from molehill.wire.store import load_tree
from molehill_simulation.describe import describe
from molehill_simulation.simulate import simulate

SECURE = {"privacy": {"secure_aggregation": True}}
EXACT = {"wire": {"up": "fp32"}}
LOSSES = {"molora": {"targets": ["query"], "experts": 2, "rank": 2, "losses": [{"name": "z_loss", "coef": 0.01}]}}


def test_a_check_says_so(config):
    row = ("masked", "the server sees sums only, of 3 clients or more")
    assert row in describe(config(**SECURE, **EXACT)).plan
    assert row not in describe(config()).plan


def final(out):
    return load_tree(out / "final.safetensors")[0].flat


@pytest.mark.parametrize("preset", ["fedit", "ffa", "fedsa", "fedsvd"])
def test_it_ends_where_a_plain_run_does(finished, preset):
    sections = {**EXACT, **LOSSES, "federation": {"preset": preset}, "run": {"rounds": 3}}
    hidden, secret = finished("hidden", **sections, **SECURE)
    open_, plain = finished("open", **sections)
    np.testing.assert_allclose(final(secret), final(plain), rtol=1e-4, atol=1e-5)
    for one, other in zip(events(secret, "round"), events(plain, "round"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)
        assert one["routing"] == pytest.approx(other["routing"], rel=1e-2)
        assert one["accepted"] == other["accepted"]
        assert (one["tokens"], one["loss_by_client"]) == ({}, {})
    assert hidden.mean.personalised == pytest.approx(open_.mean.personalised, abs=0.1)
    assert all(event["tokens"] == {} for event in events(secret, "evaluation"))
    report = (secret / "report.html").read_text(encoding="utf-8")
    assert "client-1" in report


def test_in_worker_processes_that_share_nothing_but_the_disk(finished):
    sections = {**EXACT, **SECURE, "run": {"rounds": 2}}
    _, here = finished("here", **sections)
    _, there = finished("there", **sections, engine={"workers": 2, "together": 1})
    _, together = finished("together", **sections, engine={"workers": 1, "together": 3})
    np.testing.assert_allclose(final(here), final(there), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(final(here), final(together), rtol=1e-3, atol=1e-4)


def test_clients_vanish_and_are_late(finished):
    """The same fates as in a plain run, though a client may vanish once more, before it agrees or helps to unmask."""
    sections = {
        **EXACT,
        "data": {"clients": 6},
        "run": {"rounds": 4, "seed": 3},
        "scenario": {"availability": 0.95, "dropout": 0.1, "stragglers": 0.2, "delay": 1.0},
        "round": {"quorum": 0.3, "grace": 5.0, "retries": 6},
    }
    _, secret = finished("hidden", **sections, **SECURE)
    rounds = events(secret, "round")
    assert any(len(event["accepted"]) < 6 for event in rounds)
    assert all(len(event["accepted"]) >= 5 for event in rounds)  # more than two thirds
    assert np.isfinite(final(secret)).all()


def test_too_few_stay(config, tmp_path):
    lonely = config(**EXACT, **SECURE, scenario={"dropout": 1.0}, round={"deadline": 10, "grace": 1})
    with pytest.raises(FederationError, match="3 are needed"):
        simulate(lonely, tmp_path / "run")


def test_no_personal_secret_is_left_in_the_open(finished):
    _, out = finished(**EXACT, **SECURE)
    for path in out.rglob("*"):
        if path.is_file() and path.suffix not in (".sealed", ".html"):
            data = path.read_bytes()
            assert b"shares_key" not in data
            assert b'"seed":"' not in data
    assert not (out / "masked-sum").exists()
    for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        if event["event"] == "round":
            assert len(event["deltas"]) == 3
