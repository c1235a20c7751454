"""A frozen orthonormal A."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from molehill.molora.interfaces import InitStrategy
from molehill.registry import register


@register(
    "init",
    "orth",
    paper="Zhu et al. 2024, Asymmetry in Low-Rank Adapters of Foundation Models",
    url="https://arxiv.org/abs/2402.16842",
    seeds=("S40",),
)
class OrthInit(InitStrategy):
    """A random with orthonormal rows and frozen, B zero: only B learns.

    With one A everywhere the mean of the clients' B is exactly the mean of their updates, at half the bytes.
    """

    frozen: frozenset[Literal["A", "B"]] = frozenset({"A"})

    @torch.no_grad()
    def __call__(self, A: Tensor, B: Tensor, generator: torch.Generator) -> None:
        """Fill ``A [r, d_in]`` and ``B [d_out, r]`` in place."""
        nn.init.orthogonal_(A, generator=generator)
        B.zero_()
