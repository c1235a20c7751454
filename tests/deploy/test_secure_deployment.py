"""Secure aggregation among machines: the same sums as in the simulation, and keys that every machine has signed."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_world
from lab import NAMES, open_lab

from molehill.wire.store import load_tree
from molehill_simulation.simulate import simulate

pytestmark = pytest.mark.slow

SECURE = {"privacy": {"secure_aggregation": True}, "wire": {"up": "fp32"}, "run": {"rounds": 1}}


def test_the_numbers_are_those_of_a_plain_simulation(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    with open_lab(folder, config(**SECURE), NAMES) as lab:
        lab.up()
        for name in NAMES:
            lab.join(name)
        lab.finish(lab.run("--json"), 400)
        rounds = lab.events("round")
        ours, _ = load_tree(lab.out / "final.safetensors")
        secrets = list(folder.glob("*.state/**/masking.sealed"))
    plain = {name: section for name, section in SECURE.items() if name != "privacy"}
    simulate(config(**plain), folder / "simulated")
    theirs, _ = load_tree(folder / "simulated" / "final.safetensors")
    np.testing.assert_allclose(ours.flat, theirs.flat, rtol=1e-4, atol=1e-5)
    for one, other in zip(rounds, tiny_world.events(folder / "simulated", "round"), strict=True):
        assert sorted(one["accepted"]) == sorted(other["accepted"])
        assert one["quarantined"] == {}
        assert (one["loss_by_client"], one["tokens"]) == ({}, {})
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    assert len(secrets) == 3
