"""What an owner makes of the final model: what each candidate is, which one is chosen, and what is kept of it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tiny_world
import torch
from tiny_house import House

from molehill import registry
from molehill.errors import TrainingError
from molehill.tasks.lengths import Examples
from molehill.tasks.outcomes import Parts
from molehill_client.choosing import TEMPERATURES, choose, clearly_worse, losses_of
from molehill_client.making import Candidate, Company
from molehill_client.scores import score
from molehill_client.scoring import evaluate_together

NAMES = [method.name for method in registry.methods("candidate")]
EVERY = ["shared_model", "fitted_model", "own_adapter", "trained_alone"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("many")
    rows = tiny_world.write_rows(folder / "r.jsonl", tiny_world.rows(240))
    return tiny_world.save_base(folder / "bert", "bert"), rows


def home_of(sources, folder, candidates, **sections):
    personal = {"holdout": 0.25, "candidates": candidates, "steps": 6, **sections.pop("personal", {})}
    train = {"steps": 25, "lr": 2e-2, "batch_size": 16, **sections.pop("train", {})}
    return House(sources, folder, personal=personal, train=train, **sections)


@pytest.fixture
def home(sources, tmp_path):
    return lambda candidates=EVERY, **sections: home_of(sources, tmp_path, candidates, **sections)


def contrary(client):
    """The client with every label taken for the next."""
    for name in ("train_rows", "test_rows"):
        rows = getattr(client, name)
        turned = [dataclasses.replace(row, labels=(row.labels + 1) % 3) for row in rows]
        setattr(client, name, Examples(turned, rows.lengths, rows.units))
    return client


def learnt(home, steps=100):
    """A model that is trained on the rows of the rounds of all clients."""
    teacher = home.client(0)
    parts = [home.client(n).round_rows for n in range(3)]
    rows = [row for part in parts for row in part]
    teacher.train_rows = Examples(rows, parts[0].lengths, range(len(rows)))
    teacher.__dict__["_parts"] = (teacher.train_rows, teacher.train_rows.part(()))
    teacher.train(home.plan(0, steps=steps))
    return home.bench.model.tree(home.bench.initial.layout)


def company_of(home, numbers=(0,), tree=None):
    clients = [home.client(n) for n in numbers]
    plans = [home.plan(n, tree=tree) for n in numbers]
    received = []
    for client, plan in zip(clients, plans, strict=True):
        client.begin(plan, after=True)
        received.append(home.bench.model.flat.detach().clone())
    return Company(clients, plans, [client.round_rows for client in clients], torch.stack(received), "here")


@pytest.mark.parametrize("name", NAMES)
def test_a_candidate_changes_what_it_says_and_makes_the_same_again(home, name):
    house = home(train={"steps": 4}, personal={"head": "anchored", "steps": 3})
    candidate = registry.build("candidate", name, {"steps": 6} if name == "own_adapter" else {})
    company = company_of(house, (0, 1))
    made = candidate.make(company)
    assert made
    model = house.bench.model
    for values in made:
        assert values.shape == company.received.shape
        assert values.isfinite().all()
    again = candidate.make(company)
    assert all(torch.equal(one, two) for one, two in zip(made, again, strict=True))
    model.flat.copy_(made[-1][0])
    ours = model.tree(house.bench.initial.layout)
    changed = {key.kind for key in ours if not np.array_equal(ours[key], house.bench.initial[key])}
    assert bool(changed) == candidate.replaces
    assert candidate.steps(house.config) >= 0
    alone = candidate.make(company.part([0]))
    for one, both in zip(alone, made, strict=True):
        torch.testing.assert_close(one[0], both[0], rtol=1e-3, atol=1e-4)


def test_an_adapter_goes_each_part_of_the_way_under_its_pull(home):
    house = home(personal={"head": "global"})
    company = company_of(house, tree=learnt(house, steps=10))

    def build(**params):
        return registry.build("candidate", "own_adapter", {"steps": 10, **params}).make(company)

    half, whole = (values - company.received for values in build())
    torch.testing.assert_close(half, whole / 2, rtol=1e-3, atol=1e-5)
    assert build(along=[1.0])[0].equal(whole + company.received)
    (held,) = build(along=[1.0], pull=1e4)
    assert (held - company.received).norm() < whole.norm() / 2


def test_alone_is_the_baseline(home):
    house = home(
        personal={"head": "global", "gate": "global"},
        evaluate={"baselines": True},
        run={"rounds": 1},
        train={"steps": 12},
    )
    company = company_of(house)
    client, plan = company.clients[0], company.plans[0]
    alone = registry.build("candidate", "trained_alone", {})
    everything = dataclasses.replace(company, rows=[client.train_rows])
    house.bench.model.flat.copy_(alone.make(everything)[0][0])
    ours = score(house.bench, client.test_rows).scores()
    theirs = client.baseline(plan).stages["local"]
    assert ours.loss == pytest.approx(theirs.loss, abs=0.25)  # of other batches


def test_how_long_an_adapter_is_trained_alone_can_be_said(home):
    company = company_of(home(run={"rounds": 2}, train={"steps": 3}, personal={"head": "global"}))

    def made(**params):
        return registry.build("candidate", "trained_alone", params).make(company)[0]

    assert made(steps=6).equal(made())
    assert not made(steps=7).equal(made())
    assert registry.build("candidate", "trained_alone", {"steps": 7}).steps(company.bench.config) == 7


def test_the_frozen_base_is_the_baseline(home):
    house = home(personal={"head": "convex"}, evaluate={"baselines": True}, run={"rounds": 1})
    company = company_of(house, tree=learnt(house, steps=10))
    client, plan = company.clients[0], company.plans[0]
    base = registry.build("candidate", "frozen_base", {})
    house.bench.model.flat.copy_(base.make(dataclasses.replace(company, rows=[client.train_rows]))[0][0])
    ours = score(house.bench, client.test_rows).scores()
    theirs = client.baseline(plan).stages["base"]
    assert ours.loss == pytest.approx(theirs.loss, abs=0.02)  # of other folds
    assert ours.accuracy == pytest.approx(theirs.accuracy, abs=0.02)


def test_who_is_like_the_others_takes_the_shared_model_and_who_contradicts_them_its_own(home):
    house = home(personal={"head": "global"})  # a head of its own could say the opposite
    tree = learnt(house)
    clients, plans = [house.client(0), contrary(house.client(2))], [house.plan(n, tree=tree) for n in (0, 2)]
    replies = evaluate_together(clients, plans)
    assert replies[0].chosen in {"shared_model", "fitted_model"}
    assert replies[1].chosen in {"own_adapter", "trained_alone"}
    for client, reply in zip(clients, replies, strict=True):
        assert reply.stages["personalised"].loss <= reply.stages["global"].loss + 0.05
        assert client.store.before(3).chosen == reply.chosen
    assert replies[1].stages["personalised"].accuracy > replies[1].stages["global"].accuracy + 0.2
    # What is kept is what was scored, in another process, too; and the next round goes on from what all share.
    state, model = clients[1].store.before(2), house.bench.model
    clients[0].begin(plans[0], after=True)
    assert score(house.bench, clients[1].test_rows).scores() != replies[1].stages["personalised"]
    model.load(state.personal)
    assert score(house.bench, clients[1].test_rows).scores() == replies[1].stages["personalised"]
    clients[1].begin(house.plan(2, 2, tree=tree))
    ours = model.tree(house.bench.initial.layout)
    assert all(np.array_equal(ours[key], tree[key]) for key in tree)
    clients[1].train(house.plan(2, 2, tree=tree, steps=1))
    after = clients[1].store.before(3)
    assert (after.chosen, len(after.own.layout)) == ("", 0)


def losses(*each, counts=None):
    return Parts.of_rows(each, counts)


def worse(one, best, units=None):
    return clearly_worse(one, best, range(len(best.above)) if units is None else units)


def test_worse_is_what_is_more_than_a_standard_error_of_paired_units():
    best = losses(1.0, 2.0, 3.0, 4.0)
    assert not worse(best, best)
    assert worse(losses(1.1, 2.1, 3.1, 4.1), best)  # each unit says so
    apart = np.array([1.0, -0.5, 0.5, -0.5])
    error = apart.std(ddof=1) / 2
    assert not worse(losses(*(best.above + apart - apart.mean() + error * 0.999)), best)
    assert worse(losses(*(best.above + apart - apart.mean() + error * 1.001)), best)


def test_one_unit_tells_nothing():
    good, bad = Parts.of_rows([0.1, 0.1]), Parts.of_rows([9.0, 9.0])
    assert not clearly_worse(bad, good, [4, 4])
    assert clearly_worse(bad, good, [4, 5])


def test_units_count_by_their_predictions():
    counts, units = [1.0, 1.0, 1.0, 1.0, 2.0, 2.0], [7, 8, 8, 9, 3, 3]
    best = losses(*[0.0] * 6, counts=counts)
    other = losses(0.8, 0.2, 0.2, 0.0, 0.4, 0.4, counts=counts)
    assert other.value() == 0.25
    apart = np.array([0.8, 0.4, 0.0, 0.8])
    each = (apart - 0.25 * np.array([1.0, 2.0, 1.0, 4.0])) / 8  # by how much each unit changes the mean
    error = np.sqrt(4 / 3 * (each**2).sum())
    assert worse(other, best, units) == (error < 0.25)
    assert worse(losses(*(other.above + 5 * np.array(counts)), counts=counts), best, units)


class Known(Candidate):
    """Leaves the model, or moves all of it."""

    def __init__(self, by=0.0, fails=False):
        self.by, self.fails, self.made = by, fails, 0

    def make(self, company, /):
        self.made += 1
        if self.fails:
            raise TrainingError("it does not work")
        moved = torch.sin(torch.arange(company.received.shape[1]))
        return [company.received + self.by * moved]


def chosen_of(house, monkeypatch, *candidates, **values):
    """Places of what is chosen of these candidates, which stand in for the configured, by owner."""
    company = company_of(house, **values)
    named = iter(candidates)
    monkeypatch.setattr(type(house.config.personal.candidates[0]), "build", lambda *_, **__: next(named))
    try:
        return [EVERY.index(choice.name) for choice in choose(company)]
    finally:
        monkeypatch.undo()


def test_at_equal_losses_the_earlier_wins(home, monkeypatch):
    house = home(EVERY[:3])
    tree = learnt(house, steps=30)
    assert chosen_of(house, monkeypatch, Known(), Known(), Known(), tree=tree) == [0]
    assert chosen_of(house, monkeypatch, Known(2.0), Known(), Known(), tree=tree) == [1]


class Sure(Candidate):
    """The model with its head's numbers times so many: it says the same, as sure as it likes."""

    def __init__(self, times, house):
        self.times, self.places = times, [slot for key, slot in house.bench.model.slots.items() if key.site == "head"]

    def make(self, company, /):
        values = company.received.clone()
        for slot in self.places:
            values[:, slot.start : slot.stop] *= self.times
        return [values]


