"""A chain of LoRAs: what was learnt is frozen every few rounds, and a new LoRA goes on (COLA)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from molehill.registry import register
from molehill.wire.keys import Key
from molehill_server.aggregation.interfaces import Combined, Lower
from molehill_server.aggregation.lowers.merge_restart import fresh
from molehill_server.aggregation.sums import factors
from molehill_server.records import AggOut, Global, pairs


@dataclass(frozen=True)
class ChainOfLoRAsParams:
    """Parameters of `ChainOfLoRAs`.

    Attributes:
        every: Rounds that a LoRA is trained.
        links: LoRAs in all; the last goes on to the end.
    """

    every: Annotated[int, Field(ge=1)] = 2
    links: Annotated[int, Field(ge=1)] = 3


@register(
    "lower",
    "chain_of_loras",
    params=ChainOfLoRAsParams,
    paper="Xia, Qin and Hazan 2024, Chain of LoRA: Efficient Fine-tuning of Language Models via Residual Learning",
    url="https://arxiv.org/abs/2401.04151",
)
class ChainOfLoRAs(Lower):
    """Every few rounds the averaged ``B A`` goes into the expert's patch, and the expert restarts with B = 0.

    The function of the shared model stays the same when that happens. Between them it is the mean of the factors, which
    FLoRA's merge is not, that restarts in every round. An expert that nobody used keeps what it has.
    """

    needs_products = False
    patches = True

    def __init__(self, params: ChainOfLoRAsParams) -> None:
        self._params = params

    def lower(self, combined: Combined, glob: Global, seed: int, /) -> AggOut:
        """The means of the factors; or fresh factors, and the means as a patch."""
        done, rest = divmod(glob.round + 1, self._params.every)
        if rest or done >= self._params.links:
            return AggOut(combined.tree)
        tree, patch = combined.tree.copy(), {}
        for pair in pairs(combined.tree):
            patch[pair] = factors(combined.tree, glob.tree, pair)
            a, b = Key(*pair, "A"), Key(*pair, "B")
            if a in tree:  # else it is frozen, and stays
                tree[a][...] = fresh(a, tree.layout[a], seed, glob.round)
            if b in tree:
                tree[b][...] = 0
        return AggOut(tree, patch)
