"""Merge the round's product into the frozen patches and start fresh factors (FLoRA)."""

from __future__ import annotations

import hashlib

import numpy as np

from molehill.registry import register
from molehill.wire.keys import Key
from molehill.wire.tree import Array
from molehill_server.aggregation.interfaces import Combined, Lower
from molehill_server.records import AggOut, Global


@register("lower", "merge_restart", paper="Wang et al. 2024, FLoRA", url="https://arxiv.org/abs/2409.05976")
class MergeRestart(Lower):
    """Adds the whole product to the expert's patch; the expert restarts with a random A and B = 0.

    Exact for any ranks. A is drawn as peft draws it, uniform within ``1/sqrt(d_in)`` (Kaiming with slope sqrt 5), from
    the run's seed, the round and the key, so a resumed run draws the same.
    """

    patches = True
    restarts = True

    def lower(self, combined: Combined, glob: Global, seed: int, /) -> AggOut:
        """Fresh factors and the product as a patch."""
        tree = combined.tree.copy()
        for pair in combined.products:
            a = Key(*pair, "A")
            tree[a][...] = fresh(a, tree.layout[a], seed, glob.round)
            tree[Key(*pair, "B")][...] = 0
        return AggOut(tree, combined.products)


def fresh(key: Key, shape: tuple[int, ...], seed: int, rnd: int) -> Array:
    """A as peft draws it, ``[r, d_in]``, the same for a seed, a round and a key."""
    name = int.from_bytes(hashlib.sha256(key.name.encode()).digest()[:8], "little")
    bound = shape[1] ** -0.5
    return np.random.default_rng([seed, rnd, name]).uniform(-bound, bound, shape).astype(np.float32)
