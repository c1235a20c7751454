"""Binary trees whose leaves are experts: node 1 is the root, nodes 2i and 2i + 1 are below node i, leaves come last.

With E experts there are E - 1 inner nodes, 1 to E - 1, and expert e is node E + e. All leaves are equally deep where
E is a power of two, and differ by one level else.
"""

from __future__ import annotations

import torch
from torch import Tensor


def paths(n_leaves: int) -> tuple[Tensor, Tensor]:
    """Which inner nodes a leaf is left of, and right of: two ``[n - 1, n]`` float32 of 0 and 1."""
    left, right = (torch.zeros(max(n_leaves - 1, 0), n_leaves) for _ in range(2))
    for leaf in range(n_leaves):
        node = n_leaves + leaf
        while node > 1:
            (right if node % 2 else left)[node // 2 - 1, leaf] = 1.0
            node //= 2
    return left, right


def masses(p: Tensor) -> list[Tensor]:
    """The probability of every node, ``[...]`` each, by its number (0 is none), from those of leaves ``[..., n]``."""
    n = p.shape[-1]
    found = [p[..., 0]] * n + list(p.unbind(-1))
    for node in range(n - 1, 0, -1):
        found[node] = found[2 * node] + found[2 * node + 1]
    return found


def greedy(p: Tensor) -> Tensor:
    """1 for the leaf that is reached by going to the likelier side of every node, ``[..., n]``; ties go left."""
    n, mass = p.shape[-1], masses(p)
    on = [torch.ones_like(p[..., 0])] * (2 * n)
    for node in range(1, n):
        left = (mass[2 * node] >= mass[2 * node + 1]).to(p.dtype)
        on[2 * node], on[2 * node + 1] = on[node] * left, on[node] * (1 - left)
    return torch.stack(on[n:], -1)
