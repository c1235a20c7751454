"""A net over what all experts say (S130)."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_models
from number_passes import HostPasses, NumberPasses, sure

from molehill.decoding import options
from molehill.decoding.interfaces import Example
from molehill.errors import AnswerError
from molehill.molora.decode import TorchPasses

CLASSES = 3


def fuse(**keys):
    return options.build("decoding", "fuse_outputs", {"rows": "a", **keys})


def fitted(passes, rows, **keys):
    strategy = fuse(**keys)
    strategy.learn(passes, rows)
    return strategy


def told(strategy, passes, ids):
    return strategy.begin(passes, ids)(ids)


def wrong(by):
    """An expert that is never right: it says another class, sure to a degree that depends on the text."""
    return lambda ids: sure((ids[0] + by) % CLASSES, CLASSES, 2.0 + ids[1] / 10)


def rows(n=30):
    return [Example((label, noise), (label,)) for noise in range(n // CLASSES) for label in range(CLASSES)]


ALWAYS_WRONG = {"e0": wrong(1), "e1": wrong(2)}
NEW = [(label, noise) for noise in (-3, 14) for label in range(CLASSES)]


def test_it_is_right_where_every_expert_is_wrong():
    passes = NumberPasses(ALWAYS_WRONG)
    strategy = fitted(passes, rows())
    for ids in NEW:
        assert all(passes.logits(ids, passes.only([name])).argmax() != ids[0] for name in passes.experts)
        assert passes.logits(ids).argmax() != ids[0]  # nor is their mean
        assert told(strategy, passes, ids).argmax() == ids[0]
    assert (told(fitted(passes, rows()), passes, NEW[0]) == told(strategy, passes, NEW[0])).all()
    assert (told(fitted(passes, rows(), seed=1), passes, NEW[0]) != told(strategy, passes, NEW[0])).any()


def test_it_is_no_sum_of_what_experts_say():
    passes = NumberPasses({"e0": lambda ids: sure(ids[0], 2), "e1": lambda ids: sure(ids[1], 2)})
    either = [(a, b) for a in range(2) for b in range(2)]
    strategy = fitted(passes, [Example(ids, (int(ids[0] != ids[1]),)) for ids in either * 8])
    assert [told(strategy, passes, ids).argmax() for ids in either] == [0, 1, 1, 0]


def half(knows):
    """An expert that is sure and right about its own domain ``ids[1]``, and knows nothing of others."""
    return lambda ids: sure(ids[0], CLASSES, 5.0) if ids[1] == knows else np.array([0.3, 0.0, 0.1])


DOMAINS = {name: half(n) for n, name in enumerate(("e0", "e1", "e2"))}
DEALT = [Example((label, n % 3), (label,)) for n in range(27) for label in range(CLASSES)]


def test_with_an_expert_for_each_domain_it_is_as_good_as_who_knows():
    passes = NumberPasses(DOMAINS)
    strategy = fitted(passes, DEALT)
    assert all(told(strategy, passes, (label, n)).argmax() == label for n in range(3) for label in range(CLASSES))


def test_frugal_asks_no_more_than_it_has_to():
    passes = NumberPasses(DOMAINS)
    whole, frugal, never = (fitted(passes, DEALT, risk=risk) for risk in (0.0, 0.2, 1e-9))
    for domain in range(3):
        for label in range(CLASSES):
            del passes.asked[:]
            assert told(frugal, passes, (label, domain)).argmax() == label
            assert len(passes.asked) == domain + 1  # until who knows was asked, of equals the first
    del passes.asked[:]
    assert (told(whole, passes, (1, 0)) == told(fitted(passes, DEALT), passes, (1, 0))).all()
    assert passes.asked[:3] == [("e0",), ("e1",), ("e2",)]
    assert told(never, passes, (1, 0)).argmax() == 1


def test_a_row_is_not_its_own_neighbour():
    passes = NumberPasses({"e0": lambda ids: np.zeros(CLASSES), "e1": lambda ids: np.zeros(CLASSES)})
    strategy = fitted(passes, [Example((0, 0), (0,)), Example((0, 0), (1,))], neighbours=1)
    assert strategy._mistaken([0]).tolist() == [True, True]


def test_all_that_is_asked_is_asked_once():
    passes = NumberPasses(ALWAYS_WRONG)
    strategy = fitted(passes, [*rows(), *(Example((0, n), (n % CLASSES,)) for n in range(9))], risk=1e-9)
    del passes.asked[:]
    told(strategy, passes, (0, 4))
    assert sorted(passes.asked) == [("e0",), ("e1",)]


def test_what_a_text_is_like_may_be_read_as_well():
    """Experts that always say the same tell nothing."""
    same = dict.fromkeys(["e0", "e1"], lambda ids: np.zeros(CLASSES))
    passes = HostPasses(same)
    assert told(fitted(passes, rows(), inputs="both"), passes, (2, 5)).argmax() == 2
    blind = {int(told(fitted(passes, rows()), passes, ids).argmax()) for ids in NEW}
    assert len(blind) == 1
    with pytest.raises(AnswerError, match="known only where the model was trained"):
        fitted(NumberPasses(same), rows(), inputs="both")


def test_one_expert_is_fused_with_nobody():
    passes = NumberPasses({"e0": lambda ids: sure(ids[0], CLASSES)})
    for risk in (0.0, 0.5):
        strategy = fitted(passes, rows(), risk=risk)
        assert all(told(strategy, passes, ids).argmax() == passes.logits(ids).argmax() for ids in NEW)


def test_a_model_that_classifies():
    model = tiny_models.shake(tiny_models.adapted("bert", experts=3, rank=2))
    passes = TorchPasses(model)
    some = [Example((5 + n, 9, 3 + n % 4), (n % CLASSES,)) for n in range(12)]
    found = told(fitted(passes, some, risk=0.3), passes, [7, 9, 5])
    assert found.shape == (CLASSES,)
    assert np.isfinite(found).any()


def test_what_it_is_fitted_to():
    with pytest.raises(AnswerError, match=r"fitted to labelled rows. Add --set rows=FILE"):
        fuse(rows="").begin(NumberPasses(DOMAINS), [1])
    with pytest.raises(AnswerError, match="no answer to judge"):
        fitted(NumberPasses(DOMAINS), [Example((1, 2))])
    with pytest.raises(AnswerError, match="no rows to learn from"):
        fitted(NumberPasses(DOMAINS), [])
