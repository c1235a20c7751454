"""The step loop against a loop that is written here, and what it must never do."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_models import ARCHITECTURES, adapted, batch, separate, shake, training

from molehill import registry
from molehill.errors import TrainingError
from molehill.tasks.batches import Batch
from molehill_client.goals import Goal
from molehill_client.objectives.sft import SFT
from molehill_client.regularisers.fedprox import FedProx, FedProxParams
from molehill_client.trainer import Rates, Settings, schedule_factor, train


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


RATES = Rates(experts=1e-2, router=5e-3, head=2e-2)


def batches(architecture, count=4, rows=3):
    return [Batch(**batch(architecture, rows=rows, seed=seed)) for seed in range(count)]


def fit(model, data, *, steps=3, scope=lambda _: "shared", objective=None, losses=(), **settings):
    settings.setdefault("rates", RATES)
    (result,) = train(
        model, [itertools.cycle(data)], [Goal(objective or SFT())], losses, Settings(**settings), scope, steps=steps
    )
    return result


def pull(mu):
    return FedProx(FedProxParams(mu))


def model_of(architecture="bert", **keys):
    return shake(adapted(architecture, **{"experts": 3, "rank": 2, **keys}), scale=0.1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_steps_are_those_of_plain_adamw(architecture):
    """Clipping, schedule and a rate for each kind of tensor, with torch's optimiser on the parameters themselves."""
    ours, theirs = model_of(architecture), model_of(architecture)
    data = batches(architecture)
    result = fit(ours, data, steps=4, schedule="cosine", clip=0.5, decay=0.1)
    rates = {"gate": RATES.router, "head": RATES.head}
    kinds = {id(p): "head" if theirs.head is not None and any(p is q for q in theirs.head.parameters()) else "A"
             for p, _, _ in theirs.places}  # fmt: skip
    kinds |= {id(p): "gate" for group in theirs.routers.values() for p in group.parameters()}
    parameters = [parameter for parameter, _, _ in theirs.places]
    optimiser = torch.optim.AdamW([{"params": [p]} for p in parameters], weight_decay=0.1)
    training(theirs)
    losses = []
    for step in range(4):
        factor = 0.1 + 0.45 * (1 + math.cos(math.pi * step / 4))
        for group in optimiser.param_groups:
            group["lr"] = factor * rates.get(kinds[id(group["params"][0])], RATES.experts)
        for parameter in parameters:
            parameter.grad.zero_()
        at = data[step]
        forward = theirs(at.input_ids, at.attention_mask, at.labels)
        loss = F.cross_entropy(forward.logits, forward.labels)
        loss.backward()
        losses.append(float(loss.detach()))
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimiser.step()
    torch.testing.assert_close(ours.flat, theirs.flat, rtol=1e-4, atol=1e-5)
    assert result.loss == pytest.approx(sum(losses) / 4, rel=1e-5)


@pytest.mark.parametrize("kind", ["A", "B", "gate", "head", "e1"])
def test_frozen_tensors_keep_every_bit(kind):
    model = model_of()
    before = model.tree()

    def scope(key):
        return "frozen" if kind in {key.kind, key.expert} else "shared"

    base = {name: value.clone() for name, value in model.base.state_dict().items() if "bank" not in name}
    fit(model, batches("bert"), scope=scope, decay=0.1, rules=[pull(0.1)])
    after = model.tree()
    for key in before:
        assert (before[key] == after[key]).all() == (scope(key) == "frozen"), key
    assert all(torch.equal(value, base[name]) for name, value in model.base.state_dict().items() if name in base)


def test_a_plan_that_trains_nothing_is_an_error():
    with pytest.raises(TrainingError, match="trains no tensor"):
        fit(model_of(), batches("bert"), scope=lambda _: "frozen")


def anchored_model():
    return shake(adapted("bert", gate="anchored", experts=3, rank=2), scale=0.1)


def test_residuals_can_learn_alone():
    start, model = anchored_model().tree(), anchored_model()
    fit(model, batches("bert"), steps=2, scope=lambda key: "personal" if key.residual else "frozen")
    for key, value in start.items():
        assert bool((model.tree()[key] != value).any()) == key.residual, key


