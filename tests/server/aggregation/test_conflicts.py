"""Combinations of `[federation]` that are refused, over the whole table."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from molehill import registry
from molehill.config import Federation
from molehill.errors import ConfigError, FederationError
from molehill_server.aggregate import Aggregator, conflicts

SPACES, LOWERS, OPTS = ([method.name for method in registry.methods(axis)] for axis in ("space", "lower", "server_opt"))
ALLOWED = {
    ("factor", "none"),
    ("factor", "chain_of_loras"),
    *itertools.product(["common"], ["none", "chain_of_loras", "svd", "residual", "merge_restart"]),
    *itertools.product(["product", "stack"], ["svd", "residual", "merge_restart"]),
}


@pytest.mark.parametrize(("space", "lower", "opt"), list(itertools.product(SPACES, LOWERS, OPTS)))
def test_every_combination_is_refused_with_a_reason_or_runs(kit, space, lower, opt):
    federation = Federation.model_validate({"policy": "ffa", "space": space, "lower": lower, "server_opt": opt})
    fine = (space, lower) in ALLOWED and (opt == "none" or lower == "none")
    assert (not list(conflicts(federation))) == fine
    if not fine:
        with pytest.raises(ConfigError, match=r"federation\.\w+ with federation\.lower: "):
            Aggregator.from_config(federation)
        return
    glob = kit.model()
    new, _ = Aggregator.from_config(federation)(glob, [kit.client(glob, seed, roles=("B",)) for seed in range(3)])
    assert np.all(np.isfinite(new.tree.flat))


@pytest.mark.parametrize(("factor", "roles"), [("A", ("A",)), ("A", ("A", "B")), ("B", ("B",)), ("either", ("A", "B"))])
def test_a_client_that_moved_the_common_factor_stops_the_round(kit, factor, roles):
    glob = kit.model()
    aggregate = kit.preset("ffa", space={"name": "common", "factor": factor})
    with pytest.raises(FederationError, match=r"c0: .* was trained"):
        aggregate(glob, [kit.client(glob, 0, roles=roles)])


def test_clients_must_move_the_same_factor_in_a_round(kit):
    glob = kit.model()
    updates = [kit.client(glob, 0, roles=("A",)), kit.client(glob, 1, roles=("B",))]
    with pytest.raises(FederationError, match=r"c1: .* was trained"):
        kit.preset("rolora")(glob, updates)


def test_a_common_factor_that_is_sent_unchanged_is_fine(kit):
    glob = kit.model()
    update = kit.client(glob, 0, rank=2)
    for key, value in update.tree.items():
        if key.role == "A":
            value[...] = glob.tree[key][:2]
    _, report = kit.preset("ffa")(glob, [update])
    assert report["residual"] < 1e-6
