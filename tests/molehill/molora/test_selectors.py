from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from molehill import registry
from molehill.errors import ConfigError
from molehill.molora.distributions import softmax, top_k_softmax, tsallis, uncertainty

SELECTORS = [
    ("dense", {}),
    ("dense", {"activation": "sigmoid"}),
    ("dense", {"activation": "sigmoid_norm"}),
    ("top_k", {"k": 2}),
    ("top_k", {"k": 3, "renorm": "none"}),
    ("switch", {"capacity": None}),
    ("top_p", {"p": 0.6}),
    ("dynmole", {}),
    ("dynmole", {"inclusive": False, "tau": 0.8}),
    ("gw", {"k": 2}),
    ("gw", {"k": 1, "renorm": "none", "threshold": 0.5, "slots": 1}),
]


def _p(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def _shannon(p):
    return -sum(v * math.log(v) for v in p if v > 0)


def _tsallis(p, q):
    n = len(p)
    return ((1 - sum(v**q for v in p)) / (q - 1)) / ((1 - n ** (1 - q)) / (q - 1))


def _one_token(name, params, z):
    """Weights of one token at inference, by the definitions, in plain Python."""
    p, n = _p(z), len(z)
    order = sorted(range(n), key=lambda e: -p[e])
    w = np.zeros(n)
    if name == "dense":
        s = 1 / (1 + np.exp(-z))
        return {"softmax": p, "sigmoid": s, "sigmoid_norm": s / s.sum()}[params.get("activation", "softmax")]
    if name in {"top_k", "gw", "switch"}:
        k, renorm = params.get("k", 1), params.get("renorm", "selected")
        chosen = order[:k]
        for e in chosen:
            w[e] = p[e] if renorm == "none" or name == "switch" else p[e] / sum(p[i] for i in chosen)
        return w
    chosen = _up_to(
        p, order, params.get("p", 0.4) if name == "top_p" else 0.75, inclusive=params.get("inclusive", True)
    )
    if name == "dynmole":
        unsure = _tsallis(p, 1.1) > params.get("tau", 0.9)
        chosen = order if unsure else {*chosen, *order[:2]}
    for e in chosen:
        w[e] = p[e]
    return w


def _up_to(p, order, limit, *, inclusive):
    """The most probable experts until their mass reaches the limit, with or without the last of them."""
    mass, chosen = 0.0, []
    for e in order:
        mass += p[e]
        if inclusive or mass <= limit:
            chosen.append(e)
        if mass >= limit:
            break
    return chosen


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
@pytest.mark.parametrize(("name", "params"), SELECTORS)
def test_equals_the_definition(name, params, scale, context):
    z = torch.randn(3, 5, 6) * scale
    route = registry.build("selector", name, params)(z, context())
    expected = np.array([[_one_token(name, params, z[b, t].double().numpy()) for t in range(5)] for b in range(3)])
    np.testing.assert_allclose(route.weights.numpy(), expected, atol=2e-6)
    assert bool((route.weights >= 0).all())
    torch.testing.assert_close(route.probs.sum(-1), torch.ones(3, 5), atol=1e-5, rtol=0)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("name", "params"), [*SELECTORS, ("switch", {"capacity": 1.0})])
def test_permuting_experts_permutes_weights(name, params, training, context):
    select = registry.build("selector", name, params)
    z, order = torch.randn(2, 7, 5), torch.randperm(5)
    route = select(z, context(training=training))
    permuted = select(z[..., order], context(training=training))
    torch.testing.assert_close(permuted.weights, route.weights[..., order])
    torch.testing.assert_close(permuted.probs, route.probs[..., order])


@pytest.mark.parametrize(("name", "params"), SELECTORS)
def test_one_expert_has_weight_one(name, params, context):
    if params.get("activation") == "sigmoid":
        pytest.skip("a lone sigmoid gate is not renormalised")
    route = registry.build("selector", name, params)(torch.randn(2, 3, 1), context(training=True))
    torch.testing.assert_close(route.weights, torch.ones(2, 3, 1))


@pytest.mark.parametrize(("name", "params"), [*SELECTORS, ("switch", {"capacity": 1.0})])
def test_eval_form_is_the_selector_at_inference(name, params, context):
    select = registry.build("selector", name, params)
    z = torch.randn(2, 7, 5)
    evaluated = select.eval_form()
    assert evaluated.causal
    assert select.causal
    torch.testing.assert_close(evaluated(z, context()).weights, select(z, context()).weights)
    # and nothing changes when it is told that it trains
    torch.testing.assert_close(evaluated(z, context(training=True)).weights, select(z, context()).weights)


