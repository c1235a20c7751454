"""MoLoRA into a graph: routers, experts and what a device may change, beside the marked linears of a base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from molehill.config import MethodRef
from molehill.errors import AdapterError, ConfigError
from molehill.molora.banks import FittedMixer, PairBank
from molehill.molora.model import MoLoRAModel
from molehill.wire.keys import Key
from molehill_export.base_quantise import Scheme
from molehill_export.beside import MIX, Beside
from molehill_export.blocks import Blocks
from molehill_export.graph import Graph
from molehill_export.insertion import Array, Inserted, Work
from molehill_export.joined import pack_attention
from molehill_export.products import Products
from molehill_export.routers import Routers, effective
from molehill_protos.v1 import bundle_pb2 as pb


def choose_slots(model: MoLoRAModel, experts: Sequence[str] | None, spare: int) -> list[pb.Slot]:
    """The slots of a bundle: the chosen experts in the model's order, then empty ones.

    Raises:
        ConfigError: An expert does not exist, or a shared one is left out.
    """
    wanted = list(model.experts if experts is None else experts)
    unknown = [name for name in wanted if name not in model.experts]
    if unknown:
        raise ConfigError(
            f"there is no expert {unknown[0]!r}", where="--experts", mend=f"There are {', '.join(model.experts)}."
        )
    shared = [name for name in model.experts if name.startswith("shared")]
    if not set(shared) <= set(wanted):
        raise ConfigError(
            "shared experts are always on and cannot be left out", where="--experts", mend=f"Add {', '.join(shared)}."
        )
    if len(wanted) == len(shared) and len(shared) < len(model.experts):
        raise ConfigError("no routed expert is left", where="--experts")
    chosen = [pb.Slot(id=name, shared=name in shared) for name in model.experts if name in wanted]
    return [*chosen, *(pb.Slot() for _ in range(spare))]


def insert(
    graph: Graph, model: MoLoRAModel, scorer: MethodRef, slots: Sequence[pb.Slot], scheme: Scheme, *,
    by_places: bool = False,
) -> Inserted:  # fmt: skip
    """Put experts and routers beside the marked linears.

    Args:
        graph: A base, quantised or not; changed in place.
        model: The adapter; its shared values, without personal residuals.
        scorer: What its routers were built from.
        slots: Of `choose_slots`.
        scheme: Of the experts.
        by_places: Give the graph the input by which experts are chosen by their places among a router's logits.

    Raises:
        AdapterError: A linear of the adapter is not marked in the graph, or does not run there as often as in training.
    """
    for name, site in model.sites.items():
        graph.places[name] = graph.between(*site.span)
        runs = len(graph.places.get(name, ()))
        if runs != len(site.calls):
            raise AdapterError(f"{name} runs {len(site.calls)} times in the model and {runs} times in the graph")
    work = Work(graph, model, list(slots), scheme)
    routers = Routers(work, scorer, by_places=by_places)
    products, beside = Products(work, routers), Beside(work, routers, graph.consumers())
    together: dict[tuple[Any, ...], list[str]] = {}
    for name, site in model.sites.items():
        if work.plain(site):
            read = tuple(place.x for place in graph.places[name])
            together.setdefault((read, id(site.group)), []).append(name)
    for names in together.values():
        products.insert(names)
    for name, site in model.sites.items():
        if work.plain(site) or site.of_block:
            continue
        if isinstance(site.bank, PairBank):
            beside.low_rank(name, site)
        else:
            beside.other(name, site)
    blocks = Blocks(work, routers, beside)
    for block in model.blocks:
        blocks.insert(block)
    pack_attention(graph)
    order = {name: i for i, name in enumerate(model.sites)}
    work.out.sites.sort(key=lambda site: order[site.name])
    return work.out


def gate_values(model: MoLoRAModel, inserted: Inserted) -> dict[str, Array]:
    """What a gate file holds: the routers for the bundle's slots (empty ones get zeros), and the head.

    Args:
        model: With the gate in question.
        inserted: Of `insert`.
    """
    values: dict[str, Array] = {}
    groups = list(model.routers.values())
    for tensor in inserted.gate:
        key = Key.parse(tensor.name)
        if tensor.router < 0:
            assert model.head is not None
            part = key.role.removeprefix("head.")
            value = getattr(model.head, part)
            if model.head.residual and model.head.personal:
                value = value + model.head.residual[part]
            values[tensor.name] = value.detach().float().numpy().copy()
            continue
        if key.role.startswith(MIX):
            mixer = model.sites[key.site].mixer
            assert isinstance(mixer, FittedMixer)
            value = mixer.get_parameter(key.role.removeprefix(MIX)).detach().float().cpu().numpy()
            values[tensor.name] = np.array(value if mixer.personal else np.zeros_like(value))
            continue
        group, slots = groups[tensor.router], inserted.routers[tensor.router].slots
        parts = {role: part for part, role in group.router.roles().items()}
        value = effective(group.router, parts[key.role])
        if tensor.expert_axis >= 0:
            first = model.site_of(group)
            ids = model.expert_ids(first)[first.shared :]
            rows = [np.take(value, ids.index(inserted.slots[i].id), tensor.expert_axis) if inserted.slots[i].id
                    else np.zeros_like(np.take(value, 0, tensor.expert_axis)) for i in slots]  # fmt: skip
            value = np.stack(rows, tensor.expert_axis)
        values[tensor.name] = np.ascontiguousarray(value, np.float32)
    return values
