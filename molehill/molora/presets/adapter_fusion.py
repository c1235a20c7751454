"""AdapterFusion."""

from __future__ import annotations

from typing import Any

from molehill.registry import register


@register(
    "preset",
    "adapter_fusion",
    paper="Pfeiffer et al. 2021, AdapterFusion: Non-Destructive Task Composition for Transfer Learning",
    url="https://arxiv.org/abs/2005.00247",
    seeds=("S15",),
)
def adapter_fusion() -> dict[str, Any]:
    """AdapterFusion: bottlenecks behind feed-forward blocks in the rounds, then every owner learns which to hear.

    Rounds make the adapters, one for each kind of owner with ``federation.assign = "clusters"``; after the last, an
    owner's attention over all adapters' outputs is fitted to its rows (``personal.steps``), and no adapter moves.
    Differs from the paper: adapters are averaged within their clusters and not trained on one task each, and the
    router's weights multiply the attention.
    """
    return {
        "targets": (r"(?:down_proj|mlp\.c_proj|(?<!attention\.)output\.dense)",),
        "experts": 4,
        "rank": 48,
        "expert": {"name": "bottleneck", "activation": "relu", "source": "output"},
        "scorer": "leaning",
        "selector": "dense",
        "mixer": "attention",
    }
