"""An adapted linear: the frozen module, its bank of experts and its route."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from molehill.errors import ModelError
from molehill.molora.banks import Bank, Mixer, PairBank
from molehill.molora.block import contract, mix
from molehill.molora.interfaces import Overrides, Route, RouteContext, RouteRecord, Site
from molehill.molora.recompute import source_of
from molehill.molora.router import Router


@dataclass
class ForwardState:
    """What all sites of a model share during one forward pass.

    Attributes:
        mask: True for real tokens, ``[B, T]`` bool, or None.
        task_ids: Task of every row, ``[B]``, or None.
        progress: Fraction of training done.
        enabled: False runs the frozen base alone.
        collect: Keep a `RouteRecord` of every route.
        count: Add up the gate mass of every expert.
        clients: Clients whose rows follow each other in a batch, in equal numbers; see `MoLoRAModel.stack`.
        records: The records of the last forward pass.
        version: Increases with every pass; routes shared between sites are cached per version.
        next: Mask and task ids that the coming pass of the base is to use.
    """

    mask: Tensor | None = None
    task_ids: Tensor | None = None
    progress: float = 0.0
    enabled: bool = True
    collect: bool = False
    count: bool = False
    clients: int = 1
    records: list[RouteRecord] = field(default_factory=list)
    version: int = 0
    next: tuple[Tensor, Tensor | None] | None = None

    def announce(self, mask: Tensor, task_ids: Tensor | None) -> None:
        """Say what the coming pass of the base is about."""
        self.next = (mask, task_ids)

    def begin(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Start a pass; a forward pre-hook of the base, so that a pass somebody else starts gets routes of its own."""
        mask = kwargs.get("attention_mask")
        mask = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
        self.mask, self.task_ids = self.next or (mask, None)
        self.next = None
        self.records = []
        self.version += 1

    def mask_of(self, lead: torch.Size) -> Tensor | None:
        """The mask for tokens in rows ``[B, T]`` or one after another ``[1, B * T]``; None when it is of others."""
        if self.mask is None or self.mask.shape == lead:
            return self.mask
        return self.mask.reshape(lead) if tuple(lead) == (1, self.mask.numel()) else None


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
    """

    costs: Tensor
    mass: Tensor
    tokens: Tensor

    def __init__(
        self, router: Router, site: Site, state: ForwardState, costs: Tensor, tokens: Sequence[bool] = (True,)
    ) -> None:
        super().__init__()
        self.router = router
        self.site = site
        self.state = state
        self.overrides = Overrides()
        self.register_buffer("costs", costs, persistent=False)
        # By client: gate mass and number of real tokens.
        self.register_buffer("mass", torch.zeros(1, len(costs)), persistent=False)
        self.register_buffer("tokens", torch.zeros(1), persistent=False)
        self.calls = tuple(tokens)
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

    def route(self, x: Tensor, logits: Tensor | None, call: int) -> Route:
        """The route of a call.

        Args:
            x: Input of the calling site, ``[B, T, d]``.
            logits: Scores ``[B, T, E]`` when the caller has them.
            call: Number of the site's call in this pass.

        Raises:
            ModelError: The calling site comes first but has another width than the router.
        """
        route = self._current(call)
        if route is not None:
            return route
        self._require_width(x)
        state = self.state
        tokens = self.calls[min(call, len(self.calls) - 1)]
        mask = state.mask_of(x.shape[:2]) if tokens else None
        ctx = RouteContext(
            x=x,
            site=self.site,
            mask=mask,
            task_ids=state.task_ids,
            progress=state.progress,
            training=self.training,
            overrides=self.overrides,
        )
        route = self.router.route(ctx, logits)
        self._routes[call] = route
        if state.collect and tokens:
            state.records.append(RouteRecord(self.site, route, mask, self.costs, state.task_ids))
        if state.count and tokens:
            self._count(route, mask, x.shape[:2])
        return route

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
        weights = route.weights.detach()
        if weights.dim() == 4:  # heads: an expert's mass is its mean over heads
            weights = weights.mean(2)
        clients = self.state.clients
        flat = weights.expand(*shape, -1).reshape(clients, -1, weights.shape[-1])
        real = torch.ones(shape, device=flat.device) if mask is None else mask.to(flat.dtype)
        real = real.reshape(clients, 1, -1) / sum(self.calls)  # a token counts once, however often it comes by
        self.mass += (real @ flat).squeeze(1)
        self.tokens += real.sum((1, 2))

    def forget(self) -> None:
        """Let go of the last routes, whose graph remembers the shape of the router's rows."""
        self._routes = {}

    def reset_counts(self) -> None:
        """Forget the counted gate mass."""
        self.mass = self.mass.new_zeros(self.state.clients, self.mass.shape[-1])
        self.tokens = self.tokens.new_zeros(self.state.clients)


