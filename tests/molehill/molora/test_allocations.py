from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import adapted

from molehill import registry
from molehill.errors import ConfigError
from molehill.molora.allocations.hetero_rank import apportion
from molehill.molora.interfaces import Site


def _sites(layers):
    return [Site(i, f"layers.{i}.{n}", layers, 32, 64) for i in range(layers) for n in ("q_proj", "up_proj")]


def _plan(name, values=None, *, layers=8, experts=8, shared=1, rank=16):
    return registry.build("allocation", name, values).plan(_sites(layers), experts, shared, rank)


@pytest.mark.parametrize("name", ["uniform", "by_depth", "hetero_rank", "fine_grained"])
def test_every_site_gets_a_plan_and_shared_experts_stay_whole(name):
    plans = _plan(name, shared=2)
    assert set(plans) == {site.name for site in _sites(8)}
    assert all(plan.shared_ranks == (16, 16) and min(plan.ranks) >= 1 for plan in plans.values())


def test_uniform():
    assert {(p.ranks, p.top_k) for p in _plan("uniform").values()} == {((16,) * 8, None)}


@pytest.mark.parametrize("shape", [(2, 4, 6, 8), (8, 6, 4, 2), (2, 8, 8, 2), (5, 5, 5, 5)])
@pytest.mark.parametrize("layers", [4, 8, 32])
def test_by_depth_follows_the_shape_and_keeps_the_total(shape, layers):
    plans = _plan("by_depth", {"experts": shape}, layers=layers)
    counts = [len(plans[f"layers.{i}.q_proj"].ranks) for i in range(layers)]
    assert counts == [shape[4 * i // layers] for i in range(layers)]
    assert sum(counts) == 5 * layers


def test_by_depth_in_a_shallow_model():
    plans = _plan("by_depth", {"experts": (2, 4, 6, 8)}, layers=2, experts=3)
    assert [len(plans[n].ranks) for n in ("layers.0.q_proj", "layers.1.q_proj")] == [2, 6]


def test_hetero_rank_gives_the_sizes_of_the_paper():
    arithmetic = next(iter(_plan("hetero_rank", {"kind": "arithmetic"}, rank=16).values()))
    assert arithmetic.ranks == (9, 11, 13, 15, 17, 19, 21, 23)
    hybrid = next(iter(_plan("hetero_rank", {"kind": "hybrid"}, rank=2).values()))
    assert hybrid.ranks == (1, 1, 1, 1, 2, 2, 4, 4)
    geometric = next(iter(_plan("hetero_rank", {"kind": "geometric"}, experts=4, rank=15).values()))
    assert geometric.ranks == (4, 8, 16, 32)
    explicit = next(iter(_plan("hetero_rank", {"kind": "explicit", "ranks": (1, 7)}, experts=2).values()))
    assert explicit.ranks == (1, 7)


@pytest.mark.parametrize("kind", ["arithmetic", "geometric", "hybrid"])
@pytest.mark.parametrize(("experts", "rank"), [(1, 8), (3, 5), (8, 8), (8, 1), (32, 4)])
def test_hetero_rank_keeps_the_budget(kind, experts, rank):
    ranks = next(iter(_plan("hetero_rank", {"kind": kind}, experts=experts, rank=rank).values())).ranks
    assert len(ranks) == experts
    assert sum(ranks) == experts * rank
    assert min(ranks) >= 1
    assert list(ranks) == sorted(ranks)


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=40), st.integers(0, 500))
def test_apportion_shares_out_everything_in_order_of_size(sizes, extra):
    shares = apportion(sizes, len(sizes) + extra)
    assert sum(shares) == len(sizes) + extra
    assert min(shares) >= 1
    assert all(
        a <= b for (s, a) in zip(sizes, shares, strict=True) for (t, b) in zip(sizes, shares, strict=True) if s < t
    )


@pytest.mark.parametrize("m", [1, 2, 4])
def test_fine_grained_keeps_the_parameters_and_the_active_rank(m):
    plan = next(iter(_plan("fine_grained", {"m": m, "k": 2}, shared=1).values()))
    assert sum(plan.ranks) == 8 * 16
    assert len(plan.ranks) == 8 * m
    assert plan.top_k == 2 * m
    assert plan.top_k * plan.ranks[0] == 2 * 16
    assert plan.shared_ranks == (16,)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("fine_grained", {"m": 3}),
        ("hetero_rank", {"kind": "explicit", "ranks": (1, 2)}),
        ("hetero_rank", {"kind": "explicit"}),
        ("hetero_rank", {"ranks": (1, 2)}),
        ("by_depth", {"experts": ()}),
        ("by_depth", {"experts": (2, 0)}),
    ],
)
def test_impossible_plans_are_refused(name, values):
    with pytest.raises(ConfigError):
        _plan(name, values)


def test_an_allocation_that_decides_k_needs_a_selector_that_has_it():
    keys = {"experts": 2, "rank": 8, "allocation": {"name": "fine_grained", "m": 2, "k": 1}}
    assert adapted(selector="top_k", **keys).routers
    with pytest.raises(ConfigError, match="'fine_grained' needs a selector with k, which 'dense' does not have"):
        adapted(selector="dense", **keys)


# --- start values -----------------------------------------------------------------------------------------------


def _start(name, values=None, seed=0, r=4, d_in=64, d_out=16):
    A, B = torch.full((r, d_in), 9.0), torch.full((d_out, r), 9.0)
    init = registry.build("init", name, values)
    init(A, B, torch.Generator().manual_seed(seed))
    return init, A, B


@pytest.mark.parametrize("name", ["lora", "orth", "gaussian"])
def test_a_fresh_expert_does_nothing_and_a_seed_gives_one_start(name):
    _, A, B = _start(name)
    assert float(B.abs().max()) == 0
    assert float(A.abs().min()) > 0
    torch.manual_seed(99)  # the global generator has no say
    assert torch.equal(_start(name)[1], A)
    assert not torch.equal(_start(name, seed=1)[1], A)


def test_lora_is_kaiming_uniform_as_in_peft():
    init, A, _ = _start("lora", r=64, d_in=256)
    assert init.frozen == frozenset()
    assert float(A.abs().max()) <= 1 / 16
    assert float(A.std()) == pytest.approx(1 / 16 / 3**0.5, rel=0.03)


def test_orth_has_orthonormal_rows_and_freezes_a():
    init, A, _ = _start("orth")
    assert init.frozen == frozenset({"A"})
    torch.testing.assert_close(A @ A.T, torch.eye(4), atol=1e-5, rtol=0)


def test_gaussian_has_its_spread():
    init, A, _ = _start("gaussian", {"std": 0.1}, r=64, d_in=256)
    assert init.frozen == frozenset()
    assert float(A.std()) == pytest.approx(0.1, rel=0.03)
    assert float(A.abs().max()) > 0.3
