"""Fast feed-forward networks with a master leaf."""

from __future__ import annotations

from typing import Any

from molehill.molora.presets.targets import FFN
from molehill.registry import register


@register(
    "preset",
    "fff",
    paper="Charalampopoulos et al. 2024, Enhancing Fast Feed Forward Networks with Load Balancing and a Master Leaf "
    "Node",
    url="https://arxiv.org/abs/2405.16836",
    seeds=("S29",),
)
def fff() -> dict[str, Any]:
    """FFF: a tree of 7 decisions over 8 LoRAs, of which a token has one at inference, beside a master that all have.

    For a device that is to compute one expert per token. In training all leaves count by their probability; a loss
    makes decisions clear, another one spreads tokens. Differs from the paper: leaves are LoRAs of feed-forward linears,
    and the balance stays on to the end.
    """
    return {
        "targets": FFN,
        "experts": 8,
        "shared": 1,
        "rank": 8,
        "alpha": 16.0,
        "scope": "block",
        "scorer": "tree",
        "selector": "leaf",
        "blend": "scalar",
        "losses": ({"name": "node_entropy", "coef": 1.0}, {"name": "switch_balance", "coef": 1.0}),
    }
