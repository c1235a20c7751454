"""The k best experts, with a gradient for those that were not chosen."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from molehill.molora.distributions import top_k_mask
from molehill.molora.interfaces import OfK, Route, RouteContext
from molehill.registry import register


@dataclass(frozen=True)
class PerturbedTopKParams:
    """Parameters of `PerturbedTopK`.

    Attributes:
        k: Experts per token; all when there are fewer.
        samples: M, draws of noise per choice in training.
        sigma: Standard deviation of the noise on the logits.
    """

    k: Annotated[int, Field(ge=1)] = 2
    samples: Annotated[int, Field(ge=1)] = 16
    sigma: Annotated[float, Field(gt=0)] = 0.5


@register(
    "selector",
    "perturbed_top_k",
    params=PerturbedTopKParams,
    paper="Kotary, Di Vito and Fioretto 2022, Differentiable Model Selection for Ensemble Learning",
    url="https://arxiv.org/abs/2211.00251",
)
class PerturbedTopK(OfK):
    """An even vote of the k best; in training the expected vote when the logits are disturbed by Gaussian noise.

    The gradient is that of the expectation (Berthet et al. 2020, Learning with Differentiable Perturbed Optimizers), so
    that an expert learns of its worth when it was not chosen, too.
    """

    random = True

    def __init__(self, params: PerturbedTopKParams) -> None:
        self.params = params

    def with_k(self, k: int) -> PerturbedTopK:
        """See `OfK.with_k`."""
        return PerturbedTopK(replace(self.params, k=k))

    def __call__(self, z: Tensor, ctx: RouteContext) -> Route:
        """Return the route for logits ``[..., E]``."""
        k = min(self.params.k, z.shape[-1])
        if not ctx.training:
            return Route(z, top_k_mask(z, k).to(z.dtype) / k)
        mask: Tensor = _Expected.apply(z, k, self.params.samples, self.params.sigma)  # type: ignore[no-untyped-call]  # untyped torch
        return Route(z, mask / k, aux={"selected": top_k_mask(z.detach(), k)})


class _Expected(torch.autograd.Function):
    """The expected mask of the k largest of ``z + sigma e``, and its gradient ``E[<g, mask> e] / sigma``."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, k: int, samples: int, sigma: float) -> Tensor:
        noise = torch.randn(samples, *z.shape, device=z.device, dtype=z.dtype)
        masks = top_k_mask(z + sigma * noise, k).to(z.dtype)
        ctx.save_for_backward(noise, masks)
        ctx.sigma = sigma
        return masks.mean(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        noise, masks = ctx.saved_tensors
        each = (masks * grads[0]).sum(-1, keepdim=True)
        # of equal expectation and less variance: what all samples have in common tells nothing
        each = each - each.mean(0)
        return (each * noise).mean(0) / ctx.sigma, None, None, None
