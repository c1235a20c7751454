"""FedAMoLE's router: what an expert makes of a token, held against what the router makes of it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from molehill.molora.interfaces import RouteContext, Scorer
from molehill.molora.scorers.linear import init_rows
from molehill.registry import register


@register(
    "scorer",
    "lowrank_dot",
    paper="Zhang et al. 2024, Personalized Federated Fine-Tuning for LLMs via Data-Driven Heterogeneous Model "
    "Architectures (FedAMoLE)",
    url="https://arxiv.org/abs/2411.19128",
)
class LowrankDot(Scorer):
    """``z_e = (A_e x) . (P x) / sqrt(r)``: an expert's first factor says itself what it is for.

    P is the only parameter whatever the number of experts, so clients with different experts can average it. Experts
    learn from the scores too. What ``federation.assign`` says is added; it does not learn.

    Args:
        d_in: Input features, d.
        n_experts: Routed experts, E.
        rank: That of every routed expert, r.

    Attributes:
        projection: P ``[r, d]`` float32.
        lean: Added to the logits, ``[E]`` float32, 0 at the start.
    """

    reads = frozenset({"experts"})
    wants = frozenset({"pairs", "equal_ranks"})
    own = frozenset({"lean"})
    fixed = frozenset({"lean"})
    embeds = True
    leans = "lean"

    def __init__(self, *, d_in: int, n_experts: int, rank: int = 1) -> None:
        super().__init__()
        self.n_experts = n_experts
        self.projection = nn.Parameter(torch.empty(rank, d_in))
        self.lean = nn.Parameter(torch.zeros(n_experts))
        init_rows(self.projection, "kaiming", 1.0)

    def axes(self) -> Mapping[str, int]:
        """P belongs to all experts."""
        return {"projection": -1, "lean": 0}

    def forward(self, ctx: RouteContext) -> Tensor:
        """Return logits ``[B, T, E]``."""
        token, experts = self.embeddings(ctx).tensor_split([1], -2)
        return (experts * token).sum(-1) / math.sqrt(token.shape[-1]) + self.lean.detach()

    def embeddings(self, ctx: RouteContext) -> Tensor:
        """P x and all A_e x, ``[B, T, 1 + E, r]``."""
        assert ctx.experts is not None
        rows = torch.cat([self.projection.unsqueeze(0), ctx.experts.float()])
        found = ctx.x.float() @ rows.flatten(0, 1).T
        return found.view(*found.shape[:-1], *rows.shape[:2])
