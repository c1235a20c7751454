"""The modules that are traced: a router as it acts at inference, and experts that are more than two products.

Each takes its parameters as inputs, so that one piece serves every place of the same shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call

from molehill.molora.banks import Bank, FittedMixer, Mixer
from molehill.molora.block import contract, expand, mix
from molehill.molora.blocks import cut
from molehill.molora.interfaces import RouteContext, Site
from molehill.molora.router import Router, window
from molehill.molora.steps import BlockTopology, Step, Stepped

Weights: TypeAlias = Tensor | tuple[Tensor, Tensor, Tensor]


class Routing(nn.Module):
    """What routers in graphs share: the parameters are given.

    Args:
        router: As it was trained.
        scorer: One for as many experts as the bundle has places.
        names: Of its parameters, and then of the blend's.
        site: Where it sits.
    """

    def __init__(self, router: Router, scorer: nn.Module, names: Sequence[str], site: Site) -> None:
        super().__init__()
        self.scorer, self.names, self.blend = scorer, tuple(names), router.blend
        self.transforms, self.selector = router.transforms, router.selector.eval_form()
        self.reads_ids, self.reads_mask = "token_ids" in router.reads, self.selector.masked
        self.site = site if self.reads_ids else Site(0, "", 1, site.d_in, site.d_in)  # else one serves all layers

    def key(self, shapes: Sequence[tuple[int, ...]]) -> tuple[Any, ...]:
        """All that the traced nodes depend on."""
        return (
            type(self).__name__, fingerprint(self.scorer), *map(fingerprint, self.transforms),
            fingerprint(self.selector), fingerprint(self.blend) if self.blend else "", self.site.layer, *shapes,
        )  # fmt: skip

    def scores(
        self, x: Tensor, limits: Tensor, parameters: list[Tensor], told: Sequence[Tensor]
    ) -> tuple[Tensor, RouteContext]:
        """Logits ``[B|1, T|1, (H,) E]`` for inputs ``[B, T, d]`` and what is added, ``[E]``; and what is known.

        Args:
            x: The inputs.
            limits: What is added.
            parameters: Of the scorer.
            told: Of the tokens, ``[B, T]`` int64: their ids where the router reads them, and then whether they are
                real where it reads that.
        """
        of_tokens = iter(told)
        ctx = RouteContext(
            x=x,
            site=self.site,
            token_ids=next(of_tokens) if self.reads_ids else None,
            mask=next(of_tokens).bool() if self.reads_mask else None,
        )
        of_scorer = len(self.names) - self._blended
        given = dict(zip(self.names[:of_scorer], parameters[:of_scorer], strict=True))
        z: Tensor = functional_call(self.scorer, given, (ctx,)).float()
        for transform in self.transforms:
            z = transform(z, ctx)
        return z + limits, ctx

    def shared(self, weights: Tensor, x: Tensor, parameters: list[Tensor]) -> Weights:
        """The weights of routed experts, and what those of always-on and of routed ones are multiplied by, if anything.

        Args:
            weights: Of routed experts.
            x: The inputs.
            parameters: Of scorer and blend.
        """
        if self.blend is None:
            return weights
        of_blend = (name.partition(".")[2] for name in self.names[len(self.names) - self._blended :])
        given = dict(zip(of_blend, parameters[len(self.names) - self._blended :], strict=True))
        always, part = functional_call(self.blend, given, (x,))
        return weights, always, part

    @property
    def _blended(self) -> int:
        """Number of the blend's parameters."""
        return 0 if self.blend is None else len(list(self.blend.parameters()))


class Route(Routing):
    """A router as it acts at inference."""

    def forward(self, x: Tensor, limits: Tensor, parameters: list[Tensor], further: list[Tensor]) -> Weights:
        """Weights ``[B|1, T|1, (H,) E]`` for inputs ``[B, T, d]`` and what is added to the logits, ``[E]``.

        See `Routing.shared` for what comes with them, and `Routing.scores` for what is told further.
        """
        z, ctx = self.scores(x, limits, parameters, further)
        return self.shared(self.selector(z, ctx).weights, x, parameters)


class RouteByPlaces(Routing):
    """A router of whose experts a caller may choose those at some places, in place of the selector's choice."""

    def forward(self, x: Tensor, limits: Tensor, parameters: list[Tensor], further: list[Tensor]) -> Weights:
        """Weights as of `Route`; the first of what is further told are places.

        They are ``[2]``: the first and the one after the last, or 0 and 0 for none.
        """
        places, *told = further
        z, ctx = self.scores(x, limits, parameters, told)
        weights, _ = window(z, places[0], places[1])
        return self.shared(torch.where(places[1] > 0, weights, self.selector(z, ctx).weights), x, parameters)


class Delta(nn.Module):
    """What a bank adds to a frozen output, its parameters given in the order of their names, then those of the mixer.

    Args:
        mixer: Of the site.
        bank: The bank.
        names: Of the bank's parameters.
    """

    def __init__(self, mixer: Mixer, bank: Bank, names: Sequence[str]) -> None:
        super().__init__()
        self.bank, self.names = bank, tuple(f"bank.{name}" for name in names)
        if isinstance(mixer, FittedMixer):
            mixer = copy(mixer)
            mixer.personal = True  # it is so for everybody, and the shared gate has zeros
            self.names += tuple(f"mixer.{name}" for name, _ in mixer.named_parameters())
        self.mixed = _Mixed(mixer, bank)

    def forward(self, x: Tensor, y: Tensor, weights: Tensor, factors: list[Tensor]) -> Tensor:
        """The delta ``[B, T, d_out]`` for input, frozen output and weights."""
        out: Tensor = functional_call(self.mixed, dict(zip(self.names, factors, strict=True)), (x, y, weights))
        return out


