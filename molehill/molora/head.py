"""The head of a task: pooling, or none for labels of tokens, and one linear layer in float32."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Pooling: TypeAlias = Literal["mean", "cls", "last", "token"]


class Head(nn.Module):
    """Pools token states, and says of each row or token what a task wants to know.

    Args:
        d: Width of the token states.
        outputs: Numbers that it says, such as one for every class.
        pooling: ``mean`` over real tokens, ``cls`` (first token), ``last`` (last real token), or ``token``: every
            token by itself.
        anchored: Give the layer a residual that stays with the client, as a router has.

    Attributes:
        personal: Whether the residual counts.
    """

    def __init__(self, d: int, outputs: int, pooling: Pooling, *, anchored: bool) -> None:
        super().__init__()
        self.pooling = pooling
        self.weight = nn.Parameter(torch.zeros(outputs, d))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.residual = nn.ParameterDict()
        if anchored:
            self.residual["weight"] = nn.Parameter(torch.zeros_like(self.weight))
            self.residual["bias"] = nn.Parameter(torch.zeros_like(self.bias))
        self.personal = True

    @property
    def pools(self) -> bool:
        """Whether it says something of rows; else of tokens."""
        return self.pooling != "token"

    def pool(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """One vector per row, or the states as they are.

        Args:
            hidden: Token states ``[B, T, d]``.
            mask: True for real tokens, ``[B, T]``.

        Returns:
            ``[B, d]``, or ``[B, T, d]``, float32.
        """
        if self.pooling == "token":
            return hidden.float()
        if self.pooling == "cls":
            return hidden[:, 0].float()
        if self.pooling == "last":
            last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
            rows = last[:, None, None].expand(-1, 1, hidden.shape[-1])
            return hidden.gather(1, rows)[:, 0].float()  # an index with arange would fix the batch of an exported graph
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(1, dtype=torch.float32) / weights.sum(1, dtype=torch.float32)

    def forward(self, pooled: Tensor) -> Tensor:
        """Return ``[N, outputs]``; parameters with a client axis serve equal runs of the vectors, one per client."""
        weight, bias = self.weight, self.bias
        if self.residual and self.personal:
            weight, bias = weight + self.residual["weight"], bias + self.residual["bias"]
        if weight.dim() == 2:
            return F.linear(pooled, weight, bias)
        rows = pooled.view(len(weight), -1, pooled.shape[-1])
        return torch.baddbmm(bias.unsqueeze(1), rows, weight.mT).flatten(0, 1)
