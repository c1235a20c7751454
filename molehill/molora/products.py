"""What experts share whose change of the weight is a product that no two thin factors give."""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from molehill.molora.banks import Bank


class ProductBank(Bank):
    """Experts whose delta is ``C_e x``, C_e made of small tensors whenever it is asked for.

    A pass makes all C and multiplies by each, which costs as many products as there are experts.
    """

    noun, size = "matrix", "rank"
    transposes = False

    @abstractmethod
    def change(self, expert: int) -> Tensor:
        """C of an expert, ``[d_out, d_in]``."""

    def delta(self, x: Tensor, y0: Tensor, weights: Tensor) -> Tensor:
        """See `Bank.delta`."""
        made = torch.zeros(*x.shape[:-1], self.site.d_out, dtype=x.dtype, device=x.device)
        for expert in range(self.n_experts):
            made = made + F.linear(x, self.change(expert).to(x.dtype)) * weights[..., expert : expert + 1].to(x.dtype)
        return made

    def weight(self, expert: int) -> tuple[Tensor, Tensor | None]:
        """C alone."""
        return self.change(expert), None
