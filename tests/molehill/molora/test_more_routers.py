"""What tells routers from their nearest neighbours: distances, groups, votes, clusters, and embeddings of tasks."""

from __future__ import annotations

import pytest
import torch
from tiny_models import adapted, batch, shake, training

from molehill import registry
from molehill.errors import ConfigError
from molehill.molora.interfaces import RouteRecord, Site

SITE = Site(0, "a", 1, 8, 8)


def built(axis, name, /, **params):
    return registry.build(axis, name, params)


def scorer(name, n=6, **params):
    return registry.build("scorer", name, params, d_in=8, n_experts=n)


def test_laplace_is_largest_at_its_centre_and_goes_by_distance_alone(context):
    laplace, shift = scorer("laplace"), 5 * torch.randn(8)
    at = laplace(context(x=laplace.centres.detach().unsqueeze(0)))
    assert at.argmax(-1).tolist() == [[0, 1, 2, 3, 4, 5]]
    x = torch.randn(2, 3, 8)
    before = laplace(context(x=x))
    torch.testing.assert_close(
        before, -torch.cdist(x, laplace.centres.unsqueeze(0).expand(2, -1, -1)), atol=1e-4, rtol=1e-4
    )
    with torch.no_grad():
        laplace.centres += shift
    torch.testing.assert_close(laplace(context(x=x + shift)), before, atol=1e-4, rtol=1e-4)
    linear = scorer("linear")
    assert not torch.allclose(linear(context(x=x + shift)), linear(context(x=x)), atol=1e-2)


def test_distances_hold_far_from_the_origin(context):
    laplace, x = scorer("laplace"), 1000 + torch.randn(2, 3, 8)
    with torch.no_grad():
        laplace.centres += 1000
    far = -(x.unsqueeze(-2) - laplace.centres).norm(dim=-1)
    torch.testing.assert_close(laplace(context(x=x)), far, atol=1e-3, rtol=1e-3)


def test_two_levels_are_the_product_of_their_softmaxes(context):
    laplace, x = scorer("laplace", groups=3), torch.randn(2, 4, 8)
    p = laplace(context(x=x)).softmax(-1)
    torch.testing.assert_close(laplace(context(x=x)).logsumexp(-1), torch.zeros(2, 4), atol=1e-5, rtol=0)
    group = (-torch.cdist(x, laplace.group_centres.unsqueeze(0).expand(2, -1, -1))).softmax(-1)
    torch.testing.assert_close(p.view(2, 4, 3, 2).sum(-1), group, atol=1e-4, rtol=1e-4)
    with pytest.raises(ConfigError, match="6 experts do not lie in 4 groups"):
        scorer("laplace", groups=4)


def test_every_group_gives_one_expert(context):
    z = torch.randn(3, 5, 6)
    route = built("selector", "grouped", groups=3)(z, context())
    assert bool(((route.weights.view(3, 5, 3, 2) > 0).sum(-1) == 1).all())
    one = built("selector", "grouped", groups=1)(z, context()).weights
    assert torch.equal(one, built("selector", "switch", capacity=None)(z, context()).weights)
    assert torch.equal(built("selector", "grouped", groups=6)(z, context()).weights, torch.ones(3, 5, 6))
    two = (built("selector", "top_k", k=2)(z, context()).weights > 0).view(3, 5, 3, 2)
    assert bool((two.sum(-1) == 2).any())  # top-2 takes two of one group
    with pytest.raises(ConfigError, match="6 experts do not lie in 4 groups"):
        built("selector", "grouped", groups=4)(z, context())


def test_even_trust_is_the_plain_sum_and_the_least_trusted_weighs_least(context):
    selector, z = built("selector", "leave_one_out"), torch.randn(2, 3, 5)
    assert torch.equal(selector(torch.zeros(2, 3, 4), context()).weights, torch.ones(2, 3, 4))
    weights = selector(z, context()).weights
    torch.testing.assert_close(weights.sum(-1), torch.full((2, 3), 5.0))
    assert torch.equal(weights.argmin(-1), z.argmax(-1))  # g is how far an expert is left out
    # The mixture, by g, of the ensembles that lack one expert each.
    ensembles = (1 - torch.eye(5)) * 5 / 4
    torch.testing.assert_close(weights, z.softmax(-1) @ ensembles)


def test_a_pass_of_the_experts_leaves_the_gate_and_one_expert_alone(context):
    torch.manual_seed(0)
    z = torch.randn(1, 400, 4, requires_grad=True)
    route = built("selector", "leave_one_out", gate=1e-9)(z, context(training=True))
    assert bool(((route.weights == 0).sum(-1) == 1).all())
    assert not route.weights.requires_grad
    assert built("selector", "leave_one_out", gate=1.0)(z, context(training=True)).weights.requires_grad


