"""Experts in a graph by their own arithmetic, traced: blocks of experts, experts mixed by parameters, other kinds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from molehill import registry
from molehill.errors import ModelError
from molehill.molora.adapted import Adapted
from molehill.molora.banks import FittedMixer
from molehill.molora.layer import ContractLinear, ExpandLinear
from molehill.wire.keys import NO_EXPERT, Key
from molehill_export.insertion import Work
from molehill_export.pieces import Contract, Delta, Expand, Mix, fingerprint
from molehill_export.products import Factors, factors_of
from molehill_export.routers import Routers
from molehill_export.stacks import common, stacks
from molehill_export.trace import DYNAMIC, piece
from molehill_protos.v1 import bundle_pb2 as pb

MIX = "gate.mix."  # begins the role of what an owner fits of a mixer, as a graph's input


class Beside:
    """Puts such experts beside their linears.

    Args:
        work: The insertion.
        routers: In the graph already.
        consumers: Nodes that read each tensor of the base.
    """

    def __init__(self, work: Work, routers: Routers, consumers: Mapping[str, list[Any]]) -> None:
        self._work, self._routers, self._consumers = work, routers, consumers

    def low_rank(self, name: str, site: Adapted) -> None:
        """Low-rank experts of a block, or mixed by parameters."""
        graph = self._work.graph
        slots, ranks, stored = self.pairs(name, site)
        inputs = list(stored.values())
        info = site.site._replace(layer=0, name="", n_layers=1)
        factors = (torch.zeros(sum(ranks), site.site.d_in), torch.zeros(sum(ranks), site.site.d_out))
        flat: list[dict[int, Any]] = [{} for _ in factors]
        tokens = {0: DYNAMIC, 1: DYNAMIC}
        sample, moving = self._routers.sample_weights(site, len(ranks))
        key = (type(site).__name__, info, ranks, tuple(sample.shape), fingerprint(site.mixer))
        x, y = torch.zeros(2, 3, site.site.d_in), torch.zeros(2, 3, site.site.d_out)
        for call, place in enumerate(graph.places[name]):
            if place.flat and (isinstance(site, ContractLinear | ExpandLinear)):
                raise ModelError(
                    f"{name} runs on tokens one after another, and a block of experts wants them in rows",
                    mend=f"Leave it out of molora.targets, or use topology {registry.those('topology', scope=None)}.",
                )
            if isinstance(site, ContractLinear):
                weights = self._routers.all_weights(site, slots, call)
                blocks = torch.zeros(2, 3, 1 + len(ranks), site.site.d_in)
                mixed = piece((*key, "mix"), Mix(), (blocks, sample), [tokens, moving])
                delta = piece((*key, "delta"), Contract(), (blocks, sample, *factors), [tokens, moving, *flat])
                (middle,) = mixed.insert(graph, [place.x, weights])
                graph.rewire(place.x, middle, self._consumers[place.x])
                self._work.add(place, delta.insert(graph, [place.x, weights, *inputs])[0])
            elif isinstance(site, ExpandLinear):
                both = piece(key, Expand(len(ranks)), (x, y, *factors), [tokens, tokens, *flat])
                frozen = graph.move(place.y)
                (out,) = both.insert(graph, [place.x, frozen, *inputs])
                graph.node("Identity", [out], out=place.y)
            else:
                self._beside(name, site, call, slots, ranks, stored)

    def other(self, name: str, site: Adapted) -> None:
        """Experts of any other kind: all tensors of their bank in float32, and its arithmetic as it was traced."""
        slots, ranks, inputs = self.tensors(name, site)
        for call in range(len(self._work.graph.places[name])):
            self._beside(name, site, call, slots, ranks, inputs)

    def pairs(self, name: str, site: Adapted) -> tuple[list[int], tuple[int, ...], dict[str, str]]:
        """Low-rank experts in the bundle: their slots, their ranks, and where the bank's parameters are."""
        f = factors_of(self._work, name, site)
        ranks = tuple(f.ranks)
        inputs = dict(zip(("A", "Bt"), self._rows(name, f), strict=True))
        form = pb.ROWS_FP32 if self._work.scheme == "fp32" else pb.ROWS_INT8
        self._work.out.sites.append(
            pb.Site(
                name=name, d_in=site.site.d_in, d_out=site.site.d_out, slots=f.slots, ranks=ranks, form=form,
                a=f"{name}/A", b=f"{name}/B",
            )
        )  # fmt: skip
        return f.slots, ranks, inputs

    def tensors(self, name: str, site: Adapted) -> tuple[list[int], tuple[int, ...], dict[str, str]]:
        """The same of experts of any other kind."""
        bank, ids, slots = site.bank, self._work.model.expert_ids(site), self._work.slots_of(site, routed=False)
        tree = self._work.model.tree(lambda key: key.site == name and key.kind != "gate")
        placed = [self._work.out.slots[slot].id for slot in slots]
        ranks = tuple(bank.ranks[ids.index(expert)] if expert else max(bank.ranks) for expert in placed)
        inputs: dict[str, str] = {}
        tensors = []
        for stack in stacks(bank):
            values = [stack.stored(tree[Key(name, expert, stack.role)]) if expert else stack.empty(rank)
                      for expert, rank in zip(placed, ranks, strict=True)]  # fmt: skip
            place = f"{name}/{stack.role}"
            weight = self._work.keep(place, np.concatenate(values))
            if stack.unit > 1:
                shape = self._work.graph.const([-1, *stack.row], np.int64)
                weight = self._work.graph.node("Reshape", [weight, shape])
            inputs[stack.parameter] = weight
            tensors.append(pb.SiteTensor(role=stack.role, name=place, by_rank=stack.by_rank, shape=stack.shape))
        for part in common(bank):
            value = tree[Key(name, NO_EXPERT, part.role)]
            inputs[part.parameter] = self._work.keep(f"{name}/{part.role}", value.T if part.transposed else value)
        self._work.out.sites.append(
            pb.Site(name=name, d_in=site.site.d_in, d_out=site.site.d_out, slots=slots, ranks=ranks, form=pb.TENSORS,
                    tensors=tensors)
        )  # fmt: skip
        return slots, ranks, inputs

    def _beside(
        self, name: str, site: Adapted, call: int, slots: list[int], ranks: tuple[int, ...], inputs: dict[str, str]
    ) -> None:
        """Add what a bank says beside a linear, traced with its parameters as inputs."""
        graph, place = self._work.graph, self._work.graph.places[name][call]
        info = site.site._replace(layer=0, name="", n_layers=1)
        bank = site.bank.like(info, ranks)
        values = [torch.zeros(bank.get_parameter(parameter).shape) for parameter in inputs]
        fits = self.fitted(name, site)
        values += [torch.zeros(shape) for shape in fits.values()]
        sample, moving = self._routers.sample_weights(site, len(ranks))
        tokens = {0: DYNAMIC, 1: DYNAMIC}
        key = (info, ranks, tuple(sample.shape), fingerprint(bank), fingerprint(site.mixer), *fits.values())
        x, y = torch.zeros(2, 3, site.site.d_in), torch.zeros(2, 3, site.site.d_out)
        module = Delta(site.mixer, bank, list(inputs))
        delta = piece(key, module, (x, y, sample, values), [tokens, tokens, moving, [{} for _ in values]])
        weights, given = self._routers.all_weights(site, slots, call), [*inputs.values(), *fits]
        frozen = graph.move(place.y)
        if place.flat:
            if site.group is not None:
                gate = self._routers.gate(site.group, call)
                weights = self._work.in_rows(self._routers.for_rows(weights, len(slots), gate, place, name))
            rows = self._work.in_rows(place.x), self._work.in_rows(frozen)
            (d,) = delta.insert(graph, [*rows, weights, *given])
            d = graph.node("Squeeze", [d, graph.const([0], np.int64)])
        else:
            (d,) = delta.insert(graph, [place.x, frozen, weights, *given])
        graph.node("Add", [frozen, d], out=place.y)

    def fitted(self, name: str, site: Adapted) -> dict[str, tuple[int, ...]]:
        """What the owner fits of a mixer: inputs of the graph with their shapes, 0 where nothing is given."""
        if not isinstance(site.mixer, FittedMixer):
            return {}
        known = {tensor.name for tensor in self._work.out.gate}
        found: dict[str, tuple[int, ...]] = {}
        for part, parameter in site.mixer.named_parameters():
            key, shape = Key(name, NO_EXPERT, f"{MIX}{part}").name, tuple(parameter.shape)
            if key not in known:  # a linear may run several times
                self._work.graph.default_input(key, np.zeros(shape, np.float32))
                router = next(i for i, group in enumerate(self._work.model.routers.values()) if group in site.groups)
                self._work.out.gate.append(pb.GateTensor(name=key, shape=shape, router=router, expert_axis=-1))
            found[key] = shape
        return found

    def _rows(self, name: str, f: Factors) -> list[str]:
        """A ``[R, d_in]`` and B ``[R, d_out]`` in the graph; rounded row by row when the bundle is quantised."""
        out = []
        for suffix, value in (("A", f.a), ("B", f.b)):
            if self._work.scheme == "fp32":
                out.append(self._work.keep(f"{name}/{suffix}", value))
                continue
            scale = np.maximum(np.abs(value).max(1), 1e-20).astype(np.float32) / 127
            q = self._work.keep(f"{name}/{suffix}", np.rint(value / scale[:, None]).astype(np.int8))
            out.append(
                self._work.graph.node("DequantizeLinear", [q, self._work.keep(f"{name}/{suffix}.scale", scale)], axis=0)
            )
        return out
