"""An adapted linear: the frozen module, its bank of experts and its route.

Linears that read one tensor are computed at once (`Fan`): one product with the first factors of all, and one gradient
for x. A transformer makes queries, keys and values of the same states, and both halves of a gated feed-forward block.
Which linears these are is what a pass through the base shows (`molehill.molora.trial.Trial.together`), not their
names. The function stays the same, only the order of its sums changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from molehill.molora.adapted import Adapted
from molehill.molora.banks import Bank, PairBank, Peft
from molehill.molora.block import contract, mix
from molehill.molora.fused import Output, down, up
from molehill.molora.interfaces import Site
from molehill.molora.recompute import source_of, version_of
from molehill.molora.routes import RouteGroup, route_together


class _Made(NamedTuple):
    """Outputs that wait for the linears they belong to: what they were made of, when, and they by linear."""

    x: Tensor
    version: tuple[int, int]
    outputs: dict[nn.Module, Tensor]


class Fan:
    """Sites that read one tensor; a site by itself is a fan of one.

    The first that is called in a pass computes all, the others take theirs. One that is called with another tensor, or
    once more, computes its own anew: what the trial saw may not be so for every input.

    Args:
        sites: Fused sites in the order of the pass; without dropout when there are several.
    """

    def __init__(self, sites: Sequence[MoLoRALinear]) -> None:
        self.sites = tuple(sites)
        self._pass = -1  # number of the last pass
        self._made: _Made | None = None

    def output(self, site: MoLoRALinear, x: Tensor, call: int) -> Tensor:
        """Output of one of the sites, ``[..., d_out]``.

        Args:
            site: The site that is called.
            x: Its input ``[..., d_in]``; two dimensions or more.
            call: Number of its call in this pass.

        Raises:
            ModelError: A route does not fit the input.
        """
        version = site.state.version, version_of(x)
        if self._pass != version[0]:
            self._pass = version[0]
            self._made = _Made(x, version, dict(zip(self.sites, self._compute(self.sites, x, call), strict=True)))
        made = self._made
        if made is not None and made.x is x and made.version == version and site in made.outputs:
            y = made.outputs.pop(site)
            if not made.outputs:
                self._made = None
            return y
        if made is not None and site in made.outputs and site.group is not None:
            site.group.reopen(call)  # its route was made of the other tensor
        return self._compute([site], x, call)[0]

    def forget(self) -> None:
        """Let go of what waits for sites that a broken pass never came to."""
        self._made = None

    def _compute(self, sites: Sequence[MoLoRALinear], x: Tensor, call: int) -> list[Tensor]:
        x3 = x if x.dim() == 3 else x.flatten(0, -2).unsqueeze(0)
        seen = sites[0].dropout(x3)
        same = seen is x3
        banks = [site.bank for site in sites if isinstance(site.bank, PairBank)]
        factors = [bank.factors() for bank in banks]
        rows = _open_routes(sites, x3, call) if same else {}
        source = source_of(x) if same else None
        projection = down(seen.flatten(0, 1), [A for A, _ in factors], list(rows.values()), source)
        if rows:
            logits = projection.logits.view(*x3.shape[:2], -1)
            scores = torch.split(logits, [gate.shape[-2] for gate in rows.values()], -1)
            route_together(dict(zip(rows, scores, strict=True)), x3, call)
        outputs = [
            Output(site.weight, site.bias, site.flat_weights(x3, call), Bt, bank.spread)
            for site, bank, (_, Bt) in zip(sites, banks, factors, strict=True)
        ]
        ys = up(x3.flatten(0, 1), projection, outputs, same_input=same)
        return [y.view(*x.shape[:-1], -1) for y in ys]


def _open_routes(sites: Sequence[MoLoRALinear], x: Tensor, call: int) -> dict[RouteGroup, Tensor]:
    """Router rows of the routes that this call is to compute and that are one product with x."""
    groups = dict.fromkeys(site.group for site in sites if site.group is not None)
    rows = {group: group.gate_rows(x, call) for group in groups}
    return {group: gate for group, gate in rows.items() if gate is not None}


class MoLoRALinear(Adapted):
    """A frozen linear with experts: ``y = W0 x + b + sum_e w_e delta_e(x)``.

    Args:
        base: ``nn.Linear`` or GPT-2's ``Conv1D``; frozen.
        site: Its place.
        bank: Its experts, shared ones first.
        parts: As of `Adapted`.
    """

    def __init__(self, base: nn.Module, site: Site, bank: Bank, **parts: Any) -> None:
        super().__init__(site, bank, **parts)
        self.base = base
        self.fan = Fan([self])

    @property
    def weight(self) -> Tensor:
        """Frozen weight ``[d_out, d_in]``."""
        weight: Tensor = self.base.weight  # type: ignore[assignment]  # modules hide their attributes' types
        return weight.t() if isinstance(self.base, Conv1D) else weight

    @property
    def bias(self) -> Tensor | None:
        """Frozen bias ``[d_out]`` or None."""
        return self.base.bias  # type: ignore[return-value]  # modules hide their attributes' types

    @property
    def pairs(self) -> bool:
        """Whether its experts are low-rank changes of the weight."""
        return isinstance(self.bank, PairBank)

    @property
    def peft(self) -> Peft | None:
        """What an expert of its bank is."""
        return self.bank.peft if self.bank.transposes or not isinstance(self.base, Conv1D) else None

    @property
    def fused(self) -> bool:
        """Whether its experts are computed with the frozen product, by a `Fan`."""
        return type(self) is MoLoRALinear and isinstance(self.bank, PairBank) and self.mixer.fused

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[..., d_out]`` for ``x [..., d_in]``; two dimensions or more."""
        if not self.state.enabled:
            return self.base(x)  # type: ignore[no-any-return]  # its callee is untyped
        if self.fused:
            return self.fan.output(self, x, self.next_call())
        x3 = x if x.dim() == 3 else x.flatten(0, -2).unsqueeze(0)
        y = self._adapted(x3, self.next_call())
        return y if x.dim() == 3 else y.view(*x.shape[:-1], -1)

    def _adapted(self, x: Tensor, call: int) -> Tensor:
        y0 = F.linear(x, self.weight, self.bias)
        return y0 + self.mixer(self.bank, self.dropout(x), y0, self.weights(x, call)).to(y0.dtype)

    def forget(self) -> None:
        """Let go of what a broken pass left."""
        self.fan.forget()

    def flat_weights(self, x: Tensor, call: int) -> Tensor:
        """`weights` for every token: ``[B * T, E]``."""
        weights = self.weights(x, call)
        return weights.expand(*x.shape[:2], -1).reshape(-1, weights.shape[-1])

    @property
    def stackable(self) -> bool:
        """Whether the weights of this site may have a client axis.

        Dropout would draw other numbers than alone, and what is no token of a batch has no client.
        """
        routed = self.group is None or self.group.router.stackable
        return routed and self.fused and self.dropout.p == 0 and all(self.calls) and self.gain is None


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
        w = self.weights(h0, self.next_call()).to(x.dtype)
        seen = self.dropout(h)
        delta = contract(seen, w * self.bank.scales[0], self.bank.A.to(x.dtype), self.bank.Bt.to(x.dtype))
        y = F.linear(mix(h0, h, w), self.weight, self.bias) + delta
        owner = self.bank.patch_expert
        if len(owner):
            frozen = torch.einsum("btpd,pd->btp", seen[:, :, owner], self.bank.patch_A.to(x.dtype))
            y = y + (frozen * w[..., owner]) @ self.bank.patch_Bt.to(x.dtype)
        return y
