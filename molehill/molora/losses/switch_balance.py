"""The balance loss of Switch, in its two usual scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from molehill.molora.interfaces import RouteRecord, RoutingLoss
from molehill.molora.records import Stack, mean_over_records
from molehill.registry import register


@dataclass(frozen=True)
class SwitchBalanceParams:
    """Parameters of `SwitchBalance`.

    Attributes:
        normalise_by_k: Divide by the mean number of chosen experts: the loss of a balanced router is then 1 (MoLA,
            DeepSeekMoE), otherwise k (Mixtral, MixLoRA).
    """

    normalise_by_k: bool = False


@register(
    "routing_loss",
    "switch_balance",
    params=SwitchBalanceParams,
    paper="Fedus, Zoph and Shazeer 2021, Switch Transformers",
    url="https://arxiv.org/abs/2101.03961",
    seeds=("S171", "S2", "S113", "S180"),
)
class SwitchBalance(RoutingLoss):
    """``E sum_e f_e P_e``: f_e the part of tokens that chose expert e, P_e its mean probability.

    With one choice per token it is 1 when both are uniform and E when one expert takes all.
    """

    def __init__(self, params: SwitchBalanceParams) -> None:
        self.normalise_by_k = params.normalise_by_k

    def __call__(self, records: Sequence[RouteRecord]) -> Tensor:
        """Return the mean over records."""
        return mean_over_records(records, self._loss)

    def _loss(self, stack: Stack) -> Tensor:
        f = stack.mean(stack.selected)
        if self.normalise_by_k:
            f = f / f.sum(-1, keepdim=True).clamp_min(1e-9)
        return stack.n_experts * (f * stack.mean(stack.probs)).sum(-1)