def test_decay_pulls_to_zero_what_learns():
    start, free, held = anchored_model().tree(), anchored_model(), anchored_model()
    scope = {True: "frozen", False: "shared"}
    fit(free, batches("bert"), steps=1, scope=lambda key: scope[key.residual])
    fit(held, batches("bert"), steps=1, scope=lambda key: scope[key.residual], decay=0.5)
    for key, value in free.tree().items():
        rate = {"gate": RATES.router, "head": RATES.head}.get(key.kind, RATES.experts)
        expected = value if key.residual else value - rate * 0.5 * start[key]
        np.testing.assert_allclose(held.tree()[key], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_accumulation_is_one_large_batch(architecture):
    """Micro-batches have unequal numbers of predictions in a causal LM."""
    large = Batch(**batch(architecture, rows=6))
    if architecture != "bert":
        large.labels[0, 3:] = -100
    halves = [
        Batch(*(getattr(large, name)[rows] for name in ("input_ids", "attention_mask", "labels")))
        for rows in (slice(3), slice(3, None))
    ]
    whole, parts = model_of(architecture), model_of(architecture)
    one = fit(whole, [large], steps=3, clip=None)
    two = fit(parts, halves, steps=3, clip=None, accumulation=2)
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-3, atol=1e-5)
    assert two.loss == pytest.approx(one.loss, rel=1e-4)


def test_a_strong_pull_keeps_the_model_where_it_started():
    moved = {}
    for mu in (0.0, 1.0, 1e6):
        model = model_of()
        start = model.flat.clone()
        fit(model, batches("bert"), steps=40, rules=[pull(mu)], clip=None)
        moved[mu] = float((model.flat - start).norm())
    assert moved[0.0] > moved[1.0] > moved[1e6]
    assert moved[1e6] < 0.2 * moved[0.0]


def test_fedprox_is_a_method_with_its_paper_that_train_rules_and_its_short_form_build(house):
    assert house("without").bench.settings().rules == ()
    for number, given in enumerate(({"prox": 0.3}, {"rules": [{"name": "fedprox", "mu": 0.3}]})):
        assert [rule.mu for rule in house(str(number), train=given).bench.settings().rules] == [0.3]
    method = registry.get("regulariser", "fedprox")
    assert method.target is FedProx
    assert method.url == "https://arxiv.org/abs/1812.06127"


