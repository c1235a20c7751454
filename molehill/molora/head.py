"""The classification head: pooling and one linear layer in float32."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
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
            rows = last[:, None, None].expand(-1, 1, hidden.shape[-1])
            return hidden.gather(1, rows)[:, 0].float()  # an index with arange would fix the batch of an exported graph
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(1, dtype=torch.float32) / weights.sum(1, dtype=torch.float32)

    def forward(self, pooled: Tensor) -> Tensor:
        """Return logits ``[B, classes]``; parameters with a client axis serve equal runs of rows, one per client."""
        weight, bias = self.weight, self.bias
        if self.residual and self.personal:
            weight, bias = weight + self.residual["weight"], bias + self.residual["bias"]
        if weight.dim() == 2:
            return F.linear(pooled, weight, bias)
        rows = pooled.view(len(weight), -1, pooled.shape[-1])
        return torch.baddbmm(bias.unsqueeze(1), rows, weight.mT).flatten(0, 1)
