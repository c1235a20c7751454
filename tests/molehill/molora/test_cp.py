"""Experts that are slices of one factored tensor: what is of all of them, and what is each one's."""

from __future__ import annotations

import edge_export
import numpy as np
import pytest
import torch
from tiny_models import adapted, batch, shake

from molehill import registry
from molehill.errors import AdapterError
from molehill.molora.adapter import Manifest, load_adapter, save_adapter
from molehill.molora.interfaces import Site
from molehill.wire.keys import NO_EXPERT, Key
from molehill_export.as_one import fold

SITE = Site(0, "layers.0.up", 1, 6, 10)
NAME = "model.layers.0.mlp.up_proj"


def bank_of(experts, rank=5):
    torch.manual_seed(0)
    bank = registry.build("expert", "cp", site=SITE, ranks=(rank,) * experts, alpha=4.0)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.normal_()
    return bank


def test_in_factors_it_is_the_contraction_with_the_whole_tensor():
    bank, x, a = bank_of(7), torch.randn(2, 3, 6), torch.randn(2, 3, 7).softmax(-1)
    whole = torch.einsum("er,ri,ro->eio", bank.f, bank.down, bank.up)
    torch.testing.assert_close(bank.delta(x, x, a), torch.einsum("bte,eio,bti->bto", a, whole, x))
    one = torch.zeros(1, 1, 7)
    one[..., 4] = 1
    torch.testing.assert_close(bank.delta(x, x, one), x @ whole[4])
    torch.testing.assert_close(bank.weight(4)[0], whole[4].T)


def test_an_expert_costs_a_row_of_numbers():
    few, many = (sum(p.numel() for p in bank_of(n).parameters()) for n in (1, 1000))
    assert many - few == 999 * 5


def test_rows_start_around_one_and_differ_and_all_say_nothing():
    model = adapted("llama", preset="mumoe")
    bank = model.sites[NAME].bank
    assert bank.n_experts == 64
    assert abs(float(bank.f.detach().mean()) - 1) < 0.1
    assert abs(float(bank.f.detach().std()) - 1) < 0.1
    assert not torch.equal(bank.f[0], bank.f[1])
    assert bank.down.any()
    assert not bank.up.any()


def test_what_is_of_all_experts_is_a_tensor_of_no_expert():
    model = shake(adapted("llama", preset="mumoe", experts=4, rank=3))
    keys = {(key.expert, key.role) for key in model.layout if key.site == NAME and key.kind == "dense"}
    assert keys == {(NO_EXPERT, "dense.down"), (NO_EXPERT, "dense.up"), *((f"e{e}", "dense.f") for e in range(4))}
    (up,) = model.tree(lambda key: key == Key(NAME, NO_EXPERT, "dense.up")).values()
    assert np.array_equal(up, model.sites[NAME].bank.up.detach().numpy())


def test_an_adapter_folder_has_it_in_a_file_of_its_own(tmp_path):
    keys = {"preset": "mumoe", "experts": 3, "rank": 2}
    model = shake(adapted("llama", **keys))
    about = Manifest(
        base={"id": "b", "digest": "d"}, task="causal-lm", molora=edge_export.config.parse({"molora": keys}).molora,
        ranks={},
    )  # fmt: skip
    save_adapter(tmp_path, model, about)
    other = adapted("llama", seed=9, **keys)
    load_adapter(tmp_path, other, base_digest="d")
    assert torch.equal(other(**batch("llama")).logits, model(**batch("llama")).logits)
    (tmp_path / "common.safetensors").unlink()
    with pytest.raises(AdapterError):
        load_adapter(tmp_path, other, base_digest="d")


def test_at_fixed_weights_it_folds_into_the_linears():
    model, _ = edge_export.adapted("llama", preset="mumoe", experts=4, rank=3)
    site = next(iter(model.sites.values()))
    x, weights = torch.randn(1, 2, site.site.d_in), torch.tensor([0.1, 0.2, 0.3, 0.4])
    frozen = torch.nn.functional.linear(x, site.weight, site.bias)
    wanted = (frozen + site.bank.delta(x, frozen, weights.view(1, 1, -1))).detach()
    fold(model, dict.fromkeys(model.sites, weights))
    torch.testing.assert_close(torch.nn.functional.linear(x, site.weight, site.bias), wanted, rtol=1e-4, atol=1e-5)
