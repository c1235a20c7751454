from __future__ import annotations

import math

import pytest
import torch

from molehill import registry
from molehill.errors import ConfigError
from molehill.molora.interfaces import Route

LOSSES = [
    ("switch_balance", {}),
    ("switch_balance", {"normalise_by_k": True}),
    ("z_loss", {}),
    ("importance_cv2", {}),
    ("entropy", {}),
    ("entropy", {"kind": "tsallis", "q": 1.3}),
    ("dynmole_balance", {}),
    ("p_penalty", {}),
    ("localized_balance", {"delta": 0.3}),
    ("localized_balance", {"delta": 0.2, "types": 3}),
]


def _tokens(record):
    """Yield (row, logits, probs, weights, selected) of every real token and head, as Python numbers."""
    route = record.route
    for b in range(route.logits.shape[0]):
        for t in range(route.logits.shape[1]):
            if record.mask is not None and not record.mask[b, t]:
                continue
            values = [v[b, t].reshape(-1, v.shape[-1]).tolist() for v in (route.logits, route.probs, route.weights)]
            chosen = route.selected[b, t].reshape(-1, route.logits.shape[-1]).tolist()
            yield from ((b, z, p, w, s) for z, p, w, s in zip(*values, chosen, strict=True))


def _mean(rows):
    rows = list(rows)
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def _cv2(values):
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / len(values) / mean**2


def _reference(name, params, record):
    """The loss of one record by its definition, in plain Python."""
    tokens = list(_tokens(record))
    n = record.route.logits.shape[-1]
    p = _mean(t[2] for t in tokens)
    w = _mean(t[3] for t in tokens)
    f = _mean(t[4] for t in tokens)
    q = params.get("q", 1.1)
    if params.get("kind") == "tsallis":
        entropies = [(1 - sum(v**q for v in t[2])) / (1 - n ** (1 - q)) for t in tokens]
    else:
        entropies = [-sum(v * math.log(v) for v in t[2]) for t in tokens]
    return {
        "switch_balance": lambda: n * _dot(f, p) / (sum(f) if params.get("normalise_by_k") else 1),
        "z_loss": lambda: sum(math.log(sum(math.exp(v) for v in t[1])) ** 2 for t in tokens) / len(tokens),
        "importance_cv2": lambda: _cv2(w),
        "entropy": lambda: sum(entropies) / len(tokens),
        "dynmole_balance": lambda: n * _dot(w, p),
        "p_penalty": lambda: n * _dot([a * c for a, c in zip(f, record.costs.tolist(), strict=True)], p),
        "localized_balance": lambda: _localized(params["delta"], params.get("types", 2), tokens, record.types, n),
    }[name]()


def _dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def _localized(delta, types, tokens, row_types, n):
    z = []
    for b in sorted({t[0] for t in tokens}):
        for e, gate in enumerate(_mean(t[3] for t in tokens if t[0] == b)):
            own = e * types // n == int(row_types[b]) % types
            z.append(gate * (1 + delta if own else 1 - delta))
    return _cv2(z)


def _records(record, context, selector=("top_k", {"k": 2}), shapes=((3, 5, 6),) * 3, *, masked=True):
    made = []
    for i, shape in enumerate(shapes):
        z = torch.randn(*shape, dtype=torch.float64) * 2
        mask = None
        if masked:
            mask = torch.rand(*shape[:2]) > 0.3
            mask[0] = True
        if i == 2 and masked:
            mask[1] = False  # a row that is all padding
        route = registry.build("selector", *selector)(z, context(training=True, mask=mask))
        costs = torch.rand(shape[-1], dtype=torch.float64) + 0.5
        made.append(record(route, mask, costs=costs / costs.mean(), types=torch.arange(shape[0])))
    return made


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(
    "selector", [("top_k", {"k": 2}), ("dense", {}), ("switch", {"capacity": 0.5}), ("top_p", {}), ("gw", {"slots": 2})]
)
@pytest.mark.parametrize(("name", "params"), LOSSES)
def test_equals_the_definition(name, params, selector, masked, record, context):
    records = _records(record, context, selector, masked=masked)
    records += _records(record, context, selector, shapes=((2, 4, 3), (2, 4, 3)), masked=masked)
    expected = sum(_reference(name, params, r) for r in records) / len(records)
    assert float(registry.build("routing_loss", name, params)(records)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("name", "params"), LOSSES)
