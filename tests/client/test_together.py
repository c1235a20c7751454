"""Clients that train in the same passes come out as they do one after another."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_world
import torch
from tiny_house import House

from molehill.errors import MessageError, ModelError, TrainingError
from molehill.tasks.batches import Example, join, pad
from molehill_client import trainer
from molehill_client.baselines import baseline_together
from molehill_client.together import may_share, share, train_together

LOSSES = [{"name": "switch_balance", "coef": 0.1}, {"name": "localized_balance", "coef": 0.1}]
RANKS = {"name": "hetero_rank", "kind": "explicit", "ranks": [1, 2, 3]}
CASES = {
    "top_k": {},
    "losses": {"molora": {"losses": LOSSES}, "train": {"clip": 0.01}},
    "mixed ranks": {"molora": {"allocation": RANKS, "experts": 3}},
    "one route for all": {"molora": {"scope": "block", "selector": "dynmole"}},
    "dense, global": {"molora": {"selector": "dense"}, "personal": {"gate": "global", "head": "global"}},
    "prox, accumulation": {"train": {"prox": 0.5, "accumulation": 2, "objective": "dft"}},
    "personal steps, reference": {"personal": {"steps": 2}, "train": {"objective": {"name": "asft", "coef": 0.5}}},
    "class weights, accumulation": {
        "task": {"class_weights": "balanced"},
        "train": {"accumulation": 2, "batch_size": 3},
        "personal": {"steps": 2},
    },
    "logit adjustment": {"train": {"objective": "logit_adjust"}},
    "plain LoRA": {"molora": {"experts": 1, "selector": "dense"}},
}


def close(ours, theirs, tolerance=1e-5):
    return np.linalg.norm(ours - theirs) <= tolerance * np.linalg.norm(theirs)


def check(house, **values):
    plans = [house.plan(n, steps=3, seed=11 + n, **values) for n in range(3)]
    together = [house.client(n) for n in range(3)]
    assert may_share(together, plans)
    replies = train_together(together, plans)
    personal = [client.store.before(2).tree.flat for client in together]
    house.folder = house.folder / "alone"
    for n, (plan, reply) in enumerate(zip(plans, replies, strict=True)):
        client = house.client(n)
        alone = client.train(plan)
        ours, theirs = house.delta(reply), house.delta(alone)
        assert ours.tree.layout == theirs.tree.layout
        assert close(ours.tree.flat, theirs.tree.flat)
        assert theirs.tree.flat.any()
        assert close(personal[n], client.store.before(2).tree.flat)
        assert ours.tokens == pytest.approx(theirs.tokens, rel=1e-4)
        assert reply.loss == pytest.approx(alone.loss, rel=1e-5)
        assert reply.metrics == pytest.approx(alone.metrics, rel=1e-4)
        assert (reply.examples, reply.bytes_down) == (alone.examples, alone.bytes_down)


@pytest.mark.parametrize("case", CASES)
def test_together_equals_one_after_another(house, case):
    check(house(**CASES[case]))


@pytest.mark.parametrize("passes", [[[2], [1], [0]], [[1], [0, 2]]])
def test_clients_of_like_lengths_have_a_pass_of_their_own(house, monkeypatch, passes):
    monkeypatch.setattr(trainer, "alike", lambda tokens, start, most: passes if most > 1 else [[0]])
    check(house(molora={"losses": LOSSES}, train={"accumulation": 2}))


def test_clients_of_other_ranks_train_together(house):
    home = house(molora={"rank": 3})
    plans = [home.plan(n, rank=1 + n) for n in range(2)]
    replies = train_together([home.client(n) for n in range(2)], plans)
    for n, plan in enumerate(plans):
        theirs = home.delta(home.client(n).train(plan))
        assert close(home.delta(replies[n]).tree.flat, theirs.tree.flat)


def test_a_decoder_learns_answers_of_unequal_length(tmp_path):
    torch.set_num_threads(1)
    base = tiny_world.save_base(tmp_path / "llama", "llama")
    source = tiny_world.write_rows(tmp_path / "rows.jsonl", tiny_world.rows(60, "llama"))
    task = {"kind": "causal-lm", "max_length": 48}
    molora = {"targets": ["q_proj", "up_proj"], "losses": LOSSES}
    train = {"accumulation": 2, "batch_size": 4}
    scopes = (("*/gate.residual*", "personal"), ("*", "shared"))
    check(House((base, source), tmp_path / "home", task=task, molora=molora, train=train), scopes=scopes)


def test_local_baselines_together(house):
    home = house(molora={"losses": LOSSES})
    clients, plans = [home.client(n) for n in range(3)], [home.plan(n, 0) for n in range(3)]
    together = baseline_together(clients, plans)
    for client, plan, reply in zip(clients, plans, together, strict=True):
        alone = client.baseline(plan)
        assert reply.stages["base"] == alone.stages["base"]
        assert reply.stages["local"].loss == pytest.approx(alone.stages["local"].loss, rel=1e-5)


@pytest.mark.parametrize(
    "sections",
    [
        {"molora": {"scorer": {"name": "mixture", "m": 2}}},
        {"molora": {"expert": "ia3"}},
        {"molora": {"dropout": 0.1}},
        {"molora": {"selector": {"name": "switch", "capacity": 1.0}}},
        {"molora": {"preset": "mhr", "targets": ["query"]}},
    ],
)
def test_what_cannot_be_stacked_says_so(house, sections):
    home = house(**sections)
    assert not may_share([home.client(0), home.client(1)], [home.plan(0), home.plan(1)])
    with pytest.raises(ModelError, match=r"engine\.together"):
        home.bench.model.stack(2)


def test_an_objective_that_cannot_be_stacked_is_not_shared(one, monkeypatch):
    clients, plans = [one.client(0), one.client(1)], [one.plan(0), one.plan(1)]
    assert may_share(clients, plans)
    monkeypatch.setattr(type(one.bench.objective()), "alone", True)
    assert not may_share(clients, plans)


def test_unequal_work_is_not_shared(one):
    clients, plan = [one.client(0), one.client(1)], one.plan(0)
    assert may_share(clients, [plan, one.plan(1)])
    assert not may_share(clients, [plan, one.plan(1, steps=3)])
    assert not may_share(clients, [plan, one.plan(1, scopes=(("*", "shared"),))])
    assert not may_share(clients, [plan, one.plan(1, patches=[one.bench.initial])])
    clients[1].train_rows = clients[1].train_rows[:5]
    assert not may_share(clients, [plan, one.plan(1)])


def test_clients_with_as_many_experts_a_token_share_passes(house):
    home = house(
        molora={"experts": 4}, federation={"policy": {"name": "mixed_k", "ks": [1, 3]}}, train={"steps": 3},
        wire={"up": "fp32"},
    )  # fmt: skip
    plans = [home.plan(n, steps=3, k=k) for n, k in enumerate((1, 3, 1))]
    clients = [home.client(n) for n in range(3)]
    assert may_share([clients[0], clients[2]], [plans[0], plans[2]])
    assert not may_share(clients[:2], plans[:2])
    shared = [home.delta(reply).tree.flat for reply in share(train_together, clients, plans)]
    home.folder = home.folder / "alone"
    alone = [home.delta(home.client(n).train(plan)).tree.flat for n, plan in enumerate(plans)]
    assert all(close(ours, theirs) for ours, theirs in zip(shared, alone, strict=True))
    home.folder = home.folder / "more"
    more = home.delta(home.client(0).train(plans[0].model_copy(update={"k": 3}))).tree.flat
    assert not close(more, alone[0], 1e-2)


def test_an_error_leaves_the_model_whole(house):
    home = house(train={"lr": 1e30})
    with pytest.raises(TrainingError, match="client-1, client-2"):
        train_together([home.client(0), home.client(1)], [home.plan(0, steps=4), home.plan(1, steps=4)])
    model = home.bench.model
    assert len(model.values) == 1
    assert all(parameter.shape == parameter.grad.shape for parameter, _, _ in model.places)
    home.client(0).evaluate(home.plan(0))


def test_an_error_meets_the_one_who_caused_it(one):
    clients = [one.client(n) for n in range(3)]
    plans = [one.plan(0), one.plan(1).model_copy(update={"base": "f" * 64}), one.plan(2)]
    replies = share(train_together, clients, plans)
    assert isinstance(replies[1], MessageError)
    assert [replies[n].client for n in (0, 2)] == ["client-1", "client-3"]
    clients[2].train_rows = clients[2].train_rows[:5]  # a smaller batch: alone
    plans[1] = one.plan(1)
    assert [reply.examples for reply in share(train_together, clients, plans)] == [15, 16, 5]


def test_any_failure_of_a_client_is_its_own(one):
    def fail(step, steps):
        raise RuntimeError("not enough memory")

    clients, plans = [one.client(n) for n in range(3)], [one.plan(n) for n in range(3)]
    clients[1].observe = fail
    first, second, third = share(train_together, clients, plans)
    assert [first.client, third.client] == ["client-1", "client-3"]
    assert repr(second) == "RuntimeError('not enough memory')"


@pytest.mark.parametrize(("init", "learns"), [("lora", {"A", "B"}), ("orth", {"B"})])
def test_the_local_baseline_is_the_same_adapter(house, init, learns):
    home = house(molora={"init": init})
    baseline_together([home.client(0)], [home.plan(0)])
    before = home.bench.initial
    after = home.bench.model.tree(before.layout)
    changed = {key.kind for key in before if not np.array_equal(before[key], after[key])}
    assert changed & {"A", "B"} == learns


def test_stacking_keeps_the_values_of_the_selected_client(one):
    model = one.bench.model
    model.flat.normal_()
    before = model.tree()
    model.stack(3)
    for number in range(3):
        model.select(number)
        assert np.array_equal(model.tree().flat, before.flat)
        model.flat.add_(number)
    model.select(1)
    kept = model.tree()
    model.stack(1)
    assert np.array_equal(model.tree().flat, kept.flat)
    assert not np.array_equal(kept.flat, before.flat)


def test_joined_batches_are_padded_to_the_longest():
    short, long = ([Example([5] * n, 1) for n in lengths] for lengths in ((3, 8), (9, 17)))
    both = join([pad(short, 0), pad(long, 0)])
    assert both.input_ids.shape == both.attention_mask.shape == (4, 17)
    assert both.attention_mask.sum(1).tolist() == [3, 8, 9, 17]
    assert both.labels.tolist() == [1, 1, 1, 1]
    tokens = [Example([5] * n, [-100] * (n - 1) + [7], task=n) for n in (3, 9)]
    both = join([pad(tokens[:1], 0), pad(tokens[1:], 0)])
    assert both.labels.shape == (2, 9)
    assert (both.labels != -100).sum(1).tolist() == [1, 1]
    assert both.task_ids.tolist() == [3, 9]
