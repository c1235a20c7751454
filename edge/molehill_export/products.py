"""Low-rank experts in a graph as products: one with all A that read a tensor, one with each B.

The dense form: all of them are multiplied, and the weights of those not chosen are zero. In 4 bits B goes into the
product of the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from molehill.molora.adapted import Adapted
from molehill.molora.banks import PairBank
from molehill.wire.keys import NO_EXPERT, Key
from molehill_edge.quantise import block_of, output_scale, pack4, quantise
from molehill_export import joined
from molehill_export.base_quantise import Activations
from molehill_export.graph import MICROSOFT
from molehill_export.insertion import Array, Work
from molehill_export.routers import Routers
from molehill_protos.v1 import bundle_pb2 as pb

BLOCK_A, BLOCK_B = 128, 128  # of int4 experts
_FORMS = {"fp32": pb.GEMM_FP32, "int8": pb.GEMM_INT8, "int4": pb.GEMM_INT4}


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


def factors_of(work: Work, name: str, site: Adapted) -> Factors:
    """The factors of a site's experts for the slots of the bundle; empty slots get zeros, of the widest rank."""
    ids, slots = work.model.expert_ids(site), work.slots_of(site, routed=False)
    bank = site.bank
    assert isinstance(bank, PairBank)
    tree = work.model.tree(lambda key: key.site == name and key.expert != NO_EXPERT)
    gain = np.float32(site.gain is None or site.gain.on or not work.plain(site))  # traced ones: of their weights
    a, b, ranks = [], [], []
    for slot in slots:
        expert = work.out.slots[slot].id
        A, B = np.zeros((0, site.site.d_in), np.float32), np.zeros((0, site.site.d_out), np.float32)
        if expert:
            patch_A, patch_B = (each.numpy() for each in bank.patches(ids.index(expert)))
            A = np.concatenate([tree[Key(name, expert, "A")], patch_A])
            B = np.concatenate([tree[Key(name, expert, "B")].T, patch_B.T]) * gain
        a.append(A)
        b.append(B)
        ranks.append(len(B))
    widest = max(ranks)
    even = not work.plain(site)  # traced arithmetic wants equal ranks
    for i, slot in enumerate(slots):
        short = widest - ranks[i] if even or not work.out.slots[slot].id else 0
        if short:
            a[i] = np.pad(a[i], ((0, short), (0, 0)))
            b[i] = np.pad(b[i], ((0, short), (0, 0)))
            ranks[i] = widest
    return Factors(slots, ranks, np.concatenate(a).astype(np.float32), np.concatenate(b).astype(np.float32))


