"""Compressed experts: a token's best experts are computed, of its others one vector each is left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from molehill.errors import ConfigError
from molehill.molora.banks import Bank, Mixer, Modulates
from molehill.molora.interfaces import Wish
from molehill.registry import register


@dataclass(frozen=True)
class CompressedParams:
    """Parameters of `CompressedMixer`.

    Attributes:
        main: Experts of a token that are computed; the others that the selector chose are those of which only the
            vector counts.
    """

    main: Annotated[int, Field(ge=1)] = 2


@register(
    "mixer",
    "compressed",
    params=CompressedParams,
    paper="He et al. 2025, Efficiently Editing Mixture-of-Experts Models with Compressed Experts",
    url="https://arxiv.org/abs/2503.00634",
    seeds=("S81",),
)
class CompressedMixer(Mixer):
    """``sum_m w_m delta_m(c * x)`` over a token's best experts; c is the mean of its other experts' vectors.

    The weighted mean, by the weights of those others over their own sum; 1 where there are none. The best keep the
    weights that they have, so these sum to less than 1. As in the official code, vectors multiply the input. All
    experts are computed here and those that are not among the best weighed with 0.
    """

    mixes = "other"
    wants: frozenset[Wish] = frozenset({"vectors", "no_shared"})

    def __init__(self, params: CompressedParams) -> None:
        self.main = params.main

    def __call__(self, bank: Bank, x: Tensor, y0: Tensor, weights: Tensor) -> Tensor:
        """Return the delta ``[B, T, d_out]`` for weights ``[B|1, T|1, E]``.

        Raises:
            ConfigError: The experts have no vectors.
        """
        if not isinstance(bank, Modulates):
            raise ConfigError(
                "mixer 'compressed' needs experts with vectors", where="molora.mixer", mend="Use expert 'compressed'."
            )
        # of equal weights the first is before, as in a graph
        places = weights.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1, stable=True)
        best = places < self.main
        others = torch.where(best, 0.0, weights)
        share = others / others.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
        return bank.delta(x * bank.modulation(share).to(x.dtype), y0, torch.where(best, weights, 0.0))
