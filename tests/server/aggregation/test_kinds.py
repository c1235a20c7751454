"""Experts that are no pairs of factors: what is true of experts is true of theirs."""

from __future__ import annotations

import numpy as np
import pytest

from molehill.config import Federation
from molehill.wire.keys import Key
from molehill.wire.tree import Tree
from molehill_server.aggregate import Aggregator
from molehill_server.records import Global, Update

SITE = "layer.0.query"
EXPERTS = ("e0", "e1", "e2", "shared0")


def model(roles, change=0.0):
    parts = {"A": (2, 4), "B": (3, 2), "dense.down": (2, 4), "dense.shift": (1, 3)}
    arrays = {Key(SITE, e, role): np.full(parts[role], 1.0 + change) for e in EXPERTS for role in roles}
    return Tree.of({**arrays, Key("head", "-", "head.bias"): np.full(3, 1.0 + change)})


@pytest.mark.parametrize("rule", ["mean", "median"])
@pytest.mark.parametrize("roles", [("A", "B"), ("dense.down", "dense.shift"), ("dense.shift",)])
def test_experts_of_every_kind_are_counted_as_kept_where_nobody_used_them(roles, rule):
    glob = Global(model(roles))
    tokens = {(SITE, "e0"): 5.0, (SITE, "e1"): 0.0, (SITE, "e2"): 0.0}
    updates = [Update(f"c{k}", model(roles, 1.0 + k), 10, tokens) for k in range(5)]
    products = {"space": "product", "lower": "svd"} if rule == "median" else {}
    new, report = Aggregator.from_config(Federation.model_validate({"rule": rule, **products}))(glob, updates)
    assert report["experts_kept"] == 2
    for key, value in new.tree.items():
        assert np.array_equal(value, glob.tree[key]) is (key.expert in {"e1", "e2"})
