"""Three machines and a coordinator, as processes of their own on loopback: the same numbers as the simulation."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny_world
from lab import NAMES

from molehill.wire.store import load_tree
from molehill_simulation.simulate import simulate

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(lab):
    """A run that has ended; the machines are still there."""
    for name in NAMES:
        lab.join(name)
    lab.finish(lab.run("--json"))
    return lab


def test_the_numbers_are_those_of_a_simulation(finished, tmp_path_factory):
    out = tmp_path_factory.mktemp("simulated") / "run"
    summary = simulate(finished.config, out)
    ours, _ = load_tree(finished.out / "final.safetensors")
    theirs, _ = load_tree(out / "final.safetensors")
    assert ours.layout == theirs.layout
    np.testing.assert_allclose(ours.flat, theirs.flat, rtol=1e-6, atol=1e-7)
    deployed = json.loads((finished.out / "summary.json").read_text())
    simulated = json.loads(summary.to_json())
    assert deployed["clients"] == simulated["clients"]
    rounds = [tiny_world.events(folder, "round") for folder in (finished.out, out)]
    for ours, theirs in zip(*rounds, strict=True):
        for key in ("selected", "quarantined", "missing", "bytes_up"):
            assert ours[key] == theirs[key]
        assert ours["loss_by_client"] == pytest.approx(theirs["loss_by_client"], rel=1e-6)
