"""Pickers that learn from rows: each tells what its neighbours do not."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_models
import torch
from number_passes import HostPasses, sure

from molehill.decoding import options
from molehill.decoding.interfaces import Example
from molehill.decoding.judging import likelihoods, right
from molehill.errors import AnswerError
from molehill.molora.decode import TorchPasses

CLASSES = 3


def knows(*kinds, by=4.0):
    """An expert that tells the class of texts of some kinds, ``ids[0]`` is the kind and ``ids[1]`` the class."""
    return lambda ids: sure(ids[1] if ids[0] in kinds else (ids[1] + 1) % CLASSES, CLASSES, by)


def row(kind, label, *more, **columns):
    return Example((kind, label, *more), (label,), {key: str(value) for key, value in columns.items()})


def learnt(by, passes, rows, **keys):
    picker = options.build("picker", by, keys)
    picker.learn(passes, rows)
    return picker


def picked(picker, passes, ids, k=1):
    return [passes.experts[place] for place in picker.group(picker.scores(passes, ids), k)]


SPECIALISTS = {"e0": knows(10), "e1": knows(-10), "e2": knows(0, by=2.0)}
DOMAINS = [row(kind, label, expert=name) for kind, name in ((10, "e0"), (-10, "e1")) for label in range(CLASSES)]


# ---- centroid (S19) ----------------------------------------------------------------------------------------------


def test_the_expert_of_the_nearest_domain_is_picked():
    passes = HostPasses(SPECIALISTS)
    picker = learnt("centroid", passes, DOMAINS, score=0.0)
    assert picked(picker, passes, (9, 1)) == ["e0"]
    assert picked(picker, passes, (-9, 1)) == ["e1"]
    # without rows of the best domain another is picked, and who has none never is
    fewer = learnt("centroid", passes, DOMAINS[CLASSES:], score=0.0)
    assert picked(fewer, passes, (9, 1)) == ["e1"]
    assert fewer.scores(passes, (9, 1))[0] == -np.inf
    assert passes.asked == []  # the score was not asked for


def test_what_an_expert_does_to_rows_like_the_text_may_outweigh_its_domain():
    rows = [row(10, 1, expert="e0"), row(10, 2, expert="e0"), row(10, 0, 0, expert="e1")]
    rows = [Example((*each.ids, 0)[:3], each.answer, each.columns) for each in rows]
    passes = HostPasses({"e0": knows(-10), "e1": knows(10)})
    assert picked(learnt("centroid", passes, rows, score=0.0), passes, (10, 2, 0)) == ["e0"]
    both = learnt("centroid", passes, rows)
    assert picked(both, passes, (10, 2, 0)) == ["e1"]
    asked = len(passes.asked)
    both.scores(passes, (10, 2, 0))
    assert len(passes.asked) == asked  # experts are asked about a row once
    near = learnt("centroid", passes, rows, sample=1)
    near.scores(passes, (10, 2, 0))
    assert len(passes.asked) == asked + 2


def test_every_row_names_an_expert():
    with pytest.raises(AnswerError, match="no column 'expert'"):
        learnt("centroid", HostPasses(SPECIALISTS), [row(1, 0)])
    with pytest.raises(AnswerError, match=r"names the expert 'e9' in column 'who'. There are e0, e1, e2"):
        learnt("centroid", HostPasses(SPECIALISTS), [row(1, 0, who="e9")], column="who")
    with pytest.raises(AnswerError, match="no answer to judge experts by"):
        learnt("centroid", HostPasses(SPECIALISTS), [Example((1, 0), (), {"expert": "e0"})]).scores(
            HostPasses(SPECIALISTS), (1, 0)
        )


# ---- classifier (S69) --------------------------------------------------------------------------------------------


def test_a_classifier_of_texts_reaches_who_knows():
    passes = HostPasses(SPECIALISTS)
    rows = [row(kind, label) for kind in (10, 0, -10) for label in range(CLASSES)]
    picker = learnt("classifier", passes, rows)
    told = [picked(picker, passes, (kind, label))[0] for kind in (11, 0, -11) for label in range(CLASSES)]
    assert told == ["e0"] * 3 + ["e2"] * 3 + ["e1"] * 3
    # a table of winners says the same without an expert asked
    named = [row(*each.ids, expert=passes.experts[(10, -10, 0).index(each.ids[0])]) for each in rows]
    del passes.asked[:]
    assert learnt("classifier", passes, named).scores(passes, (9, 1)) == pytest.approx(picker.scores(passes, (9, 1)))
    assert passes.asked == []


def test_a_subject_has_one_expert_and_a_query_its_own():
    rows = [row(kind, 1, expert=name, subject="sums") for kind, name in ((10, "e0"), (12, "e0"), (16, "e1"))]
    rows += [row(-10, 1, expert="e2", subject="words")]
    passes = HostPasses(SPECIALISTS)
    subjects, queries = (learnt("classifier", passes, rows, level=level) for level in ("subject", "query"))
    assert [picked(queries, passes, (kind, 1)) for kind in (10, 17, -10)] == [["e0"], ["e1"], ["e2"]]
    assert [picked(subjects, passes, (kind, 1)) for kind in (10, 17, -10)] == [["e0"], ["e0"], ["e2"]]
    assert subjects.scores(passes, (10, 1)) == pytest.approx([2 / 3, 1 / 3, 0])
    with pytest.raises(AnswerError, match="no column 'subject'"):
        learnt("classifier", passes, [row(1, 1, expert="e0")], level="subject")


def test_an_expert_that_is_never_best_is_not_picked_and_equals_go_by_id():
    passes = HostPasses({"e0": knows(1), "e1": knows(1)})
    scores = learnt("classifier", passes, [row(1, 0), row(1, 1)]).scores(passes, (1, 2))
    assert scores.tolist() == [0.0, -np.inf]


# ---- kshot (S72) -------------------------------------------------------------------------------------------------


def shots(*labels):
    return [row(1, label) for label in labels]


def test_a_blind_guesser_is_not_picked():
    """It is right as often, and unsure."""
    passes = HostPasses({"e0": knows(1, by=0.1), "e1": knows(1, by=5.0), "e2": knows(2)})
    picker = learnt("kshot", passes, shots(0, 1, 2))
    assert picked(picker, passes, (7, 7)) == ["e1"]
    assert picker.scores(passes, (7, 7)).tolist() == [-1, 0, -3]


def test_the_group_of_equals_that_are_least_alike():
    alike = np.array([[9, 5, 4, 3], [5, 9, 2, -0.0], [4, 2, 9, 1], [3, 0, 1, 9]])
    passes = HostPasses(dict.fromkeys(["e0", "e1", "e2", "e3"], knows(1)), alike=alike)
    picker = learnt("kshot", passes, shots(0, 2))
    assert picked(picker, passes, (1, 1), 2) == ["e1", "e3"]
    assert picked(picker, passes, (1, 1), 3) == ["e1", "e2", "e3"]
    assert picked(picker, passes, (1, 1), 1) == ["e0"]
    assert picked(learnt("kshot", passes, shots(0, 2), pool=2), passes, (1, 1), 2) == ["e0", "e1"]


def test_good_experts_go_before_different_ones():
    """Algorithm 1: ranks by perplexity, accuracy and likeness are added up."""
    good, bad = knows(1), knows(2)
    alike = np.array([[9, 3, 2, 2], [3, 9, 2, 2], [2, 2, 9, 1], [2, 2, 1, 9]])
    passes = HostPasses({"e0": good, "e1": good, "e2": bad, "e3": bad}, alike=alike)
    picker = learnt("kshot", passes, shots(0, 1, 2))
    assert picked(picker, passes, (1, 1), 2) == ["e0", "e1"]  # 0 and 2, before 2 and 1, before 4 and 0


def test_too_many_groups_are_refused():
    passes = HostPasses({f"e{n}": knows(1) for n in range(30)})
    with pytest.raises(AnswerError, match="30 experts have 142506 groups of 5"):
        picked(learnt("kshot", passes, shots(0), pool=30), passes, (1, 1), 5)


def test_how_alike_experts_of_a_model_are():
    model = tiny_models.shake(tiny_models.adapted("llama", experts=3, rank=2))
    before = TorchPasses(model).likeness()
    tensors = 2 * len(model.sites)  # A and B of every site
    assert np.diag(before) == pytest.approx([tensors] * 3, rel=1e-5)
    assert (before == before.T).all()
    assert before[0, 1] < tensors / 2
    tree = model.tree(lambda key: key.expert == "e0")
    with torch.no_grad():
        model.load({key._replace(expert="e1"): -2 * value for key, value in tree.items()})
    after = TorchPasses(model).likeness()
    assert after[0, 1] == pytest.approx(tensors, rel=1e-5)
    assert after[0, 2] == pytest.approx(before[0, 2], rel=1e-5)


def test_answers_of_several_tokens_are_judged_as_the_model_would_write_them():
    model = tiny_models.separate(tiny_models.shake(tiny_models.adapted("llama", experts=2, rank=2)), 4.0)
    passes, ids = TorchPasses(model), [5, 9, 14]
    one = passes.only(["e1"])
    first = int(passes.logits(ids, one, "a").argmax())
    second = int(passes.logits([*ids, first], one, "a").argmax())
    assert right(passes, Example(tuple(ids), (first, second)), one)
    assert not right(passes, Example(tuple(ids), (first, (second + 1) % passes.answers)), one)
    wanted = np.exp(-passes.losses([*ids, first, second], one)[-2:].mean())
    assert likelihoods(passes, [Example(tuple(ids), (first, second))])[0, 1] == pytest.approx(wanted, rel=1e-5)


# ---- tree (S170) -------------------------------------------------------------------------------------------------


def judged(rows, experts=("e0", "e1")):
    """Feedback on every expert: rows of kinds, and who was right."""
    return [
        row(kind, n % CLASSES, expert=name, value=name == best)
        for n, (kind, best) in enumerate(rows)
        for name in experts
    ]


def test_two_regions_with_opposite_experts_beat_one():
    passes = HostPasses({"e0": knows(1), "e1": knows(2)})
    rows = judged([(-8, "e0"), (7, "e1"), (-9, "e0"), (8, "e1"), (-10, "e0"), (10, "e1"), (-7, "e0"), (9, "e1")])
    picker = learnt("tree", passes, rows)
    assert picker.leaves == 2
    assert [picked(picker, passes, (kind, 1))[0] for kind in (-100, -1, 1, 100)] == ["e0", "e0", "e1", "e1"]
    assert passes.asked == []  # what people said was enough
    flat = learnt("tree", passes, rows, split=len(rows) + 1)  # one aggregator
    assert flat.leaves == 1
    assert flat.scores(passes, (-8, 1)) == pytest.approx([0.5, 0.5])
    assert picker.scores(passes, (-8, 1)) == pytest.approx([0.9, 0.1])  # four of five, and one even one


def test_one_region_is_never_split():
    rows = judged([(kind, "e1") for kind in (-8, 7, -9, 8, -10, 10, -7, 9)])
    passes = HostPasses({"e0": knows(1), "e1": knows(2)})
    picker = learnt("tree", passes, rows)
    assert picker.leaves == 1
    assert picked(picker, passes, (3, 1)) == ["e1"]


def test_a_model_that_is_replayed_chooses_before_it_sees():
    passes = HostPasses({"e0": knows(1), "e1": knows(2)})
    picker = learnt("tree", passes, judged([(1, "e0")] * 3))
    # each expert was judged every second time: once a guess among two, then twice what it knows
    assert picker._replayed(np.arange(6)) == pytest.approx(2 * 0.5 * (0.5 + 1 + 1))


def test_rows_without_judgement_are_tried():
    passes = HostPasses({"e0": knows(10, 9), "e1": knows(-10, -9)})
    rows = [row(kind, label) for label in range(CLASSES) for kind in (10, -10, 9, -9)]
    picker = learnt("tree", passes, rows)
    assert [picked(picker, passes, (kind, 1))[0] for kind in (8, -8)] == ["e0", "e1"]


def test_a_judgement_weighs_by_how_seldom_its_expert_was_judged():
    passes = HostPasses({"e0": knows(1), "e1": knows(2)})
    picker = learnt("tree", passes, [row(1, 1, expert=name, value=1) for name in ("e0", "e0", "e0", "e1")])
    assert picker._seen.sum(0).tolist() == [4.0, 4.0]


@pytest.mark.parametrize("value", ["good", "2", "-1", "nan"])
def test_a_judgement_is_from_0_to_1(value):
    with pytest.raises(AnswerError, match=f"a row has the value '{value}'"):
        learnt("tree", HostPasses(SPECIALISTS), [row(1, 1, expert="e0", value=value)])