def test_heads_count_as_tokens(name, params, record, context):
    records = _records(record, context, ("dense", {"activation": "sigmoid_norm"}), shapes=((3, 5, 2, 6),) * 2)
    expected = sum(_reference(name, params, r) for r in records) / 2
    assert float(registry.build("routing_loss", name, params)(records)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("name", "params"), LOSSES)
def test_padding_never_counts(name, params, record, context):
    (before,) = _records(record, context, ("dense", {}), shapes=((3, 5, 6),))
    noise = torch.where(before.mask[..., None], before.route.logits, torch.randn(3, 5, 6, dtype=torch.float64) * 9)
    noise.requires_grad_()
    after = record(registry.build("selector", "dense")(noise, context()), before.mask, costs=before.costs)
    after.types = before.types
    loss = registry.build("routing_loss", name, params)
    torch.testing.assert_close(loss([before]), loss([after]))
    loss([after]).backward()
    assert float(noise.grad[~before.mask].abs().max()) == 0


@pytest.mark.parametrize(("name", "params"), LOSSES)
def test_a_route_per_sequence_stands_for_its_tokens(name, params, record, context):
    z = torch.randn(3, 1, 4, dtype=torch.float64)
    mask = torch.rand(3, 6) > 0.4
    mask[:, 0] = True
    select, types = registry.build("selector", "top_k", {"k": 2}), torch.arange(3)
    loss = registry.build("routing_loss", name, params)
    short = loss([record(select(z, context()), mask, types=types)])
    torch.testing.assert_close(short, loss([record(select(z.expand(3, 6, 4), context()), mask, types=types)]))
    static = z[:1]
    full = record(select(static.expand(3, 6, 4), context()), mask, types=types)
    torch.testing.assert_close(loss([record(select(static, context()), mask, types=types)]), loss([full]))


