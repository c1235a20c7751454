"""What has experts in a base: their bank, who weighs them, and what both share with a pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from molehill.errors import ModelError
from molehill.molora.banks import Bank, Mixer, Peft
from molehill.molora.gain import Gain
from molehill.molora.interfaces import Site
from molehill.molora.routes import ForwardState, RouteGroup


class Adapted(nn.Module):
    """A bank of experts and what weighs them.

    Args:
        site: Its place.
        bank: Its experts, shared ones first.
        shared: Number of shared experts; their weight is always 1.
        group: Where the routed experts' weights come from; None when all weights are 1.
        mixer: How weights meet experts.
        dropout: Dropout on the experts' input.
        state: Shared state of the pass.
        tokens: For every call in a pass, whether the input are the tokens of the batch.
        gain: What the weights of all experts are multiplied by; None where they stay.
    """

    def __init__(
        self,
        site: Site,
        bank: Bank,
        *,
        shared: int,
        group: RouteGroup | None,
        mixer: Mixer,
        dropout: float,
        state: ForwardState,
        tokens: Sequence[bool] = (True,),
        gain: Gain | None = None,
    ) -> None:
        super().__init__()
        self.calls = tuple(tokens)
        self._pass = (-1, 0)  # version of the pass, calls in it
        self.site = site
        self.bank = bank
        self.shared = shared
        self.mixer = mixer
        self.gain = gain
        self.dropout = nn.Dropout(dropout)
        self.state = state
        # held outside the module tree: a group belongs to the model, not to one of its sites
        self.__dict__["group"] = group
        self.group: RouteGroup | None

    @property
    def groups(self) -> tuple[RouteGroup, ...]:
        """All that weigh its experts."""
        return () if self.group is None else (self.group,)

    @property
    def span(self) -> tuple[str, str]:
        """Paths in the base of the module whose input its experts read, and of the one whose output they add to."""
        return self.site.name, self.site.name

    @property
    def of_block(self) -> bool:
        """Whether it lies beside a whole block, with which it is computed."""
        return False

    @property
    def pairs(self) -> bool:
        """Whether its experts are low-rank changes of the weight of a linear."""
        return False

    @property
    def peft(self) -> Peft | None:
        """The peft method that an expert is here; None where peft has none."""
        return None

    @property
    def fused(self) -> bool:
        """Whether its experts are computed with the frozen product."""
        return False

    @property
    def stackable(self) -> bool:
        """Whether the weights of this site may have a client axis."""
        return False

    def forget(self) -> None:
        """Let go of what the last pass left."""

    def next_call(self) -> int:
        """Number of this call in the pass, from 0."""
        version, calls = self._pass
        call = calls if version == self.state.version else 0
        self._pass = self.state.version, call + 1
        return call

    def weights(self, x: Tensor, call: int) -> Tensor:
        """Weights of all experts, shared ones first, ``[B|1, T|1, (H,) E]``.

        Raises:
            ModelError: The route is of other rows than the input.
        """
        return self.weigh(self.group, x, call)

    def weigh(self, group: RouteGroup | None, x: Tensor, call: int, share: Tensor | None = None) -> Tensor:
        """`weights` by one of its routers; None leaves all always on.

        Args:
            group: The router.
            x: Input of the experts, ``[B, T, d]``.
            call: Number of the call in this pass.
            share: What the weights of routed experts are multiplied by, ``[B, T, 1]``.
        """
        weights = self._weighed(group, x, call, share)
        if self.gain is None:
            return weights
        if self.state.collect:
            self.state.records.scores.append((self.gain.score, self.gain.threshold))
        factor: Tensor = self.gain()
        return weights * factor

    def _weighed(self, group: RouteGroup | None, x: Tensor, call: int, share: Tensor | None) -> Tensor:
        ones = torch.ones(1, device=x.device)
        if group is None:
            return ones.expand(1, 1, self.bank.n_experts)
        route = group.route(x, None, call, share)
        routed = _for_rows(route.weights, x.shape[:2], self.site.name)
        if not self.shared:
            return routed
        if route.blend is None:
            return torch.cat([ones.expand(*routed.shape[:-1], self.shared), routed], -1)
        always, part = (_for_rows(each, x.shape[:2], self.site.name) for each in route.blend)
        if routed.dim() == 4:  # of every head
            always, part = always.unsqueeze(-2), part.unsqueeze(-2)
        routed = routed * part
        return torch.cat([always.expand(*routed.shape[:-1], self.shared), routed], -1)

    def tokens(self, client: int) -> list[float]:
        """Counted gate mass of every expert, shared ones first; needs ``state.count`` during the passes.

        It is empty where all weights are always 1. A token that several routers weigh counts once, by their mean.
        """
        if not self.groups:
            return []
        always = float(self.groups[0].tokens[client])
        routed = torch.stack([group.mass[client] for group in self.groups]).mean(0)
        return [always] * self.shared + routed.tolist()


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