class _Mixed(nn.Module):
    def __init__(self, mixer: Mixer, bank: Bank) -> None:
        super().__init__()
        self.mixer, self.bank = mixer, bank

    def forward(self, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        return self.mixer(self.bank, x, y, weights)


class Beneath(nn.Module):
    """All that lies beside a block: routers and banks, in the steps of its topology.

    Args:
        topology: Of the block.
        steps: Its steps.
        routes: What routes each of them; None where the experts are always on.
        deltas: What each bank adds.
        shared: How many experts of each bank are always on.
        gains: What the weights of each bank are multiplied by.
    """

    def __init__(
        self, topology: BlockTopology, steps: Sequence[Step], routes: Sequence[Routing | None],
        deltas: Sequence[Delta], shared: Sequence[int], gains: Sequence[float],
    ) -> None:  # fmt: skip
        super().__init__()
        self.topology, self.steps, self.shared, self.gains = topology, tuple(steps), tuple(shared), tuple(gains)
        self.routes = nn.ModuleList(route for route in routes if route is not None)
        self.deltas = nn.ModuleList(deltas)
        numbers = iter(range(len(self.routes)))
        self.numbers = tuple(None if route is None else next(numbers) for route in routes)

    def banks(self) -> list[Bank]:
        """The banks by number."""
        return [delta.bank for delta in self.deltas if isinstance(delta, Delta)]

    def forward(
        self, x: Tensor, y: Tensor, limits: list[Tensor], gates: list[list[Tensor]], factors: list[list[Tensor]],
        further: list[Tensor],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """The delta ``[B, T, d]``, and the weights of the routed experts of every step that has a router.

        Args:
            x: Input of the block ``[B, T, d]``.
            y: Its frozen output.
            limits: What is added to the logits of every router, ``[E]``.
            gates: Parameters of every router.
            factors: Parameters of every bank.
            further: What else routers take, see `molehill_export.routers.Routers.further`.
        """
        shown: list[Tensor] = []

        def run(step: int, x: Tensor, share: Tensor | None = None) -> Stepped:
            (bank, _, parts, _), number = self.steps[step], self.numbers[step]
            z, always = cut(x, parts), torch.ones(1, 1, 1)
            if number is None:
                weights = always.expand(1, 1, self.shared[bank])
            else:
                more = [each.repeat_interleave(parts, 1) if each.dim() > 1 else each for each in further]  # of tokens
                found = self.routes[number](z, limits[number], gates[number], more)
                weights, *blend = found if isinstance(found, tuple) else (found,)
                if share is not None:
                    weights = weights * cut(share, parts)
                full = weights.expand(*z.shape[:2], -1)
                shown.append(full.reshape(x.shape[0], x.shape[1], parts, -1).mean(2))
                if blend:
                    always, weights = blend[0], weights * blend[1]
                weights = torch.cat([always.expand(*weights.shape[:-1], self.shared[bank]), weights], -1)
            weights = weights * self.gains[bank]
            delta = self.deltas[bank](z, cut(y, parts), weights, factors[bank])
            return Stepped(delta.reshape(x.shape), None if number is None else weights[..., self.shared[bank] :])

        return self.topology.delta(run, x, y), *shown


class Expand(nn.Module):
    """A first linear of a routed block: the frozen output and every expert's.

    Args:
        experts: Their number.
    """

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor, y: Tensor, A: Tensor, Bt: Tensor) -> Tensor:
        """``[B, T, 1 + E, d_out]``."""
        frozen = y.unsqueeze(-2)
        return torch.cat([frozen, frozen + expand(x, A, Bt, self.experts)], -2)


class Mix(nn.Module):
    """What the frozen last linear of a routed block reads."""

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """``[B, T, d_in]`` from ``[B, T, 1 + E, d_in]`` and weights ``[B, T, E]``."""
        return mix(x[:, :, 0], x[:, :, 1:], weights)


class Contract(nn.Module):
    """What the experts add to the last linear of a routed block."""

    def forward(self, x: Tensor, weights: Tensor, A: Tensor, Bt: Tensor) -> Tensor:
        """``[B, T, d_out]`` from ``[B, T, 1 + E, d_in]`` and weights ``[B, T, E]``."""
        return contract(x[:, :, 1:], weights, A, Bt)


def fingerprint(part: Any) -> str:
    """A method with its parameters, without its weights."""
    values = {
        k: v
        for k, v in sorted(vars(part).items())
        if isinstance(v, str | int | float | bool | tuple) or hasattr(v, "__dataclass_fields__")
    }
    values.pop("training", None)
    inner = [fingerprint(v) for k, v in sorted(vars(part).items()) if hasattr(v, "eval_form")]
    return f"{type(part).__module__}.{type(part).__qualname__}({values}){inner}"
