"""Mixtures of LoRA experts as MoE-PEFT computes them (https://github.com/TUDB-Labs/MoE-PEFT, commit 40f8cb7).

The two forms that put experts on every linear, operation by operation: `MolaLinear` is ``MolaSparseMoe`` of
``adapters/mola``, `LoraMoeLinear` is ``LoraMoe`` of ``adapters/loramoe``. Experts and gates are float32 whatever the
base is, as there. Left out is what is not the layer: the auxiliary loss, and dropout, of which MoE-PEFT wants some.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Expert(nn.Module):
    """One LoRA in float32: ``lora_forward`` of ``common/lora_linear.py``."""

    def __init__(self, d_in: int, d_out: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(d_in, rank, bias=False), nn.Linear(rank, d_out, bias=False)
        self.dropout = nn.Dropout(0.0)
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(self.dropout(x.to(torch.float32)))) * self.scale


class MoeLinear(nn.Module):
    """A frozen linear with experts and a gate."""

    def __init__(self, base: nn.Linear, experts: int, rank: int, alpha: float, top_k: int) -> None:
        super().__init__()
        self.base, self.top_k = base, top_k
        sizes = base.in_features, base.out_features
        self.experts = nn.ModuleList(Expert(*sizes, rank, alpha) for _ in range(experts))
        self.gate = nn.Linear(base.in_features, experts, bias=False)


class MolaLinear(MoeLinear):
    """Gathers the tokens of each expert, runs its LoRA, and adds the results back by index."""

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


class LoraMoeLinear(MoeLinear):
    """Runs every expert on all tokens, weighted by the softmax of all scores."""

    def forward(self, x: Tensor) -> Tensor:
        residual = self.base(x)
        weights = F.softmax(self.gate(x.to(torch.float32)), dim=-1, dtype=torch.float32)
        for index, expert in enumerate(self.experts):
            residual = residual + (weights[:, :, index].unsqueeze(-1) * expert(x)).to(x.dtype)
        return residual


Form = Callable[[nn.Linear, int, int, float, int], MoeLinear]


def put(form: Form, base: nn.Module, targets: list[str], experts: int, rank: int, alpha: float, top_k: int) -> None:
    """Replace the linears of these names."""
    for name, module in list(base.named_modules()):
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in targets:
            parent, _, last = name.rpartition(".")
            setattr(base.get_submodule(parent), last, form(module, experts, rank, alpha, top_k))
