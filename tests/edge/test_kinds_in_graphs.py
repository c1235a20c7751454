"""Kinds of experts that lie in other ways than ours: they go into graphs and to devices too, or are refused clearly."""

from __future__ import annotations

import edge_export
import numpy as np
import pytest
import torch
from torch import nn

from molehill import catalogue, registry
from molehill.errors import ModelError
from molehill.molora.banks import Bank, Part
from molehill_edge import experts, tensors
from molehill_edge import manifest as manifests
from molehill_export.molora import choose_slots, insert
from molehill_export.stacks import expert_tensors, stacks
from molehill_protos.v1 import bundle_pb2 as pb


class Gated(Bank):
    """``delta_e = tanh(s_e * y0) * t_e + U_e (D_e x * G_e x)``: two rows of a role for every expert or for every rank.

    On the wire ``up`` and ``pair`` are transposed.
    """

    noun = "gated"
    needs_output = True

    def __init__(self, *, site, ranks, alpha):
        del alpha
        super().__init__(site=site, ranks=ranks)
        total = sum(ranks)
        self.pair = nn.Parameter(torch.zeros(2 * len(ranks), site.d_out))
        self.both = nn.Parameter(torch.zeros(2 * total, site.d_in))
        self.up = nn.Parameter(torch.zeros(total, site.d_out))
        owner = torch.tensor([e for e, rank in enumerate(ranks) for _ in range(rank)])
        self.register_buffer("spread", nn.functional.one_hot(owner, len(ranks)).t().float(), persistent=False)

    def parts(self):
        for e in range(self.n_experts):
            yield Part("pair", "dense.pair", e, slice(2 * e, 2 * e + 2), transposed=True, scale=2.0)
        for e in range(self.n_experts):
            rows = self.rows(e)
            yield Part("both", "dense.both", e, slice(2 * rows.start, 2 * rows.stop))
        for e in range(self.n_experts):
            yield Part("up", "dense.up", e, self.rows(e), transposed=True)

    def like(self, site, ranks):
        made = Gated(site=site, ranks=ranks, alpha=1.0)
        made.scale = 1.0
        return made

    scale = 2.0

    def delta(self, x, y0, weights):
        pair = self.pair.view(self.n_experts, 2, -1) * self.scale
        vectors = (torch.tanh(y0.unsqueeze(-2) * pair[:, 0]) * pair[:, 1] * weights.unsqueeze(-1)).sum(-2)
        units = nn.functional.linear(x, self.both).unflatten(-1, (-1, 2)).prod(-1)
        return vectors + (units * (weights @ self.spread)) @ self.up


@pytest.fixture
def gated():
    """The kind among the registered ones."""
    registry.register("expert", "gated", paper="house: a test")(Gated)
    yield
    del catalogue._registry.methods["expert", "gated"]


def _adapted(**keys):
    model, section = edge_export.adapted("llama", expert="gated", targets=["up_proj", "q_proj"], experts=3, **keys)
    with torch.no_grad():
        for site in model.sites.values():
            for parameter in site.bank.parameters():
                parameter.mul_(4)
    return model, section


RANKS = {"name": "hetero_rank", "kind": "explicit", "ranks": [1, 2, 4]}


@pytest.mark.usefixtures("gated")
@pytest.mark.parametrize("keys", [{"rank": 2}, {"allocation": RANKS}], ids=["equal", "other"])
def test_a_graph_gives_the_logits_of_torch(keys):
    model, section = _adapted(**keys)
    ids, mask = edge_export.batch("llama")
    wanted = edge_export.original(model, ids, mask)
    found = edge_export.exported(edge_export.session(model, section, "llama"), ids, mask)
    assert edge_export.error(wanted, edge_export.frozen("llama")) > 1e-3
    assert np.abs(found - wanted).max() < 1e-4


@pytest.mark.usefixtures("gated")
def test_a_device_puts_an_expert_where_the_export_would():
    model, section = _adapted(rank=2)
    name = model.experts[1]

    def bundle(slots):
        graph = edge_export.traced("llama").copy()
        inserted = insert(graph, model, section.scorer, slots, "fp32")
        manifest = pb.Manifest(base=pb.Base(digest="d"), slots=inserted.slots, sites=inserted.sites)
        for site in manifest.sites:
            manifests._check_site(site, len(slots))
        return manifest, tensors.pack(inserted.experts, {})[0]

    whole, wanted = bundle(choose_slots(model, None, 0))
    slots = [slot if slot.id != name else pb.Slot() for slot in whole.slots]
    spare, data = bundle(slots)
    about = {"format": "1", "kind": "expert", "id": name, "base": "d"}
    expert = experts.parse(tensors.pack(expert_tensors(model, name), about)[0], spare, "")
    slot = experts.find_slot(expert, spare, "")
    placed = experts.place(expert, slot, spare, data)
    made, right = (experts.views(bytearray(each)) for each in (placed, wanted))
    assert made.keys() == right.keys()
    assert all(np.array_equal(made[key], right[key]) for key in right)
    assert not all(np.array_equal(value, right[key]) for key, value in experts.views(bytearray(data)).items())
    cleared = experts.views(bytearray(experts.clear(slot, spare, placed)))
    assert all(np.array_equal(value, cleared[key]) for key, value in experts.views(bytearray(data)).items())


class _Odd(Gated):
    """Parts as a test wants them."""

    odd = staticmethod(lambda parts: parts)

    def like(self, site, ranks):
        made = type(self)(site=site, ranks=ranks, alpha=1.0)
        made.scale = 1.0
        return made

    def parts(self):
        return iter(self.odd(list(super().parts())))


@pytest.mark.parametrize(
    ("odd", "why"),
    [
        (lambda parts: [part._replace(role=f"{part.role}{part.expert}") for part in parts], "several roles"),
        (lambda parts: parts[::-1], "in their order"),
        (lambda parts: [*parts[:2], *parts[3:]], "one tensor of every expert"),
        (lambda parts: [*parts, parts[0]], "one tensor of every expert"),
        (lambda parts: [parts[0]._replace(rows=slice(0, 1)), *parts[1:]], "one after another"),
        (
            lambda parts: [
                parts[0]._replace(rows=slice(0, 1)), parts[1]._replace(rows=slice(1, 4)), *parts[2:]
            ],
            "equally many rows",
        ),
    ],
)  # fmt: skip
def test_other_tensors_are_refused_by_name(odd, why):
    site = edge_export.adapted("llama", targets=["q_proj"], experts=1)[0].sites.popitem()[1].site
    kind = type("OddBank", (_Odd,), {"odd": staticmethod(odd)})
    with pytest.raises(ModelError, match=rf"gated experts cannot go .*'(pair|up)' of OddBank .*{why}"):
        stacks(kind(site=site, ranks=(2, 2), alpha=1.0))
