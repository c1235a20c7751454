"""The fused product against finite differences and against a loop over experts that is written here."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from molehill import registry
from molehill.molora.experts.lora import LoRABank
from molehill.molora.fused import Output, down, up
from molehill.molora.interfaces import RouteContext, Site
from molehill.molora.layer import MoLoRALinear
from molehill.molora.mixers.output import OutputMixer
from molehill.molora.router import Router
from molehill.molora.routes import ForwardState, RouteGroup

D_IN, D_OUT, ALPHA = 12, 10, 6.0
SELECTORS = {
    **{method.name: (method.name, {}) for method in registry.methods("selector")},
    "leave_one_out": ("leave_one_out", {"gate": 1.0}),  # else a pass may be of the experts alone
    "top_k none": ("top_k", {"k": 2, "renorm": "none"}),
    "dense sigmoid": ("dense", {"activation": "sigmoid"}),
    "dense sigmoid_norm": ("dense", {"activation": "sigmoid_norm"}),
}
CASES = {
    "uniform": {"ranks": (3, 3, 3, 3)},
    "mixed ranks": {"ranks": (1, 2, 5, 3)},
    "shared": {"ranks": (3, 3, 3), "shared": (3, 3)},
    "shared mixed": {"ranks": (2, 3, 1), "shared": (4,)},
    "patches": {"ranks": (2, 2, 2), "patches": {0: 3, 2: 1}},
    "dropout": {"ranks": (3, 3, 3), "dropout": 0.4},
    "all": {"ranks": (1, 2, 3), "shared": (2,), "patches": {0: 2, 3: 1}, "dropout": 0.3},
}


def site_of(selector, *, ranks, shared=(), patches=None, dropout=0.0):
    name, params = selector
    place, state = Site(0, "layers.0.q", 2, D_IN, D_OUT), ForwardState()
    bank = LoRABank(site=place, ranks=(*shared, *ranks), alpha=ALPHA)
    scorer = registry.build("scorer", "linear", {"init": "normal", "std": 1.0}, d_in=D_IN, n_experts=len(ranks))
    group = RouteGroup(
        Router(scorer, [], registry.build("selector", name, params), anchored=False),
        place,
        state,
        torch.ones(len(ranks)),
    )
    base = nn.Linear(D_IN, D_OUT).requires_grad_(requires_grad=False)
    nn.init.normal_(bank.A)
    nn.init.normal_(bank.Bt)
    bank.set_patches({e: (torch.randn(p, D_IN), torch.randn(D_OUT, p)) for e, p in (patches or {}).items()})
    return MoLoRALinear(
        base, place, bank, shared=len(shared), group=group, mixer=OutputMixer(), dropout=dropout, state=state
    )


def by_loop(module, x):
    """One expert after another, and the route by the selector alone."""
    bank, router = module.bank, module.group.router
    seen = module.dropout(x)
    ctx = RouteContext(x=x, site=module.site, training=module.group.training)
    weights = router.selector(x @ router.scorer.weight.T, ctx).weights
    y = x @ module.base.weight.T + module.base.bias
    start = 0
    for index, rank in enumerate(bank.ranks):
        A, B = bank.A[start : start + rank], bank.Bt[start : start + rank].T
        start += rank
        delta = ALPHA / rank * (seen @ A.T) @ B.T
        for row in (bank.patch_expert == index).nonzero().flatten():
            delta = delta + (seen @ bank.patch_A[row]).unsqueeze(-1) * bank.patch_Bt[row]
        y = y + (delta if index < module.shared else weights[..., index - module.shared, None] * delta)
    return y


def run(module, function, x, *, input_grad):
    """Output and gradients of everything that learns, with one draw of dropout."""
    module.state.version += 1  # another pass
    x = x.clone().requires_grad_(input_grad)
    torch.manual_seed(7)
    y = function(x)
    learns = [module.bank.A, module.bank.Bt, module.group.router.scorer.weight, *([x] if input_grad else [])]
    probe = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    return [y, *torch.autograd.grad((y * probe).sum(), learns)]


def assert_same(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4 * float(other.detach().abs().max()))


@pytest.mark.parametrize("input_grad", [True, False])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("selector", SELECTORS)
def test_fused_equals_a_loop_over_experts(selector, case, input_grad):
    module = site_of(SELECTORS[selector], **CASES[case]).train()
    x = torch.randn(2, 6, D_IN)
    fused = run(module, module, x, input_grad=input_grad)
    loop = run(module, lambda x: by_loop(module, x), x, input_grad=input_grad)
    assert_same(fused, loop)


@pytest.mark.parametrize("selector", SELECTORS)
def test_fused_equals_the_loop_at_inference(selector):
    module = site_of(SELECTORS[selector], **CASES["all"]).eval()
    module.group.eval()
    x = torch.randn(2, 6, D_IN)
    with torch.no_grad():
        torch.testing.assert_close(module(x), by_loop(module, x), rtol=1e-4, atol=1e-4)


def test_two_dimensional_input_is_one_row_of_tokens():
    module = site_of(("top_k", {}), ranks=(2, 2, 2)).eval()
    x = torch.randn(5, D_IN)
    with torch.no_grad():
        two = module(x)
        module.state.version += 1
        torch.testing.assert_close(two, module(x.unsqueeze(0))[0])


# ---- the pair of functions in float64 ----------------------------------------------------------------------------


def operands(clients=None, tokens=6, experts=3, rank=2):
    def make(*shape):
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    lead = () if clients is None else (clients,)
    R = experts * rank
    spread = torch.zeros(experts, R, dtype=torch.float64)
    for e in range(experts):
        spread[e, e * rank : (e + 1) * rank] = 0.5 + e
    x, A, gate, Bt = make(tokens, 5), make(*lead, R, 5), make(*lead, experts, 5), make(*lead, R, 4)
    return x, A, gate, Bt, torch.randn(4, 5, dtype=torch.float64), torch.randn(4, dtype=torch.float64), spread


def plainly(x, W, bias, A, weights, Bt, spread):
    return F.linear(x, W, bias) + (F.linear(x, A) * (weights @ spread)) @ Bt


@pytest.mark.parametrize("clients", [None, 2])
@pytest.mark.parametrize("same", [True, False])
def test_gradients_are_those_of_finite_differences(clients, same):
    x, A, gate, Bt, W, bias, spread = operands(clients)

    def product(x, A, gate, Bt):
        projection = down(x if same else 0.5 * x, [A], [gate])
        return up(x, projection, [Output(W, bias, projection.logits.softmax(-1), Bt, spread)], same_input=same)[0]

    assert torch.autograd.gradcheck(product, (x, A, gate, Bt))


@pytest.mark.parametrize(
    "frozen", [(), ("A",), ("Bt",), ("gate",), ("x",), ("A", "x"), ("A", "gate"), ("A", "gate", "x")]
)
def test_what_is_frozen_gets_no_gradient_and_the_rest_keeps_its_own(frozen):
    named = dict(zip(("x", "A", "gate", "Bt"), operands()[:4], strict=True))
    W, bias, spread = operands()[4:]
    for name in frozen:
        named[name].requires_grad_(requires_grad=False)
    x, A, gate, Bt = named.values()

    def fused():
        projection = down(x, [A], [gate])
        return up(x, projection, [Output(W, bias, projection.logits.softmax(-1), Bt, spread)])[0]

    def oracle():
        return plainly(x, W, bias, A, F.linear(x, gate).softmax(-1), Bt, spread)

    learns = [tensor for name, tensor in named.items() if name not in frozen]
    torch.testing.assert_close(fused(), oracle())
    for mine, other in zip(
        torch.autograd.grad(fused().square().sum(), learns),
        torch.autograd.grad(oracle().square().sum(), learns),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)


def test_a_given_route_needs_no_router_rows():
    x, A, _, Bt, W, bias, spread = operands()
    weights = torch.rand(6, 3, dtype=torch.float64, requires_grad=True)

    def product(x, A, Bt, weights):
        return up(x, down(x, [A]), [Output(W, bias, weights, Bt, spread)])[0]

    assert torch.autograd.gradcheck(product, (x, A, Bt, weights))
    torch.testing.assert_close(product(x, A, Bt, weights), plainly(x, W, bias, A, weights, Bt, spread))


def test_logits_alone_have_gradients_too():
    """A routing loss may use a site whose output nobody looks at."""
    x, A, gate, *_ = operands()
    x.grad = None
    down(x, [A], [gate]).logits.square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * (x @ gate.T @ gate).detach())
    torch.testing.assert_close(gate.grad, (2 * (x @ gate.T).T @ x).detach())
    assert not A.grad.any()


def test_a_graph_can_be_walked_twice():
    x, A, gate, Bt, W, bias, spread = operands()
    projection = down(x, [A], [gate])
    loss = up(x, projection, [Output(W, bias, projection.logits.softmax(-1), Bt, spread)])[0].square().sum()
    once = torch.autograd.grad(loss, [x, A, gate, Bt], retain_graph=True)
    for mine, other in zip(once, torch.autograd.grad(loss, [x, A, gate, Bt]), strict=True):
        torch.testing.assert_close(mine, other)
