"""The weights of a base that is a mixture itself."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from molehill.errors import ModelError
from molehill.molora.interfaces import RouteContext, Scorer
from molehill.registry import register


@register(
    "scorer",
    "base_router",
    paper="Liu et al. 2024, PERFT: Parameter-Efficient Routed Fine-Tuning for Mixture-of-Expert Model",
    url="https://arxiv.org/abs/2411.08212",
)
class BaseRouter(Scorer):
    """What the base's own router gives each of its own experts in the block; nothing of it is learnt.

    There is an expert for each that the base has there, whatever ``molora.experts`` says, and the selector is to be
    ``given``: an expert of ours has the weight that the base's has. For ``molora.topology = "beside"``.
    """

    reads = frozenset({"base_route"})
    ordered = True
    weighs = "logits"

    def __init__(self, *, d_in: int, n_experts: int) -> None:
        super().__init__()
        del d_in
        self.n_experts = n_experts

    def axes(self) -> Mapping[str, int]:
        """It has no parameters."""
        return {}

    def forward(self, ctx: RouteContext) -> Tensor:
        """The weights ``[B, T, E]``.

        Raises:
            ModelError: The site is beside no mixture.
        """
        if ctx.base_route is None:
            raise ModelError(
                f"{ctx.site.name} is beside no mixture of the base, whose router would be asked",
                where="molora.scorer",
                mend='Use molora.topology = "beside" on a base that is a mixture.',
            )
        return ctx.base_route
