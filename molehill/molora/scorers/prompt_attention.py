"""Parrot's router: what a learnt query finds in a row's prompt decides for the whole row."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from molehill.molora.interfaces import RouteContext, Scorer
from molehill.registry import register


@register(
    "scorer",
    "prompt_attention",
    paper="Sun et al. 2024, Parrot: Multilingual Visual Instruction Tuning",
    url="https://arxiv.org/abs/2406.02539",
    seeds=("Z3",),
)
class PromptAttention(Scorer):
    """``z = W sum_t a_t h_t`` with ``a = softmax(q h_t / sqrt(w))`` over the prompt's frozen embeddings h.

    All tokens of a row have one route, by its prompt alone: an answer changes nothing, while it is trained or written.

    Differs from the paper: the query q is learnt, where the paper asks with what an image encoder says of the image.

    Args:
        d_in: Input features, which it does not look at.
        n_experts: Routed experts, E.
        width: Features of h, w.

    Attributes:
        query: q ``[w]`` float32.
        weight: W ``[E, w]``.
    """

    level = "row"
    reads = frozenset({"prompt"})

    def __init__(self, *, d_in: int, n_experts: int, width: int = 0) -> None:
        super().__init__()
        self.n_experts = n_experts
        width = width or d_in
        self.query = nn.Parameter(torch.zeros(width))  # the mean of the prompt at first
        self.weight = nn.Parameter(torch.empty(n_experts, width))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def axes(self) -> Mapping[str, int]:
        """Rows of W."""
        return {"query": -1, "weight": 0}

    def forward(self, ctx: RouteContext) -> Tensor:
        """Return logits ``[B, 1, E]``."""
        assert ctx.prompt is not None
        h, there = ctx.prompt[..., :-1], ctx.prompt[..., -1] > 0
        asked = (h @ self.query / math.sqrt(h.shape[-1])).masked_fill(~there, torch.finfo(h.dtype).min)
        found = torch.einsum("bt,btw->bw", asked.softmax(-1), h)
        return (found @ self.weight.T).unsqueeze(1)
