"""A router: scorer, logit transforms, selector, and what a caller or a client adds to them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from molehill.molora.interfaces import Blend, LogitTransform, Overrides, Read, Route, RouteContext, Scorer, Selector

_BLEND = "blend"


class Router(nn.Module):
    """Pipes ``Scorer -> LogitTransform* -> Selector``; arithmetic after the scores is float32.

    Args:
        scorer: Produces logits.
        transforms: Edit the logits, in order.
        selector: Turns logits into weights.
        anchored: Give every scorer parameter that is neither the client's own nor fixed a residual of the same shape,
            zero at the start, that is added to it. The parameter can then be averaged over clients while each client
            keeps its residual.
        blend: How always-on experts and the routed ones share the weight; None where both keep theirs.

    Attributes:
        residual: The residuals by parameter name (dots replaced by ``__``); empty when not anchored.
        personal: Whether the residuals count; False gives the shared router.
        uniform: Ignore the scores and weigh all experts alike: the router of a model nobody trained a gate for.
    """

    def __init__(
        self, scorer: Scorer, transforms: Sequence[LogitTransform], selector: Selector, *, anchored: bool,
        blend: Blend | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.scorer = scorer
        self.blend = blend
        self.transforms = tuple(transforms)
        self.selector = selector
        self.residual = nn.ParameterDict()
        if anchored:
            for name in self.roles():
                if name in scorer.own | scorer.fixed:  # which stays with the client, or stays at all, as it is
                    continue
                self.residual[name.replace(".", "__")] = nn.Parameter(torch.zeros_like(self.parameter(name)))
        self.personal = True
        self.uniform = False

    @property
    def n_experts(self) -> int:
        """Routed experts."""
        return self.scorer.n_experts

    @property
    def reads(self) -> frozenset[Read]:
        """What its routes depend on beside the input."""
        return self.scorer.reads.union(*(transform.reads for transform in self.transforms))

    @property
    def ordered(self) -> bool:
        """Whether experts are told apart by their place."""
        return self.scorer.ordered or self.selector.ordered

    @property
    def heads(self) -> int:
        """Heads of a route; more than one have weights each for their own block of features."""
        return self.scorer.heads

    def roles(self) -> dict[str, str]:
        """The role on the wire of every parameter of scorer and blend, by its name."""
        of_blend = () if self.blend is None else self.blend.named_parameters(_BLEND)
        return {
            name: f"gate.own.{name}" if name in self.scorer.own else f"gate.{name}"
            for name, _ in (*self.scorer.named_parameters(), *of_blend)
        }

    def parameter(self, name: str) -> nn.Parameter:
        """A parameter by its name in `roles`."""
        if self.blend is not None and name.startswith(f"{_BLEND}."):
            return self.blend.get_parameter(name.removeprefix(f"{_BLEND}."))
        return self.scorer.get_parameter(name)

    @property
    def stackable(self) -> bool:
        """Whether the parameters may have a client axis: one product with x, rows by themselves, and nothing drawn."""
        drawn = self.selector.random or any(transform.random for transform in self.transforms)
        return self.scorer.fusable and self.selector.per_row and not drawn

    def kin(self, overrides: Overrides) -> Hashable:
        """Equal for routers that turn given logits into weights alike, row by row; else its own."""
        alike = self.selector.by_logits and all(transform.by_logits for transform in self.transforms)
        if not (self.stackable and alike) or self.blend is not None or overrides != Overrides():
            return id(self)
        return id(self.selector), *map(id, self.transforms), self.n_experts

    def effective(self, name: str) -> Tensor:
        """A parameter, with its residual where it has one that counts."""
        parameter, residual = self.parameter(name), name.replace(".", "__")
        counts = self.personal and residual in self.residual
        return parameter + self.residual[residual] if counts else parameter

    def gate_rows(self) -> Tensor | None:
        """Rows ``[E, d]`` that may be multiplied together with A; None when the scores are not one product with x."""
        if self.uniform or not self.scorer.fusable:
            return None
        return self.effective("weight")

    def logits(self, product: Tensor) -> Tensor:
        """The scores ``[B, T, E]`` of which `gate_rows` gave the product; clients in the model have runs of rows."""
        offset = self.scorer.offset()
        if offset is None:
            return product
        clients = offset.view(-1, 1, self.n_experts)
        return (product.float().reshape(len(clients), -1, self.n_experts) + clients).view_as(product)

    def route(self, ctx: RouteContext, logits: Tensor | None = None) -> Route:
        """Return the route.

        Args:
            ctx: What the router may look at.
            logits: Scores ``[B, T, E]`` where they are known (see `logits`); computed here when None.

        Returns:
            Weights ``[B|1, T|1, (H,) E]`` in float32.
        """
        route = self._route(ctx, logits)
        if self.blend is not None:
            route.blend = self._blend(self.blend, ctx.x)
        return route

    def _route(self, ctx: RouteContext, logits: Tensor | None) -> Route:
        over = ctx.overrides
        if self.uniform or over.weights is not None:
            heads = (self.heads,) if self.heads > 1 else ()
            z = torch.zeros(1, 1, *heads, self.n_experts, device=ctx.x.device)
            weights = torch.full_like(z, 1 / self.n_experts) if over.weights is None else over.weights.expand_as(z)
            if over.weights is not None and over.expert_mask is not None:
                weights = torch.where(self._by_row(over.expert_mask), weights, 0.0)
            return Route(z, weights, weights)
        z = self._score(ctx) if logits is None else logits
        for transform in self.transforms:
            z = transform(z, ctx)
        if over.bias is not None:
            z = z + self._by_row(over.bias)
        if over.expert_mask is not None:
            z = z.masked_fill(~self._by_row(over.expert_mask), torch.finfo(z.dtype).min)
        if over.ranks is None:
            return self.selector(z, ctx)
        weights, kept = window(z, *over.ranks)
        return Route(z, weights, aux={"selected": kept})

    def _by_row(self, values: Tensor) -> Tensor:
        """Values of experts, ``[E]`` or ``[B, 1, E]``, as they meet logits ``[B, T, (H,) E]``."""
        return values.unsqueeze(-2) if self.heads > 1 and values.dim() > 1 else values

    def _blend(self, blend: Blend, x: Tensor) -> tuple[Tensor, Tensor]:
        values = {name: self.effective(f"{_BLEND}.{name}") for name, _ in blend.named_parameters()}
        found: tuple[Tensor, Tensor] = functional_call(blend, values, (x,))
        return found

    def _score(self, ctx: RouteContext) -> Tensor:
        if not (self.residual and self.personal):
            return self.scorer(ctx).float()  # type: ignore[no-any-return]  # its callee is untyped
        effective = {name: self.effective(name) for name, _ in self.scorer.named_parameters()}
        return functional_call(self.scorer, effective, (ctx,)).float()  # type: ignore[no-any-return]  # its callee is untyped


def window(z: Tensor, first: int | Tensor, stop: int | Tensor) -> tuple[Tensor, Tensor]:
    """The weights of the experts at some places, by the softmax of their logits; of equal ones the first is before.

    Args:
        z: Logits ``[..., E]``.
        first: The first place, from the best at 0.
        stop: The place after the last.

    Returns:
        Weights ``[..., E]``, and which experts they are of.
    """
    places = z.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1, stable=True)
    kept = (places >= first) & (places < stop)
    # masked, and not divided by what is left of a softmax over all, which may be nothing
    weights = torch.where(kept, z.masked_fill(~kept, torch.finfo(z.dtype).min).softmax(-1), 0.0)
    return weights, kept
