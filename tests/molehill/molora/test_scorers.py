from __future__ import annotations

import math

import pytest
import torch

from molehill import registry


def _build(name, values=None, *, d_in=8, n_experts=5):
    return registry.build("scorer", name, values, d_in=d_in, n_experts=n_experts)


def test_linear_is_one_product(context):
    scorer, x = _build("linear"), torch.randn(2, 3, 8)
    assert scorer.fusable
    assert [n for n, _ in scorer.named_parameters()] == ["weight"]
    expected = torch.stack([torch.stack([scorer.weight @ token for token in row]) for row in x])
    torch.testing.assert_close(scorer(context(x=x)), expected)


def test_linear_inits_have_their_spread():
    def build(**values):
        return _build("linear", values, d_in=256, n_experts=64).weight.detach()

    assert float(build().abs().max()) <= 1 / 16
    assert float(build().std()) == pytest.approx(1 / 16 / math.sqrt(3), rel=0.05)
    assert float(build(init="normal", std=0.02).std()) == pytest.approx(0.02, rel=0.05)
    switch = build(init="switch")
    sigma = math.sqrt(0.1 / 256)
    assert float(switch.abs().max()) <= 2 * sigma
    assert float(switch.std()) == pytest.approx(0.88 * sigma, rel=0.05)


def test_jitter_is_on_the_input_and_only_in_training(context):
    scorer = _build("linear", {"jitter": 0.1}, n_experts=2)
    assert not scorer.fusable
    x = torch.ones(4, 500, 8)
    clean = x @ scorer.weight.T
    assert torch.equal(scorer(context(x=x)), clean)
    noise = (scorer(context(x=x, training=True)) - clean).flatten(0, 1).detach()
    # noise on the inputs reaches the logits through W: its covariance is var(U) * W W^T
    torch.testing.assert_close(noise.T.cov(), 0.01 / 3 * scorer.weight @ scorer.weight.T, atol=1e-4, rtol=0.15)


def test_mixture_mixes_distributions(context):
    scorer, x = _build("mixture", {"m": 3}), torch.randn(2, 4, 8)
    assert sorted(n for n, _ in scorer.named_parameters()) == ["main", "sub"]
    probs = scorer(context(x=x)).softmax(-1)
    torch.testing.assert_close(scorer(context(x=x)).exp().sum(-1), torch.ones(2, 4))
    for b in range(2):
        for t in range(4):
            a = (scorer.main @ x[b, t]).softmax(-1)
            mixed = sum(a[m] * (scorer.sub[m] @ x[b, t]).softmax(-1) for m in range(3))
            torch.testing.assert_close(probs[b, t], mixed)


def test_mixture_of_one_is_the_plain_router_and_a_certain_main_router_picks_one(context):
    x = torch.randn(2, 4, 8)
    one = _build("mixture", {"m": 1})
    torch.testing.assert_close(one(context(x=x)).softmax(-1), (x @ one.sub[0].T).softmax(-1))
    scorer = _build("mixture", {"m": 3})
    with torch.no_grad():
        scorer.main.zero_()
        scorer.main[2] = 1000 * x[0, 0]
    torch.testing.assert_close(scorer(context(x=x[:1, :1])).softmax(-1)[0, 0], (scorer.sub[2] @ x[0, 0]).softmax(-1))


@pytest.mark.parametrize("splits", [1, 4])
def test_task_table_looks_up_rows_and_unseen_tasks_get_the_mean(splits, context):
    scorer = _build("task_table", {"tasks": 3, "splits": splits})
    assert scorer.heads == splits
    assert float(scorer.table.detach().abs().max()) <= 1e-3
    with torch.no_grad():
        scorer.table.normal_()
    z = scorer(context(x=torch.randn(5, 7, 8), task_ids=torch.tensor([2, 0, 1, 3, -1])))
    assert z.shape == ((5, 1, 5) if splits == 1 else (5, 1, splits, 5))
    rows = z.view(5, splits, 5)
    torch.testing.assert_close(rows[:3], scorer.table[[2, 0, 1]])
    torch.testing.assert_close(rows[3], scorer.table.mean(0))
    torch.testing.assert_close(rows[4], scorer.table.mean(0))
    assert torch.equal(scorer(context())[0].view(splits, 5), rows[3])


def test_task_table_learns_only_the_rows_it_used(context):
    scorer = _build("task_table", {"tasks": 3})
    scorer(context(task_ids=torch.tensor([1, 1]))).square().sum().backward()
    assert scorer.table.grad[1].abs().sum() > 0
    assert scorer.table.grad[[0, 2]].abs().sum() == 0


@pytest.mark.parametrize("name", ["linear", "mixture"])
def test_scores_are_float32_and_every_parameter_learns(name, context):
    scorer = _build(name)
    z = scorer(context(x=torch.randn(2, 3, 8).bfloat16()))
    assert z.dtype == torch.float32
    (z * torch.randn_like(z)).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in scorer.parameters())


