"""Mix the experts' parameters: one merged adapter per route."""

from __future__ import annotations

import torch
from torch import Tensor

from molehill.errors import ConfigError
from molehill.molora.banks import Bank, Mixer, PairBank
from molehill.molora.interfaces import Wish
from molehill.registry import register


@register(
    "mixer",
    "param",
    paper="Ponti et al. 2023 (Poly); Caccia et al. 2023, Multi-Head Adapter Routing (MHR)",
    url="https://arxiv.org/abs/2211.03831",
    seeds=("S118",),
)
class ParamMixer(Mixer):
    """``(sum_e w_e B_e)(sum_e w_e A_e) x``: not the same function as output mixing, and it folds into one LoRA."""

    mixes = "parameters"
    wants: frozenset[Wish] = frozenset({"pairs", "equal_ranks", "row_route"})

    def __call__(self, bank: Bank, x: Tensor, y0: Tensor, weights: Tensor) -> Tensor:
        """Return the delta ``[B, T, d_out]`` for weights ``[B|1, 1, (H,) E]``.

        With H heads, head h mixes the h-th block of A's columns and of B's rows (MHR); H = 1 is Poly.

        Raises:
            ConfigError: The experts are no low-rank pairs of one rank, or the route varies by token.
        """
        if not isinstance(bank, PairBank) or len(set(bank.ranks)) != 1:
            raise ConfigError("mixer 'param' needs LoRA experts of equal rank", where="molora.mixer")
        if weights.shape[1] != 1:
            raise ConfigError(
                "mixer 'param' needs one route per row or per task",
                where="molora.mixer",
                mend="Use scorer 'task_table'.",
            )
        per_head = weights.unsqueeze(-2) if weights.dim() == 3 else weights
        heads = per_head.shape[-2]
        rank, (d_in, d_out) = bank.ranks[0], (bank.site.d_in, bank.site.d_out)
        w = per_head[:, 0]
        A = bank.A.view(-1, rank, heads, d_in // heads)
        Bt = bank.Bt.view(-1, rank, heads, d_out // heads)
        A_mix = torch.einsum("bhe,erhd->brhd", w, A).flatten(2).to(x.dtype)
        Bt_mix = torch.einsum("bhe,erhd->brhd", w, Bt).flatten(2).to(x.dtype)
        return (x @ A_mix.transpose(1, 2)) @ Bt_mix * bank.scales[0]
