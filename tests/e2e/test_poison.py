"""A client that sends poison which passes every check: the rules against it hold, and the mean does not."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_world import events

from molehill.errors import ConfigError
from molehill.wire.keys import Key
from molehill.wire.store import load_tree
from molehill_server.records import pairs

CLIENTS = 7
POISON = {"client-2": -30.0}
RULES = {
    "krum": {"name": "krum", "f": 1},
    "multi_krum": {"name": "multi_krum", "f": 1},
    "geometric_median": "geometric_median",
    "trimmed_mean": {"name": "trimmed_mean", "f": 1},
    "median": "median",
}


@pytest.fixture
def run(finished):
    def start(name, rule, **sections):
        _, out = finished(
            name,
            data={"clients": CLIENTS},
            molora={"preset": "lora", "rank": 2, "targets": ["query"]},
            federation={"space": "product", "rule": rule, "lower": "svd"},
            evaluate={"baselines": False},
            **{"round": {"norm_bound": "off"}, **sections},
        )
        for event in events(out, "round"):
            refused = set(event["quarantined"])
            assert refused == (set(POISON) if "round" in sections else set())  # else nobody is, whoever lies
        return load_tree(out / "final.safetensors")[0]

    return start


def matrices(tree):
    """Everything that decides what the model says: products, and what is no factor."""
    products = [(tree[Key(*pair, "B")] @ tree[Key(*pair, "A")]).ravel() for pair in pairs(tree)]
    return np.concatenate([*products, *(value.ravel() for key, value in tree.items() if key.role not in ("A", "B"))])


def test_poison_passes_the_checks_and_only_the_rules_withstand_it(run):
    clean = matrices(run("clean", "mean"))
    moved = np.linalg.norm(matrices(run("poisoned", "mean", scenario={"poison": POISON})) - clean)
    for name, rule in RULES.items():
        held = np.linalg.norm(matrices(run(name, rule, scenario={"poison": POISON})) - clean)
        assert held < moved / 5, (name, held, moved)


def test_by_itself_the_norm_gives_it_away(run):
    clean = matrices(run("clean", "mean"))
    poison = {"scenario": {"poison": POISON}, "round": {"norm_bound": "auto"}}
    assert np.linalg.norm(matrices(run("poisoned", "mean", **poison)) - clean) < 0.5 * np.linalg.norm(clean)


def test_a_poisoner_that_does_not_exist_is_refused(run):
    with pytest.raises(ConfigError, match=r"scenario\.poison: there is no client 'client-9'"):
        run("nobody", "mean", scenario={"poison": {"client-9": 1.0}})
