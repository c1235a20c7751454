"""The classification head: pooling and one linear layer in float32."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


class Head(nn.Module):
    """Pools token states and classifies.

    Args:
        d: Width of the token states.
        classes: Number of classes.
        pooling: ``mean`` over real tokens, ``cls`` (first token) or ``last`` (last real token).
        anchored: Give the layer a residual that stays with the client, as a router has.

    Attributes:
        personal: Whether the residual counts.
    """

    def __init__(self, d: int, classes: int, pooling: Literal["mean", "cls", "last"], *, anchored: bool) -> None:
        super().__init__()
        self.pooling = pooling
        self.weight = nn.Parameter(torch.zeros(classes, d))
        self.bias = nn.Parameter(torch.zeros(classes))
        self.residual = nn.ParameterDict()
        if anchored:
            self.residual["weight"] = nn.Parameter(torch.zeros_like(self.weight))
            self.residual["bias"] = nn.Parameter(torch.zeros_like(self.bias))
        self.personal = True

    def pool(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """One vector per row.

        Args:
            hidden: Token states ``[B, T, d]``.
            mask: True for real tokens, ``[B, T]``.

        Returns:
            ``[B, d]`` float32.
        """
        if self.pooling == "cls":
            return hidden[:, 0].float()
        if self.pooling == "last":
            last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
            return hidden[torch.arange(len(hidden), device=hidden.device), last].float()
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(1, dtype=torch.float32) / weights.sum(1, dtype=torch.float32)

    def forward(self, pooled: Tensor) -> Tensor:
        """Return logits ``[B, classes]``."""
        if self.residual and self.personal:
            return F.linear(pooled, self.weight + self.residual["weight"], self.bias + self.residual["bias"])
        return F.linear(pooled, self.weight, self.bias)
