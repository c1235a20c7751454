"""Routers in a graph: traced from the modules that training ran, with a bias and a mask that a device may change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from onnx import TensorProto, ValueInfoProto, helper
from torch import Tensor

from molehill.config import MethodRef
from molehill.errors import ModelError
from molehill.molora.adapted import Adapted
from molehill.molora.interfaces import RouteContext
from molehill.molora.router import Router
from molehill.molora.routes import RouteGroup
from molehill.wire.keys import NO_EXPERT, Key
from molehill_edge.gates import PLACES
from molehill_export.graph import Place
from molehill_export.insertion import Array, Work
from molehill_export.pieces import Route, RouteByPlaces, Routing
from molehill_export.trace import DYNAMIC, piece
from molehill_protos.v1 import bundle_pb2 as pb

_SMALLEST = float(torch.finfo(torch.float32).min)


@dataclass
class Gate:
    """A router in the graph.

    Attributes:
        weights: Its output ``[B, T, E]``, or ``[1, B * T, E]`` when flat.
        slots: Slot of each of its E.
        flat: Whether its tokens come one after another.
        blend: What the weights of always-on experts are multiplied by, and those of routed ones; None where both stay.
        spread: What was made of the weights.
    """

    weights: str
    slots: list[int]
    flat: bool
    blend: tuple[str, str] | None = None
    spread: dict[tuple[Any, ...], str] = field(default_factory=dict)


class Declared(NamedTuple):
    """A router whose inputs are in the graph.

    Attributes:
        number: Its place among all.
        slots: Slot of each of its E.
        module: What computes it.
        limits: What is added to its logits.
        inputs: Its parameters.
        shapes: Theirs.
    """

    number: int
    slots: list[int]
    module: Routing
    limits: str
    inputs: list[str]
    shapes: list[tuple[int, ...]]


class Routers:
    """All routers of a model, put into the graph.

    Args:
        work: The insertion.
        scorer: What they were built from.
        by_places: Let a caller choose experts by their places among the logits.

    Raises:
        ModelError: The scorer reads more than its input.
    """

    def __init__(self, work: Work, scorer: MethodRef, *, by_places: bool = False) -> None:
        self._work, self._scorer = work, scorer
        self._places = ""  # the input for that, where there is one
        self._gates: dict[tuple[int, int], Gate] = {}  # by router and number of the call
        self._limits: list[str] = []
        groups = list(work.model.routers.values())
        if any("experts" in group.router.scorer.reads for group in groups):
            raise ModelError(
                f"scorer {scorer.name!r} reads the experts themselves, which routers in a graph cannot",
                mend="Train with another molora.scorer.",
            )
        if any("base" in group.router.scorer.reads for group in groups):
            raise ModelError(
                f"scorer {scorer.name!r} reads what the base alone makes of a text, for which a graph has no pass",
                mend="Train with another molora.scorer, or ask the run itself: molehill generate.",
            )
        if any("prompt" in group.router.scorer.reads for group in groups):
            raise ModelError(
                f"scorer {scorer.name!r} reads the prompt of a text, for which a graph has no input",
                mend="Train with another molora.scorer, or ask the run itself: molehill generate.",
            )
        if any("base_route" in group.router.reads for group in groups):
            raise ModelError(
                f"scorer {scorer.name!r} goes by the base's own router, which a graph does not show",
                mend="Train with another molora.scorer, or ask the run itself: molehill generate.",
            )
        if any("domain_ids" in group.router.reads for group in groups):
            raise ModelError(
                f"scorer {scorer.name!r} goes by the domain of a text, for which a graph has no input",
                mend="Train with another molora.scorer, or ask the run itself: molehill generate.",
            )
        routed = [work.slots_of(work.first(group), routed=True) for group in groups]
        in_order = any(block.topology.ordered for block in work.model.blocks)
        fixed = (in_order or group.router.ordered for group in groups)
        counts = ((len(slots), group.router.n_experts) for group, slots in zip(groups, routed, strict=True))
        if any(one and there != wanted for one, (there, wanted) in zip(fixed, counts, strict=True)):
            raise ModelError(
                "this router tells experts apart by their place, so that none can be left out or added",
                mend="Export all experts, without --experts and --spare-slots.",
            )
        self._overrides([len(slots) for slots in routed])
        if groups and by_places:
            self._places = work.graph.default_input(PLACES, np.zeros(2, np.int64))
        self.declared: dict[int, Declared] = {}
        for index, (group, slots) in enumerate(zip(groups, routed, strict=True)):
            declared = self.declared[id(group)] = self._declare(index, group, slots)
            if not work.first(group).of_block:  # else it is a part of the block
                self._route(group, declared)

    def gate(self, group: RouteGroup, call: int) -> Gate:
        """The router of a group, in one of the calls of its site."""
        return self._gates[id(group), call]

    def spread(self, gate: Gate, layouts: Sequence[tuple[list[int], list[int]]]) -> str:
        """The weight of every rank ``[..., Q]`` of some sites, from the weights of a router."""
        key = tuple((tuple(slots), tuple(ranks)) for slots, ranks in layouts)
        if key not in gate.spread:
            slots = [
                slot for part, ranks in layouts for slot, rank in zip(part, ranks, strict=True) for _ in range(rank)
            ]
            matrix = np.zeros((len(gate.slots), len(slots)), np.float32)
            always = np.zeros(len(slots), np.float32)
            for rank, slot in enumerate(slots):
                if self._work.out.slots[slot].shared:
                    always[rank] = 1
                else:
                    matrix[gate.slots.index(slot), rank] = 1
            graph = self._work.graph
            name = graph.node("MatMul", [self._routed(gate), graph.const(matrix)])
            if always.any():
                given = graph.const(always)
                shared = given if gate.blend is None else graph.node("Mul", [gate.blend[0], given])
                name = graph.node("Add", [name, shared])
            gate.spread[key] = name
        return gate.spread[key]

    def for_rows(self, weights: str, width: int, gate: Gate, place: Place, name: str) -> str:
        """Weights ``[B, T, width]`` of a router for a linear whose tokens come in rows or one after another.

        Raises:
            ModelError: They are not one for every token, or the linear has rows and the router has none.
        """
        if not place.flat and not gate.flat:
            return weights
        site = self._work.model.sites[name]
        assert site.group is not None
        shape = self.sample_weights(site, 1)[0].shape
        if (gate.flat and not place.flat) or len(shape) != 3 or (shape[0] > 1 and shape[1] == 1):
            raise ModelError(
                f"{name} runs on tokens one after another, which its router cannot serve in a graph",
                mend='Train with molora.scope = "site", or leave it out of molora.targets.',
            )
        return self._work.graph.node("Reshape", [weights, self._work.graph.const([-1, width], np.int64)])

    def all_weights(self, site: Adapted, slots: list[int], call: int) -> str:
        """The weights of all experts of a site in one of its calls, shared ones first, times its gain."""
        weights = self._weights(site, slots, call)
        if site.gain is None or site.gain.on:
            return weights
        return self._work.graph.node("Mul", [weights, self._work.graph.const(0, np.float32)])

    def _weights(self, site: Adapted, slots: list[int], call: int) -> str:
        graph, n = self._work.graph, len(slots)
        if site.group is None:
            return graph.const(np.ones((1, 1, n), np.float32))
        gate = self.gate(site.group, call)
        assert slots[site.shared :] == gate.slots
        if not site.shared:
            return gate.weights
        routed = self._routed(gate)
        ones = graph.node("Shape", [routed], end=-1)
        shape = graph.node("Concat", [ones, graph.const([site.shared], np.int64)], axis=0)
        always = graph.const(1, np.float32) if gate.blend is None else gate.blend[0]
        return graph.node("Concat", [graph.node("Expand", [always, shape]), routed], axis=-1)

    def _routed(self, gate: Gate) -> str:
        """The weights of routed experts, after the blend."""
        return gate.weights if gate.blend is None else self._work.graph.node("Mul", [gate.weights, gate.blend[1]])

    def sample_weights(self, site: Adapted, n: int) -> tuple[Tensor, dict[int, Any]]:
        """Weights of the shape that the router gives, and the axes of them that vary."""
        if site.group is None:
            return torch.ones(1, 1, n), {}
        router = site.group.router
        ids = torch.zeros(2, 3, dtype=torch.int64)
        ctx = RouteContext(x=torch.zeros(2, 3, site.group.site.d_in), site=site.group.site, token_ids=ids)
        with torch.no_grad():
            route = router.route(ctx)
            shape = route.weights.shape
            if route.blend is not None:
                shape = torch.Size([*np.broadcast_shapes(shape[:-1], route.blend[0].shape[:-1]), shape[-1]])
            if self._places:  # which gives every logit a weight
                shape = torch.Size(np.broadcast_shapes(shape, route.logits.shape))
        return torch.ones(*shape[:-1], n), {axis: DYNAMIC for axis in (0, 1) if shape[axis] > 1}

    def _of_tokens(self, name: str, place: Place) -> str:
        """An input with one number of every token, in rows or one after another."""
        graph = self._work.graph
        return graph.node("Reshape", [name, graph.const([1, -1], np.int64)]) if place.flat else name

    def _overrides(self, sizes: Sequence[int]) -> None:
        """The inputs ``router_bias`` and ``expert_mask``, cut into one sum per router."""
        if not sizes:
            return
        graph, n = self._work.graph, sum(sizes)
        bias = graph.default_input("router_bias", np.zeros(n, np.float32))
        filled = [
            bool(self._work.out.slots[i].id)
            for g in self._work.model.routers.values()
            for i in self._work.slots_of(self._work.first(g), routed=True)
        ]
        mask = graph.default_input("expert_mask", np.array(filled))
        # 0 or the smallest float32, and three cheap nodes: Where with a mask is slower than all of them
        open_ = graph.node("Cast", [mask], to=1)
        shut = graph.node("Sub", [open_, graph.const(1, np.float32)])
        allowed = graph.node("Add", [graph.node("Mul", [shut, graph.const(-_SMALLEST, np.float32)]), bias])
        if len(sizes) == 1:
            self._limits = [allowed]
        else:
            self._limits = graph.split("Split", [allowed, graph.const(list(sizes), np.int64)], len(sizes), axis=0)

    def _declare(self, index: int, group: RouteGroup, slots: list[int]) -> Declared:
        """The inputs of a router, and the module that computes it."""
        router = group.router
        roles = router.roles()
        axes = {part: router.scorer.axes().get(part, -1) for part in roles}
        inputs, shapes = [], []
        for part, axis in axes.items():
            value = effective(router, part)
            shape = list(value.shape)
            if axis >= 0:
                shape[axis] = len(slots)
            key = Key(group.site.name, NO_EXPERT, roles[part]).name
            inputs.append(self._work.graph.default_input(key, np.zeros(shape, np.float32)))
            self._work.out.gate.append(pb.GateTensor(name=key, shape=shape, router=index, expert_axis=axis))
            shapes.append(tuple(shape))
        self._work.out.routers.append(pb.Router(name=group.site.name, slots=slots))
        scorer = self._scorer.build("scorer", d_in=group.site.d_in, n_experts=len(slots))
        kind = RouteByPlaces if self._places else Route
        module = kind(router, scorer, list(axes), group.site)
        return Declared(index, slots, module, self._limits[index], inputs, shapes)

    def further(self, module: Routing, place: Place) -> tuple[list[str], list[Tensor], list[dict[int, Any]]]:
        """What else a router takes in a graph: names, examples, and the axes of them that vary."""
        names: list[str] = []
        examples: list[Tensor] = []
        moving: list[dict[int, Any]] = []
        if self._places:
            names, examples, moving = [self._places], [torch.zeros(2, dtype=torch.int64)], [{}]
        reads = {"input_ids": module.reads_ids, "attention_mask": module.reads_mask}
        for name in (name for name, wanted in reads.items() if wanted):
            names.append(self._of_tokens(name, place))
            examples.append(torch.ones(2, 3, dtype=torch.int64))
            moving.append({0: DYNAMIC, 1: DYNAMIC})
        return names, examples, moving

    def show(self, index: int, names: list[str]) -> str:
        """Make the mean of some weights the output of a router; returns what the first of them are called now."""
        route, graph = f"route.{index}", self._work.graph
        graph.outputs.append(_float_output(route))
        if len(names) == 1 and graph.rename(names[0], route):
            return route
        graph.node("Identity" if len(names) == 1 else "Mean", names, out=route)
        return names[0]

    def _route(self, group: RouteGroup, of: Declared) -> None:
        """A router, once for every call of its site; its output is the mean of those that route tokens."""
        x, limits = torch.zeros(2, 3, group.site.d_in), torch.zeros(len(of.slots))
        examples = [torch.zeros(shape) for shape in of.shapes]
        shown: list[Gate] = []
        for call, place in enumerate(self._work.graph.places[group.site.name]):
            names, more, moving = self.further(of.module, place)
            traced = piece(
                of.module.key([tuple(x.shape), tuple(limits.shape), *of.shapes]), of.module,
                (x, limits, examples, more), [{0: DYNAMIC, 1: DYNAMIC}, {}, [{} for _ in examples], moving],
            )  # fmt: skip
            x_name = self._work.in_rows(place.x) if place.flat else place.x
            weights, *blend = traced.insert(self._work.graph, [x_name, of.limits, *of.inputs, *names])
            both = (blend[0], blend[1]) if blend else None
            gate = self._gates[id(group), call] = Gate(weights, of.slots, place.flat, both)
            if group.calls[call]:
                shown.append(gate)
        shown = shown or [self._gates[id(group), 0]]
        shown[0].weights = self.show(of.number, [gate.weights for gate in shown])


def effective(router: Router, part: str) -> Array:
    """A parameter of a router's scorer, with its residual where that counts."""
    return router.effective(part).detach().float().cpu().numpy()


def _float_output(name: str) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
