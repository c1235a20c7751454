"""A router in which the own expert of an owner is always among those chosen (FedLEASE)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from molehill.molora.interfaces import RouteContext, Scorer
from molehill.molora.scorers.linear import init_rows
from molehill.registry import register


@dataclass(frozen=True)
class OwnAliasParams:
    """Parameters of `OwnAlias`.

    Attributes:
        init: Start values of all rows; see the linear scorer.
        std: Standard deviation for ``normal``.
    """

    init: Literal["kaiming", "normal", "switch"] = "kaiming"
    std: Annotated[float, Field(gt=0)] = 0.02


class _Rows(nn.Module):
    """The router of those who own one expert.

    Attributes:
        weight: A row for every expert, ``[E, d]``.
        alias: As many rows for the own expert, of which all but one less than there are open experts are at rest.
    """

    def __init__(self, params: OwnAliasParams, d_in: int, n_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, d_in))
        self.alias = nn.Parameter(torch.empty(n_experts, d_in))
        init_rows(self.weight, params.init, params.std)
        init_rows(self.alias, params.init, params.std)


@register(
    "scorer",
    "own_alias",
    params=OwnAliasParams,
    paper="Wang et al. 2025, Adaptive LoRA Experts Allocation and Selection for Federated Fine-Tuning (FedLEASE)",
    url="https://arxiv.org/abs/2510.26165",
)
class OwnAlias(Scorer):
    """Adaptive top-M of M open experts, of which one is the owner's own.

    The router has 2M - 1 outputs: one for each expert, and M - 1 more for the own. The M largest are taken, and weigh
    by their softmax; what several say of the own expert adds up. Only M - 1 outputs are of others, so the own expert
    is always among the chosen, with all weight where it takes all M places: every token chooses how many experts it
    has.
    The logits are the logarithms of these weights, and the least number there is for experts not chosen, so the
    selector is to be ``dense``.

    What is whose is in ``lean``, which stays with the owner and is not learnt: 2 for the own expert, 1 for others that
    are open, 0 for the closed. With 0 for all there is no own expert, as in the shared model: all are open, and all
    count.

    Those who own an expert have a router in common, so there is one for each expert (``of.<expert>``), and who does
    not train the expert does not train its router. Without an own expert the rows are the mean over all routers.

    Attributes:
        of: A router for each expert.
        lean: ``[E]`` float32, 0 at the start.
    """

    own = frozenset({"lean"})
    fixed = frozenset({"lean"})
    leans = "lean"
    lean_means = "place"
    weighs = "softmax"

    def __init__(self, params: OwnAliasParams, *, d_in: int, n_experts: int) -> None:
        super().__init__()
        self.n_experts = n_experts
        self.of = nn.ModuleDict({f"e{i}": _Rows(params, d_in, n_experts) for i in range(n_experts)})
        self.lean = nn.Parameter(torch.zeros(n_experts))

    def axes(self) -> Mapping[str, int]:
        """Rows, and the numbers of ``lean``."""
        return {name: 0 for name, _ in self.named_parameters()}

    def forward(self, ctx: RouteContext) -> Tensor:
        """Return logits ``[B, T, E]``: logarithms of the weights."""
        lean, n = self.lean.detach(), self.n_experts
        own = lean > 1.5
        own = own & (own.long().cumsum(0) == 1)  # the first, were there several
        placed = own.any()
        opened = (lean > 0.5) | ~placed
        count = opened.sum()
        share = torch.where(placed, own.float(), torch.full_like(lean, 1 / n))
        parts = [part for part in self.of.children() if isinstance(part, _Rows)]
        weight, alias = torch.stack([part.weight for part in parts]), torch.stack([part.alias for part in parts])
        rows = torch.cat([weight, alias], 1) * share.view(-1, 1, 1)  # [E, 2 E, d]
        z = ctx.x.float() @ rows.sum(0).T
        spare = (torch.arange(n, device=lean.device) < count - 1) & placed
        least = torch.finfo(z.dtype).min
        there = torch.cat([opened, spare])
        z = z.masked_fill(~there, least)
        places = z.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1, stable=True)
        p = z.masked_fill(~((places < count) & there), least).softmax(-1)
        w = p[..., :n] + p[..., n:].sum(-1, keepdim=True) * own
        tiny = torch.finfo(z.dtype).tiny
        return torch.where(w >= tiny, w.clamp_min(tiny).log(), least)
