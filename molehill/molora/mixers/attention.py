"""AdapterFusion: what a token's output asks for decides which experts' outputs are heard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from molehill.errors import ConfigError
from molehill.molora.banks import Bank, FittedMixer
from molehill.molora.interfaces import Site, Wish
from molehill.registry import register


@dataclass(frozen=True)
class AttentionParams:
    """Parameters of `AttentionMixer`.

    Attributes:
        blocks: Both matrices are of so many blocks on their diagonals, each ``d_out / blocks`` wide, and 0 elsewhere;
            1: whole matrices, as in the paper.
    """

    blocks: Annotated[int, Field(ge=1)] = 1


@register(
    "mixer",
    "attention",
    params=AttentionParams,
    paper="Pfeiffer et al. 2021, AdapterFusion: Non-Destructive Task Composition for Transfer Learning",
    url="https://arxiv.org/abs/2005.00247",
    seeds=("S15",),
)
class AttentionMixer(FittedMixer):
    """``V sum_e a_e o_e`` with ``a_e = w_e exp(y0' M o_e) / sum``: outputs o_e are weighed by what they are.

    In the rounds it is the mixture by the router's weights w; after them every owner fits M and V on its own rows,
    while the experts stand still. Nothing of it is sent. With equal w it is the fusion of the paper.

    Differs from the paper: ``M = Q' K`` is learnt as one matrix, from 0, and V from the identity, so that fitting
    begins with the mixture; the query has no bias (that of the keys counts for nothing in any case);
    ``personal.decay`` pulls V to the identity.

    Args:
        params: See `AttentionParams`.
        site: The adapted module.

    Raises:
        ConfigError: The blocks do not divide what the site gives.

    Attributes:
        score: d M, ``[blocks, d, d]`` float32 with ``d = d_out / blocks``: a step of one learning rate then moves what
            M gives alike at every width.
        value: ``d (V - I)'``, of the same shape.
    """

    wants: frozenset[Wish] = frozenset({"no_shared"})

    def __init__(self, params: AttentionParams, *, site: Site) -> None:
        super().__init__()
        width, rest = divmod(site.d_out, params.blocks)
        if rest:
            raise ConfigError(
                f"{params.blocks} blocks do not divide the {site.d_out} features out of {site.name}",
                where="molora.mixer",
                mend="Set blocks to a number that divides them, or choose other molora.targets.",
            )
        self.score = nn.Parameter(torch.zeros(params.blocks, width, width))
        self.value = nn.Parameter(torch.zeros(params.blocks, width, width))

    def fitted(self, bank: Bank, x: Tensor, y0: Tensor, weights: Tensor) -> Tensor:
        """See `FittedMixer.fitted`; weights ``[B|1, T|1, E]``."""
        o = bank.outputs(x, y0).float()
        asked = _times(y0.float(), self.score)
        z = (o * asked.unsqueeze(2)).sum(-1)
        shut = weights <= 0
        z = (z + weights.clamp_min(torch.finfo(z.dtype).tiny).log()).masked_fill(shut, torch.finfo(z.dtype).min)
        a = torch.where(shut, 0.0, z.softmax(-1)) * weights.sum(-1, keepdim=True)  # which is 1 in the paper
        heard = (o * a.unsqueeze(-1)).sum(2)
        return (heard + _times(heard, self.value)).to(y0.dtype)


def _times(rows: Tensor, blocks: Tensor) -> Tensor:
    """Rows ``[B, T, d_out]`` times a matrix that has blocks on its diagonal, over their width."""
    made = torch.einsum("btgi,gij->btgj", rows.reshape(*rows.shape[:-1], *blocks.shape[:2]), blocks)
    return made.flatten(-2) / blocks.shape[-1]
