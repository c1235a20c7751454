"""A route by the prompt alone, as it is read in training and while an answer is written."""

from __future__ import annotations

import pytest
import torch
from tiny_models import adapted, base, shake
from transformers import DynamicCache

from molehill import registry

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 0], [11, 12, 13, 14, 15, 16, 17]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 0], [1] * 7]).bool()
LABELS = torch.where(torch.tensor([[0, 0, 0, 0, 1, 1, 0], [0, 0, 1, 1, 1, 1, 1]]).bool(), IDS, -100)


def made(**keys):
    model = shake(adapted("llama", preset="parrot", rank=4, **keys))
    model.state.collect = True
    return model


def routes(model, ids, mask=MASK, labels=LABELS):
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask, labels=labels)
    return model.state.records[0].route.weights


def test_it_is_the_attention_of_the_query_over_the_prompt(context):
    scorer, prompt = registry.build("scorer", "prompt_attention", d_in=3, n_experts=4, width=8), torch.randn(2, 5, 9)
    prompt[..., -1] = torch.tensor([[1.0, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    with torch.no_grad():
        scorer.query.normal_()
    z = scorer(context(x=torch.randn(2, 3, 3), prompt=prompt))
    assert z.shape == (2, 1, 4)
    h = prompt[1, :2, :8]
    wanted = (h @ scorer.query / 8**0.5).softmax(0) @ h @ scorer.weight.T
    torch.testing.assert_close(z[1, 0], wanted)


def test_another_answer_has_the_same_route_and_another_prompt_has_not():
    model = made()
    before = routes(model, IDS)
    assert before.shape == (2, 1, 6)  # of all tokens of a row
    answer, prompt = IDS.clone(), IDS.clone()
    answer[0, 4:6], answer[1, 2:] = 20, 21
    prompt[0, 1], prompt[1, 0] = 22, 23
    assert torch.equal(routes(model, answer), before)
    other = routes(model, prompt)
    assert all(float((a - b).abs().max()) > 1e-3 for a, b in zip(before, other, strict=True))


def test_a_longer_row_and_padding_change_nothing():
    model = made()
    before = routes(model, IDS)[:1]
    alone = routes(model, IDS[:1, :6], MASK[:1, :6], LABELS[:1, :6])
    torch.testing.assert_close(alone, before)


def test_embeddings_are_those_of_the_frozen_base():
    model = made()
    routes(model, IDS)
    seen, frozen = model.state.base, base("llama").get_input_embeddings()(IDS)
    assert torch.equal(seen[..., :-1], frozen)
    assert seen[..., -1].sum(1).tolist() == [4, 2]


def test_query_and_weights_learn():
    model = made()
    forward = model(input_ids=IDS, attention_mask=MASK, labels=LABELS)
    forward.nll().mean().backward()
    (group,) = model.routers.values()
    assert float(group.router.scorer.query.grad.abs().max()) > 0
    assert float(group.router.scorer.weight.grad.abs().max()) > 0


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_an_answer_is_written_by_the_route_of_its_prompt(architecture):
    model = shake(adapted(architecture, preset="parrot", rank=4))
    ids, prompt = IDS[1:], IDS[1:, :3]
    with torch.no_grad():
        known = model.state.read(model.base, (), {"input_ids": prompt}, None)
        with model.state.about(known):
            whole = model.base(ids, use_cache=False).logits
        cache = DynamicCache()
        found = [model.base(prompt, past_key_values=cache, use_cache=True).logits]
        found += [model.base(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits for t in range(3, 7)]
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-4, atol=1e-4)
