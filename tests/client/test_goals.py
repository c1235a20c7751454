"""Classes that do not occur alike: weights, and the objective that goes by how often they occur."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import tiny_world
import torch
from tiny_house import House
from tiny_models import adapted, batch, shake

from molehill import registry
from molehill.errors import ConfigError
from molehill.molora.forward import Forward
from molehill.tasks.batches import Batch, join
from molehill_client.baselines import baseline_together
from molehill_client.goals import Goal, balanced
from molehill_client.objectives.sft import SFT
from molehill_client.scoring import evaluate_together
from molehill_client.trainer import Rates, Settings, train

CAUSAL = {"kind": "causal-lm", "max_length": 48}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def objective(name, counts=None, **params):
    made = registry.build("objective", name, params)
    if counts is not None:
        made.begin(torch.tensor(counts, dtype=torch.float32))
    return made


def forward_of(logits, labels, reference=None):
    return Forward(logits, labels, torch.arange(len(labels)), [], lambda: reference)


def gradient(function, logits, labels):
    logits = logits.clone().requires_grad_()
    (grad,) = torch.autograd.grad(function(forward_of(logits, labels)), logits)
    return grad


@pytest.fixture
def drawn():
    torch.manual_seed(0)
    return torch.randn(4, 3, dtype=torch.float64), torch.tensor([2, 0, 1, 0]), torch.randn(4, 3, dtype=torch.float64)


def test_balanced_weights_are_those_of_scikit_learn():
    weights = balanced(torch.tensor([6.0, 0.0, 3.0, 1.0]))  # compute_class_weight("balanced", ..) of those that occur
    torch.testing.assert_close(weights, torch.tensor([10 / 18, 0.0, 10 / 9, 10 / 3]))


@pytest.mark.parametrize(("name", "params"), [("sft", {}), ("dft", {}), ("asft", {"coef": 0.3}), ("logit_adjust", {})])
def test_a_row_that_weighs_twice_is_there_twice(drawn, name, params):
    logits, labels, reference = drawn
    twice = torch.tensor([0, 1, 1, 2, 3, 3])  # the rows of class 0
    loss = objective(name, [2, 1, 1], **params)
    weighted = Goal(loss, torch.tensor([2.0, 1.0, 1.0]))(forward_of(logits, labels, reference))
    torch.testing.assert_close(weighted, loss(forward_of(logits[twice], labels[twice], reference[twice])))
    assert not torch.isclose(weighted, loss(forward_of(logits, labels, reference)))


def test_micro_batches_of_unlike_weight_are_one_step():
    one, two = (Batch(**batch("bert", rows=2, seed=seed)) for seed in (0, 1))
    one, two = (replace(each, labels=torch.tensor(labels)) for each, labels in ((one, [0, 0]), (two, [2, 0])))
    both = join([one, two])
    goal = Goal(SFT(), balanced(torch.tensor([9.0, 0.0, 1.0])))

    def fit(data, accumulation):
        model = shake(adapted("bert", experts=2, rank=2), scale=0.1)
        settings = Settings(Rates(1e-2, 1e-2, 1e-2), clip=None, accumulation=accumulation)
        (result,) = train(model, [itertools.cycle(data)], [goal], (), settings, lambda _: "shared", steps=1)
        return result.loss, model.grads.clone()

    (loss, grads), (whole, all_at_once) = fit([one, two], 2), fit([both], 1)
    assert loss == pytest.approx(whole, rel=1e-5)
    torch.testing.assert_close(grads, all_at_once, rtol=1e-4, atol=1e-6)


def test_logit_adjustment_without_strength_or_of_classes_that_occur_alike_is_sft(drawn):
    logits, labels, _ = drawn
    want = objective("sft")(forward_of(logits, labels))
    assert torch.equal(objective("logit_adjust", [9, 1, 0], tau=0.0)(forward_of(logits, labels)), want)
    torch.testing.assert_close(objective("logit_adjust", [5, 5, 5])(forward_of(logits, labels)), want)
    assert torch.equal(objective("logit_adjust")(forward_of(logits, labels)), want)


def test_logit_adjustment_is_equation_10(drawn):
    logits, labels, _ = drawn
    prior = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    own, powers = logits[torch.arange(4), labels], prior**0.7
    want = -(own.exp() * powers[labels] / (logits.exp() * powers).sum(1)).log().mean()
    torch.testing.assert_close(objective("logit_adjust", [5, 2, 3], tau=0.7)(forward_of(logits, labels)), want)


def test_the_optimum_of_logit_adjustment_has_the_least_balanced_error():
    """Its scores are log p(x | y), so they choose as if classes occurred alike; those of sft choose the common one."""
    seen = torch.tensor([[60, 1], [25, 3], [5, 6]], dtype=torch.float64)  # rows by what is seen, and class
    per_class = seen / seen.sum(0)
    rows, labels = (seen > 0).nonzero(as_tuple=True)
    rows, labels = (part.repeat_interleave(seen.flatten().long()) for part in (rows, labels))
    for loss, best in ((objective("logit_adjust", [90, 10]), per_class), (objective("sft"), seen)):
        table = best.log().requires_grad_()
        loss(forward_of(table[rows], labels)).backward()
        torch.testing.assert_close(table.grad, torch.zeros_like(table), rtol=0, atol=1e-7)
    assert per_class.argmax(1).tolist() == [0, 1, 1]
    assert seen.argmax(1).tolist() == [0, 0, 1]


def test_logit_adjustment_turns_the_gradient_where_class_weights_only_scale_it():
    logits, labels = torch.zeros(1, 3, dtype=torch.float64), torch.tensor([2])
    plain = gradient(objective("sft"), logits, labels)
    weighted = gradient(lambda f: 7 * Goal(SFT(), torch.tensor([0.1, 0.4, 7.0]))(f), logits, labels)
    torch.testing.assert_close(weighted, 7 * plain)
    adjusted = gradient(objective("logit_adjust", [6, 3, 1]), logits, labels)
    torch.testing.assert_close(adjusted, torch.tensor([[0.6, 0.3, -0.9]], dtype=torch.float64))


def test_a_class_that_a_client_does_not_have_gets_no_gradient_from_it(drawn):
    logits, labels, _ = drawn
    labels = labels.where(labels != 1, 0)
    grad = gradient(objective("logit_adjust", [3, 0, 1]), logits, labels)
    assert torch.equal(grad[:, 1], torch.zeros(4, dtype=torch.float64))
    assert grad[:, 0].abs().min() > 0
    one = gradient(objective("logit_adjust", [4, 0, 0]), logits, torch.zeros_like(labels))
    assert torch.equal(one, torch.zeros_like(one))  # there is nothing to tell apart


def test_a_client_goes_by_its_own_training_rows(house):
    home = house(task={"class_weights": "balanced"}, train={"objective": "logit_adjust"})
    goals = []
    for number in range(2):
        client = home.client(number)
        client.train_rows[number:] = [row for row in client.train_rows[number:] if row.labels != 2]
        labels = torch.tensor([row.labels for row in client.train_rows])
        counts = torch.bincount(labels, minlength=3).float()
        goals.append(client.bench.goal(client.train_rows))
        torch.testing.assert_close(goals[-1].weights, balanced(counts))
        shifted = goals[-1].objective(forward_of(torch.zeros(len(labels), 3), labels))
        torch.testing.assert_close(shifted, -(counts / counts.sum()).log()[labels].mean())
    assert not torch.equal(goals[0].weights, goals[1].weights)


def test_what_an_owner_fits_for_itself_may_be_by_plain_cross_entropy(house):
    home = house(train={"objective": {"name": "logit_adjust", "rounds_only": True}})
    client = home.client(0)
    client.train_rows[:] = [row for i, row in enumerate(client.train_rows) if row.labels != 2 or i % 3 == 0]
    labels = torch.tensor([row.labels for row in client.train_rows])
    forward = forward_of(torch.randn(len(labels), 3), labels)
    plain = forward.mean(forward.nll())
    assert not torch.isclose(client.bench.goal(client.train_rows)(forward), plain, rtol=0.01)
    own = client.bench.goal(client.train_rows, personal=True)
    torch.testing.assert_close((own(forward), own.of_scores(forward)), (plain, plain))
    both = house("both", train={"objective": {"name": "logit_adjust"}}).client(0)
    assert both.bench.goal(client.train_rows, personal=True)(forward) != plain


@pytest.mark.parametrize("stage", ["local", "personalised"])
@pytest.mark.parametrize(("head", "steps"), [("convex", 0), ("anchored", 40)])
def test_an_owner_whose_classes_are_skewed_predicts_them_as_often_as_they_occur(house, head, steps, stage):
    def loss(*, rounds_only):
        home = house(
            f"only {rounds_only}",
            train={"objective": {"name": "logit_adjust", "tau": 2.0, "rounds_only": rounds_only}},
            personal={"head": head, "steps": steps, "head_lr": 0.1, "decay": 0.0},
        )
        client = home.client(0)
        rows = client.train_rows
        client.train_rows = rows.part([i for i, row in enumerate(rows) if row.labels == 0 or i % 5 == 0])
        client.test_rows = client.train_rows
        score = baseline_together if stage == "local" else evaluate_together
        return score([client], [home.plan(0)])[0].stages[stage].loss

    assert loss(rounds_only=True) < loss(rounds_only=False)


def test_after_rounds_that_teach_nothing_a_model_trained_alone_is_the_personalised_one(house):
    home = house(
        train={"objective": {"name": "logit_adjust", "tau": 2.0, "rounds_only": True}, "lr": 1e-12},
        personal={"head": "anchored", "steps": 10, "head_lr": 0.1, "gate_lr": 0.1},
    )
    client, plan = home.client(0), home.plan(0)
    client.train_rows[:] = [row for i, row in enumerate(client.train_rows) if row.labels != 2 or i % 3 == 0]
    alone = baseline_together([client], [plan])[0].stages["local"]
    ours = evaluate_together([client], [plan])[0].stages
    assert alone.loss == pytest.approx(ours["personalised"].loss, rel=1e-5)
    assert alone.loss != pytest.approx(ours["global"].loss, rel=1e-2)


def test_baselines_are_trained_for_rare_classes_too(house):
    stages = {}
    for name, objective, weights in (("plain", "sft", "none"), ("weighted", "sft", "balanced"),
                                     ("adjusted", "logit_adjust", "none"), ("scaled", "dft", "none"),
                                     ("both", "dft", "balanced")):  # fmt: skip
        home = house(name, task={"class_weights": weights}, train={"objective": objective})
        client = home.client(0)
        client.train_rows[:] = [row for i, row in enumerate(client.train_rows) if row.labels != 2 or i % 3 == 0]
        stages[name] = baseline_together([client], [home.plan(0)])[0].stages
    assert len({found["local"].loss for found in stages.values()}) == len(stages)
    base = {name: found["base"].loss for name, found in stages.items()}
    assert len({base[name] for name in ("plain", "weighted", "adjusted")}) == 3
    assert base["scaled"] == base["plain"]  # its gradient is of no function, so there is none to minimise
    assert base["both"] == base["weighted"]


@pytest.mark.parametrize("section", [{"train": {"objective": "logit_adjust"}}, {"task": {"class_weights": "balanced"}}])
def test_a_task_without_classes_is_refused(tmp_path, section):
    base = tiny_world.save_base(tmp_path / "llama", "llama")
    source = tiny_world.write_rows(tmp_path / "rows.jsonl", tiny_world.rows(20, "llama"))
    task, molora = {**CAUSAL, **section.get("task", {})}, {"targets": ["q_proj"]}
    home = House((base, source), tmp_path / "home", **{**section, "task": task, "molora": molora})
    with pytest.raises(ConfigError, match="no classes"):
        home.bench.goal(home.client(0).train_rows)
