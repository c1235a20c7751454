"""Hydra, LoHa and LoKr: what they are of the weight, and that peft opens them."""

from __future__ import annotations

import peft
import pytest
import torch
from tiny_models import adapted, base, batch, shake

from molehill import registry
from molehill.molora.adapter import Manifest, save_adapter
from molehill.molora.interfaces import Site
from molehill.molora.peft_folder import read_peft

SITE = Site(0, "layers.0.up", 1, 12, 20)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def bank_of(name, rank=2, alpha=4.0):
    bank = registry.build("expert", name, site=SITE, ranks=(rank,), alpha=alpha)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return bank


def test_hydra_is_another_weight_and_bias_and_without_what_is_behind_a_lora():
    bank, lora = bank_of("hydra"), bank_of("lora")
    x, weight, bias = torch.randn(2, 3, 12), torch.randn(20, 12), torch.randn(20)
    y0 = torch.nn.functional.linear(x, weight, bias)
    delta = bank.delta(x, y0, torch.ones(1, 1, 1))
    torch.testing.assert_close(
        torch.nn.functional.linear(x, *bank.folded(torch.ones(1), weight, bias)), y0 + delta, atol=1e-4, rtol=1e-4
    )
    with torch.no_grad():
        bank.sB.zero_()
        lora.A.copy_(bank.pA)
        lora.Bt.copy_(bank.pB)
    torch.testing.assert_close(bank.delta(x, y0, torch.ones(1, 1, 1)), lora.delta(x, y0, torch.ones(1, 1, 1)))


def test_a_loha_has_a_higher_rank_than_its_factors_and_a_lokr_repeats_one():
    rank = torch.linalg.matrix_rank
    assert int(rank(bank_of("loha", 2).change(0).detach())) == 4  # r^2
    assert int(rank(bank_of("lora", 4).weight(0)[0].detach())) == 4  # of as many numbers
    assert int(rank(bank_of("loha", 1).change(0).detach())) == 1
    lokr = bank_of("lokr", 1)
    change = lokr.change(0).detach()
    assert lokr.w1.shape == (4, 3)
    assert int(rank(change)) == 3  # the rank of a Kronecker product is the product of ranks
    blocks = change.view(4, 5, 3, 4).permute(0, 2, 1, 3)
    one, other = (blocks[at] / lokr.w1[at].detach() for at in ((1, 2), (0, 0)))
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft reads it
@pytest.mark.parametrize(("name", "rank"), [("loha", 4), ("lokr", 2)])
def test_peft_opens_an_expert_and_computes_the_same(name, rank, tmp_path):
    model = shake(adapted("llama", preset=name, rank=rank, alpha=2.0 * rank), scale=0.4)
    molora = {"preset": name, "rank": rank, "alpha": 2.0 * rank}
    about = {"base": {"id": "base", "digest": ""}, "task": "causal-lm", "molora": molora, "ranks": {}}
    save_adapter(tmp_path, model, Manifest.model_validate(about))
    folder = tmp_path / "experts" / "e0"
    assert (folder / "adapter_config.json").is_file()
    at = batch()
    theirs = peft.PeftModel.from_pretrained(base("llama"), folder).eval()
    with torch.no_grad():
        wanted = model.base(input_ids=at["input_ids"], attention_mask=at["attention_mask"].long()).logits
        found = theirs(input_ids=at["input_ids"], attention_mask=at["attention_mask"].long()).logits
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(found, base("llama")(input_ids=at["input_ids"]).logits, atol=1e-2)
    read = read_peft(folder)
    for key, value in model.tree().items():
        torch.testing.assert_close(torch.from_numpy(read[key.site][key.role].copy()), torch.from_numpy(value.copy()))


def test_a_linear_of_gpt2_is_none_that_peft_has_products_for_and_neither_is_a_high_rank(tmp_path):
    for keys in ({"architecture": "gpt2", "preset": "loha"}, {"architecture": "llama", "preset": "lokr", "rank": 16}):
        model = shake(adapted(**keys))
        assert {site.peft for site in model.sites.values()} == {None}
