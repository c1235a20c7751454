"""Context-PEFT: experts that are active in the contexts they are listed for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from molehill.errors import ConfigError
from molehill.molora.interfaces import RouteContext, Scorer
from molehill.registry import register


@dataclass(frozen=True)
class ContextsParams:
    """Parameters of `Contexts`.

    Attributes:
        listens: For every expert the numbers of the domains (places in ``data.domains``) that it is active in. Empty
            gives expert i domain i.
    """

    listens: tuple[tuple[int, ...], ...] = ()


@register(
    "scorer",
    "contexts",
    params=ContextsParams,
    paper="Hadji-Kyriacou and Arandjelovic 2024, Context-PEFT",
    url="https://arxiv.org/abs/2312.08900",
)
class Contexts(Scorer):
    """1 for every expert that lists the token's domain, else 0; nothing of it is learnt.

    For text whose kinds are known: languages, sources, years (``data.columns.domain`` and ``data.domains``). The
    selector is to be ``given``, so that experts of one domain add up. A token of no domain, or of rows of which nobody
    has said one, has no routed expert; give it an always-on one (``molora.shared``).

    Differs from the paper: domains are of rows, where the paper has images and text in one row.

    Attributes:
        listens: ``[E, D]`` float32, 1 where an expert lists a domain.

    Raises:
        ConfigError: The lists are of another number of experts, or have a number below 0.
    """

    reads = frozenset({"domain_ids"})
    fixed = frozenset({"listens"})
    weighs = "logits"

    def __init__(self, params: ContextsParams, *, d_in: int, n_experts: int) -> None:
        super().__init__()
        self.n_experts = n_experts
        sets = params.listens or tuple((each,) for each in range(n_experts))
        if len(sets) != n_experts or min(map(min, filter(None, sets)), default=0) < 0:
            raise ConfigError(
                f"listens is of {len(sets)} experts, and there are {n_experts}"
                if len(sets) != n_experts
                else "listens has a number below 0",
                where="molora.scorer.listens",
                mend="Give a list of numbers of domains for every expert.",
            )
        self.listens = nn.Parameter(torch.zeros(n_experts, 1 + max(map(max, filter(None, sets)), default=0)))
        with torch.no_grad():
            for expert, domains in enumerate(sets):
                self.listens[expert, list(domains)] = 1.0

    def axes(self) -> Mapping[str, int]:
        """Rows."""
        return {"listens": 0}

    def forward(self, ctx: RouteContext) -> Tensor:
        """Return logits ``[B, T, E]``; ``[1, T, E]`` of zeros where no domain is known."""
        listens = self.listens.detach().T
        if ctx.domain_ids is None:
            return listens.new_zeros(1, ctx.x.shape[1], self.n_experts)
        known = (ctx.domain_ids >= 0) & (ctx.domain_ids < len(listens))
        return torch.where(known.unsqueeze(-1), listens[torch.where(known, ctx.domain_ids, 0)], 0.0)
