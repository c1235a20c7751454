"""A gate as fixed weights: what its routers say on the mean, and how far that is from what they say token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from molehill.molora.interfaces import Route, RouteContext, Scorer, Selector
from molehill.molora.model import MoLoRAModel
from molehill.molora.router import Router
from molehill_export.parity import Difference

_SAME = 1e-5  # weights that differ by no more are one


@dataclass(frozen=True)
class Fixed:
    """Fixed weights.

    Attributes:
        weights: Of the routed experts by the name of the route's first site, ``[E]`` or, with heads, ``[H, E]``.
        varies: By how much a weight differs from its mean at most, over all tokens and routes.
        texts: How many texts were read.
        error: Mean squared difference of the logits from those of the routed model, over their variance.
        agreement: How often the likeliest token is the same.
    """

    weights: dict[str, Tensor]
    varies: float
    texts: int
    error: float
    agreement: float

    @property
    def exact(self) -> bool:
        """Whether the routers always say the same."""
        return self.varies <= _SAME


@torch.no_grad()
def fix(model: MoLoRAModel, texts: Sequence[Sequence[int]]) -> Fixed:
    """Weigh the experts as the routers do on the mean over the tokens of some texts, and measure what that changes.

    Args:
        model: Of a causal LM, with the gate in use.
        texts: Token ids of at least one text.
    """
    routed = [_pass(model, ids) for ids in texts]
    weights: dict[str, Tensor] = {}
    tokens = sum(len(ids) for ids in texts)
    for (_, routes), ids in zip(routed, texts, strict=True):
        for name, found in routes.items():
            spread = found.expand(found.shape[0], len(ids), *found.shape[2:])
            weights[name] = weights.get(name, 0) + spread.mean(0).sum(0) / tokens
    varies = max(
        (float((found - weights[name]).abs().max()) for _, routes in routed for name, found in routes.items()),
        default=0.0,
    )
    total = Difference()
    with _fixed(model, weights):
        for (original, _), ids in zip(routed, texts, strict=True):
            total.add(original.numpy(), _pass(model, ids)[0].numpy())
    return Fixed(weights, varies, total.texts, total.error, total.same / total.predictions)


def _pass(model: MoLoRAModel, ids: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits ``[T, V]`` of a text, and the weights of every route ``[calls, T|1, (H,) E]``."""
    tokens = torch.tensor([list(ids)])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    model.state.collect = True
    try:
        model.state.announce(mask, None)
        logits = model.base(input_ids=tokens, attention_mask=mask.long()).logits
    finally:
        model.state.collect = False
    found: dict[str, list[Tensor]] = {}
    for record in model.state.records:
        found.setdefault(record.site.name, []).append(record.route.weights)
    return logits[0].float(), {name: torch.cat(weights) for name, weights in found.items()}


@contextmanager
def _fixed(model: MoLoRAModel, weights: dict[str, Tensor]) -> Iterator[None]:
    """Let every route have these weights."""
    before = {name: group.router for name, group in model.routers.items()}
    try:
        for group in model.routers.values():
            group.router = Router(_Given(weights[group.site.name]), (), _AsTheyAre(), anchored=False)
        yield
    finally:
        for name, router in before.items():
            model.routers[name].router = router


class _Given(Scorer):
    """Logits that are weights already.

    Args:
        weights: ``[E]`` or ``[H, E]``.
    """

    level = "static"

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = weights
        self.n_experts = weights.shape[-1]
        self.heads = len(weights) if weights.dim() == 2 else 1

    def axes(self) -> dict[str, int]:
        """It has no parameters."""
        return {}

    def forward(self, ctx: RouteContext) -> Tensor:
        """The weights ``[1, 1, (H,) E]``, whatever the input."""
        del ctx
        return self.weights.view(1, 1, *self.weights.shape)


class _AsTheyAre(Selector):
    """Takes logits for weights."""

    def __call__(self, z: Tensor, ctx: RouteContext) -> Route:
        """Return the route for ``[1, 1, (H,) E]``."""
        del ctx
        return Route(z, z, z)