@pytest.mark.parametrize(("name", "params"), LOSSES)
def test_gradients(name, params, record, context):
    mask, types = torch.rand(2, 4) > 0.3, torch.tensor([0, 1])
    mask[:, 0] = True
    costs = torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64)
    select, loss = registry.build("selector", "top_k", {"k": 2}), registry.build("routing_loss", name, params)

    def run(*logits):
        return loss([record(select(z, context()), mask, costs=costs, types=types) for z in logits])

    logits = tuple(torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(run, logits)


@pytest.mark.parametrize(("name", "params"), LOSSES)
def test_certain_routers_have_finite_gradients(name, params, record, context):
    z = (torch.eye(4) * 500).view(1, 4, 4).requires_grad_()
    route = registry.build("selector", "top_k", {"k": 2})(z, context())
    registry.build("routing_loss", name, params)([record(route, types=torch.zeros(1, dtype=torch.int64))]).backward()
    assert bool(torch.isfinite(z.grad).all())


@pytest.mark.parametrize(("name", "params"), LOSSES)
def test_no_records_no_loss(name, params):
    assert float(registry.build("routing_loss", name, params)([])) == 0


# --- the property of each ---------------------------------------------------------------------------------------


def _balanced(n, k):
    """Tokens whose k choices go round and whose mean probabilities are uniform."""
    return torch.stack([torch.zeros(n).index_fill(0, torch.arange(t, t + k) % n, 8.0) for t in range(n)])[None]


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_two_minima_of_the_balance_loss(k, record, context):
    route = registry.build("selector", "top_k", {"k": k})(_balanced(6, k), context())
    plain = registry.build("routing_loss", "switch_balance")([record(route)])
    normal = registry.build("routing_loss", "switch_balance", {"normalise_by_k": True})([record(route)])
    assert float(plain) == pytest.approx(k, rel=1e-5)
    assert float(normal) == pytest.approx(1, rel=1e-5)


def test_balance_is_e_at_collapse(record, context):
    z = torch.zeros(2, 5, 6)
    z[..., 2] = 50
    route = registry.build("selector", "switch")(z, context())
    assert float(registry.build("routing_loss", "switch_balance")([record(route)])) == pytest.approx(6)


def test_balance_counts_choices_before_capacity(record, context):
    z = torch.randn(2, 20, 4)
    loss = registry.build("routing_loss", "switch_balance")
    limited = registry.build("selector", "switch", {"capacity": 0.25})(z, context(training=True))
    free = registry.build("selector", "switch", {"capacity": None})(z, context(training=True))
    assert not torch.equal(limited.weights, free.weights)
    torch.testing.assert_close(loss([record(limited)]), loss([record(free)]))


def test_z_loss_feels_a_shift_that_the_weights_do_not(record, context):
    select, loss = registry.build("selector", "dense"), registry.build("routing_loss", "z_loss")
    z = torch.randn(2, 3, 4)
    here, there = select(z, context()), select(z + 3, context())
    torch.testing.assert_close(here.weights, there.weights)
    assert float(loss([record(there)])) > float(loss([record(here)]))


def test_cv2_is_zero_when_all_carry_the_same(record, context):
    route = registry.build("selector", "top_k", {"k": 2})(_balanced(6, 2), context())
    assert float(registry.build("routing_loss", "importance_cv2")([record(route)])) == pytest.approx(0, abs=1e-9)
    one = registry.build("selector", "dense")(torch.randn(1, 3, 1), context())
    assert float(registry.build("routing_loss", "importance_cv2")([record(one)])) == 0


def test_entropy_extremes(record, context):
    uniform = registry.build("selector", "dense")(torch.zeros(2, 3, 6), context())
    certain = registry.build("selector", "dense")(torch.eye(6)[None] * 99, context())
    for params, top in (({}, math.log(6)), ({"kind": "tsallis", "q": 1.1}, 1.0)):
        loss = registry.build("routing_loss", "entropy", params)
        assert float(loss([record(uniform)])) == pytest.approx(top, rel=1e-5)
        assert float(loss([record(certain)])) == pytest.approx(0, abs=1e-5)
    with pytest.raises(ConfigError):
        registry.build("routing_loss", "entropy", {"q": 1.0})


def test_dynmole_balance_weighs_and_switch_balance_counts(record, context):
    z = torch.tensor([[[3.0, 0.0, 0.0]], [[0.0, 3.0, 0.0]]])
    route = registry.build("selector", "top_k", {"k": 2, "renorm": "none"})(z, context())
    assert float(registry.build("routing_loss", "dynmole_balance")([record(route)])) < float(
        registry.build("routing_loss", "switch_balance")([record(route)])
    )


def test_p_penalty_with_equal_sizes_is_the_balance_loss_and_grows_with_size(record, context):
    z = torch.randn(2, 9, 4)
    route = registry.build("selector", "top_p")(z, context())
    penalty, balance = registry.build("routing_loss", "p_penalty"), registry.build("routing_loss", "switch_balance")
    torch.testing.assert_close(penalty([record(route)]), balance([record(route)]))
    p = torch.full((1, 1, 4), 0.25, requires_grad=True)
    made = Route(torch.zeros(1, 1, 4), torch.full((1, 1, 4), 0.25), p)
    penalty([record(made, costs=torch.tensor([0.4, 0.8, 1.2, 1.6]))]).backward()
    assert bool((p.grad[0, 0].diff() > 0).all())


def test_localized_balance_is_zero_where_gates_undo_the_importance(record):
    types = torch.tensor([0, 1, 0])
    importance = torch.tensor([[1.3, 1.3, 0.7, 0.7], [0.7, 0.7, 1.3, 1.3], [1.3, 1.3, 0.7, 0.7]])
    w = (1 / importance)[:, None].expand(3, 5, 4)
    loss = registry.build("routing_loss", "localized_balance", {"delta": 0.3})
    made = record(Route(torch.zeros(3, 5, 4), w), types=types)
    assert float(loss([made])) == pytest.approx(0, abs=1e-9)
    uniform = record(Route(torch.zeros(3, 5, 4), torch.full((3, 5, 4), 0.25)), types=types)
    assert float(loss([uniform])) > 0.05


def test_localized_balance_without_delta_or_types_is_cv2_over_rows(record):
    w = torch.rand(3, 5, 4)
    expected = _cv2(w.mean(1).flatten().tolist())
    plain = registry.build("routing_loss", "localized_balance", {"delta": 0.0})
    typed = record(Route(torch.zeros(3, 5, 4), w), types=torch.arange(3))
    assert float(plain([typed])) == pytest.approx(expected, rel=1e-5)
    untyped = record(Route(torch.zeros(3, 5, 4), w))
    assert float(registry.build("routing_loss", "localized_balance")([untyped])) == pytest.approx(expected, rel=1e-5)
