"""Trees to send."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from molehill.wire.keys import Key
from molehill.wire.tree import Tree

# How fast examples come says something about the machine, not about the code.
settings.register_profile("wire", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("wire")


@pytest.fixture
def heavy() -> Tree:
    """About 150 000 heavy-tailed numbers in tensors of uneven shapes, as a trained delta has them."""
    rng = np.random.default_rng(7)
    arrays = {Key("head", "-", "head.bias"): 1e-2 * rng.standard_normal(3), Key("x", "-", "gate.bias"): np.float32(0.5)}
    for layer in range(4):
        for expert in ("e0", "e1", "shared0"):
            site = f"encoder.layer.{layer}.query"
            arrays[Key(site, expert, "A")] = 1e-3 * rng.standard_t(4, (8, 777))
            arrays[Key(site, expert, "B")] = 3e-4 * rng.standard_t(4, (777, 8))
    return Tree.of({key: np.asarray(array, np.float32) for key, array in arrays.items()})


@pytest.fixture
def small() -> Tree:
    """A fixed tree whose bytes are known."""
    return Tree.of(
        {
            Key("head", "-", "head.bias"): np.array([0.5, -1.0, 0.25], np.float32),
            Key("layer.0.query", "e0", "A"): np.linspace(-1, 1, 10, dtype=np.float32).reshape(2, 5),
            Key("layer.0.query", "e0", "B"): np.array([[1e-3, -2e-3], [0.0, 4e-3]], np.float32),
        }
    )