class MoLoRALinear(nn.Module):
    """A frozen linear with experts: ``y = W0 x + b + sum_e w_e delta_e(x)``.

    Args:
        base: ``nn.Linear`` or GPT-2's ``Conv1D``; frozen.
        site: Its place.
        bank: Its experts, shared ones first.
        shared: Number of shared experts; their weight is always 1.
        group: Where the routed experts' weights come from; None when all weights are 1.
        mixer: How weights meet experts.
        dropout: Dropout on the experts' input.
        state: Shared state of the pass.
        tokens: For every call in a pass, whether the input are the tokens of the batch.
    """

    def __init__(
        self,
        base: nn.Module,
        site: Site,
        bank: Bank,
        *,
        shared: int,
        group: RouteGroup | None,
        mixer: Mixer,
        dropout: float,
        state: ForwardState,
        tokens: Sequence[bool] = (True,),
    ) -> None:
        super().__init__()
        self.calls = tuple(tokens)
        self._pass = (-1, 0)  # version of the pass, calls in it
        self.base = base
        self.site = site
        self.bank = bank
        self.shared = shared
        self.mixer = mixer
        self.dropout = nn.Dropout(dropout)
        self.state = state
        # held outside the module tree: a group belongs to the model, not to one of its sites
        self.__dict__["group"] = group
        self.group: RouteGroup | None

    @property
    def weight(self) -> Tensor:
        """Frozen weight ``[d_out, d_in]``."""
        weight: Tensor = self.base.weight  # type: ignore[assignment]  # modules hide their attributes' types
        return weight.t() if isinstance(self.base, Conv1D) else weight

    @property
    def bias(self) -> Tensor | None:
        """Frozen bias ``[d_out]`` or None."""
        return self.base.bias  # type: ignore[return-value]  # modules hide their attributes' types

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[..., d_out]`` for ``x [..., d_in]``; two dimensions or more."""
        if not self.state.enabled:
            return self.base(x)  # type: ignore[no-any-return]  # its callee is untyped
        x3 = x if x.dim() == 3 else x.flatten(0, -2).unsqueeze(0)
        y = self._adapted(x3, self._next_call())
        return y if x.dim() == 3 else y.view(*x.shape[:-1], -1)

    def _next_call(self) -> int:
        """Number of this call in the pass, from 0."""
        version, calls = self._pass
        call = calls if version == self.state.version else 0
        self._pass = self.state.version, call + 1
        return call

    def _adapted(self, x: Tensor, call: int) -> Tensor:
        seen = self.dropout(x)
        if isinstance(self.bank, PairBank) and self.mixer.fused:
            return self._fused(self.bank, x, seen, call)
        y0 = F.linear(x, self.weight, self.bias)
        return y0 + self.mixer(self.bank, seen, y0, self.weights(x, None, call)).to(y0.dtype)

    def _fused(self, bank: PairBank, x: Tensor, seen: Tensor, call: int) -> Tensor:
        lead = x.shape[:2]
        flat, seen2 = x.reshape(-1, x.shape[-1]), seen.reshape(-1, x.shape[-1])
        same = seen is x
        gate = self.group.gate_rows(x, call) if self.group is not None and same else None
        projection = bank.project(seen2, gate, source_of(x) if same else None)
        logits = projection.logits.view(*lead, -1) if gate is not None else None
        weights = self.flat_weights(x, logits, call)
        y = bank.combine(flat, self.weight, self.bias, projection, weights, same_input=same)
        return y.view(*lead, -1)

    def weights(self, x: Tensor, logits: Tensor | None, call: int) -> Tensor:
        """Weights of all experts, shared ones first, ``[B|1, T|1, (H,) E]``.

        Raises:
            ModelError: The route is of other rows than the input.
        """
        ones = torch.ones(1, device=x.device)
        if self.group is None:
            return ones.expand(1, 1, self.bank.n_experts)
        routed = _for_rows(self.group.route(x, logits, call).weights, x.shape[:2], self.site.name)
        if not self.shared:
            return routed
        return torch.cat([ones.expand(*routed.shape[:-1], self.shared), routed], -1)

    def flat_weights(self, x: Tensor, logits: Tensor | None, call: int) -> Tensor:
        """`weights` for every token: ``[B * T, E]``."""
        weights = self.weights(x, logits, call)
        return weights.expand(*x.shape[:2], -1).reshape(-1, weights.shape[-1])

    def tokens(self, client: int) -> list[float]:
        """Counted gate mass of every expert, shared ones first; needs ``state.count`` during the passes.

        It is empty where all weights are always 1.
        """
        group = self.group
        if group is None:
            return []
        return [float(group.tokens[client])] * self.shared + group.mass[client].tolist()

    @property
    def stackable(self) -> bool:
        """Whether the weights of this site may have a client axis.

        Dropout would draw other numbers than alone, and what is no token of a batch has no client.
        """
        bank = self.bank
        routed = self.group is None or self.group.router.stackable
        fused = type(self) is MoLoRALinear and isinstance(bank, PairBank) and self.mixer.fused
        return routed and fused and self.dropout.p == 0 and all(self.calls)


def _for_rows(weights: Tensor, lead: torch.Size, name: str) -> Tensor:
    """Weights ``[B|1, T|1, ...]`` for tokens in rows, or for the same tokens one after another, ``lead = [1, B * T]``.

    Raises:
        ModelError: They are neither.
    """
    rows, tokens = weights.shape[:2]
    if rows in {1, lead[0]} and tokens in {1, lead[1]}:
        return weights
    if lead[0] == 1 and lead[1] % rows == 0 and tokens in {1, lead[1] // rows}:
        return weights.expand(rows, lead[1] // rows, *weights.shape[2:]).flatten(0, 1).unsqueeze(0)
    if rows == 1 and tokens == lead[0] * lead[1]:
        return weights.reshape(*lead, *weights.shape[2:])
    raise ModelError(
        f"{name} runs on {lead[0]} rows of {lead[1]}, its route is for {rows} rows of {tokens}",
        mend='Set molora.scope = "site", or leave it out of molora.targets.',
    )


class ExpandLinear(MoLoRALinear):
    """First linear of a routed block: keeps the frozen output and one output per expert, ``[B, T, 1 + E, d_out]``."""

    def _adapted(self, x: Tensor, call: int) -> Tensor:
        assert self.group is not None
        self.group.route(x, None, call)
        y0 = F.linear(x, self.weight, self.bias)
        delta = self.bank.outputs(self.dropout(x), y0)
        return torch.cat([y0.unsqueeze(-2), y0.unsqueeze(-2) + delta], -2)


class ContractLinear(MoLoRALinear):
    """Last linear of a routed block: mixes ``[B, T, 1 + E, d_in]`` into ``[B, T, d_out]``."""

    def forward(self, x: Tensor) -> Tensor:
        """Mix the block's experts as deltas on the frozen block.

        With h_0 the frozen block's activation and h_e an expert's, the result is
        ``W (h_0 + sum_e w_e (h_e - h_0)) + b + sum_e w_e s B_e A_e h_e``: the plain mixture of blocks when the
        weights sum to 1, and bitwise the frozen block when all B are zero.
        """
        if not self.state.enabled:
            return self.base(x)  # type: ignore[no-any-return]  # its callee is untyped
        assert isinstance(self.bank, PairBank)
        h0, h = x[:, :, 0], x[:, :, 1:]
        w = self.weights(h0, None, self._next_call()).to(x.dtype)
        seen = self.dropout(h)
        delta = contract(seen, w * self.bank.scales[0], self.bank.A.to(x.dtype), self.bank.Bt.to(x.dtype))
        y = F.linear(mix(h0, h, w), self.weight, self.bias) + delta
        owner = self.bank.patch_expert
        if len(owner):
            frozen = torch.einsum("btpd,pd->btp", seen[:, :, owner], self.bank.patch_A.to(x.dtype))
            y = y + (frozen * w[..., owner]) @ self.bank.patch_Bt.to(x.dtype)
        return y
