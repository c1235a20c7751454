"""Gaussian start values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from molehill.molora.interfaces import InitStrategy
from molehill.registry import register


@dataclass(frozen=True)
class GaussianParams:
    """Parameters of `GaussianInit`.

    Attributes:
        std: Standard deviation of A.
    """

    std: Annotated[float, Field(gt=0)] = 0.02


@register(
    "init",
    "gaussian",
    params=GaussianParams,
    paper="Zadouri et al. 2023, Pushing Mixture of Experts to the Limit (MoLORA)",
    url="https://arxiv.org/abs/2309.05444",
    seeds=("S13",),
)
class GaussianInit(InitStrategy):
    """A drawn from N(0, std), B zero."""

    def __init__(self, params: GaussianParams) -> None:
        self.std = params.std

    @torch.no_grad()
    def __call__(self, A: Tensor, B: Tensor, generator: torch.Generator) -> None:
        """Fill ``A [r, d_in]`` and ``B [d_out, r]`` in place."""
        nn.init.normal_(A, std=self.std, generator=generator)
        B.zero_()
