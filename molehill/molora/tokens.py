"""How many real tokens stand behind each entry of a route."""

from __future__ import annotations

import torch
from torch import Tensor


def token_counts(mask: Tensor | None, like: Tensor) -> Tensor:
    """Return the real tokens behind each entry of a route.

    Args:
        mask: True for real tokens, ``[B, T]`` bool; None when every entry counts once.
        like: A tensor of the route, ``[B|1, T|1, ...]``. A route per sequence stands for the tokens of its row, a
            static route for all tokens.

    Returns:
        Counts ``[B|1, T|1]`` in the type of ``like``; 0 for padding.
    """
    rows, steps = like.shape[:2]
    if mask is None:
        return torch.ones(rows, steps, dtype=like.dtype, device=like.device)
    counts = mask.to(like.dtype)
    if steps == 1:
        counts = counts.sum(1, keepdim=True)
    return counts.sum(0, keepdim=True) if rows == 1 else counts
