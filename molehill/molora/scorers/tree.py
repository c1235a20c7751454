"""Fast feed-forward: a tree of decisions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from molehill.molora.interfaces import RouteContext, Scorer
from molehill.molora.scorers.linear import init_rows
from molehill.molora.trees import paths
from molehill.registry import register


@register(
    "scorer",
    "tree",
    paper="Belcak and Wattenhofer 2023, Fast Feedforward Networks",
    url="https://arxiv.org/abs/2308.14711",
)
class Tree(Scorer):
    """``log P(leaf)``: the product of the decisions on the way to an expert, each a sigmoid of one product with x.

    With the selector ``leaf`` a token takes one way down at inference. Experts are told apart by their place in the
    tree: neighbours share all decisions but the last.

    Attributes:
        nodes: ``[E - 1, d]`` float32; the tree is that of `molehill.molora.trees`.
    """

    ordered = True
    left: Tensor
    right: Tensor

    def __init__(self, *, d_in: int, n_experts: int) -> None:
        super().__init__()
        self.n_experts = n_experts
        self.nodes = nn.Parameter(torch.empty(max(n_experts - 1, 0), d_in))
        init_rows(self.nodes, "kaiming", 1.0)
        left, right = paths(n_experts)
        self.register_buffer("left", left, persistent=False)
        self.register_buffer("right", right, persistent=False)

    def axes(self) -> Mapping[str, int]:
        """Nodes are no experts."""
        return {"nodes": -1}

    def forward(self, ctx: RouteContext) -> Tensor:
        """Return logits ``[B, T, E]``, of which the softmax is ``exp``."""
        s = ctx.x.float() @ self.nodes.T
        # as logsigmoid, of which graphs for devices make the logarithm of a sigmoid, which is 0 far below 0
        both = s.clamp_max(0.0) - torch.log1p(torch.exp(-s.abs()))
        return both @ self.left + (both - s) @ self.right