class Products:
    """Puts such experts beside their linears.

    Args:
        work: The insertion.
        routers: In the graph already.
    """

    def __init__(self, work: Work, routers: Routers) -> None:
        self._work, self._routers = work, routers
        self._quantised = Activations(work.graph)

    def insert(self, names: list[str]) -> None:
        """Sites that read one tensor, call by call: one product with all A, one with each B."""
        graph, form = self._work.graph, _FORMS[self._work.scheme]
        factors = [factors_of(self._work, name, self._work.model.sites[name]) for name in names]
        a_name = f"{names[0]}/A"
        b_scales = [output_scale(f.b) for f in factors]
        sizes = [sum(f.ranks) for f in factors]
        group = self._work.model.sites[names[0]].group
        for call, place in enumerate(graph.places[names[0]]):
            h = self._first_product(place.x, a_name, [(f.a.T, f.b, s) for f, s in zip(factors, b_scales, strict=True)])
            if group is not None:
                gate = self._routers.gate(group, call)
                gates = self._routers.spread(gate, [(f.slots, f.ranks) for f in factors])
                h = graph.node("Mul", [h, self._routers.for_rows(gates, sum(sizes), gate, place, names[0])])
            for name, f, scale in zip(names, factors, b_scales, strict=True):
                self._keep_second(f"{name}/B", f, scale)
            self._second_products(names, sizes, call, h)
        start = 0
        for name, f, size in zip(names, factors, sizes, strict=True):
            b_block = block_of(size, BLOCK_B) if self._work.scheme == "int4" else 0
            site = self._work.model.sites[name].site
            self._work.out.sites.append(
                pb.Site(
                    name=name, d_in=site.d_in, d_out=site.d_out, slots=f.slots, ranks=f.ranks, form=form, a=a_name,
                    a_start=start, b=f"{name}/B", a_block=block_of(site.d_in, BLOCK_A) if b_block else 0,
                    b_block=b_block,
                )
            )  # fmt: skip
            start += size

    def _first_product(self, x: str, name: str, parts: Sequence[tuple[Array, Array, Array]]) -> str:
        graph = self._work.graph
        if self._work.scheme == "fp32":
            return graph.node("MatMul", [x, self._work.keep(name, np.concatenate([a for a, _, _ in parts], 1))])
        if self._work.scheme == "int8":
            q = [quantise(a, b, scale, 8) for a, b, scale in parts]
            weight = self._work.keep(name, np.concatenate([each.a for each in q], 1))
            return self._quantised.product(
                x, weight, self._work.keep(f"{name}.scale", np.concatenate([e.a_scale for e in q]))
            )
        block = block_of(len(parts[0][0]), BLOCK_A)
        q = [quantise(a, b, scale, 4, block) for a, b, scale in parts]
        weight = self._work.keep(name, np.concatenate([pack4(each.a, block) for each in q]))
        scales = self._work.keep(
            f"{name}.scale", np.ascontiguousarray(np.concatenate([each.a_scale for each in q], 1).T)
        )
        return self._block_product(x, weight, scales, len(parts[0][0]), graph.tensors[weight].shape[0], block)

    def _second_products(self, names: list[str], sizes: list[int], call: int, h: str) -> None:
        """Products of weighted ranks ``h [..., Q]`` with every B, inside those of the base where these have 4 bits."""
        graph, places = self._work.graph, [self._work.graph.places[name][call] for name in names]
        inside = [joined.product_of(graph, place.y) for place in places]
        nodes = [node for node in inside if node is not None]
        if len(nodes) == len(names) and joined.share(graph, nodes, [place.y for place in places], sizes):
            x = joined.widened(graph, nodes[0], places[0].x, h, sum(sizes))
            for i, (name, product) in enumerate(zip(names, nodes, strict=True)):
                joined.join(graph, product, x, f"{name}/B", sum(sizes[:i]), sum(sizes))
            return
        parts = [h] if len(names) == 1 else graph.split(
            "Split", [h, graph.const(sizes, np.int64)], len(names), axis=-1
        )  # fmt: skip
        for name, size, place, part, node in zip(names, sizes, places, parts, inside, strict=True):
            if node is None:
                self._work.add(place, self._second_product(part, f"{name}/B", size))
            else:
                joined.join(graph, node, joined.widened(graph, node, place.x, part, size), f"{name}/B", 0, size)

    def _keep_second(self, name: str, f: Factors, scale: Array) -> None:
        """B of a site in ``experts.safetensors``."""
        if self._work.scheme == "fp32":
            self._work.keep(name, f.b)
        elif self._work.scheme == "int8":
            self._work.keep(name, quantise(f.a.T, f.b, scale, 8).b)
            self._work.keep(f"{name}.scale", scale)
        else:
            block = block_of(len(f.b), BLOCK_B)
            weight = pack4(quantise(f.a.T, f.b, scale, 4).b, block)
            self._work.keep(name, weight)
            self._work.keep(f"{name}.scale", np.repeat(scale[:, None], weight.shape[1], 1))

    def _second_product(self, h: str, name: str, R: int) -> str:
        graph = self._work.graph
        if self._work.scheme == "fp32":
            return graph.node("MatMul", [h, name])
        if self._work.scheme == "int8":
            return graph.node("DynamicQuantizeMatMul", [h, name, f"{name}.scale"], domain=MICROSOFT)
        return self._block_product(h, name, f"{name}.scale", R, graph.tensors[name].shape[0], block_of(R, BLOCK_B))

    def _block_product(self, x: str, weight: str, scale: str, K: int, N: int, block: int) -> str:
        return self._work.graph.node(
            "MatMulNBits", [x, weight, scale], domain=MICROSOFT, K=K, N=N, bits=4, block_size=block, accuracy_level=4
        )
