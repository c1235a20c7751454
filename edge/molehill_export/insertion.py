"""What goes into a graph, and what all parts of the insertion share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molehill.molora.adapted import Adapted
from molehill.molora.banks import PairBank
from molehill.molora.layer import MoLoRALinear
from molehill.molora.model import MoLoRAModel
from molehill.molora.routes import RouteGroup
from molehill_export.base_quantise import Scheme
from molehill_export.graph import Graph, Place
from molehill_protos.v1 import bundle_pb2 as pb

Array = NDArray[Any]


@dataclass
class Inserted:
    """What was put into a graph.

    Attributes:
        experts: Contents of ``experts.safetensors``.
        gate: Names and shapes of the gate's inputs; their values are defaults of the graph.
        slots: See the manifest.
        sites: See the manifest.
        routers: See the manifest.
    """

    experts: dict[str, Array] = field(default_factory=dict)
    gate: list[pb.GateTensor] = field(default_factory=list)
    slots: list[pb.Slot] = field(default_factory=list)
    sites: list[pb.Site] = field(default_factory=list)
    routers: list[pb.Router] = field(default_factory=list)


class Work:
    """One insertion.

    Args:
        graph: A base, quantised or not; changed in place.
        model: The adapter.
        slots: Of the bundle.
        scheme: Of the experts.

    Attributes:
        out: What was put in so far.
    """

    def __init__(self, graph: Graph, model: MoLoRAModel, slots: list[pb.Slot], scheme: Scheme) -> None:
        self.graph, self.model, self.scheme = graph, model, scheme
        self.out = Inserted(slots=slots, gate=head_tensors(graph))

    def first(self, group: RouteGroup) -> Adapted:
        """The first site of a route."""
        return self.model.site_of(group)

    def slots_of(self, site: Adapted, *, routed: bool) -> list[int]:
        """Slots of a site's experts; empty slots are places for routed ones."""
        ids = self.model.expert_ids(site)
        ids = ids[site.shared :] if routed else ids
        empty = site.group is not None
        return [i for i, slot in enumerate(self.out.slots) if slot.id in ids or (not slot.id and empty)]

    def plain(self, site: Adapted) -> bool:
        """Whether the experts of a site can be products with their factors, weighted rank by rank."""
        return type(site) is MoLoRALinear and isinstance(site.bank, PairBank) and site.mixer.fused

    def keep(self, name: str, value: Array) -> str:
        """A weight in ``experts.safetensors``."""
        value = np.ascontiguousarray(value)
        self.out.experts[name] = value
        return self.graph.weight(name, value)

    def add(self, place: Place, delta: str) -> None:
        """Add something to what a linear gives."""
        frozen = self.graph.move(place.y)
        self.graph.node("Add", [frozen, delta], out=place.y)

    def in_rows(self, x: str) -> str:
        """``[N, d]`` as ``[1, N, d]``."""
        return self.graph.node("Unsqueeze", [x, self.graph.const([0], np.int64)])


def head_tensors(graph: Graph) -> list[pb.GateTensor]:
    """The parameters of a classifier's head among a graph's inputs."""
    found = [value for value in graph.inputs if value.name.startswith("head/")]
    return [
        pb.GateTensor(name=v.name, shape=[d.dim_value for d in v.type.tensor_type.shape.dim], router=-1, expert_axis=-1)
        for v in found
    ]
