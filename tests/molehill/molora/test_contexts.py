"""Routes by what a token is: its domain, or its id."""

from __future__ import annotations

import pytest
import torch
from tiny_models import adapted, batch, shake

from molehill import registry
from molehill.errors import ConfigError, ModelError
from molehill.molora.interfaces import Told

SETS = [[0], [1, 2], [2]]


def contexts(**keys):
    made = {"scorer": {"name": "contexts", "listens": SETS}, "selector": "given", "experts": 3, "rank": 2}
    return adapted("llama", targets=("q_proj",), **{**made, **keys})


def moved(model, *domains):
    """Experts that get a gradient from tokens of these domains."""
    told = Told(domain_ids=torch.tensor([(list(domains) * 7)[:7]]))
    model.grads.zero_()
    model(**batch("llama", rows=1), told=told).logits.square().sum().backward()
    norms = {}
    for key, slot in model.slots.items():
        if key.kind == "A":
            norms[key.expert] = norms.get(key.expert, 0.0) + float(model.grad[slot.start : slot.stop].norm())
    return {expert for expert, norm in norms.items() if norm > 0}


def test_tokens_move_the_experts_that_list_their_domain_and_no_other():
    model = contexts()
    listens = [group.router.scorer.listens for group in model.routers.values()]
    kept = [each.detach().clone() for each in listens]
    shake(model)
    for each, before in zip(listens, kept, strict=True):
        each.data.copy_(before)
    assert moved(model, 0) == {"e0"}
    assert moved(model, 2) == {"e1", "e2"}
    assert moved(model, 0, 1) == {"e0", "e1"}
    assert moved(model, -1) == set()
    assert moved(model, 9) == set()


def test_listed_experts_add_up_at_weight_1(context):
    scorer = registry.build("scorer", "contexts", {"listens": SETS}, d_in=8, n_experts=3)
    ctx = context(x=torch.randn(1, 3, 8), domain_ids=torch.tensor([[1, 2, -1]]))
    route = registry.build("selector", "given")(scorer(ctx), ctx)
    assert route.weights[0].tolist() == [[0, 1, 0], [0, 1, 1], [0, 0, 0]]


def test_a_pass_that_nobody_announces_is_of_the_domain_that_was_said():
    model, rows = shake(contexts(shared=1)), batch("llama")
    plain = model(**rows).logits
    known = model(**rows, told=Told(domain_ids=torch.zeros(3, 7, dtype=torch.long))).logits
    assert not torch.allclose(plain, known)
    model.state.domain = 0
    free = model.base(rows["input_ids"], attention_mask=rows["attention_mask"].long()).logits
    torch.testing.assert_close(free[:, :-1][rows["labels"][:, 1:] != -100], known)


def test_a_list_for_every_expert():
    with pytest.raises(ConfigError, match="listens is of 3 experts, and there are 2"):
        contexts(experts=2)
    with pytest.raises(ConfigError, match="below 0"):
        contexts(scorer={"name": "contexts", "listens": [[0], [-1], [1]]})


def mask(**values):
    return registry.build("transform", "token_mask", values)


def test_a_rare_token_has_its_own_steady_expert_and_a_frequent_one_any():
    ids = torch.arange(20_000)
    visible = mask(frequent=4000).visible(ids, 8, 0)
    assert visible[:4000].all()
    assert (visible[4000:].sum(-1) == 1).all()
    shares = visible[4000:].float().mean(0)
    assert float((shares - 1 / 8).abs().max()) < 0.01  # rare words are spread evenly
    assert torch.equal(visible, mask(frequent=4000).visible(ids, 8, 0))
    for other in (mask(frequent=4000, seed=1).visible(ids, 8, 0), mask(frequent=4000).visible(ids, 8, 1)):
        assert float((other == visible)[4000:].all(-1).float().mean()) == pytest.approx(1 / 8, abs=0.02)
    some = mask(frequent=10, several=3, rare=2).visible(ids, 8, 0).sum(-1)
    assert some[:10].tolist() == [3] * 10
    assert bool((some[10:] == 2).all())


def test_closed_experts_get_no_weight_and_states_in_place_of_ids_are_refused(context):
    transform, z = mask(frequent=0), torch.randn(1, 50, 4)
    ids = torch.arange(50).unsqueeze(0)
    weights = registry.build("selector", "dense")(transform(z, context(token_ids=ids)), context()).weights
    assert torch.equal(weights > 0, transform.visible(ids, 4, 0))
    model, rows = adapted("llama", transforms=({"name": "token_mask", "frequent": 3},)), batch("llama")
    embeds = model.base.get_input_embeddings()(rows["input_ids"])
    with pytest.raises(ModelError, match="goes by the ids of tokens, and this pass has none"):
        model.base(inputs_embeds=embeds)
