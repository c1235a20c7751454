"""Selectors and transforms that limit experts: dropout, capacity, and experts that choose tokens."""

from __future__ import annotations

import pytest
import torch
from tiny_models import adapted, batch, shake, training

from molehill import registry


def built(axis, name, **params):
    return registry.build(axis, name, params)


def test_without_dropout_and_limit_it_is_top_k_bit_for_bit(context):
    z, plain = torch.randn(2, 9, 6), built("selector", "top_k", k=3)
    ctx = context(training=True)
    assert torch.equal(built("transform", "expert_dropout", p=0.0)(z, ctx), z)
    assert torch.equal(built("selector", "top_k", k=3, capacity=1e3)(z, ctx).weights, plain(z, ctx).weights)
    narrow = built("selector", "top_k", k=3, capacity=0.5)
    assert torch.equal(narrow(z, context()).weights, plain(z, context()).weights)  # at inference there is no limit
    assert torch.equal(narrow.eval_form()(z, ctx).weights, plain(z, ctx).weights)
    assert not torch.equal(narrow(z, ctx).weights, plain(z, ctx).weights)


def test_a_dropped_expert_has_no_weight_and_the_others_share_it(context):
    torch.manual_seed(0)
    z, transform = torch.randn(40, 10, 4), built("transform", "expert_dropout", p=0.5)
    left = transform(z, context(training=True))
    closed = left < -1e30
    assert 0.4 < float(closed.float().mean()) < 0.5  # who would have none keeps all
    assert not bool(closed.all(-1).any())
    assert torch.equal(left[~closed], z[~closed])
    weights = built("selector", "top_k", k=2)(left, context(training=True)).weights
    assert not bool(weights[closed].any())
    torch.testing.assert_close(weights.sum(-1), torch.ones(40, 10))
    assert torch.equal(transform(z, context()), z)


def test_places_go_in_order_of_arrival_and_padding_needs_none(context):
    z = torch.tensor([[[9.0, 5.0, 0.0]] * 6])
    mask = torch.tensor([[False, True, True, True, True, False]])
    route = built("selector", "top_k", k=2, capacity=0.75)(z, context(training=True, mask=mask))
    # 8 choices over 3 experts, by .75
    assert (route.weights[0, :, 0] > 0).tolist() == [False, True, True, False, False, False]
    assert bool(route.selected[0, :, :2].all())  # what balance counts


@pytest.mark.parametrize("capacity", [1.0, 2.0])
def test_every_expert_takes_as_many_real_tokens_of_a_row_and_no_padding(context, capacity):
    z = torch.randn(3, 12, 4)
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[1, 7:] = mask[2, :9] = False
    route = built("selector", "expert_choice", capacity=capacity)(z, context(mask=mask))
    taken = route.weights > 0
    lengths = torch.tensor([12, 7, 3])
    wanted = (lengths * capacity / 4).ceil().long()
    assert torch.equal(taken.sum(1), wanted.unsqueeze(1).expand(3, 4))
    assert not bool(taken[~mask].any())
    torch.testing.assert_close(route.weights[taken], z.softmax(-1)[taken])
    for row, length in enumerate(lengths):
        best = z.softmax(-1)[row].masked_fill(~mask[row].unsqueeze(-1), -1).topk(int(wanted[row]), 0).indices
        assert torch.equal(taken[row].nonzero()[:, 0].sort().values, best.flatten().sort().values), length
    assert int(taken.sum(-1).max()) > 1
    assert not bool(taken[0].any(-1).all()) or capacity > 1


def test_a_share_that_is_whole_is_not_rounded_up(context):
    taken = built("selector", "expert_choice", capacity=2.0)(torch.randn(1, 21, 7), context()).weights > 0
    assert taken.sum(1).tolist() == [[6] * 7]  # 2 / 7 in float32 is a little more than it


def test_a_later_token_may_change_an_earlier_route(context):
    selector = built("selector", "expert_choice", capacity=1.0)
    z = torch.zeros(1, 4, 2)
    z[0, :2, 0] = z[0, 2:, 1] = 2.0
    before = selector(z, context()).weights[0, 1]
    z[0, 3, 0] = 9.0
    assert not torch.equal(selector(z, context()).weights[0, 1], before)
    assert not selector.causal


def test_a_model_whose_experts_choose_trains_and_starts_as_the_base():
    model = shake(training(adapted("bert", preset="expert_choice", rank=2)), scale=0.1)
    forward = model(**batch("bert"))
    torch.nn.functional.cross_entropy(forward.logits, forward.labels).backward()
    gates = [slot for key, slot in model.slots.items() if key.kind == "gate"]
    assert all(bool(model.grad[slot.start : slot.stop].any()) for slot in gates)