def test_a_vote_has_k_members_and_tells_of_those_who_have_none(context):
    torch.manual_seed(0)
    z = torch.tensor([[[2.0, 1.0, 0.4, 0.0]]], requires_grad=True)
    hard = built("selector", "perturbed_top_k", k=2)(z, context()).weights
    assert hard.tolist() == [[[0.5, 0.5, 0.0, 0.0]]]
    near = built("selector", "perturbed_top_k", k=2, sigma=1e-4)(z, context(training=True)).weights
    assert torch.equal(near, hard)
    soft = built("selector", "perturbed_top_k", k=2, samples=4000, sigma=0.5)(z, context(training=True)).weights
    torch.testing.assert_close(soft.sum(), torch.tensor(1.0))
    worth = torch.tensor([0.0, 0.0, 1.0, 0.0])
    (soft * worth).sum().backward()
    assert float(z.grad[0, 0, 2]) > 0 > float(z.grad[0, 0, 1])
    plain = z.detach().clone().requires_grad_()
    (built("selector", "top_k", k=2)(plain, context(training=True)).weights * worth).sum().backward()
    assert not bool(plain.grad.any())  # top-k learns nothing of whom it did not choose


def test_the_gradient_of_a_vote_is_that_of_its_expectation(context):
    torch.manual_seed(1)
    z, step = torch.tensor([0.3, 0.0, -0.2]), 0.2

    def expected(z):
        return built("selector", "perturbed_top_k", k=1, samples=60000)(z, context(training=True)).weights[0]

    given = z.clone().requires_grad_()
    expected(given).backward()
    moved = (expected(z + torch.tensor([step, 0, 0])) - expected(z - torch.tensor([step, 0, 0]))) / (2 * step)
    torch.testing.assert_close(given.grad[0], moved, atol=0.04, rtol=0.05)


def test_cosines_know_no_length(context):
    cosine, x = scorer("cosine_gate"), torch.randn(2, 3, 8)
    z = cosine(context(x=x))
    torch.testing.assert_close(cosine(context(x=7 * x)), z, atol=1e-4, rtol=1e-4)
    assert float(z.detach().abs().max()) <= 1 / 0.07 + 1e-3


def test_clusters_share_their_work_and_never_close_as_a_whole(context):
    def loss(p):
        z = torch.tensor(p).log().view(1, 1, 4)
        route = built("selector", "dense")(z, context())
        return float(
            built("routing_loss", "cluster_variance", clusters=2)([RouteRecord(SITE, route, None, torch.ones(4))])
        )

    assert loss([0.4, 0.4, 0.1, 0.1]) == pytest.approx(0, abs=1e-6)  # how much clusters carry is free
    assert loss([0.5, 0.3, 0.1, 0.1]) == pytest.approx(4 * (0.01 + 0.0) / 2, abs=1e-6)
    dropout, z = built("transform", "cluster_dropout", clusters=2, p=0.9, draws=4), torch.randn(2, 3, 8)
    seen = set()
    for progress in (0.0, 0.3, 0.6, 0.9):
        closed = dropout(z, context(training=True, progress=progress)) < -1e30
        assert bool((closed == closed[:1, :1]).all())
        assert closed[0, 0].view(2, 4).sum(-1).tolist() == [3, 3]
        other = built("transform", "cluster_dropout", clusters=2, p=0.9, draws=4)
        assert torch.equal(other(z, context(training=True, progress=progress)) < -1e30, closed)  # at every site alike
        seen.add(tuple(closed[0, 0].tolist()))
    assert len(seen) > 1
    assert torch.equal(dropout(z, context()), z)
    with pytest.raises(ConfigError, match="8 experts do not lie in 3 clusters"):
        built("transform", "cluster_dropout", clusters=3)(z, context())


def test_a_task_has_one_route_and_learns_through_the_hard_choice(context):
    mlp = scorer("task_mlp", tasks=3)
    z = mlp(context(x=torch.randn(4, 5, 8), task_ids=torch.tensor([0, 2, 0, 9])))
    assert z.shape == (4, 1, 6)
    assert torch.equal(z[0], z[2])
    assert not torch.equal(z[0], z[1])
    route = built("selector", "gumbel")(z, context(training=True, progress=0.5))
    assert bool(((route.weights == 1).sum(-1) == 1).all())
    assert int((route.weights != 0).sum()) == 4
    (route.weights * torch.randn(6)).sum().backward()
    assert bool(mlp.embedding.grad[0].any())
    assert bool(mlp.outer.grad.any())
    assert mlp.own == {"embedding"}
    assert torch.equal(built("selector", "gumbel")(z, context()).weights.argmax(-1), z.argmax(-1))


