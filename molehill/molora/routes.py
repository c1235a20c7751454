"""Routes as sites use them: what one forward pass shares, and the groups of sites that share a route."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from molehill.errors import ModelError
from molehill.molora import reading
from molehill.molora.banks import PairBank
from molehill.molora.interfaces import NOTHING, Embeds, Overrides, Route, RouteContext, RouteRecord, Seen, Site, Told
from molehill.molora.router import Router


class Announced(NamedTuple):
    """What a pass is about: its mask, what is told of its rows, and which tokens are of the prompts."""

    mask: Tensor
    told: Told
    prompts: Tensor | None


@dataclass
class ForwardState:
    """What all sites of a model share during one forward pass.

    Attributes:
        mask: True for real tokens, ``[B, T]`` bool, or None.
        task_ids: Task of every row, ``[B]``, or None.
        token_ids: Id of every token of the pass, ``[B, T]``, or None where the base was given none.
        domain_ids: Domain of every token, ``[B, T]``, or None; see `RouteContext.domain_ids`.
        progress: Fraction of training done.
        enabled: False runs the frozen base alone.
        collect: Keep a `RouteRecord` of every route.
        count: Add up the gate mass of every expert.
        clients: Clients whose rows follow each other in a batch, in equal numbers; see `MoLoRAModel.stack`.
        members: Which of the stacked clients these are.
        records: The records of the last forward pass.
        version: Increases with every pass; routes shared between sites are cached per version.
        next: What the coming pass of the base is about.
        reads_base: Whether a router goes by the prompts of the rows.
        embeds: Whether it reads their embeddings; else what the base alone makes of them, for which it runs before
            every pass.
        base: That, see `RouteContext.base` and `RouteContext.prompt`; None where no router reads it, or the base runs
            alone.
        domain: That of all tokens of passes that nobody announces; None where it is not known.
        known: That of the coming passes, where it is not to be made of their own tokens, see `about`.
    """

    mask: Tensor | None = None
    task_ids: Tensor | None = None
    token_ids: Tensor | None = None
    domain_ids: Tensor | None = None
    progress: float = 0.0
    enabled: bool = True
    collect: bool = False
    count: bool = False
    clients: int = 1
    members: slice | list[int] = field(default_factory=lambda: slice(None))
    records: Seen = field(default_factory=Seen)
    version: int = 0
    next: Announced | None = None
    reads_base: bool = False
    embeds: bool = False
    base: Tensor | None = None
    domain: int | None = None
    known: Tensor | None = None
    _reading: bool = False
    _caches: WeakKeyDictionary[Any, Tensor] = field(default_factory=WeakKeyDictionary)  # `base` of what is in each

    def announce(self, mask: Tensor, of: Told = NOTHING, prompts: Tensor | None = None) -> None:
        """Say what the coming pass of the base is about; without ``prompts`` rows are prompts as a whole."""
        self.next = Announced(mask, of, prompts)

    @contextmanager
    def about(self, known: Tensor | None) -> Iterator[None]:
        """Let routers take the rows of these passes, which go on with a text, for what they were when it began.

        Args:
            known: What `base` was then; None where a text begins.
        """
        before, self.known = self.known, known
        try:
            yield
        finally:
            self.known = before

    def begin(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Start a pass; a forward pre-hook of the base, so that a pass somebody else starts gets routes of its own.

        Raises:
            ModelError: Routers read what the base makes of a text, and this pass goes on with one that is not known.
        """
        if self._reading:
            return
        mask = kwargs.get("attention_mask")
        mask = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
        ids = args[0] if args else kwargs.get("input_ids")
        self.token_ids = ids if isinstance(ids, Tensor) and not ids.is_floating_point() else None
        self.mask, (self.task_ids, self.domain_ids), prompts = self.next or (mask, NOTHING, None)
        if self.next is None and self.domain is not None and self.token_ids is not None:
            self.domain_ids = torch.full_like(self.token_ids, self.domain)
        self.next = None
        self.records = Seen(progress=self.progress)
        self.version += 1
        if self.reads_base:
            cache, self.base = kwargs.get("past_key_values"), self.known
            if not self.enabled:
                self.base = None
                return
            if self.known is None and cache is not None and int(cache.get_seq_length()) > 0:
                self.base = self._of_cache(cache, args, kwargs)
            elif self.known is None:
                self.base = self.read(base, args, kwargs, self.mask if prompts is None else prompts)
            if cache is not None and self.base is not None:
                self._caches[cache] = self.base

    def _of_cache(self, cache: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        given = (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        rows, found = next(len(each) for each in given if isinstance(each, Tensor)), self._caches.get(cache)
        if found is None or len(found) != rows:
            raise ModelError(
                "routers go by what the base makes of texts as they begin, and this pass goes on with a cache of which "
                "they know no such beginning",
                mend="Give the pass of the whole texts an empty cache (DynamicCache), and go on with that one.",
            )
        return found

    def read(self, base: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], mask: Tensor | None) -> Tensor:
        """What routers read of rows.

        It is what the base alone makes of them, the mean state of some of their tokens ``[B, w]`` float32; or the
        embeddings of all, and which they are, ``[B, T, w + 1]``.

        Args:
            base: The base.
            args: As for a pass of it.
            kwargs: As for a pass of it.
            mask: True for these tokens, ``[B, T]``; None for all.
        """
        if self.embeds:
            return reading.embeddings(base, args, kwargs, mask)
        enabled, self.enabled, self._reading = self.enabled, False, True
        try:
            return reading.mean(reading.states(base, args, kwargs), mask)
        finally:
            self.enabled, self._reading = enabled, False

    @staticmethod
    def in_rows(values: Tensor | None, lead: torch.Size) -> Tensor | None:
        """One of every token ``[B, T]`` for tokens in rows, or one after another ``[1, B * T]``; else None."""
        if values is None or values.shape == lead:
            return values
        return values.reshape(lead) if tuple(lead) == (1, values.numel()) else None


class RouteGroup(nn.Module):
    """The sites that share one route (one site, a block, a layer or the whole model).

    The first site of a forward pass computes the route from its own input; the others reuse it. Where a base runs its
    linears several times in a pass (layers that share weights, a projection that positions go through as well), every
    call has a route of its own: the n-th call of a site takes that of the n-th calls.

    Args:
        router: The router.
        site: The first site of the group; gives the router's input width.
        state: Shared state of the pass.
        costs: Relative size of every routed expert, ``[E]``.
        tokens: For every call of the site in a pass, whether its input are the tokens of the batch. What is none is
            neither counted nor recorded.
        parts: So many parts of a token, which follow each other, are routed each by itself.
    """

    costs: Tensor
    mass: Tensor
    tokens: Tensor

    def __init__(
        self, router: Router, site: Site, state: ForwardState, costs: Tensor, tokens: Sequence[bool] = (True,),
        parts: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.router = router
        self.site = site
        self.state = state
        self.overrides = Overrides()
        self.register_buffer("costs", costs, persistent=False)
        # held outside the module tree: the experts belong to a site
        self.__dict__["bank"] = None
        self.bank: PairBank | None  # of the first site, where the scorer reads it
        # By client: gate mass and number of real tokens.
        self.register_buffer("mass", torch.zeros(1, len(costs)), persistent=False)
        self.register_buffer("tokens", torch.zeros(1), persistent=False)
        self.base_route: Tensor | None = None  # see `RouteContext.base_route`; a block sets it before a call
        self.embedded: Tensor | None = None  # sum of the embeddings of real tokens, where the scorer has any
        self.calls = tuple(tokens)
        self.parts = parts
        self._version = -1  # of the pass that the routes are of
        self._routes: dict[int, Route] = {}  # by number of the call

    def gate_rows(self, x: Tensor, call: int) -> Tensor | None:
        """Router rows to multiply together with A, when this call has no route yet.

        Args:
            x: Input of the calling site, ``[B, T, d]``.
            call: Number of the site's call in this pass.

        Raises:
            ModelError: The calling site comes first but has another width than the router.
        """
        if self._current(call) is not None:
            return None
        self._require_width(x)
        return self.router.gate_rows()

    def route(self, x: Tensor, logits: Tensor | None, call: int, share: Tensor | None = None) -> Route:
        """The route of a call.

        Args:
            x: Input of the calling site, ``[B, T, d]``.
            logits: Scores ``[B, T, E]`` when the caller has them.
            call: Number of the site's call in this pass.
            share: What the weights are multiplied by, ``[B, T, 1]``.

        Raises:
            ModelError: The calling site comes first but has another width than the router.
        """
        route = self._current(call)
        if route is None:
            self._require_width(x)
            route = self.router.route(self.context(x, call), logits)
            route = self.keep(route if share is None else route.times(share), x, call)
        return route

    def context(self, x: Tensor, call: int) -> RouteContext:
        """What the router may look at in a call; its input is ``x [B, T, d]``."""
        return RouteContext(
            x=x,
            site=self.site,
            mask=self._of_tokens(self.state.mask, x, call),
            task_ids=self.state.task_ids,
            token_ids=self._of_tokens(self.state.token_ids, x, call),
            domain_ids=self._of_tokens(self.state.domain_ids, x, call),
            progress=self.state.progress,
            training=self.training,
            overrides=self.overrides,
            experts=self._experts(),
            base=None if self.state.embeds else self.state.base,
            prompt=self.state.base if self.state.embeds else None,
            base_route=self.base_route,
        )

    def _experts(self) -> Tensor | None:
        """First factors of the routed experts, ``[E, r, d]``, which follow the always-on ones."""
        if self.bank is None:
            return None
        routed = len(self.costs)
        rank = self.bank.ranks[-1]
        return self.bank.A[-routed * rank :].view(routed, rank, -1)

    def keep(self, route: Route, x: Tensor, call: int) -> Route:
        """Take a route as that of a call with the input ``x [B, T, d]``, and record and count it."""
        self._routes[call] = route
        state, mask = self.state, self._of_tokens(self.state.mask, x, call)
        if self._on_tokens(call):
            if state.collect:
                state.records.append(RouteRecord(self.site, route, mask, self.costs, state.task_ids))
            if state.count:
                self._count(route, mask, x.shape[:2])
                self._embed(x, mask, call)
        return route

    def _on_tokens(self, call: int) -> bool:
        return self.calls[min(call, len(self.calls) - 1)]

    def _of_tokens(self, values: Tensor | None, x: Tensor, call: int) -> Tensor | None:
        """Of every token of a call one value, where the call is of the batch's tokens."""
        if values is not None and self.parts > 1:
            values = values.repeat_interleave(self.parts, 1)
        return self.state.in_rows(values, x.shape[:2]) if self._on_tokens(call) else None

    def _require_width(self, x: Tensor) -> None:
        if x.shape[-1] != self.site.d_in:
            raise ModelError(
                f"the shared router of {self.site.name} was first reached with {x.shape[-1]} features, "
                f"it takes {self.site.d_in}",
                mend="Use scope 'site'.",
            )

    def _current(self, call: int) -> Route | None:
        if self._version != self.state.version:
            self.forget()
            self._version = self.state.version
        return self._routes.get(call)

    @torch.no_grad()
    def _count(self, route: Route, mask: Tensor | None, shape: torch.Size) -> None:
        weights = route.weights.detach() / self.router.selector.bound  # who counts more than all tokens is not believed
        if weights.dim() == 4:  # heads: an expert's mass is its mean over heads
            weights = weights.mean(2)
        clients = self.state.clients
        flat = weights.expand(*shape, -1).reshape(clients, -1, weights.shape[-1])
        real = torch.ones(shape, device=flat.device) if mask is None else mask.to(flat.dtype)
        real = real.reshape(clients, 1, -1) / (
            sum(self.calls) * self.parts
        )  # a token counts once, however often it comes by
        self.mass[self.state.members] += (real @ flat).squeeze(1)
        self.tokens[self.state.members] += real.sum((1, 2))

    @torch.no_grad()
    def _embed(self, x: Tensor, mask: Tensor | None, call: int) -> None:
        scorer = self.router.scorer
        if not isinstance(scorer, Embeds):
            return
        found = scorer.embeddings(self.context(x, call)).double()
        real = torch.ones(x.shape[:2], device=x.device) if mask is None else mask
        total = torch.einsum("bt,btnr->nr", real.double() / (sum(self.calls) * self.parts), found)
        self.embedded = total if self.embedded is None else self.embedded + total

    def reopen(self, call: int) -> None:
        """Let go of the route of a call, and of its record, so that it is computed anew."""
        route = self._routes.pop(call, None)
        self.state.records[:] = [record for record in self.state.records if record.route is not route]

    def forget(self) -> None:
        """Let go of the last routes, whose graph remembers the shape of the router's rows."""
        self._routes = {}

    def reset_counts(self) -> None:
        """Forget the counted gate mass."""
        self.mass = self.mass.new_zeros(self.state.clients, self.mass.shape[-1])
        self.tokens = self.tokens.new_zeros(self.state.clients)
        self.embedded = None


def route_together(scores: Mapping[RouteGroup, Tensor], x: Tensor, call: int) -> None:
    """Compute open routes of one input; those of routers that do the same are further rows of one call.

    Args:
        scores: Products ``[B, T, E]`` of x and the group's `Router.gate_rows`, by group.
        x: Their input ``[B, T, d]``.
        call: Number of the call in this pass.
    """
    scores = {group: group.router.logits(product) for group, product in scores.items()}
    companies: dict[Hashable, list[RouteGroup]] = {}
    for group in scores:
        companies.setdefault(group.router.kin(group.overrides), []).append(group)
    for company in companies.values():
        if len(company) == 1:
            company[0].route(x, scores[company[0]], call)
            continue
        n, ctx = len(company), company[0].context(x, call)
        many = replace(ctx, mask=_repeat(ctx.mask, n), task_ids=_repeat(ctx.task_ids, n))  # nobody looks at x
        whole = company[0].router.route(many, torch.cat([scores[group] for group in company]))
        for group, route in zip(company, _parted(whole, n), strict=True):
            group.keep(route, x, call)


def _repeat(rows: Tensor | None, times: int) -> Tensor | None:
    return None if rows is None else rows.repeat(times, *[1] * (rows.dim() - 1))


def _parted(route: Route, n: int) -> Iterator[Route]:
    """The routes of n equal runs of rows."""
    full = [None] * n if route.distribution is None else route.distribution.chunk(n)
    aux = {name: tensor.chunk(n) for name, tensor in route.aux.items()}
    for at, (logits, weights) in enumerate(zip(route.logits.chunk(n), route.weights.chunk(n), strict=True)):
        yield Route(logits, weights, full[at], {name: parts[at] for name, parts in aux.items()})
