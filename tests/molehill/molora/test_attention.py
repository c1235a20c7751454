"""AdapterFusion: experts' outputs are weighed by what they are, after the rounds and by every owner for itself."""

from __future__ import annotations

import edge_export
import numpy as np
import pytest
import torch
from tiny_models import adapted, batch, shake, training

from molehill import registry
from molehill.errors import ConfigError, ModelError
from molehill.molora.interfaces import Site
from molehill_export.as_one import fold

SITE = Site(0, "layers.0.down", 1, 6, 8)
EQUAL = torch.full((1, 1, 3), 1 / 3)


def made(**params):
    torch.manual_seed(0)
    bank = registry.build("expert", "bottleneck", site=SITE, ranks=(2,) * 3, alpha=4.0)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.normal_()
    mixer = registry.build("mixer", "attention", params, site=SITE)
    return bank, mixer, torch.randn(2, 3, 6), torch.randn(2, 3, 8)


def test_with_the_identity_and_equal_keys_it_is_the_mean_of_the_adapters():
    bank, mixer, x, y0 = made()
    torch.testing.assert_close(mixer(bank, x, y0, EQUAL), bank.outputs(x, y0).mean(2))


def test_it_is_the_attention_of_the_frozen_output_over_the_experts_outputs():
    bank, mixer, x, y0 = made()
    query, key, value = torch.randn(3, 8, 8)
    with torch.no_grad():
        mixer.score[0] = 8 * query.T @ key
        mixer.value[0] = 8 * (value - torch.eye(8)).T
    o = bank.outputs(x, y0)
    attention = torch.einsum("btd,bted->bte", y0 @ query.T, o @ key.T).softmax(-1)
    wanted = torch.einsum("bte,bted->btd", attention, o @ value.T)
    torch.testing.assert_close(mixer(bank, x, y0, EQUAL), wanted, rtol=1e-4, atol=1e-4)
    shut = torch.tensor([[[0.5, 0.5, 0.0]]])
    two = torch.einsum("btd,bted->bte", y0 @ query.T, o[:, :, :2] @ key.T).softmax(-1)
    wanted = torch.einsum("bte,bted->btd", two, o[:, :, :2] @ value.T)
    torch.testing.assert_close(mixer(bank, x, y0, shut), wanted, rtol=1e-4, atol=1e-4)


def test_blocks_are_whole_matrices_with_zeros_between_them():
    bank, mixer, x, y0 = made(blocks=2)
    _, whole, _, _ = made()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.normal_()
        whole.score[0] = 2 * torch.block_diag(*mixer.score)  # they are stored times their width
        whole.value[0] = 2 * torch.block_diag(*mixer.value)
    torch.testing.assert_close(mixer(bank, x, y0, EQUAL), whole(bank, x, y0, EQUAL))
    with pytest.raises(ConfigError, match="3 blocks do not divide the 8 features"):
        made(blocks=3)


def test_what_is_fitted_is_a_residual_of_the_owner():
    model = training(shake(adapted("llama", preset="adapter_fusion", rank=4)))
    fitted = model.layout.where(lambda key: ".mix." in key.role)
    assert {key.role for key in fitted} == {"gate.residual.mix.score", "gate.residual.mix.value"}
    assert all(key.residual for key in fitted)
    at = batch("llama")
    own = model(**at).logits
    own.square().sum().backward()
    assert all(float(site.mixer.score.grad.abs().max()) > 0 for site in model.sites.values())
    model.use_personal(gate=False, head=False)
    shared = model(**at).logits
    assert not torch.allclose(own, shared)
    model.load({key: np.zeros(shape, np.float32) for key, shape in fitted.items()})
    model.use_personal(gate=True, head=False)
    torch.testing.assert_close(model(**at).logits, shared)


def test_fitted_attention_is_no_change_of_a_linear():
    model, _ = edge_export.adapted(
        "llama", preset="adapter_fusion", rank=4, expert={"name": "bottleneck", "activation": "none", "source": "input"}
    )
    with pytest.raises(ModelError, match="fitted of how experts are mixed"):
        fold(model, {name: torch.eye(4)[1] for name in model.sites})


def test_a_graph_takes_the_attention_of_whoever_asks():
    model, section = edge_export.adapted("llama", preset="adapter_fusion", rank=4)
    ids, mask = edge_export.batch("llama")
    wanted = edge_export.original(model, ids, mask)
    model.use_personal(gate=False, head=False)
    shared = edge_export.original(model, ids, mask)
    opened = edge_export.session(model, section, "llama")
    own = {
        f"{name}/-/gate.mix.{part}": value.detach().numpy()
        for name, site in model.sites.items()
        for part, value in site.mixer.named_parameters()
    }
    assert np.abs(wanted - shared).max() > 1e-3
    assert np.abs(edge_export.exported(opened, ids, mask) - shared).max() < 1e-4
    assert np.abs(edge_export.exported(opened, ids, mask, **own) - wanted).max() < 1e-4
