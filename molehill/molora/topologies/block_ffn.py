"""MixLoRA: an expert is a whole feed-forward block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from molehill.errors import ConfigError
from molehill.molora.feed_forward import ends_of
from molehill.molora.interfaces import Topology, Wish
from molehill.registry import register


@register(
    "topology",
    "block_ffn",
    paper="Li et al. 2024, MixLoRA: Enhancing Large Language Models Fine-Tuning with LoRA-based Mixture of Experts",
    url="https://arxiv.org/abs/2404.15159",
    seeds=("S2",),
)
class BlockFFN(Topology):
    """Expert e is the feed-forward block with LoRA_e on each of its linears; outputs of whole blocks are mixed.

    ``y = sum_e w_e FFN_e(x)``. The frozen products are computed once: the first linears keep one output per expert
    (an extra axis that the activation between them does not see) and the last one is
    ``W_d (sum_e w_e h_e) + sum_e w_e s B_e A_e h_e``. Because of the activation this is not the same function as
    mixing at every linear. Other adapted linears get one plain LoRA.
    """

    scope = "block"
    wants: frozenset[Wish] = frozenset({"pairs", "equal_ranks", "no_shared"})

    def roles(self, site_names: Sequence[str]) -> Mapping[str, Literal["plain", "expand", "contract"]]:
        """First linears of the block expand, the last one contracts, everything else is plain.

        Raises:
            ConfigError: The targets do not cover the whole block.
        """
        expand, contract = ends_of(site_names)
        if not expand or len(contract) != 1:
            raise ConfigError(
                "topology 'block_ffn' needs all linears of the feed-forward block among the targets",
                where="molora.targets",
                mend=f"Found first linears {expand or 'none'} and last linears {contract or 'none'} in a layer.",
            )
        roles: dict[str, Literal["plain", "expand", "contract"]] = dict.fromkeys(site_names, "plain")
        return roles | dict.fromkeys(expand, "expand") | dict.fromkeys(contract, "contract")
