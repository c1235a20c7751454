"""The arithmetic of a routed block (MixLoRA): one output per expert inside, mixed at its end."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def expand(x: Tensor, A: Tensor, Bt: Tensor, experts: int) -> Tensor:
    """Every expert's delta of a first linear.

    Args:
        x: ``[B, T, d_in]``.
        A: ``[E * r, d_in]``, ranks of an expert in a row.
        Bt: ``[E * r, d_out]``, scale included.
        experts: E.

    Returns:
        ``[B, T, E, d_out]``.
    """
    low = F.linear(x, A).view(*x.shape[:2], experts, -1)
    return torch.einsum("bter,ero->bteo", low, Bt.view(experts, low.shape[-1], -1))


def mix(h0: Tensor, h: Tensor, weights: Tensor) -> Tensor:
    """``h_0 + sum_e w_e (h_e - h_0)``: ``[B, T, d]`` from the frozen activation and the experts' ``[B, T, E, d]``."""
    return h0 + torch.einsum("bted,bte->btd", h - h0.unsqueeze(2), weights)


def contract(h: Tensor, weights: Tensor, A: Tensor, Bt: Tensor) -> Tensor:
    """The experts' mixed delta of a last linear.

    Args:
        h: Activation of every expert, ``[B, T, E, d_in]``.
        weights: ``[B, T, E]``.
        A: ``[E * r, d_in]``, ranks of an expert in a row.
        Bt: ``[E * r, d_out]``, scale included.

    Returns:
        ``[B, T, d_out]``.
    """
    experts = h.shape[2]
    low = torch.einsum("bted,erd->bter", h, A.view(experts, -1, A.shape[-1])) * weights.unsqueeze(-1)
    return low.flatten(2) @ Bt
