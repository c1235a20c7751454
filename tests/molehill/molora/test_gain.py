"""Sites that are adapted or left as they are, by a score of their own."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_world
import torch
from tiny_models import ARCHITECTURES, adapted, base, batch, shake, training

from molehill import registry
from molehill.molora.interfaces import Seen
from molehill.wire.store import load_tree
from molehill_simulation.simulate import simulate

ROLE = "gate.own.gain"


def set_scores(model, value, site=None):
    for name, each in model.sites.items():
        if site is None or name == site:
            with torch.no_grad():
                each.gain.change.fill_(value - 0.15)


def learnt(model, architecture="llama"):
    model.grads.zero_()
    forward = model(**batch(architecture))
    torch.nn.functional.cross_entropy(forward.logits, forward.labels).backward()
    return forward, {key: model.grad[slot.start : slot.stop].clone() for key, slot in model.slots.items()}


@pytest.mark.parametrize("keys", [{"preset": "taps"}, {"allocation": "gated_sites", "experts": 3, "shared": 1}])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_site_below_its_threshold_is_the_base_bit_for_bit_and_its_score_learns(architecture, keys):
    model = shake(adapted(architecture, **keys, rank=2))
    set_scores(model, 0.5)
    moved, _ = learnt(model, architecture)
    set_scores(model, 0.0999)
    frozen, grads = learnt(model, architecture)
    at = batch(architecture)
    plain = base(architecture)(input_ids=at["input_ids"], attention_mask=at["attention_mask"].long())[0]
    with torch.no_grad():
        assert torch.equal(model.base(input_ids=at["input_ids"], attention_mask=at["attention_mask"].long())[0], plain)
    assert not torch.allclose(moved.logits, frozen.logits)
    scores = {key: grad for key, grad in grads.items() if key.role == ROLE}
    assert len(scores) == len(model.sites)
    assert all(bool(grad.any()) for grad in scores.values())
    assert not any(bool(grad.any()) for key, grad in grads.items() if key.expert != "-")


def test_the_gradient_of_a_score_is_that_of_a_factor_of_the_delta():
    model = shake(adapted("llama", preset="taps", rank=2))
    name = next(iter(model.sites))
    site = model.sites[name]
    _, grads = learnt(model)
    (found,) = (grad for key, grad in grads.items() if key.role == ROLE and key.site == name)
    losses = []
    for step in (1e-2, -1e-2):
        site.gain.forward = lambda step=step: torch.tensor([1.0 + step])
        forward = model(**batch())
        losses.append(float(torch.nn.functional.cross_entropy(forward.logits, forward.labels).detach()))
    assert float(found) == pytest.approx((losses[0] - losses[1]) / 2e-2, rel=0.05)


def test_experts_are_computed_with_the_frozen_products_all_the_same():
    model = adapted("llama", preset="taps", rank=2)
    assert all(site.fused for site in model.sites.values())
    assert not model.stackable


def test_a_penalty_closes_sites_and_stops_at_the_share_that_is_wanted():
    model = training(adapted("llama", preset="selective_lora", rank=2))
    loss = registry.build("routing_loss", "site_l1", {"after": 0.0, "target": 0.3})
    model.state.collect = True
    scores = [site.gain.change for site in model.sites.values()]
    with torch.no_grad():
        for n, score in enumerate(scores):
            score.fill_(0.01 * n)
    for _ in range(200):
        model(**batch())
        model.grads.zero_()
        value = loss(model.state.records)
        assert value.shape == ()
        if value.requires_grad:
            value.backward()
        with torch.no_grad():
            for each in scores:
                each.sub_(0.1 * each.grad)
    share = sum(site.gain.on for site in model.sites.values()) / len(scores)
    assert abs(share - 0.3) <= 1 / len(scores)
    assert float(loss([])) == 0
    early = registry.build("routing_loss", "site_l1", {"after": 0.5})
    model(**batch())
    assert isinstance(model.state.records, Seen)
    assert float(early(model.state.records)) == 0
    model.state.progress = 0.6
    model(**batch())
    assert float(early(model.state.records).detach()) == pytest.approx(
        float((0.15 + torch.cat(scores).detach()).abs().mean())
    )


def test_every_owner_has_sites_of_its_own_and_sends_no_score(tmp_path):
    base_ = tiny_world.save_base(tmp_path / "base", "bert")
    source = tiny_world.write_rows(tmp_path / "rows.jsonl", tiny_world.rows(90))
    config = tiny_world.config(
        base_, source, data={"clients": 2}, molora={"preset": "taps", "rank": 2}, train={"router_lr": 5e-2}
    )
    simulate(config, tmp_path / "run")
    (start, _), (end, _) = (load_tree(tmp_path / "run" / f"{name}.safetensors") for name in ("initial", "final"))
    scores = [key for key in start.layout if key.role == ROLE]
    assert all(np.array_equal(start[key], end[key]) for key in scores if key in end.layout)
    mine = [state for name, state in sorted(tiny_world.states(tmp_path / "run").items()) if name.endswith("/2")]
    found = [{key: value for key, value in state.tree.items() if key.role == ROLE} for state in mine]
    assert len(found) == 2
    assert found[0].keys() == found[1].keys() != set()
    assert any(not np.array_equal(found[0][key], found[1][key]) for key in found[0])
