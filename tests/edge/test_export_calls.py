"""Linears that run several times in a pass, as graphs."""

from __future__ import annotations

import edge_export
import numpy as np
import pytest
import tiny_models
import torch
import transformers

from molehill import config
from molehill.molora.build import wrap
from molehill_export.base import classifier
from molehill_export.base_quantise import quantise_base
from molehill_export.molora import choose_slots, gate_values, insert

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 40,
    "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
SHARED_KEY = {
    "relative_attention": True, "position_buckets": 4, "pos_att_type": ["p2c", "c2p"], "share_att_key": True,
    "norm_rel_ebd": "layer_norm", "position_biased_input": False, "type_vocab_size": 0,
}  # fmt: skip


def base(name):
    torch.manual_seed(0)
    if name == "albert":
        settings = transformers.AlbertConfig(**SIZES, embedding_size=16)
        return transformers.AlbertModel(settings, add_pooling_layer=False).eval()
    return transformers.DebertaV2Model(transformers.DebertaV2Config(**SIZES, **SHARED_KEY)).eval()


KINDS = {
    "layer": {"scope": "layer"},
    "site": {"scope": "site", "selector": {"name": "top_k", "k": 2}},
    "ia3": {"scope": "layer", "expert": "ia3"},
}


@pytest.mark.parametrize("name", ["albert", "deberta"])
def test_every_call_has_its_experts(name):
    ids = torch.randint(1, 40, (3, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[-1, 6:] = False
    graph, head = None, tiny_models.head()
    for keys in KINDS.values():
        section = config.parse({"molora": {"targets": "all-linear", "experts": 3, "rank": 2, **keys}}).molora
        model = tiny_models.shake(wrap(base(name), section, head=head, seed=0).eval(), scale=0.1)
        if graph is None:  # the base is the same for all
            graph = classifier(base(name), head, list(model.sites))
            assert sorted({len(places) for places in graph.places.values()}) == ([3] if name == "albert" else [1, 2])
        wanted = edge_export.original(model, ids, mask)
        for scheme, bound in (("fp32", 1e-9), ("int8", 0.15)):
            whole = graph.copy()
            quantise_base(whole, scheme, "")
            inserted = insert(whole, model, section.scorer, choose_slots(model, None, 0), scheme)
            whole.tensors.update(gate_values(model, inserted))
            found = edge_export.exported(edge_export.opened(whole), ids, mask)
            assert edge_export.error(wanted, found) < bound, (keys, scheme)
        model.state.enabled = False
        assert edge_export.error(wanted, edge_export.original(model, ids, mask)) > 1e-2  # the experts count
        assert np.isfinite(found).all()