def test_gumbel_draws_by_the_softmax(context):
    torch.manual_seed(0)
    z = torch.tensor([2.0, 1.0, 0.0]).expand(1, 6000, 3)
    drawn = built("selector", "gumbel")(z, context(training=True)).weights.mean((0, 1))
    torch.testing.assert_close(drawn, z[0, 0].softmax(-1), atol=0.02, rtol=0)


def test_the_number_of_experts_falls_with_training(context):
    selector, z = built("selector", "top_k", k=2, start=6), torch.randn(2, 3, 6)
    counts = []
    for progress in torch.linspace(0, 1, 21).tolist():
        chosen = selector(z, context(training=True, progress=progress)).selected.sum(-1)
        assert bool((chosen == chosen[0, 0]).all())
        counts.append(int(chosen[0, 0]))
    assert counts == sorted(counts, reverse=True)
    assert sorted(set(counts)) == [2, 3, 4, 5, 6]
    assert (counts[0], counts[-1]) == (6, 2)
    assert bool((selector(z, context(progress=0.0)).selected.sum(-1) == 2).all())  # at inference k alone counts
    assert bool((selector.with_k(1)(z, context(training=True, progress=1.0)).selected.sum(-1) == 1).all())


def test_experts_tell_a_young_gate_of_their_worth_when_all_are_chosen(context):
    worth, at = torch.randn(6), context(training=True)
    for params, silent in (({"k": 2, "start": 6}, 0), ({"k": 2}, 4)):
        z = torch.randn(1, 1, 6, requires_grad=True)
        (built("selector", "top_k", **params)(z, at).weights * worth).sum().backward()
        assert int((z.grad == 0).sum()) == silent


def test_the_noise_of_a_gate_is_learnt_and_gone_at_inference(context):
    torch.manual_seed(0)
    gate, x = scorer("noisy_linear"), torch.randn(1, 1, 8).expand(1, 20000, 8)
    with torch.no_grad():
        gate.noise.normal_()
    plain = gate(context(x=x))
    torch.testing.assert_close(plain, x @ gate.weight.T)
    noise = gate(context(x=x, training=True)) - plain
    scale = torch.nn.functional.softplus(x[0, 0] @ gate.noise.T)
    torch.testing.assert_close(noise.std((0, 1)), scale, atol=0.01, rtol=0.03)
    assert bool((noise.mean((0, 1)).abs() < 4 * scale / 20000**0.5).all())  # four standard errors of the mean


def test_what_experts_tell_of_the_task(context):
    def loss(p, types, mask=None):
        z = torch.tensor(p).clamp_min(1e-30).log()
        route = built("selector", "dense")(z, context())
        given = None if types is None else torch.tensor(types)
        return float(built("routing_loss", "task_information")([RouteRecord(SITE, route, mask, torch.ones(2), given)]))

    apart, half = [[[1.0, 0.0]] * 2, [[0.0, 1.0]] * 2], [[[0.5, 0.5]] * 2] * 2
    ln2 = float(torch.tensor(2.0).log())
    assert loss(apart, [0, 1]) == pytest.approx(0, abs=1e-5)
    assert loss(half, [0, 1]) == pytest.approx(ln2, abs=1e-5)
    for types in ([3, 3], None):  # of one task, or of none
        assert loss(apart, types) == pytest.approx(ln2, abs=1e-5)
    padded, real = [[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]], torch.tensor([[True, False]] * 2)
    assert loss(padded, [0, 1], real) == pytest.approx(0, abs=1e-5)
    assert loss(padded, [0, 1]) == pytest.approx(ln2, abs=1e-5)


@pytest.mark.parametrize("preset", ["laplace", "m6t", "mae", "diff_select", "moec", "task_moe", "ver"])
def test_all_that_is_of_a_router_learns(preset):
    torch.manual_seed(0)
    model = shake(training(adapted("llama", preset=preset, rank=2)), scale=0.1)
    seen = torch.zeros_like(model.grad)
    for _ in range(60 if preset == "mae" else 12):  # one in five is a pass of the gate
        model.grad.zero_()
        forward = model(**batch())
        torch.nn.functional.cross_entropy(forward.logits, forward.labels).backward()
        seen += model.grad.abs()
    silent = [
        key.name
        for key, slot in model.slots.items()
        if key.kind == "gate" and not bool(seen[slot.start : slot.stop].any())
    ]
    assert silent == []
