"""A pass of the base that nobody announced, and patches in a routed block."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from molehill import registry
from molehill.config import MoLoRA
from molehill.molora.build import wrap


def _model(**values):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, intermediate_size=24,
        vocab_size=48, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = wrap(LlamaForCausalLM(config).eval(), MoLoRA.model_validate({"rank": 2, **values}))
    with torch.no_grad():
        model.flat.add_(torch.randn_like(model.flat) * 0.3)
    return model


@pytest.mark.parametrize("scope", ["site", "layer", "model"])
def test_every_pass_of_the_base_gets_routes_of_its_own(scope):
    model = _model(scope=scope)
    one, two = torch.randint(3, 48, (2, 2, 7))
    with torch.no_grad():
        fresh = model.base(input_ids=two).logits
        model.base(input_ids=one)
        again = model.base(input_ids=two).logits
    torch.testing.assert_close(fresh, again)


def test_generation_with_a_cache_equals_generation_without():
    model = _model(scope="layer")
    prompt = torch.randint(3, 48, (2, 5))
    mask = torch.ones_like(prompt)
    texts = [
        model.base.generate(prompt, attention_mask=mask, max_new_tokens=6, do_sample=False, use_cache=cache)
        for cache in (True, False)
    ]
    assert torch.equal(*texts)


def test_patches_of_a_routed_block_are_ranks_that_do_not_learn():
    """An expert of rank 3 equals the expert of rank 2 with its third rank as a patch."""
    preset = {**registry.build("preset", "mixlora"), "dropout": 0.0, "experts": 3}
    whole, cut = _model(**{**preset, "rank": 3, "alpha": 3.0}), _model(**{**preset, "rank": 2, "alpha": 2.0})
    ids = torch.randint(3, 48, (2, 6))
    tree = whole.tree()
    cut.load({key: value for key, value in tree.items() if key.kind not in {"A", "B"}})
    first, rest = {}, {}
    for key, value in tree.items():
        if key.kind == "A":
            B = tree[key._replace(role="B")]
            first[key], first[key._replace(role="B")] = value[:2], np.ascontiguousarray(B[:, :2])
            rest[key.site, key.expert] = (value[2:], np.ascontiguousarray(B[:, 2:]))
    cut.load(first)
    with torch.no_grad():
        without = cut.base(input_ids=ids).logits
        cut.set_patches(rest)
        torch.testing.assert_close(cut.base(input_ids=ids).logits, whole.base(input_ids=ids).logits)
    assert (without - whole.base(input_ids=ids).logits).abs().max() > 1e-3