def test_how_sure_a_model_is_does_not_count(home, monkeypatch):
    house = home(EVERY[:2])
    tree = learnt(house, steps=30)
    assert chosen_of(house, monkeypatch, Sure(1.8, house), Sure(1.0, house), tree=tree) == [0]
    assert chosen_of(house, monkeypatch, Sure(-1.0, house), Sure(1.0, house), tree=tree) == [1]


def test_who_set_nothing_aside_takes_the_first_and_tries_none(home, monkeypatch):
    house, first, second = home(EVERY[:2]), Known(2.0), Known()
    monkeypatch.setattr("molehill_client.folds._FEWEST", 1000)
    assert chosen_of(house, monkeypatch, first, second) == [0]
    assert (first.made, second.made) == (1, 0)


def test_what_fails_is_left_out_and_said_and_all_failing_is_an_error(home, monkeypatch, caplog):
    house = home(EVERY[:2])
    assert chosen_of(house, monkeypatch, Known(fails=True), Known()) == [1]
    assert "client-1 cannot make candidate shared_model: it does not work" in caplog.text
    with pytest.raises(TrainingError, match="none of personal"):
        chosen_of(house, monkeypatch, Known(fails=True), Known(fails=True))
    with pytest.raises(TrainingError, match="it does not work"):  # of several it is found out one by one
        chosen_of(house, monkeypatch, Known(fails=True), Known(), numbers=(0, 1))


def test_what_is_scored_are_rows_that_were_set_aside(home):
    house = home()
    client = house.client(0)
    rows = client.train_rows
    client.train_rows = Examples(rows, rows.lengths, [i // 3 for i in range(len(rows))])
    found = losses_of(client)
    model, slots = house.bench.model, Sure(1.0, house).places
    there, given = model.flat.detach().clone(), []
    for temperature in TEMPERATURES:
        for slot in slots:
            model.flat.data[slot.start : slot.stop] = there[slot.start : slot.stop] / temperature
        given.append(score(house.bench, client.aside_rows).scores().loss)
    assert found.value() == pytest.approx(min(given), rel=1e-5)
    assert given.index(min(given)) != TEMPERATURES.index(1.0)
    assert len(found.above) == len(client.aside_rows) > len(set(client.aside_rows.units))