def test_temperature_anneals_in_training_and_is_final_at_inference(context):
    z = torch.randn(1, 2, 4)
    warm = registry.build("transform", "temperature", {"start": 4.0, "end": 0.25})
    for progress, tau in ((0.0, 4.0), (0.5, 1.0), (1.0, 0.25)):
        torch.testing.assert_close(warm(z, context(training=True, progress=progress)), z / tau)
    torch.testing.assert_close(warm(z, context()), z / 0.25)
    assert torch.equal(registry.build("transform", "temperature")(z, context(training=True)), z)


def test_who_leans_adds_a_number_an_expert(context):
    scorer, x = _build("leaning"), torch.randn(2, 3, 8)
    assert torch.equal(scorer(context(x=x)), x @ scorer.weight.T)
    assert scorer.own == {scorer.leans} == {"lean"}
    with torch.no_grad():
        scorer.lean.copy_(torch.arange(5.0))
    torch.testing.assert_close(scorer(context(x=x)), x @ scorer.weight.T + torch.arange(5.0))


def _placed(lean, n_experts=4):
    scorer = _build("own_alias", n_experts=n_experts)
    with torch.no_grad():
        scorer.lean.copy_(torch.tensor(lean))
        for parameter in scorer.of.parameters():
            parameter.mul_(4)
    return scorer


@pytest.mark.parametrize("lean", [(1, 1, 2, 1), (1, 0, 2, 1), (2, 0, 1, 0)])
def test_own_alias_is_the_top_m_of_2m_minus_1_outputs(lean, context):
    scorer, x = _placed([float(number) for number in lean]), torch.randn(6, 9, 8)
    weights = scorer(context(x=x)).softmax(-1)
    opened, own = [e for e in range(4) if lean[e]], lean.index(2)
    m, router = len(opened), scorer.of[f"e{own}"]
    maps = opened + [own] * (m - 1)
    rows = torch.cat([router.weight[opened], router.alias[: m - 1]])
    chosen = 0
    for b in range(6):
        for t in range(9):
            best, where = (rows @ x[b, t]).softmax(-1).topk(m)
            expected = torch.zeros(4)
            for value, at in zip(best / best.sum(), where.tolist(), strict=True):
                expected[maps[at]] += value
            torch.testing.assert_close(weights[b, t], expected)
            chosen += int((expected > 0).sum())
    assert (weights[..., own] > 0).all()  # of m outputs at most m - 1 are of others
    assert 54 < chosen < 54 * m  # and tokens differ in how many experts they have


def test_own_alias_of_one_open_expert_is_that_expert_and_without_an_own_all_count(context):
    x = torch.randn(2, 3, 8)
    assert torch.equal(_placed([0.0, 2.0, 0.0, 0.0])(context(x=x)).softmax(-1), torch.eye(4)[1].expand(2, 3, 4))
    shared = _placed([0.0] * 4)
    rows = torch.stack([router.weight for router in shared.of.values()]).mean(0)
    torch.testing.assert_close(shared(context(x=x)).softmax(-1), (x @ rows.T).softmax(-1))


def test_own_alias_teaches_the_router_of_the_own_expert_alone(context):
    scorer = _placed([1.0, 2.0, 1.0, 0.0])
    weights = scorer(context(x=torch.randn(4, 9, 8))).softmax(-1)
    (weights * torch.randn_like(weights)).sum().backward()
    moved = {
        name for name, parameter in scorer.named_parameters() if parameter.grad is not None and parameter.grad.any()
    }
    assert moved == {"of.e1.weight", "of.e1.alias"}


def test_lowrank_dot_holds_what_an_expert_makes_of_a_token_against_the_router(context):
    scorer, x = registry.build("scorer", "lowrank_dot", d_in=8, n_experts=3, rank=4), torch.randn(2, 5, 8)
    A = torch.randn(3, 4, 8, requires_grad=True)
    z = scorer(context(x=x, experts=A))
    for b, t, e in ((0, 0, 0), (1, 4, 2), (1, 2, 1)):
        expected = (A[e] @ x[b, t]) @ (scorer.projection @ x[b, t]) / 2
        torch.testing.assert_close(z[b, t, e], expected)
    places = scorer.embeddings(context(x=x, experts=A))
    torch.testing.assert_close(places[:, :, 0], x @ scorer.projection.T)
    torch.testing.assert_close(places[:, :, 2], x @ A[1].T)
    (z * torch.randn_like(z)).sum().backward()
    assert scorer.projection.grad.abs().sum() > 0
    assert A.grad.abs().sum() > 0  # an expert learns what it is for
    assert scorer.lean.grad is None  # which is said, and not learnt
    with torch.no_grad():
        scorer.lean[1] = -100.0
    torch.testing.assert_close(scorer(context(x=x, experts=A)), z + torch.tensor([0.0, -100.0, 0.0]))