def test_the_pull_is_the_gradient_of_half_the_squared_distance():
    model = model_of()
    start = model.flat.clone()
    fit(model, batches("bert", 1), steps=1, clip=None)
    near = model.flat.clone()
    again = model_of()
    fit(
        again, batches("bert", 1), steps=2, clip=None, rules=[pull(0.7)]
    )  # the first step starts from the anchor itself
    at = batches("bert", 1)[0]
    probe = model_of()
    probe.flat.copy_(near)
    forward = training(probe)(at.input_ids, at.attention_mask, at.labels)
    F.cross_entropy(forward.logits, forward.labels).backward()
    torch.testing.assert_close(again.grad, probe.grad + 0.7 * (near - start), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_training_and_says_where(value):
    model = model_of()
    before = model.tree().digest
    with pytest.raises(TrainingError, match=r"client c1: the loss is (nan|-?inf) at step 1"):
        train(
            model, [itertools.cycle(batches("bert"))], [Goal(lambda f: f.logits.sum() * value)], (), Settings(RATES),
            lambda _: "shared", steps=1, where="client c1",
        )  # fmt: skip
    assert model.tree().digest == before
    assert not model.training
    assert not model.state.count


def test_a_gradient_that_is_not_finite_stops_training():
    def steep(forward):
        return (forward.logits - forward.logits.detach()).abs().sum().sqrt()  # 0, with an infinite slope

    with pytest.raises(TrainingError, match=r"gradient is not finite at step 1\. Lower train\.lr, or"):
        fit(model_of(), batches("bert"), objective=steep)
    with pytest.raises(TrainingError, match=r"gradient is not finite at step 1\. Lower personal\.gate_lr, or"):
        fit(model_of(), batches("bert"), objective=steep, keys="personal.gate_lr")


def test_ranks_that_start_at_zero_stay_there():
    small, large = model_of(), adapted("bert", experts=3, rank=5)
    large.load(small.tree())
    fit(large, batches("bert"), steps=5, decay=0.1)
    for key, value in large.tree().items():
        if key.kind in {"A", "B"}:
            rows = value if key.kind == "A" else value.T
            assert not rows[2:].any()
            assert rows[:2].any()


def test_routing_losses_are_added_with_their_coefficient_and_reported_without():
    name = "importance_cv2"
    loss = registry.build("routing_loss", name, {})
    free, held = model_of(selector="dense"), model_of(selector="dense")
    one = fit(free, batches("bert"), steps=10, losses=[(name, 1e-9, loss)])
    two = fit(held, batches("bert"), steps=10, losses=[(name, 50.0, loss)])
    assert 0 < two.routing[name] < one.routing[name]
    assert not held.state.collect


def test_tokens_are_the_gate_mass_of_all_steps():
    result = fit(model_of(), batches("bert"), steps=3)
    model = model_of()
    real = sum(int(at.attention_mask.sum()) for at in batches("bert")[:3])
    for name in model.sites:
        assert sum(result.tokens[name, f"e{e}"] for e in range(3)) == pytest.approx(real, rel=1e-5)


def test_dropout_is_on_while_training_only():
    model = separate(model_of("gpt2", dropout=0.5))
    seen = []

    def watch(forward):
        seen.append([site.dropout.training for site in model.sites.values()])
        assert not model.base.training  # a frozen base has no dropout of its own
        return SFT()(forward)

    fit(model, batches("gpt2"), steps=1, objective=watch)
    assert all(itertools.chain(*seen))
    assert not any(site.dropout.training for site in model.sites.values())
    at = batches("gpt2")[0]
    with torch.no_grad():
        one, two = (model(at.input_ids, at.attention_mask, at.labels).logits for _ in range(2))
    assert torch.equal(one, two)


def test_every_step_is_observed():
    seen = []
    train(
        model_of(), [itertools.cycle(batches("bert"))], [Goal(SFT())], (), Settings(RATES), lambda _: "shared", steps=3,
        observe=lambda step, steps: seen.append((step, steps)),
    )  # fmt: skip
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(("kind", "end"), [("constant", 1.0), ("linear", 0.1), ("cosine", 0.1)])
def test_schedules_fall_from_one(kind, end):
    factors = [schedule_factor(kind, i / 10) for i in range(11)]
    assert factors[0] == pytest.approx(1.0)
    assert factors[-1] == pytest.approx(end)
    assert factors == sorted(factors, reverse=True)


def silent(architecture="llama"):
    """A batch of which no token is to be predicted."""
    one = Batch(**batch(architecture, rows=3))
    one.labels[:] = -100
    return one


def test_a_micro_batch_without_predictions_counts_for_nothing():
    data = batches("llama", count=2)
    alone, beside = model_of("llama"), model_of("llama")
    one = fit(alone, data[:1], steps=2)
    two = fit(beside, [data[0], silent()], steps=2, accumulation=2)
    assert two.loss == pytest.approx(one.loss, rel=1e-5)
    torch.testing.assert_close(beside.flat, alone.flat, rtol=1e-4, atol=1e-6)


def test_a_step_without_predictions_gives_no_gradient_and_no_loss():
    data = batches("llama", count=1)
    alone, between = model_of("llama"), model_of("llama")
    one = fit(alone, data, steps=1)
    two = fit(between, [data[0], silent()], steps=2)
    assert math.isfinite(two.loss)
    assert two.loss == pytest.approx(one.loss, rel=1e-5)
    assert between.grad.abs().max() == 0
    assert torch.isfinite(between.flat).all()


def test_beside_a_client_without_predictions_another_one_trains_as_alone():
    data = batches("llama", count=1)
    alone = model_of("llama")
    want = fit(alone, data, steps=1)
    both = model_of("llama")
    both.stack(2)
    both.values[:] = both.values[0].clone()
    with pytest.raises(TrainingError, match="anything to predict"):
        train(both, [itertools.cycle(data), itertools.cycle([silent()])], [Goal(SFT())] * 2, (), Settings(rates=RATES),
              lambda _: "shared", steps=1)  # fmt: skip
    torch.testing.assert_close(both.values[0], alone.flat, rtol=1e-4, atol=1e-6)
    assert torch.isfinite(both.values[1]).all()
    assert math.isfinite(want.loss)


def test_a_client_that_has_nothing_to_predict_is_told_what_to_do():
    with pytest.raises(TrainingError, match=r"no batch of 2 steps holds anything to predict\. Raise task\.max_length"):
        fit(model_of("llama"), [silent()], steps=2)
