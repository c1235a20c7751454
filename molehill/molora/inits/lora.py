"""The start values of LoRA as peft has them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from molehill.molora.interfaces import InitStrategy
from molehill.registry import register


@register(
    "init",
    "lora",
    paper="Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models",
    url="https://arxiv.org/abs/2106.09685",
)
class LoRAInit(InitStrategy):
    """A uniform in +-1/sqrt(d_in) (Kaiming with a = sqrt 5), B zero."""

    @torch.no_grad()
    def __call__(self, A: Tensor, B: Tensor, generator: torch.Generator) -> None:
        """Fill ``A [r, d_in]`` and ``B [d_out, r]`` in place."""
        nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
        B.zero_()
