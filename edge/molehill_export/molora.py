"""MoLoRA into a graph: routers, experts and what a device may change, beside the marked linears of a base.

Routers are traced from the very modules that training ran, in the selector's ``eval_form()``. Experts take the dense
form: all of them are multiplied, and the weights of those not chosen are zero. Linears that read the same tensor share
one product with all their A.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import TensorProto, ValueInfoProto, helper
from torch import Tensor

from molehill import registry
from molehill.config import MethodRef
from molehill.errors import AdapterError, ConfigError, ModelError
from molehill.molora.banks import PairBank, Part
from molehill.molora.interfaces import RouteContext
from molehill.molora.layer import ContractLinear, ExpandLinear, MoLoRALinear, RouteGroup
from molehill.molora.model import MoLoRAModel
from molehill.molora.router import Router
from molehill.wire.keys import NO_EXPERT, Key
from molehill_edge.quantise import block_of, output_scale, pack4, quantise
from molehill_export.base_quantise import Activations, Scheme
from molehill_export.graph import MICROSOFT, Graph, Place
from molehill_export.pieces import Contract, Delta, Expand, Mix, Route, fingerprint
from molehill_export.trace import DYNAMIC, piece
from molehill_protos.v1 import bundle_pb2 as pb

BLOCK_A, BLOCK_B = 128, 128  # of int4 experts
_SMALLEST = float(torch.finfo(torch.float32).min)
_FORMS = {"fp32": pb.GEMM_FP32, "int8": pb.GEMM_INT8, "int4": pb.GEMM_INT4}

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


class Factors(NamedTuple):
    """The low-rank experts of one site with their scale in ``b``, patches included.

    Attributes:
        slots: Index of every expert's slot.
        ranks: Rank of each.
        a: ``[R, d_in]``.
        b: ``[R, d_out]``.
    """

    slots: list[int]
    ranks: list[int]
    a: Array
    b: Array


@dataclass
class _Gate:
    """A router in the graph: its weights ``[B, T, E]`` (``[1, B * T, E]`` when flat), and what was made of them."""

    weights: str
    slots: list[int]
    flat: bool
    spread: dict[tuple[Any, ...], str] = field(default_factory=dict)


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


def insert(graph: Graph, model: MoLoRAModel, scorer: MethodRef, slots: Sequence[pb.Slot], scheme: Scheme) -> Inserted:
    """Put experts and routers beside the marked linears.

    Args:
        graph: A base, quantised or not; changed in place.
        model: The adapter; its shared values, without personal residuals.
        scorer: What its routers were built from.
        slots: Of `choose_slots`.
        scheme: Of the experts.

    Raises:
        AdapterError: A linear of the adapter is not marked in the graph, or does not run there as often as in training.
    """
    for name, site in model.sites.items():
        runs = len(graph.places.get(name, ()))
        if runs != len(site.calls):
            raise AdapterError(f"{name} runs {len(site.calls)} times in the model and {runs} times in the graph")
    work = _Work(graph, model, scorer, list(slots), scheme)
    return work.run()


def effective(router: Router, part: str) -> Array:
    """A parameter of a router's scorer, with its residual where that counts."""
    value = dict(router.scorer.named_parameters())[part]
    if router.residual and router.personal:
        value = value + router.residual[part.replace(".", "__")]
    return value.detach().float().cpu().numpy()


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
        group, slots = groups[tensor.router], inserted.routers[tensor.router].slots
        parts = {role: part for part, role in group.router.roles().items()}
        value = effective(group.router, parts[key.role])
        if tensor.expert_axis >= 0:
            first = next(site for site in model.sites.values() if site.group is group)
            ids = model.expert_ids(first)[first.shared :]
            rows = [np.take(value, ids.index(inserted.slots[i].id), tensor.expert_axis) if inserted.slots[i].id
                    else np.zeros_like(np.take(value, 0, tensor.expert_axis)) for i in slots]  # fmt: skip
            value = np.stack(rows, tensor.expert_axis)
        values[tensor.name] = np.ascontiguousarray(value, np.float32)
    return values


def head_tensors(graph: Graph) -> list[pb.GateTensor]:
    """The parameters of a classifier's head among a graph's inputs."""
    found = [value for value in graph.inputs if value.name.startswith("head/")]
    return [
        pb.GateTensor(name=v.name, shape=[d.dim_value for d in v.type.tensor_type.shape.dim], router=-1, expert_axis=-1)
        for v in found
    ]


