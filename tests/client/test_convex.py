"""The best head: what it is at its optimum, how far it goes, and what of it is the owner's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from molehill import registry
from molehill.errors import TrainingError
from molehill.molora.forward import Forward
from molehill.molora.likelihoods import of_class, of_flags, of_number
from molehill.tasks.kind import kind_of
from molehill_client import convex
from molehill_client.baselines import baseline_together
from molehill_client.convex import Line, Readings, find_head, read
from molehill_client.goals import Goal, balanced
from molehill_client.objectives.sft import SFT
from molehill_client.together import personal_steps

GOAL = Goal(SFT())


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def zeros(outputs=3, width=6):
    return Line(torch.zeros(outputs, width), torch.zeros(outputs))


def drawn(n=90, width=6, seed=0, strength=1.0):
    """Features of unlike scale and middle, and classes that follow from them with noise."""
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, generator=made)
    labels = (strength * x[:, :3] + torch.randn(n, 3, generator=made)).argmax(1)
    return Readings(x * torch.logspace(-1, 1, width) + 3, labels, torch.arange(n))


def found(readings, start=None, units=None, goal=GOAL, likelihood=of_class, careful=False):
    start = zeros(width=readings.features.shape[1]) if start is None else start
    units = range(len(readings.rows)) if units is None else units
    return find_head(readings, units, goal, likelihood, start, careful=careful, seed=0, where="client a")


def scores(readings, line):
    return F.linear(readings.features, line.weight, line.bias)


def with_penalties(monkeypatch, *penalties):
    monkeypatch.setattr(convex, "_PENALTIES", penalties)


def loss(readings, line, start, penalty, goal=GOAL):
    """Of the definition: the deviations and the change of the standardised weight, written out."""
    x = readings.features.double()
    said = Forward(F.linear(x, line.weight, line.bias), readings.labels, readings.rows, [], torch.tensor)
    change = (line.weight - start.weight) * x.std(0, unbiased=False)
    middle = x.mean(0)
    bias = (line.bias - start.bias) + (line.weight - start.weight) @ middle  # at the middle of the features
    pull = convex._BIAS / len(x)
    return goal.of_scores(said) + penalty / 2 * change.square().sum() + pull / 2 * bias.square().sum()


@pytest.mark.parametrize("weighted", [False, True])
def test_at_the_best_head_the_gradient_is_zero(monkeypatch, weighted):
    with_penalties(monkeypatch, 0.3)
    data, torch_seed = drawn(strength=2.0), torch.Generator().manual_seed(1)
    goal = Goal(SFT(), balanced(torch.bincount(data.labels).float())) if weighted else GOAL
    start = Line(torch.randn(3, 6, generator=torch_seed) / 9, torch.randn(3, generator=torch_seed))
    best = found(data, start, goal=goal)
    assert not torch.equal(best.weight, start.weight)
    line = Line(*(part.double().requires_grad_() for part in best))
    wide = Line(*(part.double() for part in start))
    gradients = torch.autograd.grad(loss(data, line, wide, 0.3, goal), line)
    deviation = data.features.double().std(0, unbiased=False)
    assert float((gradients[0] / deviation).abs().max()) < 1e-4  # what is left is rounding to float32
    assert float(gradients[1].abs().max()) < 1e-5


def test_a_number_is_found_as_by_the_normal_equations(monkeypatch):
    with_penalties(monkeypatch, 0.05)
    x = drawn().features
    y = (x[:, 0] - x[:, 5] / 9 + torch.randn(90, generator=torch.Generator().manual_seed(3))).float()
    data = Readings(x, y, torch.arange(90))
    best = found(data, zeros(1), likelihood=of_number)
    z = (x.double() - x.double().mean(0)) / x.double().std(0, unbiased=False)
    z = torch.cat([z, torch.ones(90, 1)], 1)
    pull = torch.diag(torch.tensor([0.05 * 90] * 6 + [convex._BIAS], dtype=torch.float64))
    wanted = z @ torch.linalg.solve(z.T @ z + pull, z.T @ y.double())
    torch.testing.assert_close(scores(data, best).squeeze(1), wanted.float(), atol=1e-4, rtol=1e-4)


def test_a_huge_penalty_leaves_the_weight_and_fits_the_bias(monkeypatch):
    with_penalties(monkeypatch, 1e9)
    data, start = drawn(), Line(torch.full((3, 6), 0.01), torch.tensor([2.0, 0.0, -2.0]))
    best = found(data, start)
    torch.testing.assert_close(best.weight, start.weight, atol=1e-6, rtol=0)
    shares = torch.bincount(data.labels) / len(data.labels)
    torch.testing.assert_close(
        scores(data, best).softmax(1).mean(0), shares, atol=5e-3, rtol=0
    )  # but for its slight pull


def test_separable_rows_are_all_right_under_a_tiny_penalty(monkeypatch):
    with_penalties(monkeypatch, 1.0, 1e-2, 1e-5)
    x = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
    data = Readings(x, x[:, :3].argmax(1), torch.arange(60))
    best = found(data)
    assert bool((scores(data, best).argmax(1) == data.labels).all())
    assert bool(best.weight.isfinite().all())


def test_the_scale_of_a_feature_changes_no_prediction(monkeypatch):
    with_penalties(monkeypatch, 1.0, 0.1)
    data = drawn(strength=2.0)
    scale = torch.ones(6)
    scale[2] = 100
    other = data._replace(features=data.features * scale)
    torch.testing.assert_close(scores(other, found(other)), scores(data, found(data)), atol=2e-3, rtol=1e-3)


def test_features_that_hardly_move_are_not_blown_up(monkeypatch):
    with_penalties(monkeypatch, 1.0, 0.1)
    data = drawn(strength=2.0)
    noise = torch.randn(90, 40, generator=torch.Generator().manual_seed(5)) * 1e-6
    more = data._replace(features=torch.cat([data.features, noise], 1))
    best = found(more, zeros(width=46))
    torch.testing.assert_close(scores(more, best), scores(data, found(data)), atol=1e-2, rtol=1e-2)


def test_a_start_at_the_best_stays(monkeypatch):
    with_penalties(monkeypatch, 1e-6)
    data = drawn(300)
    best = found(data)
    torch.testing.assert_close(scores(data, found(data, best)), scores(data, best), atol=0.02, rtol=0)


@pytest.mark.parametrize("n", [30, 400])
def test_where_labels_say_nothing_the_head_hardly_moves(n):
    data = drawn(n)
    labels = torch.randint(0, 3, (n,), generator=torch.Generator().manual_seed(9))
    start = Line(torch.zeros(3, 6), labels.bincount(minlength=3).log())
    careful = found(data._replace(labels=labels), start, careful=True)
    assert torch.equal(careful.weight, start.weight)
    assert torch.equal(careful.bias, start.bias)


def test_the_penalty_is_chosen_by_rows_that_were_left_out():
    """Twice as many features as rows, of which three say something: the weakest penalty suits rows it saw."""
    data, fresh = (drawn(n, width=120, strength=2.0, seed=n) for n in (60, 2000))
    chosen = float(F.cross_entropy(scores(fresh, found(data)), fresh.labels))
    each = []
    for penalty in (100.0, 1.0, 1e-3):
        problem = convex._Problem(data, GOAL, of_class, zeros(width=120), "")
        line = problem.line(problem.solve(penalty, problem.start(), problem.part(data.rows >= 0), convex._EXACT))
        each.append(float(F.cross_entropy(scores(fresh, line), fresh.labels)))
    assert chosen < each[1] + 0.05
    assert chosen < each[2] - 0.1
    assert chosen < math.log(3)


def test_units_are_left_out_whole():
    """Every row is there four times: with rows as units the weakest penalty seems to be the best, and it is not."""
    once = drawn(40, width=60, strength=1.0)
    data = Readings(*(part.repeat(4, *[1] * (part.dim() - 1)) for part in once[:2]), torch.arange(160))
    fresh = drawn(2000, width=60, strength=1.0, seed=7)
    apart, together = found(data), found(data, units=list(range(40)) * 4)
    losses = [float(F.cross_entropy(scores(fresh, line), fresh.labels)) for line in (apart, together)]
    assert losses[1] < losses[0] - 0.1


@pytest.mark.parametrize(("n", "units"), [(1, [0]), (5, [3] * 5)])
def test_one_unit_keeps_the_start(n, units):
    start = Line(torch.ones(3, 6), torch.ones(3))
    assert found(drawn(n), start, units) is start


def test_a_class_without_a_row_stays_within_reach():
    data = drawn(100)
    best = found(data._replace(labels=data.labels.clamp(max=1)))
    rare = scores(data, best).softmax(1)[:, 2]
    assert 1e-5 < float(rare.mean()) < 0.02


def test_what_a_row_holds_of_several_kinds_is_learnt():
    x = drawn(200, strength=3.0).features
    flags = torch.stack([x[:, 0] > x[:, 0].mean(), x[:, 3] > x[:, 3].mean()], 1).float()
    best = found(Readings(x, flags, torch.arange(200)), zeros(2), likelihood=of_flags)
    assert float(((scores(Readings(x, flags, flags), best) > 0) == (flags > 0)).float().mean()) > 0.9


def test_a_feature_that_is_not_finite_is_refused():
    data = drawn()
    data.features[3, 2] = math.inf
    with pytest.raises(TrainingError, match=r"client a: a feature is not finite.*base\.precision"):
        found(data)


@pytest.mark.parametrize("name", [m.name for m in registry.methods("objective") if registry.declared(m, "convex")])
def test_objectives_that_say_so_are_convex(name):
    made = registry.build("objective", name)
    made.begin(torch.tensor([5.0, 2.0, 1.0]))
    pairs = torch.randn(2, 50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 4
    labels = torch.arange(50) % 3
    ends = [made(Forward(z, labels, labels, [], torch.tensor)) for z in pairs]
    middle = made(Forward(pairs.mean(0), labels, labels, [], torch.tensor))
    assert registry.declared(registry.get("objective", name), "of_scores")
    assert middle < sum(ends) / 2


@pytest.mark.parametrize("name", [m.name for m in registry.methods("task") if kind_of(m.name).head])
def test_likelihoods_of_tasks_with_a_head_are_convex(name):
    kind = kind_of(name)
    assert kind.convex
    labels = {
        "class": torch.arange(50) % 3,
        "flags": (torch.arange(150) % 2).float().view(50, 3),
        "number": torch.linspace(-1, 1, 50),
    }[kind.predicts]
    function = {"class": of_class, "flags": of_flags, "number": of_number}[kind.predicts]
    outputs = 1 if kind.predicts == "number" else 3
    one, two = torch.randn(2, 50, outputs, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 4
    assert bool(
        (function((one + two) / 2, labels) <= (function(one, labels) + function(two, labels)) / 2 + 1e-12).all()
    )


# ---- of an owner ---------------------------------------------------------------------------------------------


def test_readings_are_those_of_the_rows_in_their_order(one):
    client = one.client(0)
    client.start_over()
    readings = read(one.bench, client.train_rows)
    assert readings.rows.tolist() == list(range(len(client.train_rows)))
    assert readings.labels.tolist() == [row.labels for row in client.train_rows]
    batch = one.bench.task.collate(client.train_rows[3:4])
    with torch.no_grad():
        said = one.bench.model(batch.input_ids, batch.attention_mask, batch.labels).scores
    head = one.bench.model.head
    torch.testing.assert_close(F.linear(readings.features[3:4], head.weight, head.bias), said)


@pytest.mark.parametrize("size", [1, 7])
def test_the_base_is_scored_alike_in_one_batch_and_in_several(house, size):
    whole, parts = house("whole", evaluate={"batch_size": 64}), house("parts", evaluate={"batch_size": size})
    first, second = (baseline_together([h.client(0)], [h.plan(0, 0)])[0].stages["base"] for h in (whole, parts))
    assert first.accuracy == second.accuracy
    assert first.loss == pytest.approx(second.loss, rel=1e-4)


def test_a_computed_head_is_the_best_one_after_the_gate_and_is_kept(house, monkeypatch):
    h = house(personal={"head": "convex", "gate_lr": 0.05, "steps": 3}, data={"rows": 40})
    with_penalties(monkeypatch, 1.0)
    asked = []
    find = convex.find_head

    def watched(*said, **words):
        asked.append((said[0], words["careful"]))
        return find(*said, **{**words, "careful": False})

    monkeypatch.setattr(convex, "find_head", watched)
    tree = h.bench.initial.copy()
    tree.flat[...] = np.random.default_rng(1).normal(size=tree.flat.shape) / 4  # so that moving is better than staying
    client, plan = h.client(0), h.plan(0, tree=tree)
    stages = client.evaluate(plan).stages
    ((readings, careful),) = asked
    assert careful
    kept = client.store.before(2).tree
    assert {key.kind for key in kept} == {"gate", "head"}
    assert all(key.residual for key in kept)
    assert {key.kind for key, value in kept.items() if value.any()} == {"gate", "head"}
    model = h.bench.model  # still holds what was scored
    shared = Line(model.head.weight.detach(), model.head.bias.detach())
    units = range(len(client.train_rows))
    again = find(
        readings, units, client.bench.goal(client.train_rows), of_class, shared, careful=False, seed=0, where=""
    )
    torch.testing.assert_close(model.head.residual["weight"], again.weight - shared.weight, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(readings.features, read(h.bench, client.train_rows).features)
    assert stages["personalised"].loss != stages["global"].loss
    assert client.evaluate(plan).stages == stages  # whatever was there before


def test_a_computed_head_needs_no_steps_and_alters_nothing_that_is_sent(house):
    h = house("convex", personal={"head": "convex", "gate": "global", "steps": 5})
    plain = house("plain", personal={"head": "anchored", "gate": "global"})
    scopes = tuple((pattern, "frozen" if "gate.residual" in pattern else scope) for pattern, scope in h.plan(0).scopes)
    assert personal_steps(h.client(0), h.plan(0, scopes=scopes)) == 0
    for number in (1, 2):
        mine = h.client(0).train(h.plan(0, number, scopes=scopes))
        h.client(0).evaluate(h.plan(0, number, scopes=scopes))
        assert mine.delta == plain.client(0).train(plain.plan(0, number, scopes=scopes)).delta
    newcomer = h.client(1).evaluate(h.plan(1, 2, scopes=scopes)).stages
    assert newcomer.keys() == {"global", "personalised"}
