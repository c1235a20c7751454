"""A private run from rows to report, with the real model and clients."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_world import events

from molehill.errors import ConfigError
from molehill.wire.store import load_tree
from molehill_simulation.describe import describe

PRIVATE = {"clip": 0.05, "noise": 3.0, "epsilon": 6.0, "delta": 1e-5}
FFA = {"molora": {"preset": "lora", "rank": 2, "targets": ["query"]}, "federation": {"preset": "ffa"}}


def test_a_private_run_spends_its_budget_and_says_so(finished, config):
    summary, out = finished("private", privacy=PRIVATE, **FFA)
    reports = [event["report"] for event in events(out, "round")]
    assert 0 < reports[0]["epsilon"] < reports[1]["epsilon"] < 6
    assert all(report["signal_to_noise"] >= 0 for report in reports)
    assert summary.mean.personalised is not None
    page = (out / "report.html").read_text()
    assert f"epsilon {reports[-1]['epsilon']:.3g} at delta 1e-05; signal to noise" in page
    assert ("privacy", "epsilon 6 at delta 1e-05, changes clipped to 0.05, noise 3") in describe(
        config(privacy=PRIVATE, **FFA)
    ).plan
    plain, folder = finished("plain", **FFA)
    noisy, quiet = (load_tree(at / "final.safetensors")[0].flat for at in (out, folder))
    assert 0.01 < np.abs(noisy - quiet).max() < 10
    assert "epsilon" not in (folder / "report.html").read_text().partition("<pre")[0]
    assert plain.rounds == summary.rounds == 2


def test_a_run_past_its_budget_is_refused_before_anything_starts(finished, tmp_path):
    with pytest.raises(ConfigError, match=r"privacy\.epsilon with run\.rounds: .* lasts for 1 of 2 rounds"):
        finished("past", privacy={**PRIVATE, "epsilon": 1.4}, **FFA)
    assert not (tmp_path / "past").exists()


def test_a_private_run_whose_clients_are_drawn(finished, config):
    """Half of the rounds of three clients are of one or of nobody, and count like the others."""
    drawn = {**FFA, "federation": {"preset": "ffa", "select": {"name": "poisson", "rate": 0.3}}}
    sections = {"privacy": {**PRIVATE, "epsilon": 4.0}, "run": {"rounds": 4}, "evaluate": {"baselines": False}}
    assert ("spends", "epsilon 0.914 in 4 rounds; each client is drawn with probability 0.3") in describe(
        config(**sections, **drawn)
    ).plan
    _, out = finished("drawn", **sections, **drawn)
    rounds = events(out, "round")
    assert len(rounds) == 4
    assert not events(out, "retry")
    assert all(event["report"]["noise"] == pytest.approx(0.05 * 3.0 / (0.3 * 3)) for event in rounds)
    assert [event["loss"] is None for event in rounds] == [not event["accepted"] for event in rounds]
    assert "epsilon 0.914 at delta 1e-05" in (out / "report.html").read_text()
