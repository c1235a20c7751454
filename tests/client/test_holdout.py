"""Rows that the rounds never see: which they are, that no round trains on them, and who is told of them."""

from __future__ import annotations

import numpy as np
import pytest

from molehill_client import participant
from molehill_client.folds import holdout, strata_of, strata_of_rows
from molehill_client.together import train_together


def classes(labels):
    return strata_of(np.array(labels), np.arange(len(labels)), len(labels))


def seen_in(monkeypatch, work):
    """Inputs of all batches that are made meanwhile."""
    made, batches = set(), participant.Batches.__iter__

    def spy(self):
        for batch in batches(self):
            lengths = batch.attention_mask.sum(1)
            made.update(tuple(ids[:n]) for ids, n in zip(batch.input_ids.tolist(), lengths, strict=True))
            yield batch

    with monkeypatch.context() as during:
        during.setattr(participant.Batches, "__iter__", spy)
        work()
    return made


def inputs(rows):
    return {tuple(row.input_ids) for row in rows}


def test_units_stay_whole_and_every_class_gives_its_part():
    labels = [0] * 50 + [1] * 40 + [2] * 10
    chosen = holdout(range(100), classes(labels), 0.2, seed=1)
    assert np.bincount(np.array(labels)[chosen]).tolist() == [10, 8, 2]
    units = np.repeat(np.arange(20), 5)
    chosen = holdout(units, classes([0] * 100), 0.3, seed=1)
    assert chosen.sum() == 30
    assert all(len(set(chosen[units == unit])) == 1 for unit in units)
    assert not (holdout(units, classes([0] * 100), 0.3, seed=2) == chosen).all()


@pytest.mark.parametrize("rows", [0, 1, 9])
def test_too_few_units_give_nothing(rows):
    assert not holdout(range(rows), classes([0] * rows), 0.2, seed=0).any()
    assert not holdout([*range(rows)] * 5, classes([0] * rows * 5), 0.2, seed=0).any()


def test_the_largest_unit_stays_in_the_rounds():
    chosen = holdout([0] * 200 + list(range(1, 10)), classes([0] * 200 + [1] * 9), 0.2, seed=0)
    assert not chosen[:200].any()
    assert 0 < chosen[200:].sum() < 9


def test_a_class_that_would_be_gone_keeps_all_in_the_rounds():
    # Two units have one class each, and are too large to be on one side.
    units = [0] * 10 + [1] * 10 + list(range(2, 10))
    strata = np.zeros((28, 2))
    strata[:10, 0], strata[10:20, 1] = 1, 1
    assert not holdout(units, strata, 0.5, seed=0).any()
    assert holdout(units, strata[:, :0], 0.5, seed=0).any()


def test_rows_hold_what_their_labels_say(house):
    rows = house().client(0).train_rows
    assert (strata_of_rows(rows, "row").argmax(1) == [row.labels for row in rows]).all()
    assert strata_of_rows(rows, None).shape == (len(rows), 0)


def test_no_round_sees_what_is_set_aside(house, monkeypatch):
    home = house(personal={"holdout": 0.25}, train={"steps": 12})
    clients, plans = [home.client(n) for n in range(2)], [home.plan(n) for n in range(2)]
    aside = [inputs(client.aside_rows) for client in clients]
    assert [len(some) for some in aside] == [3, 4]
    replies = []
    seen = seen_in(monkeypatch, lambda: replies.extend(train_together(clients, plans)))
    for client, some, reply in zip(clients, aside, replies, strict=True):
        assert inputs(client.round_rows) <= seen
        assert not some & seen
        assert sorted(some | inputs(client.round_rows)) == sorted(inputs(client.train_rows))
        hello = client.hello()
        assert reply.examples == hello.n_train == len(client.round_rows) == len(client.train_rows) - len(some)
        assert hello.aside == len(some)
    # What is fitted after the rounds, and what is trained alone, has them all.
    assert inputs(clients[0].train_rows) <= seen_in(monkeypatch, lambda: clients[0].baseline(home.plan(0, 0)))
    home.bench.config.personal.__dict__["steps"] = 12
    assert inputs(clients[0].train_rows) <= seen_in(monkeypatch, lambda: clients[0].evaluate(plans[0]))


def test_the_same_rows_are_set_aside_again(house):
    first, again = (house(personal={"holdout": 0.25}).client(0) for _ in range(2))
    assert inputs(first.aside_rows) == inputs(again.aside_rows)
    other = house(personal={"holdout": 0.25}, run={"seed": 3}).client(0)
    assert inputs(other.aside_rows) != inputs(first.aside_rows)


def test_who_has_too_few_rows_says_so(house, caplog):
    home = house(personal={"holdout": 0.25})
    client = home.client(0)
    client.train_rows = client.train_rows.part(range(7))
    assert client.hello().aside == 0
    assert len(client.round_rows) == 7
    assert "client-1 has too few training rows to set any aside" in caplog.text
