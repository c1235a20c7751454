"""Experts that had more than their share are shut for a while, by what was counted."""

from __future__ import annotations

import numpy as np
import tiny_world
import torch
from tiny_models import adapted, batch, training

from molehill import registry
from molehill.wire.store import load_tree
from molehill_simulation.simulate import simulate


def scorer(**params):
    return registry.build("scorer", "running_cap", params, d_in=8, n_experts=4)


def test_who_exceeds_the_mean_by_the_margin_is_shut_in_the_first_phase_alone(context):
    cap, x = scorer(margin=0.5, phase=0.2), torch.randn(2, 3, 8)
    free = cap(context(x=x))
    cap.adapt(torch.tensor([16.0, 10.0, 8.0, 6.0]))  # of a mean of 10
    shut = cap(context(x=x, training=True, progress=0.1)) < -1e30
    assert shut[0, 0].tolist() == [True, False, False, False]
    assert torch.equal(cap(context(x=x, training=True, progress=0.2)), free)
    assert torch.equal(cap(context(x=x)), free)
    assert torch.equal(free, x @ cap.weight.T)
    cap.adapt(torch.tensor([10.0, 10.0, 10.0, 10.0]))
    assert not bool((cap(context(x=x, training=True)) < -1e30).any())


def test_running_mass_never_exceeds_the_mean_by_more_than_the_margin_and_a_step(context):
    torch.manual_seed(0)
    cap = scorer(margin=0.25, phase=1.0)
    with torch.no_grad():
        cap.weight[0] += 3.0  # it would have nearly all
    selector, mass, most = registry.build("selector", "dense"), torch.zeros(4), 0.0
    for _ in range(60):
        ctx = context(x=torch.rand(2, 5, 8), training=True)
        step = selector(cap(ctx), ctx).weights.detach().sum((0, 1))
        mass = mass + step
        cap.adapt(mass)
        most = max(most, float(mass.max() - 1.25 * mass.mean()))
        assert float(mass.max()) <= 1.25 * float(mass.mean()) + 10  # a step has 10 tokens
    assert most > 0
    assert float(mass.max() / mass.mean()) < 1.5


def test_a_model_counts_in_training_and_a_client_sends_none_of_it(tmp_path):
    model = training(adapted("bert", preset="deep_moe", rank=2))
    model.count_tokens(on=True)
    model(**batch("bert"))
    model.adapt()
    for group in model.routers.values():
        assert torch.equal(group.router.scorer.mass, group.mass[0])
        assert float(group.mass.sum()) > 0
    base = tiny_world.save_base(tmp_path / "base", "bert")
    source = tiny_world.write_rows(tmp_path / "rows.jsonl", tiny_world.rows(90))
    molora = {"targets": "all-linear", "preset": "deep_moe", "rank": 2, "selector": "dense"}
    config = tiny_world.config(base, source, data={"clients": 2}, molora=molora)
    simulate(config, tmp_path / "run")
    (start, _), (end, _) = (load_tree(tmp_path / "run" / f"{name}.safetensors") for name in ("initial", "final"))
    masses = [key for key in end.layout if key.role == "gate.mass"]
    assert masses
    assert all(np.array_equal(start[key], end[key]) and not end[key].any() for key in masses)
