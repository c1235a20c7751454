"""A tree of decisions over experts, and how always-on experts share the weight with routed ones."""

from __future__ import annotations

import pytest
import torch
from tiny_models import adapted, batch, shake, training

from molehill import registry
from molehill.molora.interfaces import RouteRecord, Site
from molehill.molora.trees import greedy, masses, paths
from molehill.wire.keys import Key


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_leaves_share_all_and_their_probability_is_the_product_of_decisions(n, context):
    scorer, x = registry.build("scorer", "tree", d_in=8, n_experts=n), torch.randn(2, 3, 8)
    p = scorer(context(x=x)).exp()
    torch.testing.assert_close(p.sum(-1), torch.ones(2, 3))
    decisions = torch.sigmoid(x @ scorer.nodes.T)
    for leaf in range(n):
        node, wanted = n + leaf, torch.ones(2, 3)
        while node > 1:
            left = decisions[..., node // 2 - 1]
            wanted = wanted * (1 - left if node % 2 else left)
            node //= 2
        torch.testing.assert_close(p[..., leaf], wanted)
    far = scorer(context(x=1e4 * x))
    assert bool(far.isfinite().all())
    torch.testing.assert_close(far.logsumexp(-1), torch.zeros(2, 3))
    left, right = paths(n)
    assert not bool((left * right).any())


def test_at_inference_one_leaf_that_is_not_always_the_likeliest(context):
    p = torch.tensor([[[0.4, 0.15, 0.15, 0.3], [0.1, 0.2, 0.6, 0.1], [0.28, 0.26, 0.45, 0.01]]])
    selector, z = registry.build("selector", "leaf"), p.log()
    assert selector(z, context()).weights.argmax(-1).tolist() == [[0, 2, 0]]  # the last goes left with .54 of it
    torch.testing.assert_close(selector(z, context(training=True)).weights, p)
    assert torch.equal(selector(z, context(training=True)).selected, greedy(p) > 0)
    assert bool((greedy(torch.rand(50, 5)).sum(-1) == 1).all())
    torch.testing.assert_close(masses(p)[1], torch.ones(1, 3))


def test_hardening_is_the_entropy_of_decisions_and_makes_them_clear(context):
    site, z = Site(0, "a", 1, 8, 8), torch.tensor([0.25, 0.25, 0.4, 0.1]).log().view(1, 1, 4).requires_grad_()
    route = registry.build("selector", "leaf")(z, context(training=True))
    loss = registry.build("routing_loss", "node_entropy")([RouteRecord(site, route, None, torch.ones(4))])
    halves, last = 0.6931471805599453, -(0.8 * torch.tensor(0.8).log() + 0.2 * torch.tensor(0.2).log())
    torch.testing.assert_close(loss.detach(), (halves + halves + last) / 3)
    loss.backward()
    assert float(z.grad[0, 0, 3]) > 0 > float(z.grad[0, 0, 2])  # from the less likely side to the other
    clear = registry.build("selector", "leaf")(torch.tensor([[[0.0, -90.0, -200.0, -200.0]]]), context())
    clear = registry.build("routing_loss", "node_entropy")([RouteRecord(site, clear, None, torch.ones(4))])
    assert float(clear) < 1e-6


def blended(name, **keys):
    made = {"blend": name, "shared": 1, "experts": 2, "rank": 2, "targets": ("q_proj", "v_proj"), "scope": "layer"}
    return adapted("llama", **{**made, **keys})


def parts(model, role):
    return [slot for key, slot in model.slots.items() if key.role == role]


def test_a_scalar_shares_the_weight_out_and_alone_the_master_is_left():
    model, rows = shake(blended("scalar")), batch("llama")
    assert torch.sigmoid(torch.tensor(registry.build("blend", "scalar", d_in=1).k.item())) > 0.62
    slots = parts(model, "gate.blend.k")
    assert len(slots) == 2
    for slot in slots:
        model.flat.data[slot.start] = -60.0
    alone = model(**rows).logits
    for group in model.routers.values():
        group.router.blend = None
        group.overrides.expert_mask = None
    plain = shake(adapted("llama", shared=1, experts=2, rank=2, targets=("q_proj", "v_proj"), scope="layer"))
    tree = model.tree(lambda key: key.kind in "AB")
    plain.load(tree)
    for key in tree:
        if key.kind == "B" and key.routed:
            plain.load({key: 0 * tree[key]})
    torch.testing.assert_close(alone, plain(**rows).logits)


def test_a_token_decides_by_the_softmax_of_two_products(context):
    blend, x = registry.build("blend", "by_token", d_in=8), torch.randn(2, 3, 8)
    assert [part.tolist() for part in blend(x[:1, :1])] == [[[[0.5]]], [[[0.5]]]]
    torch.nn.init.normal_(blend.weight)
    shared, routed = blend(x)
    torch.testing.assert_close(torch.cat([shared, routed], -1), (x @ blend.weight.T).softmax(-1))


@pytest.mark.filterwarnings("ignore:grad and param do not obey the gradient layout contract")
@pytest.mark.parametrize("name", ["scalar", "by_token"])
def test_stacked_is_as_alone_and_the_blend_learns(name):
    model, rows = training(shake(blended(name))), batch("llama", rows=4)
    assert model.stackable
    values = torch.stack([model.flat, model.flat * 0.5])
    alone = []
    for c in range(2):
        model.flat.data.copy_(values[c])
        model.grads.zero_()
        half = {key: value[2 * c : 2 * c + 2] for key, value in rows.items()}
        model(**half).logits.square().sum().backward()
        alone.append(model.grad.clone())
    model.stack(2)
    model.values.copy_(values)
    model.grads.zero_()
    model(**rows).logits.square().sum().backward()
    torch.testing.assert_close(model.grads, torch.stack(alone), rtol=1e-3, atol=1e-4)
    slot = next(slot for key, slot in model.slots.items() if key.role.startswith("gate.blend"))
    assert float(model.grads[:, slot.start : slot.stop].abs().min()) > 0


def test_a_blend_has_a_personal_residual_as_a_router_has():
    model = blended("scalar", gate="anchored")
    site = next(iter(model.routers))
    assert Key(site, "-", "gate.residual.blend.k") in model.slots
    model.flat.data[model.slots[Key(site, "-", "gate.residual.blend.k")].start] = 2.0
    router = model.routers[site].router
    assert router.effective("blend.k").item() == pytest.approx(2.5)
    model.use_personal(gate=False, head=False)
    assert router.effective("blend.k").item() == pytest.approx(0.5)


def test_without_shared_experts_there_is_nothing_to_blend():
    assert all(group.router.blend is None for group in blended("scalar", shared=0).routers.values())
