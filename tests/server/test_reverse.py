"""Experts that choose their clients."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from toy_federation import BASE, LEANS, REVERSE, SITE, config, initial

from molehill import evidence, registry
from molehill.errors import MessageError
from molehill.plan import ClientReply
from molehill.wire.keys import Key
from molehill.wire.tree import Tree
from molehill_server.check import check
from molehill_server.planning.assigning import Leaning, Seen, embedded
from molehill_server.planning.assignments.reverse import ReverseParams, choose, fits
from molehill_server.planning.planner import Planner
from molehill_server.validation import parse_reply, require_embeddings

EXPERTS = ("e0", "e1", "e2", "e3")
HEAD = Key("head", "-", "head.weight")


def told(rng, clients=5, experts=6, rank=4, site="s"):
    """Embeddings of some clients, of which each had half of the experts."""
    found = {}
    for n in range(clients):
        values = rng.normal(size=(1 + experts, rank)).astype(np.float32)
        values[1 + rng.permutation(experts)[: experts // 2]] = 0
        found[f"c{n}"] = Tree.of({Key(site, "-", "gate.embeddings"): values})
    return found


def reverse(changes, number=1, **values):
    ids = tuple(f"e{n}" for n in range(6))
    state = Seen(number, 4, changes, dict.fromkeys(changes, 10), {}, ids, 3)
    return registry.build("assignment", "reverse", values).assign(state)


@pytest.mark.parametrize(("experts", "clients"), [(30, 10), (6, 3), (4, 9), (3, 1), (2, 2)])
def test_the_choice_is_within_its_bounds_and_no_other_is_better(experts, clients):
    rng = np.random.default_rng(experts)
    fit = rng.random((experts, clients))
    chosen = choose(fit, ReverseParams())
    places = 2 if clients > 1 else 1
    assert (chosen.sum(1) == places).all()
    if clients * 2 <= experts * places <= clients * 8:
        assert chosen.sum(0).min() >= 2
        assert chosen.sum(0).max() <= 8
    for _ in range(200):  # two experts trade a client each, which keeps all sums
        one, two = rng.integers(experts, size=2)
        mine, yours = chosen[one] & ~chosen[two], chosen[two] & ~chosen[one]
        if mine.any() and yours.any():
            a, b = rng.choice(np.flatnonzero(mine)), rng.choice(np.flatnonzero(yours))
            assert fit[one, a] + fit[two, b] >= fit[one, b] + fit[two, a] - 1e-9


def test_experts_fit_clients_by_a_softmax_over_these_at_every_site():
    rng = np.random.default_rng(0)
    one, two = told(rng), told(rng, site="t")
    both = [Tree.of({**one[name], **two[name]}) for name in one]
    expected = np.zeros((6, 5))
    for trees in (one, two):
        values = [next(iter(trees[name].values())).astype(float) for name in one]
        for e in range(6):
            had = [value[1 + e] for value in values if value[1 + e].any()]
            z = [np.mean(had, axis=0) @ value[0] / 2 if had else 0.0 for value in values]
            expected[e] += np.exp(z) / np.exp(z).sum() / 2
    np.testing.assert_allclose(fits(both), expected, rtol=1e-5)


def test_clients_under_other_names_get_the_same_experts():
    changes = told(np.random.default_rng(1))
    names = dict(zip(sorted(changes), ("z", "y", "k", "b", "a"), strict=True))
    found, renamed = reverse(changes), reverse({names[name]: tree for name, tree in changes.items()})
    assert {names[name]: leaning for name, leaning in found.items()} == renamed
    assert len(set(map(repr, found.values()))) > 1


def test_who_has_an_expert_trains_it_and_nothing_is_left_of_others():
    changes = told(np.random.default_rng(1))
    found = reverse(changes)
    for leaning in found.values():
        assert {expert for expert, bias in leaning.bias.items() if bias == 0} == leaning.trains
        assert {bias for expert, bias in leaning.bias.items() if expert not in leaning.trains} == {-100.0}
        assert len(leaning.bias) == 6  # or what was shut before would stay so
    assert reverse(changes, number=4) == {}  # what is scored is what was trained
    rows = Seen(0, 4, {}, dict.fromkeys(changes, 10), {}, ("e0", "e1", "e2", "e3", "e4", "e5"), 3)
    assign = registry.build("assignment", "reverse")
    assert assign.assign(rows).keys() == changes.keys()
    assert assign.assign(rows) != assign.assign(replace(rows, seed=4))


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ({"privacy": {"secure_aggregation": True}}, "privacy.secure_aggregation"),
        ({"privacy": {"clip": 1.0, "noise": 4.0, "epsilon": 8.0, "delta": 1e-3}}, "privacy.clip"),
        ({"molora": {"scorer": "leaning"}}, "molora.scorer"),
        ({"personal": {"gate": "global"}}, "personal.gate"),
    ],
)
def test_embeddings_where_they_cannot_be_are_refused(more, key):
    refused = [each for each in check(config(**{**REVERSE, **more})) if each.verdict == "refuse"]
    assert ("federation.assign", key) in [each.keys for each in refused]
    assert not [each for each in check(config(**REVERSE)) if each.verdict == "refuse"]
    private = config(**{**REVERSE, "privacy": {"secure_aggregation": True}})
    assert evidence.embedded(config(**REVERSE)) > evidence.embedded(private) == evidence.embedded(config(**LEANS))


def test_a_scorer_that_reads_experts_needs_low_rank_ones():
    for other in ({"expert": "bottleneck"}, {"allocation": "hetero_rank"}):
        refused = check(config(**{**REVERSE, "molora": {**REVERSE["molora"], **other}}))
        assert "molora.scorer" in {key for each in refused if each.verdict == "refuse" for key in each.keys}


ROWS = {"-": [1.0, 2.0, 3.0], "e0": [0.5] * 3}


@pytest.mark.parametrize(
    ("embeddings", "fits_in"),
    [
        ({SITE: ROWS}, True),
        ({}, False),
        ({SITE: ROWS, "elsewhere": ROWS}, False),
        ({SITE: {**ROWS, "e1": [0.5] * 3}}, False),  # which its plan does not let it train
        ({SITE: {"e0": [0.5] * 3}}, False),
        ({SITE: {**ROWS, "e0": [0.5] * 4}}, False),
    ],
)
def test_embeddings_that_this_model_cannot_have_are_refused(embeddings, fits_in):
    layout = initial().layout
    plan = Planner(config(), BASE).plan("c00", 1, layout, {}, 0, leaning=Leaning({}, frozenset({"e0"})))
    values = {"client": "c00", "round": 1, "delta": "", "bytes_up": 0, "bytes_down": 0, "examples": 1, "loss": 0.0}
    reply = ClientReply(**values, seconds=0, embeddings=embeddings)
    if fits_in:
        require_embeddings(reply, plan, layout, asked=True)
    else:
        with pytest.raises(MessageError, match="embeddings"):
            require_embeddings(reply, plan, layout, asked=True)
    if embeddings:
        with pytest.raises(MessageError, match="not of 0"):
            require_embeddings(reply, plan, layout, asked=False)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e31"])
def test_embeddings_are_finite(number):
    text = '{"client": "c", "round": 1, "delta": "", "bytes_up": 0, "bytes_down": 0, "examples": 1, "loss": 0, '
    text += f'"seconds": 0, "embeddings": {{"s": {{"-": [{number}]}}}}}}'
    with pytest.raises(MessageError, match="embeddings"):
        parse_reply(text)


def test_what_is_told_has_one_shape_for_all_clients():
    tree = embedded({"s": {"e1": [3.0, 4.0], "-": [1.0, 2.0]}}, ["e0", "e1"])
    assert tree[Key("s", "-", "gate.embeddings")].tolist() == [[1, 2], [0, 0], [3, 4]]
