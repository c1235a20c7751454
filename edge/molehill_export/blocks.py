"""Experts beside whole blocks in a graph: routers, banks and what a topology does between them, traced as one piece."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from molehill.molora.banks import PairBank
from molehill.molora.blocks import Block
from molehill_export.beside import Beside
from molehill_export.graph import Place
from molehill_export.insertion import Work
from molehill_export.pieces import Beneath, Delta, fingerprint
from molehill_export.routers import Declared, Routers
from molehill_export.trace import DYNAMIC, piece


class _Stored(NamedTuple):
    """A bank in the bundle: the ranks of its experts, where its parameters are, and what is fitted of its mixer."""

    ranks: tuple[int, ...]
    inputs: dict[str, str]
    fits: dict[str, tuple[int, ...]]


class Blocks:
    """Puts such experts beside their blocks.

    Args:
        work: The insertion.
        routers: In the graph as far as their inputs.
        beside: Puts the tensors of experts into the bundle.
    """

    def __init__(self, work: Work, routers: Routers, beside: Beside) -> None:
        self._work, self._routers, self._beside = work, routers, beside

    def insert(self, block: Block) -> None:
        """Add what lies beside a block, in each of its runs."""
        stored = []
        for bank in block.adapted:
            store = self._beside.pairs if isinstance(bank.bank, PairBank) else self._beside.tensors
            _, ranks, inputs = store(bank.site.name, bank)
            stored.append(_Stored(ranks, inputs, self._beside.fitted(bank.site.name, bank)))
        declared = [None if group is None else self._routers.declared[id(group)] for group in block.routers]
        routed = [each for each in declared if each is not None]
        module, key = self._module(block, declared, stored)
        shown: list[list[str]] = [[] for _ in routed]
        for place in self._work.graph.places[block.span.site.name]:
            for some, weights in zip(shown, self._run(block, module, key, routed, stored, place), strict=True):
                some.append(weights)
        for each, some in zip(routed, shown, strict=True):
            self._routers.show(each.number, some)

    def _module(
        self, block: Block, declared: list[Declared | None], stored: list[_Stored]
    ) -> tuple[Beneath, tuple[Any, ...]]:
        """What is traced, and all that its nodes depend on."""
        deltas, keys, shared = [], [], []
        gains = [float(bank.gain is None or bank.gain.on) for bank in block.adapted]
        for bank, (ranks, inputs, fits) in zip(block.adapted, stored, strict=True):
            info = bank.site._replace(layer=0, name="", n_layers=1)
            like = bank.bank.like(info, ranks)
            deltas.append(Delta(bank.mixer, like, list(inputs)))
            shared.append(len(ranks) if bank.group is None else bank.shared)
            keys.append((info, ranks, shared[-1], fingerprint(like), fingerprint(bank.mixer), *fits.values()))
        routes = [None if each is None else each.module for each in declared]
        of_routes = (each and each.module.key([(len(each.slots),), *each.shapes]) for each in declared)
        key = (fingerprint(block.topology), block.steps, *gains, *keys, *of_routes)
        return Beneath(block.topology, block.steps, routes, deltas, shared, gains), key

    def _run(
        self, block: Block, module: Beneath, key: tuple[Any, ...], routed: list[Declared], stored: list[_Stored],
        place: Place,
    ) -> list[str]:  # fmt: skip
        """Add it to one run of the block; returns the weights of the routed experts of every router."""
        graph, routers = self._work.graph, self._routers
        limits = [torch.zeros(len(each.slots)) for each in routed]
        gates = [[torch.zeros(shape) for shape in each.shapes] for each in routed]
        factors = [
            [torch.zeros(shape) for shape in (*(bank.get_parameter(name).shape for name in inputs), *fits.values())]
            for bank, (_, inputs, fits) in zip(module.banks(), stored, strict=True)
        ]
        x, y = (torch.zeros(2, 3, block.span.site.d_in) for _ in range(2))
        tokens = {0: DYNAMIC, 1: DYNAMIC}
        still: list[Any] = [[{} for _ in limits], *([[{} for _ in each] for each in some] for some in (gates, factors))]
        further, examples, moving = routers.further(routed[0].module, place) if routed else ([], [], [])
        traced = piece(key, module, (x, y, limits, gates, factors, examples), [tokens, tokens, *still, moving])
        frozen = graph.move(place.y)
        ends = [self._work.in_rows(each) if place.flat else each for each in (place.x, frozen)]
        given = [name for each in routed for name in each.inputs]
        weights = [name for _, inputs, fits in stored for name in (*inputs.values(), *fits)]
        delta, *routes = traced.insert(graph, [*ends, *(each.limits for each in routed), *given, *weights, *further])
        delta = graph.node("Squeeze", [delta, graph.const([0], np.int64)]) if place.flat else delta
        graph.node("Add", [frozen, delta], out=place.y)
        return routes
