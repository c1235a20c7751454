"""LoRA experts: one LoRA whose rank axis is divided between them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molehill.molora.fused import Projection, down, reference, up
from molehill.molora.interfaces import Site
from molehill.molora.recompute import Source
from molehill.registry import register


@register(
    "expert",
    "lora",
    paper="Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models",
    url="https://arxiv.org/abs/2106.09685",
)
class LoRABank(nn.Module):
    """All LoRA experts of one site, concatenated along the rank axis.

    ``delta_e(x) = (alpha / r_e) B_e A_e x``. Rows of `A` and `Bt` that belong to one expert are contiguous, shared
    experts first.

    Args:
        site: The adapted module.
        ranks: Rank of every expert, shared ones first.
        alpha: LoRA alpha.

    Attributes:
        A: ``[R, d_in]`` float32.
        Bt: ``[R, d_out]`` float32, the transposes of all B.
        patch_A: Frozen rows ``[P, d_in]`` that belong to experts (from exact aggregation); empty at first.
        patch_Bt: Frozen rows ``[P, d_out]``, scale absorbed.
        spread: Which ranks belong to which expert, with its scale: ``[E, R+P]`` float32; see `molehill.molora.fused`.
    """

    low_rank = True
    patch_A: Tensor  # noqa: N815  (A and B are the field's names)
    patch_Bt: Tensor  # noqa: N815  (A and B are the field's names)
    patch_expert: Tensor
    spread: Tensor

    def __init__(self, *, site: Site, ranks: tuple[int, ...], alpha: float) -> None:
        super().__init__()
        self.site = site
        self.ranks = ranks
        self.scales = tuple(alpha / rank for rank in ranks)
        total = sum(ranks)
        self.A = nn.Parameter(torch.zeros(total, site.d_in))
        self.Bt = nn.Parameter(torch.zeros(total, site.d_out))
        self.register_buffer("patch_A", torch.zeros(0, site.d_in), persistent=False)
        self.register_buffer("patch_Bt", torch.zeros(0, site.d_out), persistent=False)
        self.register_buffer("patch_expert", torch.zeros(0, dtype=torch.long), persistent=False)
        self.register_buffer("spread", self._spread(), persistent=False)
        self.fused = True

    @property
    def n_experts(self) -> int:
        """Number of experts, shared ones included."""
        return len(self.ranks)

    def rows(self, expert: int) -> slice:
        """The part of the rank axis that belongs to an expert."""
        start = sum(self.ranks[:expert])
        return slice(start, start + self.ranks[expert])

    def set_patches(self, patches: dict[int, tuple[Tensor, Tensor]]) -> None:
        """Replace the frozen additions.

        Args:
            patches: ``(A [p, d_in], B [d_out, p])`` by expert index, scale absorbed in B.
        """
        experts = sorted(patches)
        device = self.A.device
        self.patch_A = torch.cat([self.patch_A[:0], *(patches[e][0].to(device) for e in experts)])
        self.patch_Bt = torch.cat([self.patch_Bt[:0], *(patches[e][1].t().to(device) for e in experts)])
        index = [e for e in experts for _ in range(patches[e][0].shape[0])]
        self.patch_expert = torch.tensor(index, dtype=torch.long, device=device)
        self.spread = self._spread().to(device)

    def _spread(self) -> Tensor:
        """``[E, R+P]``: an expert's scale on its ranks, 1 on its patches (theirs is absorbed), 0 elsewhere."""
        experts = [e for e, rank in enumerate(self.ranks) for _ in range(rank)] + self.patch_expert.tolist()
        values = [scale for scale, rank in zip(self.scales, self.ranks, strict=True) for _ in range(rank)]
        values += [1.0] * len(self.patch_expert)
        return F.one_hot(torch.tensor(experts), self.n_experts).t() * torch.tensor(values)

    def factors(self) -> tuple[Tensor, Tensor]:
        """``A [R+P, d_in]`` and ``Bt [R+P, d_out]``, patches included."""
        if not len(self.patch_expert):
            return self.A, self.Bt
        return torch.cat([self.A, self.patch_A]), torch.cat([self.Bt, self.patch_Bt])

    def project(self, x: Tensor, gate: Tensor | None, source: Source | None) -> Projection:
        """First GEMM: tokens ``[N, d_in]`` on all A rows and, when given, the router's rows; see `fused.down`."""
        return down(x, self.factors()[0], gate, source)

    def combine(
        self, x: Tensor, W: Tensor, bias: Tensor | None, projection: Projection, weights: Tensor, *, same_input: bool
    ) -> Tensor:
        """Second GEMM: frozen output plus experts, ``[N, d_out]``; see `molehill.molora.fused.up`."""
        return up(x, W, bias, projection, weights, self.factors()[1], self.spread, same_input=same_input)

    def plain(self, x: Tensor, seen: Tensor, W: Tensor, bias: Tensor | None, weights: Tensor) -> Tensor:
        """The same output in plain autograd; ``seen`` is what the experts see of ``x`` (after dropout)."""
        A, Bt = self.factors()
        return reference(x, seen, W, bias, A, weights, Bt, self.spread)

    def delta(self, x: Tensor, y0: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum of the experts' deltas.

        Args:
            x: ``[B, T, d_in]``.
            y0: Not used.
            weights: ``[B|1, T|1, E]``.

        Returns:
            ``[B, T, d_out]``.
        """
        A, Bt = self.factors()
        return (F.linear(x, A.to(x.dtype)) * (weights @ self.spread).to(x.dtype)) @ Bt.to(x.dtype)

    def mixed(self, x: Tensor, weights: Tensor) -> Tensor:
        """Mix parameters instead of outputs: ``sum_e w_e A_e`` and ``sum_e w_e B_e`` by block of features.

        With H heads, head h mixes the h-th block of A's columns and of B's rows (MHR); H = 1 is Poly.

        Args:
            x: ``[B, T, d_in]``.
            weights: Constant within a row, ``[B|1, 1, H, E]`` or ``[B|1, 1, E]``.

        Returns:
            The delta ``[B, T, d_out]``.
        """
        per_head = weights.unsqueeze(-2) if weights.dim() == 3 else weights
        heads = per_head.shape[-2]
        rank, (d_in, d_out) = self.ranks[0], (self.site.d_in, self.site.d_out)
        w = per_head[:, 0]
        A = self.A.view(-1, rank, heads, d_in // heads)
        Bt = self.Bt.view(-1, rank, heads, d_out // heads)
        A_mix = torch.einsum("bhe,erhd->brhd", w, A).flatten(2).to(x.dtype)
        Bt_mix = torch.einsum("bhe,erhd->brhd", w, Bt).flatten(2).to(x.dtype)
        return (x @ A_mix.transpose(1, 2)) @ Bt_mix * self.scales[0]
