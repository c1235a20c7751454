"""What the frozen base alone makes of a batch: the states after its last layer, or its embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from molehill.molora.trial import plain_tokens, trial_of

_NOT_OURS = {"past_key_values", "use_cache", "labels", "logits_to_keep", "output_hidden_states"}


@torch.no_grad()
def states(base: nn.Module, args: Sequence[Any], given: Mapping[str, Any]) -> Tensor:
    """Token states after the last layer, ``[B, T, w]``.

    Args:
        base: A base that `trial_of` knows, with its experts switched off.
        args: What a pass of it is given by place.
        given: By name; caches and what is to be made of the output do not count.
    """
    ours = {name: value for name, value in given.items() if name not in _NOT_OURS}
    inner = getattr(base, "base_model", base)  # the layers without the head, which keeps no states of others
    found: Tensor
    if trial_of(base).states:
        found = base(*args, **ours).last_hidden_state
    elif inner is not base:
        found = inner(*args, **ours, use_cache=False).last_hidden_state
    else:
        found = base(*args, **ours, use_cache=False, output_hidden_states=True).hidden_states[-1]
    return found


@torch.no_grad()
def embeddings(base: nn.Module, args: Sequence[Any], given: Mapping[str, Any], mask: Tensor | None) -> Tensor:
    """The frozen embeddings of tokens, with 1 behind those that the mask is true for: ``[B, T, w + 1]`` float32.

    Args:
        base: The base.
        args: What a pass of it is given by place.
        given: By name.
        mask: True for these tokens, ``[B, T]``; None for all.
    """
    found = given.get("inputs_embeds")
    if found is None:
        found = base.get_input_embeddings()(args[0] if args else given["input_ids"])  # type: ignore[operator]  # modules hide their methods' types
    there = found.new_ones(found.shape[:2]) if mask is None else mask
    return torch.cat([found.float(), there.unsqueeze(-1).float()], -1)


def width(base: nn.Module) -> int:
    """Features of `states`; the base has no experts yet."""
    found = trial_of(base)
    if found.states:
        return found.width
    ids = torch.tensor([plain_tokens(base, 2)], device=next(base.parameters()).device)
    return int(states(base, (), {"input_ids": ids}).shape[-1])


def mean(found: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over some tokens of every row, ``[B, w]`` float32.

    Args:
        found: States ``[B, T, w]``.
        mask: True for these tokens, ``[B, T]``, at least one in each row; None for all.
    """
    if mask is None:
        return found.float().mean(1)
    weights = mask.unsqueeze(-1).float()
    return (found.float() * weights).sum(1) / weights.sum(1)


def prompts(mask: Tensor, labels: Tensor) -> Tensor:
    """Tokens before the first that has a label, ``[B, T]`` bool; all of a row that begins with one.

    Args:
        mask: True for real tokens, ``[B, T]``.
        labels: Of every token, ``[B, T]``, -100 where there is none.
    """
    before = mask & ((labels != -100).cumsum(1) == 0)
    return torch.where(before.any(1, keepdim=True), before, mask)
