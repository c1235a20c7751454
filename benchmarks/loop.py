"""A mixture of LoRA experts as published code computes it: the layer of MoLA in MoE-PEFT, around a frozen linear.

Gathers the tokens of each expert, runs its LoRA in float32, and adds the results back by index.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoopExpert(nn.Module):
    """One LoRA in float32."""

    def __init__(self, d_in: int, d_out: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(d_in, rank, bias=False), nn.Linear(rank, d_out, bias=False)
        self.dropout = nn.Dropout(0.0)
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(self.dropout(x.to(torch.float32)))) * self.scale


class LoopLinear(nn.Module):
    """MoE-PEFT's `MolaSparseMoe` around a frozen linear."""

    def __init__(self, base: nn.Linear, experts: int, rank: int, alpha: float, top_k: int) -> None:
        super().__init__()
        self.base, self.top_k = base, top_k
        sizes = base.in_features, base.out_features
        self.experts = nn.ModuleList(LoopExpert(*sizes, rank, alpha) for _ in range(experts))
        self.gate = nn.Linear(base.in_features, experts, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.base(x)
        flat = x.reshape(-1, x.shape[-1]).to(torch.float32)
        weights, chosen = torch.topk(F.softmax(self.gate(flat), dim=1, dtype=torch.float32), self.top_k, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        out = torch.zeros(flat.shape[0], self.base.out_features, dtype=torch.float32)
        mask = F.one_hot(chosen, num_classes=len(self.experts)).permute(2, 1, 0)
        for index, expert in enumerate(self.experts):
            place, token = torch.where(mask[index])
            current = flat[None, token].reshape(-1, flat.shape[-1])
            out.index_add_(0, token, expert(current) * weights[token, place, None])
        return residual + out.reshape(residual.shape).to(x.dtype)


def put_loops(base: nn.Module, targets: list[str], experts: int, rank: int, alpha: float, top_k: int) -> None:
    """Replace the linears of these names."""
    for name, module in list(base.named_modules()):
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in targets:
            parent, _, last = name.rpartition(".")
            setattr(base.get_submodule(parent), last, LoopLinear(module, experts, rank, alpha, top_k))