class _Work:
    """One insertion."""

    def __init__(
        self, graph: Graph, model: MoLoRAModel, scorer: MethodRef, slots: list[pb.Slot], scheme: Scheme
    ) -> None:
        self.graph, self.model, self.scorer, self.scheme = graph, model, scorer, scheme
        self.out = Inserted(slots=slots, gate=head_tensors(graph))
        self.quantised = Activations(graph)
        self.gates: dict[tuple[int, int], _Gate] = {}  # by router and number of the call
        self.limits: list[str] = []

    def run(self) -> Inserted:
        sites = self.model.sites
        groups = list(self.model.routers.values())
        routed = [self._slots_of(self._first(group), routed=True) for group in groups]
        self._overrides([len(slots) for slots in routed])
        for index, (group, slots) in enumerate(zip(groups, routed, strict=True)):
            self._route(index, group, slots)
        consumers = self.graph.consumers()
        together: dict[tuple[Any, ...], list[str]] = {}
        for name, site in sites.items():
            if self._plain(site):
                read = tuple(place.x for place in self.graph.places[name])
                together.setdefault((read, id(site.group)), []).append(name)
        for names in together.values():
            self._products(names)
        for name, site in sites.items():
            if not isinstance(site.bank, PairBank):
                self._other(name, site)
            elif not self._plain(site):
                self._traced(name, site, consumers)
        order = {name: i for i, name in enumerate(sites)}
        self.out.sites.sort(key=lambda site: order[site.name])
        return self.out

    # ---- who is where ----------------------------------------------------------------------------------------

    def _first(self, group: RouteGroup) -> MoLoRALinear:
        return next(site for site in self.model.sites.values() if site.group is group)

    def _slots_of(self, site: MoLoRALinear, *, routed: bool) -> list[int]:
        """Slots of a site's experts; empty slots are places for routed ones."""
        ids = self.model.expert_ids(site)
        ids = ids[site.shared :] if routed else ids
        empty = site.group is not None
        return [i for i, slot in enumerate(self.out.slots) if slot.id in ids or (not slot.id and empty)]

    def _plain(self, site: MoLoRALinear) -> bool:
        return type(site) is MoLoRALinear and isinstance(site.bank, PairBank) and site.mixer.fused

    def _factors(self, name: str, site: MoLoRALinear) -> Factors:
        ids, slots = self.model.expert_ids(site), self._slots_of(site, routed=False)
        bank = site.bank
        assert isinstance(bank, PairBank)
        tree = self.model.tree(lambda key: key.site == name and key.expert != NO_EXPERT)
        a, b, ranks = [], [], []
        for slot in slots:
            expert = self.out.slots[slot].id
            A, B = np.zeros((0, site.site.d_in), np.float32), np.zeros((0, site.site.d_out), np.float32)
            if expert:
                patch_A, patch_B = (each.numpy() for each in bank.patches(ids.index(expert)))
                A = np.concatenate([tree[Key(name, expert, "A")], patch_A])
                B = np.concatenate([tree[Key(name, expert, "B")].T, patch_B.T])
            a.append(A)
            b.append(B)
            ranks.append(len(B))
        widest = max(ranks)
        even = not self._plain(site)  # traced arithmetic wants equal ranks
        for i, slot in enumerate(slots):
            short = widest - ranks[i] if even or not self.out.slots[slot].id else 0
            if short:
                a[i] = np.pad(a[i], ((0, short), (0, 0)))
                b[i] = np.pad(b[i], ((0, short), (0, 0)))
                ranks[i] = widest
        return Factors(slots, ranks, np.concatenate(a).astype(np.float32), np.concatenate(b).astype(np.float32))

    # ---- routers ---------------------------------------------------------------------------------------------

    def _overrides(self, sizes: Sequence[int]) -> None:
        """The inputs ``router_bias`` and ``expert_mask``, cut into one sum per router."""
        if not sizes:
            return
        graph, n = self.graph, sum(sizes)
        bias = graph.default_input("router_bias", np.zeros(n, np.float32))
        filled = [
            bool(self.out.slots[i].id)
            for g in self.model.routers.values()
            for i in self._slots_of(self._first(g), routed=True)
        ]
        mask = graph.default_input("expert_mask", np.array(filled))
        # 0 or the smallest float32, and three cheap nodes: Where with a mask is slower than all of them
        open_ = graph.node("Cast", [mask], to=1)
        shut = graph.node("Sub", [open_, graph.const(1, np.float32)])
        allowed = graph.node("Add", [graph.node("Mul", [shut, graph.const(-_SMALLEST, np.float32)]), bias])
        if len(sizes) == 1:
            self.limits = [allowed]
        else:
            self.limits = graph.split("Split", [allowed, graph.const(list(sizes), np.int64)], len(sizes), axis=0)

    def _route(self, index: int, group: RouteGroup, slots: list[int]) -> None:
        """A router, once for every call of its site; its output is the mean of those that route tokens."""
        router = group.router
        axes, roles = router.scorer.axes(), router.roles()
        inputs, examples = [], []
        for part, axis in axes.items():
            value = effective(router, part)
            shape = list(value.shape)
            if axis >= 0:
                shape[axis] = len(slots)
            key = Key(group.site.name, NO_EXPERT, roles[part]).name
            inputs.append(self.graph.default_input(key, np.zeros(shape, np.float32)))
            self.out.gate.append(pb.GateTensor(name=key, shape=shape, router=index, expert_axis=axis))
            examples.append(torch.zeros(shape))
        scorer = registry.build(
            "scorer", self.scorer.name, self.scorer.params, d_in=group.site.d_in, n_experts=len(slots), n_tasks=1
        )
        module = Route(router, scorer, list(axes))
        x = torch.zeros(2, 3, group.site.d_in)
        args = (x, torch.zeros(len(slots)), examples)
        dynamic = [{0: DYNAMIC, 1: DYNAMIC}, {}, [{} for _ in examples]]
        traced = piece(module.key([tuple(t.shape) for t in (x, args[1], *examples)]), module, args, dynamic)
        shown = []
        for call, place in enumerate(self.graph.places[group.site.name]):
            x_name = self._in_rows(place.x) if place.flat else place.x
            (weights,) = traced.insert(self.graph, [x_name, self.limits[index], *inputs])
            self.gates[id(group), call] = _Gate(weights, slots, place.flat)
            if group.calls[call]:
                shown.append(weights)
        route = f"route.{index}"
        shown = shown or [self.gates[id(group), 0].weights]
        self.graph.node("Identity" if len(shown) == 1 else "Mean", shown, out=route)
        self.graph.outputs.append(_float_output(route))
        self.out.routers.append(pb.Router(name=group.site.name, slots=slots))

    def _spread(self, gate: _Gate, layouts: Sequence[tuple[list[int], list[int]]]) -> str:
        """The weight of every rank ``[..., Q]`` of some sites, from the weights of a router."""
        key = tuple((tuple(slots), tuple(ranks)) for slots, ranks in layouts)
        if key not in gate.spread:
            slots = [
                slot for part, ranks in layouts for slot, rank in zip(part, ranks, strict=True) for _ in range(rank)
            ]
            matrix = np.zeros((len(gate.slots), len(slots)), np.float32)
            always = np.zeros(len(slots), np.float32)
            for rank, slot in enumerate(slots):
                if self.out.slots[slot].shared:
                    always[rank] = 1
                else:
                    matrix[gate.slots.index(slot), rank] = 1
            name = self.graph.node("MatMul", [gate.weights, self.graph.const(matrix)])
            if always.any():
                name = self.graph.node("Add", [name, self.graph.const(always)])
            gate.spread[key] = name
        return gate.spread[key]

    def _in_rows(self, x: str) -> str:
        """``[N, d]`` as ``[1, N, d]``."""
        return self.graph.node("Unsqueeze", [x, self.graph.const([0], np.int64)])

    def _for_rows(self, weights: str, width: int, gate: _Gate, place: Place, name: str) -> str:
        """Weights ``[B, T, width]`` of a router for a linear whose tokens come in rows or one after another.

        Raises:
            ModelError: They are not one for every token, or the linear has rows and the router has none.
        """
        if not place.flat and not gate.flat:
            return weights
        site = self.model.sites[name]
        assert site.group is not None
        shape = self._sample_weights(site, 1)[0].shape
        if (gate.flat and not place.flat) or len(shape) != 3 or (shape[0] > 1 and shape[1] == 1):
            raise ModelError(
                f"{name} runs on tokens one after another, which its router cannot serve in a graph",
                mend='Train with molora.scope = "site", or leave it out of molora.targets.',
            )
        return self.graph.node("Reshape", [weights, self.graph.const([-1, width], np.int64)])

    # ---- experts beside a linear: products ---------------------------------------------------------------------

    def _products(self, names: list[str]) -> None:
        """Sites that read one tensor, call by call: one product with all A, one with each B."""
        graph, form = self.graph, _FORMS[self.scheme]
        factors = [self._factors(name, self.model.sites[name]) for name in names]
        a_name = f"{names[0]}/A"
        b_scales = [output_scale(f.b) for f in factors]
        sizes = [sum(f.ranks) for f in factors]
        group = self.model.sites[names[0]].group
        for call, place in enumerate(graph.places[names[0]]):
            h = self._first_product(place.x, a_name, [(f.a.T, f.b, s) for f, s in zip(factors, b_scales, strict=True)])
            if group is not None:
                gate = self.gates[id(group), call]
                gates = self._spread(gate, [(f.slots, f.ranks) for f in factors])
                h = graph.node("Mul", [h, self._for_rows(gates, sum(sizes), gate, place, names[0])])
            parts = [h] if len(names) == 1 else graph.split(
                "Split", [h, graph.const(sizes, np.int64)], len(names), axis=-1
            )  # fmt: skip
            for name, f, scale, part in zip(names, factors, b_scales, parts, strict=True):
                self._add(graph.places[name][call], self._second_product(part, f"{name}/B", f, scale))
        start = 0
        for name, f, size in zip(names, factors, sizes, strict=True):
            b_block = block_of(size, BLOCK_B) if self.scheme == "int4" else 0
            site = self.model.sites[name].site
            self.out.sites.append(
                pb.Site(
                    name=name, d_in=site.d_in, d_out=site.d_out, slots=f.slots, ranks=f.ranks, form=form, a=a_name,
                    a_start=start, b=f"{name}/B", a_block=block_of(site.d_in, BLOCK_A) if b_block else 0,
                    b_block=b_block,
                )
            )  # fmt: skip
            start += size

    def _first_product(self, x: str, name: str, parts: Sequence[tuple[Array, Array, Array]]) -> str:
        graph = self.graph
        if self.scheme == "fp32":
            return graph.node("MatMul", [x, self._keep(name, np.concatenate([a for a, _, _ in parts], 1))])
        if self.scheme == "int8":
            q = [quantise(a, b, scale, 8) for a, b, scale in parts]
            weight = self._keep(name, np.concatenate([each.a for each in q], 1))
            return self.quantised.product(
                x, weight, self._keep(f"{name}.scale", np.concatenate([e.a_scale for e in q]))
            )
        block = block_of(len(parts[0][0]), BLOCK_A)
        q = [quantise(a, b, scale, 4, block) for a, b, scale in parts]
        weight = self._keep(name, np.concatenate([pack4(each.a, block) for each in q]))
        scales = self._keep(f"{name}.scale", np.ascontiguousarray(np.concatenate([each.a_scale for each in q], 1).T))
        return self._block_product(x, weight, scales, len(parts[0][0]), len(graph.tensors[weight]), block)

    def _second_product(self, h: str, name: str, f: Factors, scale: Array) -> str:
        graph = self.graph
        if self.scheme == "fp32":
            return graph.node("MatMul", [h, self._keep(name, f.b)])
        if self.scheme == "int8":
            weight = self._keep(name, quantise(f.a.T, f.b, scale, 8).b)
            return graph.node(
                "DynamicQuantizeMatMul", [h, weight, self._keep(f"{name}.scale", scale)], domain=MICROSOFT
            )
        R = len(f.b)
        block = block_of(R, BLOCK_B)
        weight = self._keep(name, pack4(quantise(f.a.T, f.b, scale, 4).b, block))
        scales = np.repeat(scale[:, None], weight_blocks := -(-R // block), 1)
        assert weight_blocks == graph.tensors[weight].shape[1]
        return self._block_product(h, weight, self._keep(f"{name}.scale", scales), R, f.b.shape[1], block)

    def _block_product(self, x: str, weight: str, scale: str, K: int, N: int, block: int) -> str:
        return self.graph.node(
            "MatMulNBits", [x, weight, scale], domain=MICROSOFT, K=K, N=N, bits=4, block_size=block, accuracy_level=4
        )

    def _keep(self, name: str, value: Array) -> str:
        """A weight in ``experts.safetensors``."""
        value = np.ascontiguousarray(value)
        self.out.experts[name] = value
        return self.graph.weight(name, value)

    def _add(self, place: Place, delta: str) -> None:
        frozen = self.graph.move(place.y)
        self.graph.node("Add", [frozen, delta], out=place.y)

    # ---- experts beside a linear: all else -----------------------------------------------------------------------

    def _traced(self, name: str, site: MoLoRALinear, consumers: Mapping[str, list[Any]]) -> None:
        """Low-rank experts of a block, or mixed by parameters."""
        graph, f = self.graph, self._factors(name, site)
        inputs = self._rows(name, f)
        ranks = tuple(f.ranks)
        info = site.site._replace(layer=0, name="", n_layers=1)
        factors = (torch.zeros(sum(ranks), site.site.d_in), torch.zeros(sum(ranks), site.site.d_out))
        flat: list[dict[int, Any]] = [{} for _ in factors]
        tokens = {0: DYNAMIC, 1: DYNAMIC}
        sample, moving = self._sample_weights(site, len(ranks))
        key = (type(site).__name__, info, ranks, tuple(sample.shape), fingerprint(site.mixer))
        x, y = torch.zeros(2, 3, site.site.d_in), torch.zeros(2, 3, site.site.d_out)
        for call, place in enumerate(graph.places[name]):
            if place.flat and (isinstance(site, ContractLinear | ExpandLinear)):
                raise ModelError(
                    f"{name} runs on tokens one after another, and a block of experts wants them in rows",
                    mend="Leave it out of molora.targets, or use topology 'parallel'.",
                )
            if isinstance(site, ContractLinear):
                weights = self._all_weights(site, f.slots, call)
                blocks = torch.zeros(2, 3, 1 + len(ranks), site.site.d_in)
                mixed = piece((*key, "mix"), Mix(), (blocks, sample), [tokens, moving])
                delta = piece((*key, "delta"), Contract(), (blocks, sample, *factors), [tokens, moving, *flat])
                (middle,) = mixed.insert(graph, [place.x, weights])
                graph.rewire(place.x, middle, consumers[place.x])
                self._add(place, delta.insert(graph, [place.x, weights, *inputs])[0])
            elif isinstance(site, ExpandLinear):
                both = piece(key, Expand(len(ranks)), (x, y, *factors), [tokens, tokens, *flat])
                frozen = graph.move(place.y)
                (out,) = both.insert(graph, [place.x, frozen, *inputs])
                graph.node("Identity", [out], out=place.y)
            else:
                self._beside(name, site, call, f.slots, ranks, dict(zip(("A", "Bt"), inputs, strict=True)))
        form = pb.ROWS_FP32 if self.scheme == "fp32" else pb.ROWS_INT8
        self.out.sites.append(
            pb.Site(
                name=name, d_in=site.site.d_in, d_out=site.site.d_out, slots=f.slots, ranks=ranks, form=form,
                a=f"{name}/A", b=f"{name}/B",
            )
        )  # fmt: skip

    def _other(self, name: str, site: MoLoRALinear) -> None:
        """Experts of any other kind: all tensors of their bank in float32, and its arithmetic as it was traced."""
        bank, ids, slots = site.bank, self.model.expert_ids(site), self._slots_of(site, routed=False)
        tree = self.model.tree(lambda key: key.site == name and key.expert != NO_EXPERT)
        placed = [self.out.slots[slot].id for slot in slots]
        ranks = tuple(bank.ranks[ids.index(expert)] if expert else max(bank.ranks) for expert in placed)
        inputs: dict[str, str] = {}
        tensors = []
        for parameter, parts in groupby(bank.parts(), lambda part: part.parameter):
            of: dict[int, Part] = {part.expert: part for part in parts}
            role, row = of[0].role, tuple(bank.get_parameter(parameter).shape[1:])
            by_rank = all(part.rows.stop - part.rows.start == bank.ranks[e] for e, part in of.items())
            values = [tree[Key(name, expert, role)] if expert else np.zeros((rank if by_rank else 1, *row), np.float32)
                      for expert, rank in zip(placed, ranks, strict=True)]  # fmt: skip
            inputs[parameter] = self._keep(f"{name}/{role}", np.concatenate(values))
            tensors.append(pb.SiteTensor(role=role, name=f"{name}/{role}", by_rank=by_rank, shape=row))
        for call in range(len(self.graph.places[name])):
            self._beside(name, site, call, slots, ranks, inputs)
        self.out.sites.append(
            pb.Site(name=name, d_in=site.site.d_in, d_out=site.site.d_out, slots=slots, ranks=ranks, form=pb.TENSORS,
                    tensors=tensors)
        )  # fmt: skip

    def _beside(
        self, name: str, site: MoLoRALinear, call: int, slots: list[int], ranks: tuple[int, ...], inputs: dict[str, str]
    ) -> None:
        """Add what a bank says beside a linear, traced with its parameters as inputs."""
        graph, place = self.graph, self.graph.places[name][call]
        info = site.site._replace(layer=0, name="", n_layers=1)
        bank = site.bank.like(info, ranks)
        values = [torch.zeros(bank.get_parameter(parameter).shape) for parameter in inputs]
        sample, moving = self._sample_weights(site, len(ranks))
        tokens = {0: DYNAMIC, 1: DYNAMIC}
        key = (info, ranks, tuple(sample.shape), fingerprint(bank), fingerprint(site.mixer))
        x, y = torch.zeros(2, 3, site.site.d_in), torch.zeros(2, 3, site.site.d_out)
        module = Delta(site.mixer, bank, list(inputs))
        delta = piece(key, module, (x, y, sample, values), [tokens, tokens, moving, [{} for _ in values]])
        weights, given = self._all_weights(site, slots, call), list(inputs.values())
        frozen = graph.move(place.y)
        if place.flat:
            if site.group is not None:
                gate = self.gates[id(site.group), call]
                weights = self._in_rows(self._for_rows(weights, len(slots), gate, place, name))
            rows = self._in_rows(place.x), self._in_rows(frozen)
            (d,) = delta.insert(graph, [*rows, weights, *given])
            d = graph.node("Squeeze", [d, graph.const([0], np.int64)])
        else:
            (d,) = delta.insert(graph, [place.x, frozen, weights, *given])
        graph.node("Add", [frozen, d], out=place.y)

    def _rows(self, name: str, f: Factors) -> list[str]:
        """A ``[R, d_in]`` and B ``[R, d_out]`` in the graph; rounded row by row when the bundle is quantised."""
        out = []
        for suffix, value in (("A", f.a), ("B", f.b)):
            if self.scheme == "fp32":
                out.append(self._keep(f"{name}/{suffix}", value))
                continue
            scale = np.maximum(np.abs(value).max(1), 1e-20).astype(np.float32) / 127
            q = self._keep(f"{name}/{suffix}", np.rint(value / scale[:, None]).astype(np.int8))
            out.append(self.graph.node("DequantizeLinear", [q, self._keep(f"{name}/{suffix}.scale", scale)], axis=0))
        return out

    def _all_weights(self, site: MoLoRALinear, slots: list[int], call: int) -> str:
        """The weights of all experts of a site in one of its calls, shared ones first."""
        graph, n = self.graph, len(slots)
        if site.group is None:
            return graph.const(np.ones((1, 1, n), np.float32))
        gate = self.gates[id(site.group), call]
        assert slots[site.shared :] == gate.slots
        if not site.shared:
            return gate.weights
        ones = graph.node("Shape", [gate.weights], end=-1)
        shape = graph.node("Concat", [ones, graph.const([site.shared], np.int64)], axis=0)
        return graph.node("Concat", [graph.node("Expand", [graph.const(1, np.float32), shape]), gate.weights], axis=-1)

    def _sample_weights(self, site: MoLoRALinear, n: int) -> tuple[Tensor, dict[int, Any]]:
        """Weights of the shape that the router gives, and the axes of them that vary."""
        if site.group is None:
            return torch.ones(1, 1, n), {}
        router = site.group.router
        ctx = RouteContext(x=torch.zeros(2, 3, site.group.site.d_in), site=site.group.site)
        with torch.no_grad():
            shape = router.route(ctx).weights.shape
        return torch.ones(*shape[:-1], n), {axis: DYNAMIC for axis in (0, 1) if shape[axis] > 1}


def _float_output(name: str) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
