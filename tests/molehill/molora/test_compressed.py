"""Compressed experts: the best of a token's experts are computed, its others multiply their input."""

from __future__ import annotations

import edge_export
import pytest
import torch
from tiny_models import adapted, batch, shake, training

from molehill import registry
from molehill.errors import ConfigError, ModelError
from molehill.molora.interfaces import Site
from molehill.wire.keys import Key
from molehill_export.as_one import as_lora, fold

SITE = Site(0, "layers.0.up", 1, 6, 10)
WEIGHTS = torch.tensor([[[0.4, 0.0, 0.1, 0.3, 0.2]]])  # the best are 0 and 3, the others 4 and 2


def made():
    torch.manual_seed(0)
    bank = registry.build("expert", "compressed", site=SITE, ranks=(2,) * 5, alpha=4.0)
    with torch.no_grad():
        bank.pairs.A.normal_()
        bank.pairs.Bt.normal_()
    return bank, registry.build("mixer", "compressed", {"main": 2}), torch.randn(2, 3, 6), torch.randn(2, 3, 10)


def test_with_vectors_of_one_it_is_the_best_of_the_chosen_at_the_weights_they_had():
    bank, mixer, x, y0 = made()
    best = torch.tensor([[[0.4, 0.0, 0.0, 0.3, 0.0]]])
    torch.testing.assert_close(mixer(bank, x, y0, WEIGHTS), bank.delta(x, y0, best))
    assert not torch.allclose(mixer(bank, x, y0, WEIGHTS), bank.delta(x, y0, WEIGHTS))  # which top-k adds up


def test_the_mean_of_the_others_vectors_multiplies_the_input():
    bank, mixer, x, y0 = made()
    with torch.no_grad():
        bank.vector.normal_()
    c = 1 + (0.1 * bank.vector[2] + 0.2 * bank.vector[4]) / 0.3
    best = torch.tensor([[[0.4, 0.0, 0.0, 0.3, 0.0]]])
    torch.testing.assert_close(mixer(bank, x, y0, WEIGHTS), bank.delta(c * x, y0, best))


def test_an_expert_that_is_not_among_the_best_learns_as_a_vector_only():
    bank, mixer, x, y0 = made()
    mixer(bank, x, y0, WEIGHTS).square().sum().backward()
    down, up, vector = (p.grad.view(5, -1).abs().sum(-1) > 0 for p in (bank.pairs.A, bank.pairs.Bt, bank.vector))
    assert down.tolist() == up.tolist() == [True, False, False, True, False]
    assert vector.tolist() == [False, False, True, False, True]


def test_a_router_learns_from_the_best_and_from_the_vectors():
    bank, mixer, x, y0 = made()
    with torch.no_grad():
        bank.vector.normal_()
    weights = WEIGHTS.clone().requires_grad_()
    mixer(bank, x, y0, weights).square().sum().backward()
    assert weights.grad.isfinite().all()
    assert (weights.grad[0, 0, [0, 2, 3, 4]] != 0).all()


def test_vectors_are_of_their_experts_and_shared():
    model = training(shake(adapted("llama", preset="compressed_experts")))
    site = model.sites["model.layers.0.mlp.up_proj"]
    assert {key.role for key in model.layout if key.expert == "e3"} == {"dense.down", "dense.up", "dense.vector"}
    tree = model.tree(lambda key: key == Key(site.site.name, "e3", "dense.vector"))
    (value,) = tree.values()
    torch.testing.assert_close(torch.from_numpy(value[0]), site.bank.vector[3].detach())
    forward = model(**batch("llama"))
    forward.scores.square().sum().backward()
    assert float(site.bank.vector.grad.abs().max()) > 0


def test_several_experts_are_no_lora_and_one_is():
    model, _ = edge_export.adapted("llama", preset="compressed_experts", rank=4)
    weights = {name: torch.full((8,), 1 / 8) for name in model.sites}
    with pytest.raises(ModelError, match="is no sum of them"):
        as_lora(model, weights)
    with pytest.raises(ModelError, match="is no sum of them"):
        fold(model, weights)
    fold(model, {name: torch.eye(8)[2] for name in model.sites})


@pytest.mark.parametrize(("keys", "why"), [({"expert": "lora"}, "experts with vectors"), ({"shared": 1}, "no shared")])
def test_what_it_cannot_have_is_refused(keys, why):
    with pytest.raises(ConfigError, match=f"mixer 'compressed' needs {why}"):
        adapted("llama", preset="compressed_experts", **keys)
