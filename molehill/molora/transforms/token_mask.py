"""MaskMoE: which experts a token may have is fixed before training, by how frequent it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated
from zlib import crc32

import torch
from pydantic import Field
from torch import Tensor

from molehill.errors import ModelError
from molehill.molora.interfaces import LogitTransform, RouteContext
from molehill.registry import register

# Of multiplicative hashes; no product below reaches 2^63, and a graph for devices has the same integers.
_FACTOR, _OTHER, _WORD, _HALF = 2654435761, 362437069, 2**32, 2**16


@dataclass(frozen=True)
class TokenMaskParams:
    """Parameters of `TokenMask`.

    Attributes:
        frequent: Tokens with an id below this are frequent.
        several: Experts that a frequent token may have; 0 for all.
        rare: Experts that any other may have.
        seed: Of the dealing; everybody needs the same.
    """

    frequent: Annotated[int, Field(ge=0)] = 4000
    several: Annotated[int, Field(ge=0)] = 0
    rare: Annotated[int, Field(ge=1)] = 1
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0


@register(
    "transform",
    "token_mask",
    params=TokenMaskParams,
    paper="Su et al. 2024, MaskMoE: Boosting Token-Level Learning via Routing Mask in Mixture-of-Experts",
    url="https://arxiv.org/abs/2407.09816",
)
class TokenMask(LogitTransform):
    """Closes all experts but ``several`` to a frequent token, and all but ``rare`` to a rare one, by its id and layer.

    A rare word then has one steady expert that learns all there is of it, and a frequent one a choice. The table is
    never sent: it follows from ids and ``seed``.

    Differs from the paper: which ids are frequent is told by the tokenizer's order (that of merges or of counts in most
    vocabularies), and not by counts of anybody's text; and ids are dealt by a hash, not at random.
    """

    reads = frozenset({"token_ids"})

    def __init__(self, params: TokenMaskParams) -> None:
        self.params = params

    def __call__(self, z: Tensor, ctx: RouteContext) -> Tensor:
        """Return logits ``[B, T, (H,) E]``, the least number there is where an expert is closed.

        Raises:
            ModelError: The base was given states in place of ids.
        """
        if ctx.token_ids is None:
            raise ModelError(
                "the router goes by the ids of tokens, and this pass has none",
                mend="Give the base input_ids; and leave linears that run on anything else out of molora.targets.",
            )
        open_ = self.visible(ctx.token_ids, z.shape[-1], ctx.site.layer)
        return z.masked_fill(~(open_.unsqueeze(-2) if z.dim() == 4 else open_), torch.finfo(z.dtype).min)

    def visible(self, ids: Tensor, n_experts: int, layer: int) -> Tensor:
        """True for the experts that tokens may have in a layer, ``[..., E]`` bool for ids ``[...]`` int64."""
        p = self.params
        salt = crc32(f"{p.seed}/{layer}".encode()) % _HALF
        mixed = ((ids + 1) * _FACTOR) % _WORD
        mixed = ((mixed % _HALF + 1) * (mixed // _HALF + 1 + salt) * _OTHER) % _WORD
        first = (mixed // _HALF) % n_experts  # the upper half is the better mixed
        place = (torch.arange(n_experts, device=ids.device) - first.unsqueeze(-1)) % n_experts
        several = torch.where(ids < p.frequent, p.several or n_experts, p.rare)
        return place < several.unsqueeze(-1)
