"""Weights by the norm of the product (HetLoRA)."""

from __future__ import annotations

from collections.abc import Sequence

from molehill.registry import register
from molehill_server.aggregation.interfaces import Weight, WeightRule
from molehill_server.aggregation.lowrank import norm
from molehill_server.aggregation.shares import shares
from molehill_server.aggregation.sums import factors
from molehill_server.records import Global, Update, pairs


@register("rule", "norm_weights", paper="Cho et al. 2024, HetLoRA", url="https://arxiv.org/abs/2401.06432")
class NormWeights(WeightRule):
    """Weights by ``||B_k A_k||_F``, so that an update of low rank that says little also counts little.

    Numbers of examples do not count for experts, as in the paper; with several experts the norm is multiplied by the
    fraction of the client's tokens routed to the expert. Router and head are weighted by examples. Products of norm 0
    say nothing: an expert for which all are 0 keeps its old value. The paper's rank self-pruning is left out.
    """

    needs_pairs = True

    def weights(self, updates: Sequence[Update], glob: Global, /) -> list[Weight]:
        """Weights of the updates, see the class."""
        return [Weight(update.examples, _norms(update, glob)) for update in updates]


def _norms(update: Update, glob: Global) -> dict[tuple[str, str], float]:
    weights = shares(update)
    for pair in pairs(update.tree):
        if weights[pair] > 0:
            weights[pair] *= norm(factors(update.tree, glob.tree, pair))
    return weights
