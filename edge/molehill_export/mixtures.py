"""Bases that are mixtures of experts themselves, in a form that can be traced.

Every expert sees every token and is weighed by what the base's own gate says: zero where it did not choose it.
That is the same sum; it costs a device the experts that nobody chose, each a plain product that can be quantised.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from molehill.molora.feed_forward import mixtures


@contextlib.contextmanager
def every_expert(base: nn.Module) -> Iterator[None]:
    """Replace the mixtures of a base while the context is open."""
    found = mixtures(base)
    try:
        for name, module in found.items():
            substitute(base, name, _Every(module))
        yield
    finally:
        for name, module in found.items():
            substitute(base, name, module)


class _Every(nn.Module):
    """The experts of one layer, each with two linears of its own.

    Args:
        experts: A module of 3-D weights; its numbers are shared, not copied.
    """

    def __init__(self, experts: Any) -> None:
        super().__init__()
        first = "gate_up_proj" if experts.has_gate else "up_proj"
        self.up = _linears(experts, first)
        self.down = _linears(experts, "down_proj")
        self.norm = experts.post_expert_norm if getattr(experts, "has_post_expert_norm", False) else None
        self.__dict__["experts"] = experts  # not a part: its 3-D weights stay out of the graph

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The sum over experts for tokens ``[N, d]``, of which each has ``[N, k]`` experts and weights."""
        experts: Any = self.__dict__["experts"]
        activate = experts._apply_gate if experts.has_gate else experts.act_fn  # noqa: SLF001  (it has no public name)
        total = torch.zeros_like(hidden_states)
        for number, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            out = down(activate(up(hidden_states)))
            out = out if self.norm is None else self.norm(out)
            weight = (top_k_weights * (top_k_index == number)).sum(-1, keepdim=True)
            total = total + weight.to(out.dtype) * out
        return total


def _linears(experts: Any, name: str) -> nn.ModuleList:
    weights, biases = getattr(experts, name), getattr(experts, f"{name}_bias", None)
    made = []
    for number in range(len(weights)):
        weight = weights[number].T if experts.is_transposed else weights[number]
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=biases is not None, device="meta")
        linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
        if biases is not None:
            linear.bias = nn.Parameter(biases[number].detach(), requires_grad=False)
        made.append(linear)
    return nn.ModuleList(made)


def substitute(base: nn.Module, name: str, module: nn.Module) -> None:
    """Put another module in the place of one of a base."""
    parent, _, last = name.rpartition(".")
    setattr(base.get_submodule(parent), last, module)
