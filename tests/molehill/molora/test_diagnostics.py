from __future__ import annotations

import math

import pytest
import torch

from molehill import registry
from molehill.molora.interfaces import Route, Site


def _records(record, context, rows=2, seed=0):
    torch.manual_seed(seed)
    made = []
    for name, n in (("a", 4), ("b", 4), ("c", 3)):
        mask = torch.rand(rows, 5) > 0.3
        z = torch.randn(rows, 5, n)
        route = registry.build("selector", "top_k", {"k": 2})(z, context())
        made.append(record(route, mask, site=Site(0, name, 1, 8, 8)))
    return made


def test_load_equals_a_count(record, context):
    load, records = registry.build("diagnostic", "load"), _records(record, context)
    load.update(records)
    report = load.report()
    for r in records:
        n, real = r.route.logits.shape[-1], int(r.mask.sum())
        chosen = [0] * n
        for e in range(n):
            mass = sum(float(r.route.weights[b, t, e]) for b in range(2) for t in range(5) if r.mask[b, t])
            chosen[e] = sum(bool(r.route.weights[b, t, e] > 0) for b in range(2) for t in range(5) if r.mask[b, t])
            assert report[f"{r.site.name}/mass/e{e}"] == pytest.approx(mass / real, rel=1e-5)
            assert report[f"{r.site.name}/chosen/e{e}"] == pytest.approx(chosen[e] / real)
        assert report[f"{r.site.name}/violation"] == pytest.approx(max(chosen) / (sum(chosen) / n) - 1)
        p = r.route.logits.softmax(-1)
        entropy = float(-(p * p.log()).sum(-1)[r.mask].mean())
        assert report[f"{r.site.name}/entropy"] == pytest.approx(entropy, rel=1e-4)


def test_load_extremes(record):
    load = registry.build("diagnostic", "load")
    w = torch.zeros(1, 8, 4)
    w[..., 2] = 1
    load.update([record(Route(w * 99, w))])
    (site,) = load.state
    assert load.report()[f"{site}/violation"] == pytest.approx(3)
    assert load.report()[f"{site}/entropy"] == pytest.approx(0, abs=1e-6)
    even = registry.build("diagnostic", "load")
    even.update([record(Route(torch.zeros(1, 8, 4), torch.full((1, 8, 4), 0.25)))])
    assert even.report()[f"{site}/violation"] == pytest.approx(0)
    assert even.report()[f"{site}/entropy"] == pytest.approx(math.log(4), rel=1e-5)


def test_load_counts_a_routed_sequence_by_its_tokens_and_heads_once(record, context):
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]], dtype=torch.bool)
    for shape in ((2, 1, 3), (1, 1, 3), (2, 1, 2, 3)):
        load = registry.build("diagnostic", "load")
        load.update([record(registry.build("selector", "dense")(torch.randn(shape), context()), mask)])
        (sums,) = load.state.values()
        assert [float(sums[:3].sum()), float(sums[-1])] == pytest.approx([4, 4])


def test_coactivation_equals_a_count(record, context):
    both, records = registry.build("diagnostic", "coactivation"), _records(record, context)
    both.update(records)
    for r in records:
        chosen = (r.route.weights > 0)[r.mask].tolist()
        n = r.route.logits.shape[-1]
        for i in range(n):
            for j in range(i + 1, n):
                either = sum(c[i] or c[j] for c in chosen)
                expected = sum(c[i] and c[j] for c in chosen) / either if either else 0.0
                assert both.report()[f"{r.site.name}/e{i}/e{j}"] == pytest.approx(expected)
