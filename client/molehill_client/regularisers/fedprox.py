"""The proximal term of FedProx."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from molehill.registry import register
from molehill_client.interfaces import Regulariser


@dataclass(frozen=True)
class FedProxParams:
    """Parameters of FedProx.

    Attributes:
        mu: Strength of the pull; ``train.prox`` is short for it.
    """

    mu: Annotated[float, Field(ge=0)] = 0.01


@register(
    "regulariser",
    "fedprox",
    paper="Li et al. 2020, Federated Optimization in Heterogeneous Networks",
    url="https://arxiv.org/abs/1812.06127",
    params=FedProxParams,
)
class FedProx(Regulariser):
    """A pull to the received weights, ``mu / 2 * ||w - w_received||^2``, beside any objective."""

    def __init__(self, params: FedProxParams) -> None:
        self.mu = params.mu

    def __call__(self, grads: Tensor, values: Tensor, received: Tensor) -> None:
        """Add the gradient ``mu * (w - w_received)`` to ``grads``; all three have one shape."""
        grads.add_(values - received, alpha=self.mu)
