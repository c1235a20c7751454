"""Bottleneck adapters: two products with an activation between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from molehill.molora.banks import Bank, Part
from molehill.molora.interfaces import InitStrategy, Site
from molehill.registry import register


@dataclass(frozen=True)
class BottleneckParams:
    """Parameters of `BottleneckBank`.

    Attributes:
        activation: Between the two products; ``none`` makes it a LoRA with biases.
        source: What an expert reads: the frozen ``output`` (Houlsby: behind the linear) or its ``input`` (beside it).
        scale: s, a constant factor of the delta; ``molora.alpha`` does not count.
    """

    activation: Literal["relu", "gelu", "silu", "none"] = "gelu"
    source: Literal["output", "input"] = "output"
    scale: Annotated[float, Field(gt=0)] = 1.0


# All are 0 at 0, so rows of zeros are units that say nothing.
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "none": lambda units: units,
}


@register(
    "expert",
    "bottleneck",
    params=BottleneckParams,
    paper="Houlsby et al. 2019, Parameter-Efficient Transfer Learning for NLP",
    url="https://arxiv.org/abs/1902.00751",
)
class BottleneckBank(Bank):
    """``delta_e = s (U_e f(D_e h + b_e) + c_e)``, h the site's frozen output or its input; U and c are 0 at first.

    The rank of an expert is the width of its bottleneck; D starts as the A of a LoRA does.

    Args:
        params: See `BottleneckParams`.
        site: The adapted module.
        ranks: Width of every expert, shared ones first.
        alpha: Not used; see ``scale``.

    Attributes:
        down: All D, ``[R, d]`` float32.
        bias: All b, ``[R]``.
        up: The transposes of all U, ``[R, d_out]``.
        shift: All c, ``[E, d_out]``.
        spread: 1 where a unit belongs to an expert, ``[E, R]``.
    """

    noun, size = "bottleneck", "width"
    spread: Tensor

    def __init__(self, params: BottleneckParams, *, site: Site, ranks: tuple[int, ...], alpha: float) -> None:
        del alpha
        super().__init__(site=site, ranks=ranks)
        self.params = params
        self.needs_output = params.source == "output"
        total = sum(ranks)
        self.down = nn.Parameter(torch.zeros(total, site.d_out if self.needs_output else site.d_in))
        self.bias = nn.Parameter(torch.zeros(total))
        self.up = nn.Parameter(torch.zeros(total, site.d_out))
        self.shift = nn.Parameter(torch.zeros(len(ranks), site.d_out))
        owner = torch.tensor([e for e, rank in enumerate(ranks) for _ in range(rank)])
        self.register_buffer("spread", F.one_hot(owner, len(ranks)).t().float(), persistent=False)

    def parts(self) -> Iterator[Part]:
        """``down [r, d]``, ``bias [r]``, ``up [r, d_out]`` and ``shift [1, d_out]`` of every expert."""
        for name in ("down", "bias", "up", "shift"):
            for e in range(self.n_experts):
                rows = slice(e, e + 1) if name == "shift" else self.rows(e)
                yield Part(name, f"dense.{name}", e, rows)

    @torch.no_grad()
    def start(self, expert: int, init: InitStrategy, generator: torch.Generator) -> None:
        """D as the strategy's A, all else 0."""
        rows = self.rows(expert)
        A = torch.zeros(self.ranks[expert], self.down.shape[1])
        init(A, torch.zeros(self.site.d_out, self.ranks[expert]), generator)
        self.down[rows].copy_(A)

    def like(self, site: Site, ranks: tuple[int, ...]) -> BottleneckBank:
        """See `Bank.like`."""
        return BottleneckBank(self.params, site=site, ranks=ranks, alpha=1.0)

    def delta(self, x: Tensor, y0: Tensor, weights: Tensor) -> Tensor:
        """See `Bank.delta`."""
        h = y0 if self.needs_output else x
        units = _ACTIVATIONS[self.params.activation](F.linear(h, self.down.to(h.dtype), self.bias.to(h.dtype)))
        made = (units * (weights @ self.spread).to(h.dtype)) @ self.up.to(h.dtype)
        return (made + (weights @ self.shift).to(h.dtype)) * self.params.scale

    def weight(self, expert: int) -> tuple[Tensor, Tensor | None] | None:
        """A change of the weight only without activation and beside the linear."""
        if self.params.activation != "none" or self.needs_output:
            return None
        rows, s = self.rows(expert), self.params.scale
        up = self.up[rows].t() * s
        return up @ self.down[rows], up @ self.bias[rows] + self.shift[expert] * s
