"""Bases that are mixtures of experts themselves: ours beside their blocks, and weighed by their own routers."""

from __future__ import annotations

import pytest
import torch
from tiny_models import MIXTURES, adapted, base, batch, mixture, separate, shake

from molehill import config
from molehill.errors import ConfigError, ModelError
from molehill.molora.build import wrap
from molehill.molora.interfaces import RouteContext, Site
from molehill.molora.unwrap import unwrapped
from molehill.registry import build

every_family = pytest.mark.parametrize("family", MIXTURES)


def built(family, **keys):
    return wrap(mixture(family), config.parse({"molora": keys}).molora).eval()


def logits(model):
    given = batch()
    with torch.no_grad():
        return model(input_ids=given["input_ids"], attention_mask=given["attention_mask"].long()).logits


@every_family
@pytest.mark.parametrize("preset", ["perft_r", "perft_s", "perft_e", "coe", "cartesian_moe", "mh_moe", "molora"])
def test_they_start_as_they_are_and_learn(family, preset):
    model = built(family, preset=preset)
    plain = logits(mixture(family))
    assert torch.equal(logits(model.base), plain)
    separate(shake(model, scale=0.1))
    forward = model(**batch())
    torch.nn.functional.cross_entropy(forward.logits, forward.labels).backward()
    assert bool(model.grad.any())
    assert not torch.allclose(logits(model.base), plain, atol=1e-3)
    with unwrapped(model) as frozen:
        assert torch.equal(logits(frozen), plain)
        assert not any(module._forward_pre_hooks for module in frozen.modules())


@every_family
def test_an_expert_of_ours_has_the_weight_of_the_base_s_expert_bit_for_bit(family):
    model = shake(built(family, preset="perft_e", rank=4), scale=0.1)
    seen = []
    block = model.base.get_submodule("model.layers.0.mlp")
    block.base.gate.register_forward_hook(lambda _, args, out: seen.append(out))
    model.state.collect = True
    records = model(**batch()).records
    scores, weights, places = seen[0]
    own = torch.zeros(scores.shape, dtype=torch.float32).scatter(-1, places, weights.float())
    assert len(model.experts) == own.shape[-1]
    assert torch.equal(records[0].route.weights.view_as(own), own)
    assert bool(((own > 0).sum(-1) == 2).all())
    assert not model.routers["model.layers.0.mlp"].router.roles()  # there is no router to train


def test_a_base_without_experts_has_no_router_to_go_by():
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.mlp is no mixture.*OLMoE"):
        adapted("llama", preset="perft_e")
    scorer = build("scorer", "base_router", d_in=8, n_experts=2)
    with pytest.raises(ModelError, match="beside no mixture"):
        scorer(RouteContext(x=torch.zeros(1, 2, 8), site=Site(0, "a", 1, 8, 8)))
    assert base("llama")  # and all else works on it