@pytest.mark.parametrize(("name", "params"), SELECTORS)
def test_inference_is_causal_and_row_by_row(name, params, context):
    select = registry.build("selector", name, params)
    z = torch.randn(3, 6, 5)
    alone = select(z[1:2, :4], context()).weights
    torch.testing.assert_close(select(z, context()).weights[1:2, :4], alone)


@pytest.mark.parametrize(("name", "params"), SELECTORS)
def test_masked_experts_get_nothing(name, params, context):
    z = torch.randn(2, 4, 5)
    z[..., 3] = torch.finfo(torch.float32).min
    z.requires_grad_()
    route = registry.build("selector", name, params)(z, context(training=True))
    assert float(route.weights.detach()[..., 3].abs().max()) == 0
    (route.weights.square().sum() + (route.probs * route.weights).sum()).backward()
    assert bool(torch.isfinite(z.grad).all())


@pytest.mark.parametrize(("name", "params"), SELECTORS)
def test_gradients(name, params, context):
    select = registry.build("selector", name, params)
    z = (torch.randn(2, 3, 5, dtype=torch.float64) * 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: select(v, context(training=True)).weights, (z,))
    assert torch.autograd.gradcheck(lambda v: select(v, context(training=True)).probs, (z,))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 10_000))
def test_fast_softmaxes_equal_torch(n, k, seed):
    z = torch.randn(4, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, requires_grad=True)
    k = min(k, n)
    g = torch.randn(4, n, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    (grad,) = torch.autograd.grad(softmax(z), z, g)
    (expected,) = torch.autograd.grad(z.softmax(-1), z, g)
    torch.testing.assert_close(softmax(z), z.softmax(-1))
    torch.testing.assert_close(grad, expected)
    kept = z.masked_fill(z < z.topk(k, -1).values[:, -1:], -math.inf).softmax(-1)
    (grad,) = torch.autograd.grad(top_k_softmax(z, k), z, g)
    (expected,) = torch.autograd.grad(kept, z, g)
    torch.testing.assert_close(top_k_softmax(z, k), kept)
    torch.testing.assert_close(grad, expected)


def test_top_k_takes_exactly_k_when_logits_tie(context):
    for renorm in ("selected", "none"):
        route = registry.build("selector", "top_k", {"k": 2, "renorm": renorm})(torch.zeros(1, 4, 6), context())
        assert (route.weights > 0).sum(-1).tolist() == [[2] * 4]


# --- switch -----------------------------------------------------------------------------------------------------


def test_switch_serves_tokens_in_order_of_arrival_up_to_capacity(context):
    z = torch.randn(3, 8, 4)
    mask = torch.rand(3, 8) > 0.3
    select = registry.build("selector", "switch", {"capacity": 0.7})
    route = select(z, context(training=True, mask=mask))
    limit, taken = max(1, math.floor(0.7 * int(mask.sum()) / 4)), [0] * 4
    for b in range(3):
        for t in range(8):
            p = _p(z[b, t].numpy())
            e = int(p.argmax())
            if not mask[b, t]:
                continue
            taken[e] += 1
            expected = float(p[e]) if taken[e] <= limit else 0.0
            assert float(route.weights[b, t].sum()) == pytest.approx(expected, abs=1e-6)
    assert int((route.weights > 0)[mask].sum(0).max()) <= limit
    assert route.selected.sum(-1).eq(1).all()  # the choice before the limit, for the balance loss
    z[~mask] = 100.0  # padding takes no place
    torch.testing.assert_close(select(z, context(training=True, mask=mask)).weights[mask], route.weights[mask])


def test_switch_capacity_with_a_route_per_sequence(context):
    z = torch.zeros(4, 1, 2)
    z[..., 0] = 1
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[0] = False
    route = registry.build("selector", "switch", {"capacity": 1.0})(z, context(training=True, mask=mask))
    assert (route.weights[..., 0] > 0).flatten().tolist() == [False, True, False, False]


# --- top-p ------------------------------------------------------------------------------------------------------


def test_top_p_is_sufficient_and_minimal(context):
    z = torch.randn(4, 9, 8)
    for mass in (0.2, 0.5, 0.9):
        w = registry.build("selector", "top_p", {"p": mass})(z, context()).weights
        assert bool((w.sum(-1) >= mass - 1e-6).all())
        smallest = w.masked_fill(w == 0, math.inf).amin(-1)
        assert bool((w.sum(-1) - smallest < mass).all())


def test_top_p_limits(context):
    z = torch.randn(2, 5, 8)
    dense = registry.build("selector", "dense")(z, context())
    torch.testing.assert_close(registry.build("selector", "top_p", {"p": 1.0})(z, context()).weights, dense.weights)
    few = registry.build("selector", "top_p", {"p": 1 / 8})(z, context()).weights
    top = registry.build("selector", "top_k", {"k": 1, "renorm": "none"})(z, context()).weights
    torch.testing.assert_close(few, top)


# --- entropy ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("q", [0.5, 1.1, 2.0])
def test_tsallis_runs_from_zero_to_one(q):
    torch.testing.assert_close(tsallis(torch.full((1, 6), 1 / 6), q), torch.ones(1))
    torch.testing.assert_close(tsallis(torch.eye(6), q), torch.zeros(6), atol=2e-3, rtol=0)
    p = torch.randn(5, 6, dtype=torch.float64).softmax(-1)
    torch.testing.assert_close(tsallis(p, 1.0001), uncertainty(p), atol=1e-3, rtol=0)


def test_dynmole_starts_dense_and_sharpens(context):
    select = registry.build("selector", "dynmole")
    route = select(torch.zeros(1, 1, 6), context())
    assert (route.weights > 0).all()
    torch.testing.assert_close(route.aux["entropy"], torch.ones(1, 1))
    early = select(torch.randn(1, 4000, 6) * 0.5, context()).weights.gt(0).all(-1).float().mean()
    late = select(torch.randn(1, 4000, 6) * 2, context()).weights.gt(0).all(-1).float().mean()
    assert early > 0.8
    assert late < 0.06


def test_dynmole_paper_and_code_differ_by_the_crossing_expert(context):
    z = torch.tensor([[[2.0, 1.2, 1.0, 0.8, -9.0, -9.0]]])  # p about .44 .20 .16 .13
    given = {"tau": 1.0, "p": 0.75}
    paper = registry.build("selector", "dynmole", given)(z, context())
    code = registry.build("selector", "dynmole", given | {"inclusive": False})(z, context())
    assert int((paper.weights > 0).sum()) == int((code.weights > 0).sum()) + 1


def test_gw_broadcasts_uncertain_tokens_up_to_its_slots_and_only_in_training(context):
    z = torch.cat([torch.zeros(2, 6, 4), torch.eye(4).repeat(2, 1, 1) * 9], dim=1)  # six unsure, four sure tokens
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[1, :5] = False
    select = registry.build("selector", "gw", {"slots": 3, "k": 1})
    plain = registry.build("selector", "top_k", {"k": 1})
    trained = select(z, context(training=True, mask=mask))
    assert (trained.weights > 0).all(-1).nonzero().tolist() == [[0, 0], [0, 1], [0, 2], [1, 5]]
    torch.testing.assert_close(trained.weights[0, 0], torch.full((4,), 0.25))
    torch.testing.assert_close(trained.weights[:, 6:], plain(z, context()).weights[:, 6:])
    assert trained.selected.sum(-1).eq(1).all()
    assert torch.equal(select(z, context(mask=mask)).weights, plain(z, context()).weights)


def test_gw_threshold_is_a_part_of_ln_e(context):
    p = torch.tensor([0.4, 0.2, 0.2, 0.1, 0.05, 0.03, 0.01, 0.01])
    nats = _shannon(p.tolist())
    for shift, broadcast in ((-0.01, True), (0.01, False)):
        threshold = (nats + shift) / math.log(8)
        select = registry.build("selector", "gw", {"threshold": threshold})
        weights = select(p.log().view(1, 1, 8), context(training=True)).weights
        assert bool((weights > 0).all()) is broadcast


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("top_k", {"k": 0}),
        ("top_p", {"p": 0.0}),
        ("dynmole", {"q": 1.0}),
        ("gw", {"slots": -1}),
        ("switch", {"capacity": 0.0}),
        ("dense", {"activation": "relu"}),
        ("top_k", {"kk": 2}),
    ],
)
def test_bad_parameters_are_refused(name, params):
    with pytest.raises(ConfigError):
        registry.build("selector", name, params)


@pytest.mark.parametrize(("name", "params"), SELECTORS)
def test_export_of_the_eval_form(name, params, context):
    """The eval form is a static graph: it exports with dynamic batch and time, and the graph gives the same weights."""

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.select = registry.build("selector", name, params).eval_form()

        def forward(self, z):
            return self.select(z, context()).weights

    batch, time = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("time", min=1, max=512)
    program = torch.export.export(Module(), (torch.randn(2, 9, 5),), dynamic_shapes={"z": {0: batch, 1: time}})
    for shape in ((2, 9, 5), (3, 17, 5)):
        z = torch.randn(*shape)
        torch.testing.assert_close(program.module()(z), Module()(z))
